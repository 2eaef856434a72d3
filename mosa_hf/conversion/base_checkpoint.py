"""The files of a base model: found to be whole and of a family that is known, and loaded."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import rename_source_key, revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..compat import dequantized_gguf, exact_attention
from ..modeling.configuration import SparseGroupsConfig, is_composite, sparse_config_of
from ..modeling.family import Family, family_of
from ..modeling.layers import decoder_of, layers_of
from ..modeling.model_card import megabytes
from ..safetensors_files import FLOATING, TensorHeader, check_finite, tensor_headers
from .convert import WRAPPED
from .sources import ADAPTER_NAME, Loading, Source

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that old checkpoints hold and models compute themselves.
RECOMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
SAVED_WRAPPED = tuple((pattern, what, f"save {remedy}") for pattern, what, remedy in WRAPPED)
OF_PICTURES = (
    r"(^|\.)(language_model|text_model|vision_model|vision_tower|multi_modal_projector)\.",
    "a model of pictures and text",
    "load it with its own class, and save it with the config of that, or its language model alone",
)
# The same of names that a model has besides those that its config asks for.
HEADS_OF_OTHERS = (
    (
        r"^(v_head|value_head)\.",
        "a value head, as TRL's reinforcement learning adds it",
        "load the folder as `AutoModelForCausalLM`, which leaves that head out, and `save_pretrained`",
    ),
    (
        r"^(score|classifier|qa_outputs|lm_head|embed_out)\.weight$",
        "a head that `architectures` in the config does not name",
        "set `architectures` to the class that the weights are of, or load them with the class that it names and "
        "`save_pretrained`",
    ),
)


def checked_model(source: Source) -> PreTrainedModel:
    """
    The base model of a directory without its weights (on the meta device), once its files are found to be whole.
    Errors are those of `read_config` and `check_weights`.
    """
    config = read_config(source.path)
    model, headers = check_weights(source.path, config)
    size = sum(file.stat().st_size for file in {header.file for header in headers.values() if header.file is not None})
    logger.info(
        "Read %s: %s, %d layers, %s of weights",
        source.name if source.commit is None else f"{source.name} ({source.commit[:12]})",
        config.model_type,
        config.get_text_config(decoder=True).num_hidden_layers,
        megabytes(size),
    )
    return model


def load_gguf(source: Source, loading: Loading) -> PreTrainedModel:
    """The causal LM of a `.gguf` file, its weights dequantised."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    family = family_of(AutoConfig.from_pretrained(**where).model_type)
    options = _loading_options(loading)
    options["dtype"] = torch.float32 if options["dtype"] == "auto" else options["dtype"]  # such a file names none
    model_class = family.base_head_classes["ForCausalLM"]
    return model_class.from_pretrained(**where, **dequantized_gguf(), **exact_attention(model_class), **options)


def load_weights(model_class: type[PreTrainedModel], source: Source, loading: Loading) -> PreTrainedModel:
    """The model of a directory whose files `checked_model` has found to be whole."""
    start = time.perf_counter()
    options = _loading_options(loading) | exact_attention(model_class)
    model = model_class.from_pretrained(source.path, use_safetensors=True, **options)
    logger.info("Loaded its weights in %.0f s", time.perf_counter() - start)
    return model


def _loading_options(loading: Loading) -> dict[str, Any]:
    """What of it `from_pretrained` has to know of files that are on this machine."""
    options: dict[str, Any] = {"dtype": loading.get("dtype") or "auto"}
    if loading.get("device_map") is not None:
        options["device_map"] = loading["device_map"]
    return options


def read_config(directory: Path) -> PreTrainedConfig:
    """
    The config of a base model.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a config that is damaged, out of range, or of a family without sparse groups.
    """
    path = directory / CONFIG_NAME
    if (directory / ADAPTER_NAME).is_file():
        raise ValueError(
            f"{directory} has an adapter of PEFT ({ADAPTER_NAME}), which is not among the weights that are converted. "
            "Merge it first (`PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)`), or "
            "convert the base model and load the adapter onto that."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_NAME}: it is not a model directory.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not isinstance(sparse_config_of(config), SparseGroupsConfig):
            family_of(config.model_type)
    except Exception as error:  # whatever a damaged file makes Transformers raise
        raise ValueError(f"{path} cannot be used: {error}") from error
    if isinstance(sparse_config_of(config), SparseGroupsConfig):
        raise ValueError(f"{path}: a {config.model_type!r} model is a converted one already: convert its base.")
    return config


def check_weights(directory: Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, TensorHeader]]:
    """
    Compare the headers of a checkpoint's safetensors files with its config.

    Returns:
        The model without its weights (on the meta device), and the headers of its tensors by name.

    Raises:
        FileNotFoundError: for missing weight files.
        ValueError: for damaged or pickled files; tensors that are missing, unknown, not finite, or of a shape or dtype
            that the config does not ask for.
    """
    headers = tensor_headers(directory)
    if not headers:
        if any(file for pattern in PICKLES for file in directory.glob(pattern)):
            raise ValueError(
                f"{directory} has pickled weights only, which can run code when they are read. If you trust them, "
                "load them with Transformers and `save_pretrained`, which writes safetensors; then convert that."
            )
        raise FileNotFoundError(f"{directory} has no safetensors weights: save it with `model.save_pretrained` first.")
    _check_names(headers, SAVED_WRAPPED if is_composite(config) else (*SAVED_WRAPPED, OF_PICTURES))
    model_class, path = _base_class(family_of(config.model_type), config, directory), directory / CONFIG_NAME
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
    except Exception as error:  # sizes that fit nothing, unknown activations, ...
        raise ValueError(f"{path} does not describe a model: {error}") from error
    if not is_composite(config):  # which have layers of several kinds
        _check_layers(model, headers, path)
    if getattr(config, "quantization_config", None) is None:  # else names, shapes and dtypes are the quantiser's
        _check_tensors(model, headers, directory)
        check_finite(headers)
    return model, headers


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is left aside by `from_pretrained`, such as of a head that predicts several tokens."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return name.endswith(RECOMPUTED) or any(re.search(pattern, name) for pattern in patterns)


def _check_layers(model: PreTrainedModel, headers: dict[str, TensorHeader], path: Path) -> None:
    """Raise what `check_weights` raises for another number of layers, which says more than a name of one."""
    says = f"{path} says `num_hidden_layers` = {model.config.num_hidden_layers}"
    try:
        layers = layers_of(decoder_of(model)) or ()
    except ValueError as error:
        raise ValueError(f"{says}: {error}") from error
    prefix = f"{model.base_model_prefix}."
    name = next(name for name, module in model.named_modules() if module is layers).removeprefix(prefix)
    found = ((each, re.match(rf"(?:{prefix})?{name}\.(\d+)\.", each)) for each in headers)
    numbers = {each: int(place[1]) for each, place in found if place is not None}
    places = {number for each, number in numbers.items() if number < len(layers) or not _is_ignored(model, each)}
    if places and places != set(range(len(layers))):
        raise ValueError(f"{says}, but the weights have layers {min(places)} to {max(places)}.")


def _check_tensors(model: PreTrainedModel, headers: dict[str, TensorHeader], directory: Path) -> None:
    """Raise what `check_weights` raises for tensors that are not those of `model`."""
    state, tied = model.state_dict(), set(model.all_tied_weights_keys)
    expected = revert_weight_conversion(model, dict(state))  # as on disk: experts, for one, tensor by tensor
    if any(name in headers for name in state.keys() - expected.keys()):
        expected = state
    optional = tied | revert_weight_conversion(model, {name: state[name] for name in tied}).keys()
    prefix = f"{model.base_model_prefix}."
    decoder_alone = model.base_model is not model and not any(name.startswith(prefix) for name in headers)
    # As upstream, which loads any head from a decoder's weights, and a decoder from those of any head.
    names = {rename_source_key(name, [], [], model.base_model_prefix, expected)[0]: name for name in headers}
    if len(names) < len(headers):
        twice = min(headers.keys() - names.values())
        raise ValueError(f"{headers[twice].file} has {twice}, which is there with and without its prefix: keep one.")
    found = {name: headers[source] for name, source in names.items()}
    _check_names({name: header for name, header in found.items() if name not in expected}, HEADS_OF_OTHERS)
    for name, tensor in expected.items():
        if name not in found:
            if name in optional:
                continue
            if decoder_alone and not name.startswith(prefix):
                raise ValueError(
                    f"{directory} holds a decoder alone, without {name}, but `architectures` in {CONFIG_NAME} asks "
                    f"for {type(model).__name__}: name the decoder's class there, or save the model with its head."
                )
            raise ValueError(f"{directory}: the weights lack {name}, which {CONFIG_NAME} asks for.")
        header = found[name]
        if header.shape != tuple(tensor.shape):
            raise ValueError(
                f"{header.file}: {name} has shape {header.shape}, but {CONFIG_NAME} asks for {tuple(tensor.shape)}. "
                "Weights and config belong to different models."
            )
        if header.dtype not in FLOATING and tensor.is_floating_point():
            raise ValueError(
                f"{header.file}: {name} has dtype {header.dtype}, but {CONFIG_NAME} names no quantization: weights "
                f"must be {', '.join(sorted(FLOATING))}."
            )
    for name in sorted(found.keys() - expected.keys()):
        if not _is_ignored(model, name):
            raise ValueError(
                f"{found[name].file} has {name}, which {CONFIG_NAME} does not ask for. Weights and config belong to "
                "different models."
            )


def _check_names(headers: dict[str, TensorHeader], kinds: tuple[tuple[str, str, str], ...]) -> None:
    """
    Raises:
        ValueError: for a name of one of the `kinds`: pattern, what it is a sign of, and the remedy.
    """
    for pattern, what, remedy in kinds:
        if name := next(filter(re.compile(pattern).search, sorted(headers)), None):
            raise ValueError(f"{headers[name].file} has {name}, the name of a weight of {what}: {remedy}.")


def _base_class(family: Family, config: PreTrainedConfig, directory: Path) -> type[PreTrainedModel]:
    """The class that a config names; where it names none, the causal LM, or that of pictures and text."""
    classes = {each.__name__: each for each in (family.base_model_class, *family.base_head_classes.values())}
    usual = next(iter(family.base_head_classes.values()), family.base_model_class)
    name = (config.architectures or [usual.__name__])[0]
    if name not in classes:
        raise ValueError(
            f"{directory / CONFIG_NAME}: the architecture {name} has no MoSA class; these have: {', '.join(classes)}."
        )
    return classes[name]


def tokenizer_of(source: Path) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model directory, or of a `.gguf` file.

    Raises:
        ValueError: if there is none.
    """
    try:
        if source.is_dir():
            return AutoTokenizer.from_pretrained(source)
        return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # Transformers raises many kinds
        raise ValueError(
            f"{source} has no tokenizer that can be loaded ({error}): save the model's tokenizer there, or, in "
            "Python, give the calibration as token ids [N, T]."
        ) from error
