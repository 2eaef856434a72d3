"""What a family of models is to this package. `families` makes each of them when it is first asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

PREFIX = "mosa_"  # of model types


@dataclass(frozen=True)
class Family:
    """The classes of one family: the base's, and with sparse groups."""

    name: str  # model type of the base
    base_config_class: type[PreTrainedConfig]
    base_model_class: type[PreTrainedModel]
    config_class: type[Any]  # `SparseGroupsConfig` and the base's; of a model around a decoder, `MultimodalConfig`
    model_class: type[PreTrainedModel]
    base_head_classes: dict[str, type[PreTrainedModel]] = field(default_factory=dict)  # "ForCausalLM" → class
    head_classes: dict[str, type[PreTrainedModel]] = field(default_factory=dict)
    # The decoder's, where the base model is but a wrapper around it (OPT): base → with sparse groups.
    inner_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = field(default_factory=dict)

    def pairs(self) -> list[tuple[type[PreTrainedModel], type[PreTrainedModel]]]:
        """The base's model classes, each with the class with sparse groups."""
        heads = [(self.base_head_classes[name], self.head_classes[name]) for name in self.base_head_classes]
        return [(self.base_model_class, self.model_class), *heads, *self.inner_classes.items()]

    def classes(self) -> list[type[PreTrainedModel]]:
        """All model classes with sparse groups."""
        return [self.model_class, *self.head_classes.values(), *self.inner_classes.values()]

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


class Families(dict[str, Family]):
    """Model type of a base → its family, which is made when it is first asked for."""

    make: Callable[[str], Family]  # `registration` sets it
    lock = RLock()  # two threads would make two, of different classes

    def __missing__(self, model_type: str) -> Family:
        with self.lock:
            if model_type not in self:
                self.setdefault(model_type, self.make(model_type))
            return self[model_type]


FAMILIES = Families()  # those that were asked for so far


def family_of(model_type: str) -> Family:
    """
    The family of a base model's type.

    Raises:
        ValueError: for a type that is no decoder of Transformers whose attention can have sparse groups.
    """
    return FAMILIES[model_type]
