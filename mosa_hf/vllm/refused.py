"""Models that are not served, by name: else vLLM might fall back on something that computes otherwise."""

from collections.abc import Callable

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from vllm import ModelRegistry


class RefusedModel(nn.Module):
    """What vLLM takes for a model until it makes one."""

    reason: str

    def __init__(self, *, vllm_config, prefix: str = ""):
        raise ValueError(self.reason)

    def embed_input_ids(self, input_ids):
        raise ValueError(self.reason)

    def forward(self, input_ids, positions):
        raise ValueError(self.reason)

    def compute_logits(self, hidden_states):
        raise ValueError(self.reason)


def register(reason: Callable[[str], str]) -> list[type[RefusedModel]]:
    """
    Register every converted model that vLLM does not know yet as one that says why.

    Args:
        reason: of the name of a model class.
    """
    known = set(ModelRegistry.get_supported_archs())
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = {name for table in tables for name in table.values() if isinstance(name, str)} | known
    classes = []
    for name in sorted({each if each.startswith("Mosa") else f"Mosa{each}" for each in names} - known):
        classes.append(type(name, (RefusedModel,), {"__module__": __name__, "reason": reason(name)}))
        ModelRegistry.register_model(name, classes[-1])
    return classes
