"""
The families whose attention can have sparse groups. **To add one, add a row to `ROWS`**: its model type, and the
prefix of its class names in Transformers. Everything else about a family (projections, norms, rotary embeddings,
experts, multipliers) is its own code.

A row `("qwen3", "Qwen3")` makes `MosaQwen3Config`, `MosaQwen3Model`, `MosaQwen3ForCausalLM` and a class for each other
head, model type "mosa_qwen3". They are attributes of this module.
"""

from importlib import import_module
from types import ModuleType
from typing import cast

from huggingface_hub.dataclasses import strict
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import PreTrainedModel

from .configuration import SparseGroupsConfig
from .family import FAMILIES, Family
from .generation import MosaGenerationMixin
from .router_files import RouterFilesMixin
from .sparse_groups import SparseGroupsMixin
from .sparse_models import SparseModelMixin, SparsePreTrainedMixin

CLASSES: dict[str, type] = {}  # every class that the rows below make, by name
HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# Model type, prefix of the classes' names, and where a name does not follow from those: its file, or the name itself;
# the attention module's output projection, where that is not `o_proj`.
ROWS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("cohere2", "Cohere2", {}),
    ("gemma2", "Gemma2", {}),
    (
        "gemma3_text",
        "Gemma3Text",
        {
            "file": "gemma3",
            "PreTrainedModel": "Gemma3PreTrainedModel",
            "Attention": "Gemma3Attention",
            "ForCausalLM": "Gemma3ForCausalLM",
        },
    ),
    ("gpt_neox", "GPTNeoX", {"output_projection": "dense"}),
    ("gpt_oss", "GptOss", {}),
    ("granite", "Granite", {}),
    ("llama", "Llama", {}),
    ("mistral", "Mistral", {}),
    ("mixtral", "Mixtral", {}),
    ("olmo2", "Olmo2", {}),
    ("olmoe", "Olmoe", {}),
    ("phi3", "Phi3", {}),
    ("qwen2", "Qwen2", {}),
    ("qwen3", "Qwen3", {}),
    ("qwen3_moe", "Qwen3Moe", {}),
    ("smollm3", "SmolLM3", {}),
    ("starcoder2", "Starcoder2", {}),
)


def _class(name: str, bases: tuple[type, ...], **attributes) -> type:
    """A class of this module."""
    made = type(name, bases, {"__module__": __name__, "__qualname__": name, **attributes})
    CLASSES[name] = globals()[name] = made
    return made


def _recordable(base: type[PreTrainedModel]) -> dict:
    """What `output_hidden_states` and the like can record: all but attention weights, which sparse groups lack."""
    return {name: what for name, what in (base._can_record_outputs or {}).items() if name != "attentions"}


def _family(name: str, prefix: str, names: dict[str, str]) -> Family:
    """The classes of a row."""
    file = names.get("file", name)
    modeling: ModuleType = import_module(f"transformers.models.{file}.modeling_{file}")
    configuration: ModuleType = import_module(f"transformers.models.{file}.configuration_{file}")

    def base(suffix: str) -> type:
        return getattr(modeling, names.get(suffix, prefix + suffix))

    base_config = getattr(configuration, f"{prefix}Config")
    config_class: type[SparseGroupsConfig] = strict(
        _class(
            f"Mosa{prefix}Config",
            (SparseGroupsConfig, base_config),
            model_type=f"mosa_{name}",
            __doc__=f"`{base_config.__name__}` with the fields of `SparseGroupsConfig`.",
            __annotations__={},
        )
    )
    family = Family(
        name,
        base_config,
        base("Attention"),
        base("Model"),
        config_class,
        _class(f"Mosa{prefix}Attention", (SparseGroupsMixin, base("Attention"))),
        _class(
            f"Mosa{prefix}Model",
            (RouterFilesMixin, SparseModelMixin, base("Model")),
            config_class=config_class,
            attention_class=base("Attention"),
            _can_record_outputs=_recordable(base("Model")),
        ),
        output_projection=names.get("output_projection", "o_proj"),
    )
    cast(type[SparsePreTrainedMixin], family.model_class).family = family
    for head in HEADS:
        mixins: tuple[type, ...] = (RouterFilesMixin, SparsePreTrainedMixin)
        if head == "ForCausalLM":
            mixins = (MosaGenerationMixin, RouterFilesMixin, SparsePreTrainedMixin)
        if hasattr(modeling, names.get(head, prefix + head)):
            family.base_head_classes[head] = base(head)
            bases = (*mixins, base(head))
        elif head == "ForSequenceClassification":
            bases = (*mixins, GenericForSequenceClassification, base("PreTrainedModel"))
        else:
            continue
        recordable = _recordable(base("PreTrainedModel"))
        made = _class(
            f"Mosa{prefix}{head}", bases, config_class=config_class, family=family, _can_record_outputs=recordable
        )
        family.head_classes[head] = made
    return family


FAMILIES.update((name, _family(name, prefix, names)) for name, prefix, names in ROWS)
