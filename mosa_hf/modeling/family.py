"""What a family of models is to this package, and which there are: `families` makes them."""

from dataclasses import dataclass, field

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration import SparseGroupsConfig


@dataclass(frozen=True)
class Family:
    """The classes of one family: the base's, and with sparse groups."""

    name: str  # model type of the base
    base_config_class: type[PreTrainedConfig]
    base_attention_class: type[nn.Module]
    base_model_class: type[PreTrainedModel]
    config_class: type[SparseGroupsConfig]
    attention_class: type[nn.Module]
    model_class: type[PreTrainedModel]
    base_head_classes: dict[str, type[PreTrainedModel]] = field(default_factory=dict)  # "ForCausalLM" → class
    head_classes: dict[str, type[PreTrainedModel]] = field(default_factory=dict)
    output_projection: str = "o_proj"  # of the attention module

    @property
    def causal_lm_class(self) -> type[PreTrainedModel]:
        return self.head_classes["ForCausalLM"]

    def pairs(self) -> list[tuple[type[PreTrainedModel], type[PreTrainedModel]]]:
        """The base's model classes, each with the class with sparse groups."""
        heads = [(self.base_head_classes[name], self.head_classes[name]) for name in self.base_head_classes]
        return [(self.base_model_class, self.model_class), *heads]

    def sparse_class_of(self, base_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """
        Raises:
            ValueError: for a class that has no counterpart with sparse groups.
        """
        for base, sparse in self.pairs():
            if base is base_class:
                return sparse
        raise ValueError(
            f"{base_class.__name__} has no MoSA class; of family {self.name!r} these have: "
            f"{', '.join(base.__name__ for base, _ in self.pairs())}. Pass a model without what may be around it: "
            "adapters (`merge_and_unload()` first), `torch.compile`."
        )

    def base_class_of(self, sparse_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """
        Raises:
            ValueError: for a class that has no counterpart in the base family.
        """
        for base, sparse in self.pairs():
            if sparse is sparse_class:
                return base
        raise ValueError(f"{sparse_class.__name__} has no counterpart in Transformers' family {self.name!r}.")


FAMILIES: dict[str, Family] = {}  # by the base's model type


def family_of(model_type: str) -> Family:
    """
    The family of a base model's type.

    Raises:
        ValueError: for a family that has no row.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"Models of type {model_type!r} cannot have sparse groups; supported: {', '.join(FAMILIES)}. A decoder "
            "family of Transformers is added as a row of `mosa_hf/modeling/families.py`."
        )
    return FAMILIES[model_type]
