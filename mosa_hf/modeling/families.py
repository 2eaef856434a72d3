"""
The classes of every family of decoders that Transformers has, with sparse groups. They are made when they are first
asked for, from upstream's own tables and from what its code does: no family is listed here.

`MosaQwen3Config`, `MosaQwen3Model`, `MosaQwen3ForCausalLM`, ..., of model type "mosa_qwen3", are the classes of
"qwen3" with mixins before them, which add routers. Everything else about a family (projections, norms, rotary
embeddings, experts, multipliers) is its own code. All of them are attributes of this module.
"""

import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import transformers
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from ..compat import supports_sdpa
from .configuration import SparseGroupsConfig, is_composite
from .family import FAMILIES, PREFIX, Family
from .generation import MosaGenerationMixin
from .layers import calls_attention_interface
from .router_files import RouterFilesMixin
from .sparse_models import SparseModelMixin, SparsePreTrainedMixin

CLASSES: dict[str, type] = {}  # every class that was made so far, by name
# Upstream's tables of classes by model type, as they are before ours are added.
DECODERS = dict(modeling_auto.MODEL_MAPPING_NAMES)
HEADS = {
    "ForCausalLM": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "ForSequenceClassification": dict(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "ForTokenClassification": dict(modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "ForQuestionAnswering": dict(modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
}
# Types whose attention does more than its calls tell, and why they are refused. Conversion would find it out
# (`conversion.exactness`), but nothing would of a model that is built from a configuration.
REFUSED = {
    "blt": "it has several decoders, one within the other",
    "diffllama": "its layers call the attention function twice, and subtract",
    "doge": "its attention adds a mask of its own to the scores",
    "hrm_text": "it runs its layers several times, with another layer of the cache each time",
    "jetmoe": "the query heads that read one key/value head do not stand side by side",
    "minimax": "it wants a cache of its own",
    "musicgen": "its layers read the states of an encoder",
    "musicgen_melody": "its layers read the states of an encoder",
    "zamba": "its layers share one attention module",
    "zamba2": "its layers share one attention module",
}


def make_family(model_type: str) -> Family:
    """
    The classes of a base model's type.

    Raises:
        ValueError: for a type that is no decoder of Transformers whose attention can have sparse groups, and why.
    """
    base_config = _decoder_config(model_type)
    base_model = _base_model(model_type, base_config)
    prefix = base_config.__name__.removesuffix("Config")
    config_class: type[SparseGroupsConfig] = strict(
        type(
            f"Mosa{base_config.__name__}",
            (SparseGroupsConfig, base_config),
            {
                "__module__": __name__,
                "__doc__": f"`{base_config.__name__}` with the fields of `SparseGroupsConfig`.",
                "__annotations__": {},
                "model_type": PREFIX + model_type,
            },
        )
    )
    CLASSES[config_class.__name__] = config_class

    def made(base: type[PreTrainedModel], suffix: str, mixins: tuple[type, ...], *more: type) -> type[PreTrainedModel]:
        # A class that another family's config shares, as some do, is named by this family.
        own = not more and base.config_class is base_config
        name = f"Mosa{base.__name__}" if own else f"Mosa{prefix}{suffix}"
        if issubclass(base, GenerationMixin):
            mixins = (MosaGenerationMixin, *mixins)
        attributes = {
            "__module__": __name__,
            "config_class": config_class,
            "_can_record_outputs": recordable(base),
            "_supports_sdpa": supports_sdpa(base),
        }
        CLASSES[name] = type(name, (*mixins, *more, base), attributes)
        return CLASSES[name]

    decoder, wrapper = (RouterFilesMixin, SparseModelMixin), (RouterFilesMixin, SparsePreTrainedMixin)
    family = Family(
        model_type,
        base_config,
        base_model,
        config_class,
        made(base_model, "Model", decoder if _is_decoder(base_model) else wrapper),
    )
    if not _is_decoder(base_model):
        inner = _inner_decoder(base_model)
        family.inner_classes[inner] = made(inner, "Decoder", decoder)
    for head, names in HEADS.items():
        base = class_of(names.get(model_type)) or _of_config(base_config, head)
        if base is not None and _has_config(base, base_config):
            family.base_head_classes[head] = base
            family.head_classes[head] = made(base, head, wrapper)
    if "ForCausalLM" in family.head_classes and "ForSequenceClassification" not in family.head_classes:
        plain = next(each for each in base_model.__mro__ if PreTrainedModel in each.__bases__)
        family.head_classes["ForSequenceClassification"] = made(
            plain, "ForSequenceClassification", wrapper, GenericForSequenceClassification
        )
    for each in family.classes():
        cast(type[SparsePreTrainedMixin], each).family = family
    return family


def _decoder_config(model_type: str) -> type[PreTrainedConfig]:
    """The config class of a base model's type; raises what `make_family` raises for what is no decoder."""

    def refuse(reason: str) -> ValueError:
        return ValueError(f"Models of type {model_type!r} cannot have sparse groups: {reason}.")

    if model_type.startswith(PREFIX):
        raise refuse("they have them already")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise refuse("it is no model type of the installed Transformers, of whose own models the classes are made")
    if model_type in REFUSED:
        raise refuse(REFUSED[model_type])
    config = CONFIG_MAPPING[model_type]
    if is_composite(config):
        raise refuse(
            "it is a model around a language model, and that has the attention; `mosa_hf.convert_model` takes it whole"
        )
    above = config.__mro__[: config.__mro__.index(PreTrainedConfig)]
    declared = {name for each in above for name in vars(each).get("__annotations__", {})}
    if config.is_encoder_decoder or {"is_decoder", "add_cross_attention"} <= declared:
        raise refuse("it is an encoder, or has one, and sparse groups are causal")
    return config


def _base_model(model_type: str, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Upstream's base model of a type; raises what `make_family` raises."""
    base = class_of(DECODERS.get(model_type)) or _text_model(config_class)
    if base is None or not _attention_classes(sys.modules[base.__module__]):
        raise ValueError(
            f"Models of type {model_type!r} cannot have sparse groups: their attention is code of its own, or none. "
            "Sparse groups need attention modules that call Transformers' `ALL_ATTENTION_FUNCTIONS`."
        )
    return base


def _text_model(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The decoder of a config that upstream's table of base models lacks: a part of vision-language models."""
    found = _of_config(config_class, "Model")
    return found if found is not None and _is_decoder(found) else None


def _of_config(config_class: type[PreTrainedConfig], suffix: str) -> type[PreTrainedModel] | None:
    """The model class of a config whose name ends with `suffix`, where it has a file of models beside its own."""
    try:
        candidates = vars(import_module(config_class.__module__.replace(".configuration_", ".modeling_"))).values()
    except ImportError:
        return None
    return next(
        (
            each
            for each in candidates
            if isinstance(each, type)
            and issubclass(each, PreTrainedModel)
            and each.config_class is config_class
            and each.__name__.endswith(suffix)
            and not each.__name__.endswith("PreTrainedModel")
        ),
        None,
    )


def class_of(name: str | Sequence[str] | None) -> type[PreTrainedModel] | None:
    """A model class of Transformers by the name that a table of its gives."""
    names = (name,) if isinstance(name, str) else name or ()
    return next((found for each in names if (found := getattr(transformers, each, None)) is not None), None)


def _has_config(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> bool:
    """Whether a class is one of a decoder's, not of a model around it whose config has parts."""
    own = model_class.config_class
    return own is config_class or (own is not None and not is_composite(own))


def _is_decoder(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class runs the layers itself: whoever does makes their masks."""
    names = inspect.unwrap(model_class.forward).__code__.co_names
    return any(name.startswith("create_") and "mask" in name for name in names) or "layers" in names or "h" in names


def _inner_decoder(base_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of the decoder that a base model wraps."""
    for each in vars(sys.modules[base_model.__module__]).values():
        if isinstance(each, type) and issubclass(each, PreTrainedModel) and each.__name__.endswith("Decoder"):
            return each
    raise ValueError(f"{base_model.__name__} runs no layers, and nothing in its module is a decoder.")


def _attention_classes(module: Any) -> list[type]:
    return [each for each in vars(module).values() if isinstance(each, type) and calls_attention_interface(each)]


def recordable(base: type[PreTrainedModel]) -> dict:
    """What `output_hidden_states` and the like can record: all but attention weights, which sparse groups lack."""
    return {name: what for name, what in (base._can_record_outputs or {}).items() if name != "attentions"}


def class_named(name: str) -> type:
    """
    A class by its name, made if need be: `MosaQwen3ForCausalLM`, `MosaQwen3Config`, ...

    Raises:
        AttributeError: if there is no such class, and why.
    """
    if name in CLASSES:
        return CLASSES[name]
    base = name.removeprefix("Mosa")
    suffixes = [suffix for suffix in ("Model", *HEADS) if base.endswith(suffix)]
    candidates = [base, *(base.removesuffix(suffix) + "Config" for suffix in suffixes)] if base != name else []
    reason = "there is no such class of a decoder of Transformers"
    for candidate in candidates:
        found = getattr(transformers, candidate, None)
        config_class = found if inspect.isclass(found) and issubclass(found, PreTrainedConfig) else None
        if inspect.isclass(found) and issubclass(found, PreTrainedModel):
            config_class = found.config_class
        if config_class is not None:
            try:
                FAMILIES[config_class.model_type]
            except ValueError as error:
                reason = str(error)
        if name in CLASSES:
            return CLASSES[name]
    raise AttributeError(f"mosa_hf has no {name!r}: {reason}")


def __getattr__(name: str) -> type:
    """Pickle looks classes up here."""
    if name.startswith("__"):
        raise AttributeError(name)
    return class_named(name)
