"""
Models around a decoder: of pictures and text, of sound and text. Their language model gets sparse groups, and all else
about them is their own code.

`MosaLlavaConfig`, `MosaLlavaModel`, `MosaLlavaForConditionalGeneration`, of model type "mosa_llava", are the classes
of "llava" with mixins before them. The config's `text_config` is the decoder's own, such as a `MosaLlamaConfig`; which
decoder that is, the config says, not the class. They are made when they are first asked for, as `families` makes those
of decoders.
"""

import copy
import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from ..routing.mask import NotCausal
from . import families
from .configuration import SparseGroupsConfig, base_config_class, fields_of, is_composite, sparse_config_of
from .family import PREFIX, Family, family_of
from .generation import MosaGenerationMixin
from .remote_code import InstalledCodeConfigMixin
from .router_files import RouterFilesMixin
from .sparse_models import SparsePreTrainedMixin

HEADS = {
    "ForConditionalGeneration": {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    },
    **families.HEADS,
}
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # arguments that say which tokens are of a picture

if TYPE_CHECKING:  # what the mixin relies on
    ConfigBase = PreTrainedConfig
else:
    ConfigBase = object


class MultimodalConfig(InstalledCodeConfigMixin, ConfigBase):
    """Before the config of a model around a decoder, whose `text_config` is a `SparseGroupsConfig`."""

    text_config: Any

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            text = base_config_class(type(self))().text_config
            self.text_config = family_of(text.model_type).config_class.from_base(text)
        elif isinstance(self.text_config, dict):
            own = type(self).sub_configs["text_config"]
            fixed = issubclass(own, PreTrainedConfig)  # else what the dict names
            self.text_config = (own if fixed else CONFIG_MAPPING[self.text_config["model_type"]])(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_base(cls, config: PreTrainedConfig, **fields) -> "MultimodalConfig":
        """
        The configuration of a base model with sparse groups in its decoder.

        Args:
            config: of the base model.
            fields: `mosa_*` fields.

        Raises:
            ValueError: for a decoder that cannot have sparse groups, and see `SparseGroupsConfig.from_base`.
        """
        text = family_of(config.text_config.model_type).config_class.from_base(config.text_config, **fields)
        return _with_text(cls, config, text)

    def to_base(self) -> PreTrainedConfig:
        """The configuration of the base model."""
        return _with_text(base_config_class(type(self)), self, self.text_config.to_base())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`; `mosa_*` fields of `kwargs` are the `text_config`'s."""
        fields = {name: kwargs.pop(name) for name in [*kwargs] if name.startswith("mosa_")}
        text = config_dict.get("text_config")
        if fields and isinstance(text, dict):
            config_dict = {**config_dict, "text_config": {**text, **fields}}
        result = super().from_dict(config_dict, **kwargs)
        own = sparse_config_of(result[0] if isinstance(result, tuple) else result)
        own.fit_layers()
        own.check_read(fields)
        if isinstance(text, dict):
            own.warn_of_thresholds(fields, text)
        return result

    def validate_text_config(self):
        """Part of `@strict`-powered validation."""
        if stray := sorted(name for name in vars(self) if name.startswith("mosa_")):
            raise ValueError(f"`{'`, `'.join(stray)}`: `mosa_*` fields are those of `text_config`: set them there.")
        if not isinstance(self.text_config, SparseGroupsConfig):
            raise ValueError(
                f"`text_config` of a {type(self).__name__} has to be that of a decoder with sparse groups, of model "
                f"type '{PREFIX}...', not a {type(self.text_config).__name__}: "
                f"`{type(self).__name__}.from_base(config)` makes it of the base model's."
            )


def _with_text(config_class: type, config: PreTrainedConfig, text: PreTrainedConfig) -> Any:
    """A `config_class` of what `config` says, but for its decoder's part."""
    parts = {name: copy.deepcopy(getattr(config, name)) for name in config.sub_configs if name != "text_config"}
    result = config_class(**{**fields_of(config), **parts, "text_config": text})
    for name in ("_attn_implementation", "_experts_implementation"):
        internal = f"{name}_internal"
        setattr(result, internal, getattr(config, name, None))
        for part in config.sub_configs:  # construction has set them all to None
            if (own := getattr(result, part)) is not None:
                setattr(own, internal, getattr(getattr(config, part), name, None))
    result.name_or_path = config.name_or_path
    return result


class MultimodalMixin(RouterFilesMixin, SparsePreTrainedMixin):
    """Before every class of a model around a decoder, base model and heads alike."""


def make_multimodal(model_type: str) -> Family:
    """
    The classes of the type of a base model around a decoder.

    Raises:
        ValueError: for a type whose decoder, or what is around it, cannot have sparse groups, and why.
    """
    base_config = CONFIG_MAPPING[model_type]
    base_model = families.class_of(families.DECODERS.get(model_type))
    base_heads = {head: families.class_of(names.get(model_type)) for head, names in HEADS.items()}
    generating = base_heads["ForConditionalGeneration"]
    is_own = getattr(generating, "config_class", None) is base_config
    if base_model is None or not is_own or base_config.is_encoder_decoder:
        raise ValueError(
            f"Models of type {model_type!r} cannot have sparse groups: Transformers has no model of them that "
            "generates text by a decoder alone (`AutoModelForMultimodalLM`)."
        )
    config_class: type[MultimodalConfig] = strict(
        type(
            f"Mosa{base_config.__name__}",
            (MultimodalConfig, base_config),
            {
                "__module__": families.__name__,
                "__doc__": f"`{base_config.__name__}` whose `text_config` is a `SparseGroupsConfig`.",
                "__annotations__": {},
                "model_type": PREFIX + model_type,
                **_parts(base_config),
            },
        )
    )
    families.CLASSES[config_class.__name__] = config_class

    def made(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
        mixins = (MosaGenerationMixin, MultimodalMixin) if issubclass(base, GenerationMixin) else (MultimodalMixin,)
        attributes = {
            "__module__": families.__name__,
            "config_class": config_class,
            "_can_record_outputs": families.recordable(base),
        }
        if set(TOKEN_TYPES) & inspect.signature(base.forward).parameters.keys():
            attributes["forward"] = explaining(base.forward)
        name = f"Mosa{base.__name__}"
        families.CLASSES[name] = type(name, (*mixins, base), attributes)
        return families.CLASSES[name]

    family = Family(model_type, base_config, base_model, config_class, made(base_model))
    if generating is base_model:  # which some types have alone
        family.base_head_classes["ForConditionalGeneration"] = base_model
        family.head_classes["ForConditionalGeneration"] = family.model_class
    for head, base in base_heads.items():
        known = (base_model, *family.base_head_classes.values())
        if base is not None and base not in known and base.config_class is base_config:
            family.base_head_classes[head], family.head_classes[head] = base, made(base)
    for each in family.classes():
        cast(type[SparsePreTrainedMixin], each).family = family
    return family


def _parts(base_config: type[PreTrainedConfig]) -> dict[str, dict[str, Any]]:
    """The attribute of a config class that says of which class its parts are, with that of the decoder's own."""
    own = base_config.sub_configs["text_config"]
    if issubclass(own, PreTrainedConfig):  # else the config says which
        own = family_of(own.model_type).config_class
    specs = getattr(base_config, "sub_configs_defaults", None)
    if specs is None:  # of older versions of Transformers
        return {"sub_configs": {**base_config.sub_configs, "text_config": own}}
    spec = copy.copy(specs["text_config"])
    spec.config_class, spec.model_type = own, PREFIX + spec.model_type
    return {"sub_configs_defaults": {**specs, "text_config": spec}}


def explaining(base_forward: Callable) -> Callable:
    """The forward of a base's class, which says what is the matter if pictures would be read both ways."""

    @wraps(base_forward)
    def forward(self, *args, **kwargs):
        try:
            return base_forward(self, *args, **kwargs)
        except NotCausal as error:
            given = inspect.signature(base_forward).bind(self, *args, **kwargs).arguments
            given |= given.get("kwargs", {})
            if not any(given.get(name) is not None and bool(given[name].any()) for name in TOKEN_TYPES):
                raise
            raise ValueError(
                f"{type(self).__name__} cannot read pictures: in this family tokens of a picture read each other both "
                "ways, in layers too that have sparse groups, which are causal. Pass text alone; for pictures, "
                "use the original, `mosa_hf.to_dense(model)`."
            ) from error

    return forward


def check_no_lost_routers(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """
    A hook of torch's on modules that become parts of others.

    Raises:
        ValueError: if a decoder with sparse groups, or with the config of one, becomes part of a model of
            Transformers that does not know of them: it would be saved as one without, in silence.
    """
    if not isinstance(child, PreTrainedModel) or not isinstance(parent, PreTrainedModel):
        return
    if not isinstance(child.config, SparseGroupsConfig) or isinstance(
        parent.config, SparseGroupsConfig | MultimodalConfig
    ):
        return
    if any(each.__module__.startswith("transformers.models.") for each in type(parent).__mro__):
        raise ValueError(
            f"A {type(child).__name__} with sparse groups cannot be `{name}` of a {type(parent).__name__}, which "
            "would be saved and loaded without its routers. Convert the model whole, "
            f"`mosa_hf.convert_model(model, ...)`, or build it of a `Mosa{type(parent.config).__name__}`."
        )


def is_multimodal(model_type: str) -> bool:
    """Whether a model type of Transformers is of models around a decoder."""
    return model_type in CONFIG_MAPPING_NAMES and is_composite(CONFIG_MAPPING[model_type])
