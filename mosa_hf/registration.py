"""Makes Transformers and PEFT know the MoSA classes. Runs at `import mosa_hf`; running it again changes nothing."""

import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

import transformers
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils import constants, transformers_weight_conversion
from torch.nn.modules.module import _global_module_registration_hooks, register_module_module_registration_hook
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
from transformers.utils.import_utils import is_serve_available

from .modeling import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel
from .modeling.attention import mosa_attention_forward
from .modeling.configuration import RoutingConfig
from .modeling.families import class_of, make_family
from .modeling.family import FAMILIES, PREFIX, Families, Family, family_of
from .modeling.multimodal import MultimodalConfig, check_no_lost_routers, is_multimodal, make_multimodal
from .modeling.parallel import register_style


def _has_models(each: Any) -> bool:
    """Whether something is one of upstream's Auto classes of models."""
    is_auto = isinstance(each, type) and issubclass(each, _BaseAutoModelClass)
    return is_auto and getattr(each, "_model_mapping", None) is not None


# A head's Auto class, and where Transformers looks its classes up by name: label smoothing, pipelines, cards.
AUTO = {
    "ForCausalLM": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "ForSequenceClassification": (
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ForTokenClassification": (
        transformers.AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ForQuestionAnswering": (
        transformers.AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}
AUTO_CLASSES: list[Any] = [each for each in vars(modeling_auto).values() if _has_models(each)]
PROCESSORS = [PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING, FEATURE_EXTRACTOR_MAPPING]
# PEFT's tables by model type: what each method adapts by default, and how experts that are one tensor are adapted.
PEFT_TABLES = [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
PEFT_TABLES.append(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN)
LORA_TARGETS = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
# For types that PEFT does not know: what makes queries and values, or the latents of values.
LORA_FALLBACK = ["q_proj", "v_proj", "qkv_proj", "query_key_value", "q_b_proj", "kv_a_proj_with_mqa"]


def register() -> None:
    """Register the native model, what "mosa" is in attention, the parallel style, and how families are made."""
    AttentionInterface.register("mosa", mosa_attention_forward)
    # Without a mask function of the same name, padding would be ignored in silence.
    AttentionMaskInterface.register("mosa", sdpa_mask)
    register_style()
    heads = {"ForCausalLM": MosaForCausalLM, "ForSequenceClassification": MosaForSequenceClassification}
    _register_model(MosaConfig, MosaModel, heads, like="llama")
    Families.make = staticmethod(make_and_register)
    if check_no_lost_routers not in _global_module_registration_hooks.values():
        register_module_module_registration_hook(check_no_lost_routers)
    # Every Auto class asks this table for a config's class first, so that is where families come from.
    if not isinstance(CONFIG_MAPPING._extra_content, LazyConfigs):
        CONFIG_MAPPING._extra_content = LazyConfigs(CONFIG_MAPPING._extra_content)


class LazyConfigs(dict):
    """Upstream's table of config classes that were registered, which makes a family when "mosa_..." is looked up."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.removeprefix(PREFIX) in CONFIG_MAPPING_NAMES.keys() - {model_type}
        )

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        return FAMILIES[model_type.removeprefix(PREFIX)].config_class


def make_and_register(model_type: str) -> Family:
    """The family of a base's model type, see `make_family`, `make_multimodal`, known to Transformers and PEFT."""
    family = make_multimodal(model_type) if is_multimodal(model_type) else make_family(model_type)
    _register_model(family.config_class, family.model_class, family.head_classes, like=family.name)
    if is_multimodal(model_type):
        _register_multimodal(family)
    # Adaption prompts wrap attention modules, which the native model looks into.
    _fill([TRANSFORMERS_MODEL_CONFIG], family.config_class.model_type, like=family.name)
    # How checkpoints of the family, or of one of its classes, are laid out on disk: experts tensor by tensor, or a
    # head under another name.
    names = {base.__name__: sparse.__name__ for base, sparse in family.pairs()}
    for base_name, name in {family.name: family.config_class.model_type, **names}.items():
        mapping = get_checkpoint_conversion_mapping(base_name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, [_exact(each) for each in mapping], overwrite=True)
    if is_serve_available():
        _register_response_template(family)
    return family


def _exact(transform: WeightConverter | WeightRenaming) -> WeightConverter | WeightRenaming:
    """
    A renaming whose target begins with a dot and nothing else: upstream reads it as a regular expression when a model
    is saved, so that ".router.weight" would rename "mosa_router.weight" too.
    """
    if type(transform) is not WeightRenaming or transform.scope_prefix is not None:
        return transform
    targets = [re.sub(r"^\.", r"\\.", target) for target in transform._original_target_patterns]
    return WeightRenaming(source_patterns=transform._original_source_patterns, target_patterns=targets)


def _register_multimodal(family: Family) -> None:
    """Register a model around a decoder with the other Auto classes that know its base, and its processors."""
    classes = dict(family.pairs())
    text = family.config_class.sub_configs["text_config"]
    if issubclass(text, PreTrainedConfig):  # one kind of decoder, which `AutoModelForCausalLM` may load alone
        classes |= dict(family_of(text.model_type.removeprefix(PREFIX)).pairs())
    for auto_class in AUTO_CLASSES:
        names = auto_class._model_mapping._model_mapping
        if (sparse_class := classes.get(cast(type, class_of(names.get(family.name))))) is not None:
            auto_class._model_mapping.register(family.config_class, sparse_class, exist_ok=True)
            names.setdefault(family.config_class.model_type, sparse_class.__name__)
            family.config_class.remote_classes[auto_class.__name__] = sparse_class.__name__
    for mapping in PROCESSORS:
        if family.base_config_class in mapping:
            mapping.register(family.config_class, mapping[family.base_config_class], exist_ok=True)


def _transformers_modules() -> list[ModuleType]:
    """
    What `import transformers` gave to anyone. It is two objects: upstream's `processing_utils` executes the package a
    second time, and who imported it earlier (a user's script, `transformers serve`) keeps the first.
    """
    held: list[Any] = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
    found = {id(each): each for each in (transformers, *held) if getattr(each, "__name__", None) == "transformers"}
    return list(found.values())


def _register_response_template(family: Family) -> None:
    """How `transformers serve` finds tool calls and reasoning in what a model writes, which it knows by model type."""
    from transformers.cli.serving import utils

    for types, template in list(utils._RESPONSE_TEMPLATE_FALLBACKS.items()):
        if family.name in types:
            utils._RESPONSE_TEMPLATE_FALLBACKS[(family.config_class.model_type,)] = template


def _register_model(
    config_class: type[RoutingConfig] | type[MultimodalConfig],
    model_class: type[PreTrainedModel],
    head_classes: Mapping[str, type[PreTrainedModel]],
    like: str,
) -> None:
    """Register the classes of a model type, with the tokenizer and PEFT's defaults of the type `like`."""
    name = config_class.model_type
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    modeling_auto.MODEL_MAPPING_NAMES[name] = model_class.__name__
    remote = {"AutoConfig": config_class, "AutoModel": model_class}
    for head in AUTO:
        if head in head_classes:
            auto_class, names = AUTO[head]
            auto_class.register(config_class, head_classes[head], exist_ok=True)
            names[name] = head_classes[head].__name__
            remote[auto_class.__name__] = head_classes[head]
    config_class.remote_classes = {auto: each.__name__ for auto, each in remote.items()}
    if like in TOKENIZER_MAPPING_NAMES:
        TOKENIZER_MAPPING_NAMES.setdefault(name, TOKENIZER_MAPPING_NAMES[like])
    if like in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(name)
    for module in _transformers_modules():
        for each in (config_class, model_class, *head_classes.values()):  # tools look them up as transformers.<name>
            setattr(module, each.__name__, each)
    _fill(PEFT_TABLES, name, like)
    if issubclass(config_class, RoutingConfig):  # else PEFT would adapt what looks at pictures, too
        LORA_TARGETS.setdefault(name, LORA_FALLBACK)


def _fill(tables: list[dict[str, Any]], name: str, like: str) -> None:
    """Give the model type `name` what each table has of the type `like`."""
    for table in tables:
        if like in table:
            table.setdefault(name, table[like])
