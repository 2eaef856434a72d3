"""Conversion of a checkpoint on disk: the base's shards, linked and never rewritten, and a file of routers."""

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import save_file
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from ..arguments import checked
from ..atomic_write import atomic_directory, check_absent
from ..modeling.configuration import sparse_config_of
from ..modeling.devices import dtype_name
from ..modeling.group_plan import GroupPlan
from ..modeling.model_card import model_card, plan_in_short
from ..modeling.router_files import ROUTERS_NAME, load_routers, router_tensors, write_routers
from ..safetensors_files import tensor_headers
from .allocation import candidate_plan
from .base_checkpoint import checked_model, load_gguf, load_weights, tokenizer_of
from .calibration import check_read_twice, is_of_pictures
from .configuration import ConversionConfig
from .convert import convert_model, plain_config
from .default_text import default_text
from .publishing import check_can_publish, publish
from .sources import CARD_NAME, Loading, Source, check_loading, find_source
from .texts import Text, read_text
from .windows import NUM_WINDOWS, WINDOW_LENGTH, calibration_windows, is_text

logger = logging.getLogger(__name__)


@checked(source="`convert_model` takes a model")
def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    conversion: ConversionConfig | None = None,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None = None,
    *,
    routers: str | os.PathLike | None = None,
    routers_only: bool = False,
    num_windows: int | None = None,
    window_length: int | None = None,
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
        num_windows, window_length: how much of a text is read: windows, and tokens of one. None: 18 of 1,024, or of
            half of `max_position_embeddings`, if that is less, since windows are read twice.
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
    check_loading(loading)
    destination, token = Path(destination), loading.get("token")
    check_can_convert(destination, push_to_hub, token, routers, conversion, calibration, num_windows, window_length)
    converted = convert_files(
        source,
        destination,
        conversion,
        calibration,
        routers,
        routers_only=routers_only,
        num_windows=num_windows,
        window_length=window_length,
        push_to_hub=push_to_hub,
        **loading,
    )
    if push_to_hub is not None:
        publish(destination, push_to_hub, token)
    return GroupPlan.of_config(converted.config)


def check_can_convert(
    destination: Path, push_to_hub: str | None, token: str | bool | None, routers: object, *others: object
) -> None:
    """
    What can be known before texts are read, which may take long. Args and other errors are `convert_checkpoint`'s.

    Raises:
        ValueError: for `routers` beside any of `others`, which would make others.
    """
    check_absent(destination)
    if push_to_hub is not None:
        check_can_publish(push_to_hub, token)
    if routers is not None and any(each is not None for each in others):
        raise ValueError(
            "`routers` bring their own plan and thresholds: leave out `conversion` and `calibration`, and "
            "`num_windows` and `window_length` of that."
        )


def convert_files(
    source: str | os.PathLike,
    destination: Path,
    conversion: ConversionConfig | None,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    routers: str | os.PathLike | None,
    *,
    routers_only: bool,
    num_windows: int | None,
    window_length: int | None,
    push_to_hub: str | None,
    **loading: Unpack[Loading],
) -> PreTrainedModel:
    """
    The converted model, maybe without weights, once it is written to a directory that appears when it is whole. Args
    and errors are those of `convert_checkpoint`; nothing is uploaded.
    """
    found = find_source(source, revision=loading.get("revision"), token=loading.get("token"))
    is_file = found.path.is_file()
    model = load_gguf(found, loading) if is_file else checked_model(found)
    if routers is not None:
        converted = load_routers(model, routers, token=loading.get("token"))
    else:
        conversion = conversion or ConversionConfig()
        converted = _fitted(model, found, conversion, calibration, num_windows, window_length, loading)
    with atomic_directory(destination) as unfinished:
        if routers_only:
            write_routers(converted, unfinished, place=push_to_hub)
        elif is_file:
            converted.save_pretrained(unfinished)
            tokenizer_of(found.path).save_pretrained(unfinished)
            _write_card(converted, found, unfinished, push_to_hub)
        else:
            _write(converted, found, unfinished, push_to_hub)
    return converted


def _fitted(
    model: PreTrainedModel,
    source: Source,
    conversion: ConversionConfig,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    num_windows: int | None,
    window_length: int | None,
    loading: Loading,
) -> PreTrainedModel:
    """`model` of a source, converted: weights that are on the meta device are loaded where routers are fitted."""
    dtype = model.config.dtype
    candidate_plan(plain_config(model.config), conversion)  # raises before weights are loaded
    if calibration is None and conversion.selects():
        calibration = default_text()
    config = model.config.get_text_config(decoder=True)
    input_ids, record = _calibration(source, config, calibration, num_windows, window_length)
    if input_ids is not None:
        if not source.path.is_file():
            model = load_weights(type(model), source, loading)
        logger.info("It computes in %s on %s", dtype_name(model.dtype), model.device)
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
    config: PreTrainedConfig,
    calibration: str | os.PathLike | Text | Sequence[Any] | torch.Tensor | None,
    num_windows: int | None,
    window_length: int | None,
) -> tuple[Any, dict[str, str]]:
    """What `convert_model` takes of a calibration text in any form, and what is recorded of the text."""
    if isinstance(calibration, os.PathLike):
        calibration = [calibration]
    if isinstance(calibration, list | tuple) and calibration and isinstance(calibration[0], os.PathLike):
        calibration = read_text(calibration)
    if is_text(calibration) and not is_of_pictures(calibration):
        calibration = Text([calibration] if isinstance(calibration, str) else calibration, "a text of one's own")
    if not isinstance(calibration, Text):
        if num_windows is not None or window_length is not None:
            what = "there is no text to read" if calibration is None else "`calibration` is cut already"
            raise ValueError(f"`num_windows` and `window_length` say how much of a text is read, but {what}.")
        if isinstance(calibration, torch.Tensor) and calibration.ndim == 2:
            check_read_twice("input_ids", calibration.shape[1], config.max_position_embeddings)
        return calibration, {}
    if window_length is None:
        window_length = min(WINDOW_LENGTH, config.max_position_embeddings // 2)
    check_read_twice("window_length", window_length, config.max_position_embeddings)
    logger.info("Calibration text: %s, %s characters", calibration.name, f"{calibration.num_characters:,}")
    tokenizer = tokenizer_of(source.path)
    num_windows = NUM_WINDOWS if num_windows is None else num_windows
    input_ids = calibration_windows(tokenizer, calibration.documents, num_windows, window_length)
    return input_ids, {"text": calibration.name, "sha256": calibration.sha256}


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
    source.copy_companions(unfinished)
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
