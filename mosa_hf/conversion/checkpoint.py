"""Conversion of a checkpoint on disk: the base's shards, linked and never rewritten, and a file of routers."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import rename_source_key, revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from ..arguments import checked
from ..atomic_write import atomic_directory, check_absent
from ..compat import dequantized_gguf, exact_attention
from ..modeling.configuration import SparseGroupsConfig, is_composite, sparse_config_of
from ..modeling.family import Family, family_of
from ..modeling.group_plan import GroupPlan
from ..modeling.model_card import megabytes, model_card, plan_in_short
from ..modeling.router_files import ROUTERS_NAME, load_routers, router_tensors, write_routers
from ..safetensors_files import FLOATING, TensorHeader, check_finite, tensor_headers
from .calibration import is_of_pictures
from .configuration import ConversionConfig
from .convert import WRAPPED, convert_model
from .default_text import default_text
from .publishing import check_can_publish, publish
from .sources import ADAPTER_NAME, CARD_NAME, COMPANIONS, Loading, Source, check_loading, find_source
from .texts import Text, read_text
from .windows import NUM_WINDOWS, WINDOW_LENGTH, calibration_windows, is_text

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


@checked(source="`convert_model` takes a model")
def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    conversion: ConversionConfig | None = None,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None = None,
    *,
    routers: str | os.PathLike | None = None,
    routers_only: bool = False,
    num_windows: int = NUM_WINDOWS,
    window_length: int = WINDOW_LENGTH,
    push_to_hub: str | None = None,
    **loading: Unpack[Loading],
) -> GroupPlan:
    """
    Convert a checkpoint. The weight files are hard links of the source's (copies where the file system has none), byte
    for byte; beside them are the routers, an index, a config, a model card, and the source's tokenizer, if it has one.
    The model is loaded only to fit routers on `calibration`; that is not resumed if it is interrupted.

    Args:
        source: directory with a config and safetensors weights; a `.gguf` file, whose weights are dequantised and
            saved; or a name on the Hub (`find_source`).
        destination: directory to create. It appears when it is whole, or not at all.
        conversion: what to produce.
        calibration: what routers and thresholds are fitted on: a text, a list of texts or of chats, which are read
            one after the other (`calibration_windows`); the `Path` of a file, or several; what `read_text` makes of
            files and data sets; or token ids, or pictures with text, as `convert_model` takes them. None:
            `default_text`, where anything is to be fitted, which is so without `routers` and unless every sparsity
            is 1.
        routers: directory that `save_routers` wrote, or its name on the Hub, in place of `conversion` and
            `calibration`.
        routers_only: write the routers alone, as `save_routers` does.
        num_windows, window_length: how much of a text is read: windows, and tokens of one.
        push_to_hub: name on the Hub to upload the directory to, once it is written.
        loading: `revision`, `token`, `dtype` and `device_map` of the source, see `Loading`.

    Returns:
        What each group has become.

    Raises:
        FileExistsError: if `destination` exists.
        FileNotFoundError: if the source, or a file that it lists, does not exist, here or on the Hub.
        NotADirectoryError, PermissionError: if `destination` cannot be made.
        PermissionError: for `push_to_hub` if nobody is logged in.
        ValueError: for damaged weights, weights that disagree with the config, pickled weights, an unsupported family,
            a plan that does not fit, a short text, or a text without a tokenizer.
    """
    converted, _ = convert_and_write(
        source,
        Path(destination),
        conversion,
        calibration,
        routers=routers,
        routers_only=routers_only,
        num_windows=num_windows,
        window_length=window_length,
        push_to_hub=push_to_hub,
        **loading,
    )
    return GroupPlan.of_config(converted.config)


def convert_and_write(
    source: str | os.PathLike,
    destination: Path,
    conversion: ConversionConfig | None,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    *,
    routers: str | os.PathLike | None,
    routers_only: bool,
    num_windows: int,
    window_length: int,
    push_to_hub: str | None,
    **loading: Unpack[Loading],
) -> tuple[PreTrainedModel, str | None]:
    """`convert_checkpoint`; returns what was written, maybe without weights, and where on the Hub it is."""
    check_loading(loading)
    check_absent(destination)
    if routers is not None and (conversion is not None or calibration is not None):
        raise ValueError("`routers` bring their own plan and thresholds: leave out `conversion` and `calibration`.")
    if push_to_hub is not None:
        check_can_publish(push_to_hub, loading.get("token"))
    found = find_source(source, revision=loading.get("revision"), token=loading.get("token"))
    converted = convert_source(
        found, conversion, calibration, routers, num_windows=num_windows, window_length=window_length, **loading
    )
    write_converted(converted, found, destination, routers_only=routers_only, place=push_to_hub)
    return converted, None if push_to_hub is None else publish(destination, push_to_hub, loading.get("token"))


def convert_source(
    source: Source,
    conversion: ConversionConfig | None,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    routers: str | os.PathLike | None,
    *,
    num_windows: int,
    window_length: int,
    **loading: Unpack[Loading],
) -> PreTrainedModel:
    """
    The converted model of files that are on this machine: its weights are loaded (not on the meta device) only where
    routers are fitted. Args and errors are those of `convert_checkpoint`.
    """
    conversion = conversion or ConversionConfig()
    is_file = source.path.is_file()
    model = load_source(source, **loading) if is_file else checked_model(source)
    dtype = model.config.dtype
    if routers is not None:
        return load_routers(model, routers, token=loading.get("token"))
    if calibration is None and conversion.selects():
        calibration = default_text()
    input_ids, record = _calibration(source, calibration, num_windows, window_length)
    if input_ids is not None:
        if not is_file:
            model = _with_weights(type(model), source, loading)
        logger.info("It computes in %s on %s", str(model.dtype).removeprefix("torch."), model.device)
    start = time.perf_counter()
    converted = convert_model(model, conversion, input_ids)
    logger.info("Chose groups, fitted routers and set thresholds in %.0f s", time.perf_counter() - start)
    if dtype is not None or loading.get("dtype", "auto") != "auto":
        converted.config.dtype = dtype  # of the files, whatever it was loaded as
    sparse_config = sparse_config_of(converted.config)
    assert sparse_config.mosa_conversion is not None
    sparse_config.mosa_conversion |= source.about()
    if record:
        sparse_config.mosa_conversion["calibration"] |= record
    logger.info("Decided: %s", plan_in_short(sparse_config).replace("\n", " "))
    return converted


def _calibration(
    source: Source,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    num_windows: int,
    window_length: int,
) -> tuple[Any, dict[str, str]]:
    """What `convert_model` takes of a calibration text in any form, and what is recorded of the text."""
    if isinstance(calibration, os.PathLike):
        calibration = [calibration]
    if isinstance(calibration, list | tuple) and calibration and isinstance(calibration[0], os.PathLike):
        calibration = read_text(calibration)
    if is_text(calibration) and not is_of_pictures(calibration):
        calibration = Text([calibration] if isinstance(calibration, str) else calibration, "a text of one's own")
    if not isinstance(calibration, Text):
        return calibration, {}
    logger.info("Calibration text: %s, %s characters", calibration.name, f"{calibration.num_characters:,}")
    tokenizer = tokenizer_of(source.path)
    input_ids = calibration_windows(tokenizer, calibration.documents, num_windows, window_length)
    return input_ids, {"text": calibration.name, "sha256": calibration.sha256}


def write_converted(
    converted: PreTrainedModel, source: Source, destination: Path, *, routers_only: bool, place: str | None = None
) -> None:
    """
    Write what `convert_source` gave: a directory that appears when it is whole.

    Args:
        converted: the model, maybe without weights.
        source: what it was converted from, whose files are linked.
        destination: the directory, which must not exist.
        routers_only: write the routers alone.
        place: the name that it will have on the Hub, for its card.
    """
    with atomic_directory(destination) as unfinished:
        if routers_only:
            write_routers(converted, unfinished, place=place)
        elif source.path.is_file():
            converted.save_pretrained(unfinished)
            tokenizer_of(source.path).save_pretrained(unfinished)
            _write_card(converted, source, unfinished, place)
        else:
            _write(converted, source, unfinished, place)


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


def load_source(source: Source, **loading: Unpack[Loading]) -> PreTrainedModel:
    """
    A base model with its weights, of the class that its config names.

    Raises:
        FileNotFoundError, ValueError: see `checked_model`.
    """
    if not source.path.is_file():
        return _with_weights(type(checked_model(source)), source, loading)
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    family = family_of(AutoConfig.from_pretrained(**where).model_type)
    options = _loading_options(loading)
    options["dtype"] = torch.float32 if options["dtype"] == "auto" else options["dtype"]  # such a file names none
    model_class = family.base_head_classes["ForCausalLM"]
    return model_class.from_pretrained(**where, **dequantized_gguf(), **exact_attention(model_class), **options)


def _with_weights(model_class: type[PreTrainedModel], source: Source, loading: Loading) -> PreTrainedModel:
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
    layers = {int(place[1]) for name in headers if (place := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    if not is_composite(config) and layers != set(range(config.num_hidden_layers)):  # else there are several kinds
        raise ValueError(
            f"{path} says `num_hidden_layers` = {config.num_hidden_layers}, but the weights have layers "
            f"{min(layers, default=0)} to {max(layers, default=0)}."
        )
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
    except Exception as error:  # sizes that fit nothing, unknown activations, ...
        raise ValueError(f"{path} does not describe a model: {error}") from error
    if getattr(config, "quantization_config", None) is None:  # else names, shapes and dtypes are the quantiser's
        _check_tensors(model, headers, directory)
        check_finite(headers)
    return model, headers


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
        if header.dtype not in FLOATING:
            raise ValueError(
                f"{header.file}: {name} has dtype {header.dtype}, but {CONFIG_NAME} names no quantization: weights "
                f"must be {', '.join(sorted(FLOATING))}."
            )
    for name in sorted(found.keys() - expected.keys()):
        if not name.endswith(RECOMPUTED):
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


def _write(converted: PreTrainedModel, source: Source, unfinished: Path, place: str | None) -> None:
    """Fill the directory of a converted model; the config, without which nothing loads, comes last."""
    headers = tensor_headers(source.path)
    files = sorted({header.file for header in headers.values() if header.file is not None})
    # Names that no `save_pretrained` into this directory will write to: it would write into the source's file.
    names: dict[Path | None, str] = {
        file: f"model-base-{i:05}-of-{len(files):05}.safetensors" for i, file in enumerate(files, 1)
    }
    for file in tqdm(files, desc="Linking weights", unit="file"):
        link_or_copy(file, unfinished / names[file])
    routers = router_tensors(converted)
    save_file(routers, unfinished / ROUTERS_NAME, metadata={"format": "pt"})
    weight_map = {name: names[header.file] for name, header in headers.items()} | dict.fromkeys(routers, ROUTERS_NAME)
    total = sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (unfinished / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in sorted({file for pattern in COMPANIONS for file in source.path.glob(pattern) if file.is_file()}):
        target = unfinished / file.relative_to(source.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    config = converted.config
    config.architectures = [type(converted).__name__]
    _write_card(converted, source, unfinished, place)
    config.save_pretrained(unfinished)


def _write_card(converted: PreTrainedModel, source: Source, unfinished: Path, place: str | None) -> None:
    config = sparse_config_of(converted.config)
    base = (config.mosa_conversion or {}).get("source") or source.name
    card = model_card(config, type(converted), base, is_routers=False, place=place)
    (unfinished / CARD_NAME).write_text(card, encoding="utf-8")


def link_or_copy(source: Path, destination: Path) -> None:
    """Make `destination` the same file as `source`, which may be a symbolic link; a copy across file systems."""
    source = source.resolve()
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
