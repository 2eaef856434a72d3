"""Conversion of a checkpoint on disk: a directory or a GGUF file in, a directory that loads with `AutoModel` out."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..safetensors_files import tensor_shapes
from .configuration import ConversionConfig
from .convert import check_family, convert_model


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    conversion: ConversionConfig,
    calibration_text: str | None = None,
    num_windows: int = 24,
    window_length: int = 1024,
) -> None:
    """
    Convert a checkpoint on disk, tokenizer included.

    Args:
        source: directory with a config, safetensors weights and a tokenizer; or a `.gguf` file.
        destination: directory to create. It appears when it is whole, or not at all.
        conversion: what to produce.
        calibration_text: text that routers and thresholds are fitted on (not needed for `sparsity=1`).
        num_windows, window_length: how much of it: windows, and tokens of one.

    Raises:
        FileExistsError: if `destination` exists.
        FileNotFoundError: if the source, or a file that it lists, does not exist.
        ValueError: for damaged weights, weights that disagree with the config, an unsupported family, a short text.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists: remove it or choose another destination.")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a model directory or a .gguf file.")
    with whole_directory(destination) as unfinished:
        if source.is_file():
            where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
            load = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        elif (source / CONFIG_NAME).is_file():
            where, load = {"pretrained_model_name_or_path": source}, {}
        else:
            raise FileNotFoundError(f"{source} has no {CONFIG_NAME}: it is not a model directory.")
        config = AutoConfig.from_pretrained(**where)
        check_family(config.model_type)
        if source.is_dir():
            check_weights(source, config)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        calibration = None
        if calibration_text is not None:
            calibration = calibration_windows(tokenizer, calibration_text, num_windows, window_length)
        model = AutoModelForCausalLM.from_pretrained(**where, **load)
        converted = convert_model(model, conversion, calibration)
        converted.config.mosa_conversion["source"] = source.name
        converted.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, num_windows: int = 24, window_length: int = 1024
) -> torch.Tensor:
    """
    At most `num_windows` windows of `window_length` tokens, spread evenly over `text`: token ids `[N, T]`.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    input_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    available = len(input_ids) // window_length
    if available == 0:
        raise ValueError(
            f"The calibration text has {len(input_ids)} tokens, fewer than one window of {window_length}: give more "
            "text, or set a smaller `window_length`."
        )
    windows = input_ids[: available * window_length].view(available, window_length)
    chosen = torch.linspace(0, available - 1, min(num_windows, available)).round().long()
    return windows[chosen]


def check_weights(directory: Path, config: PreTrainedConfig) -> None:
    """
    Read the headers of a checkpoint's safetensors files and compare them with its config.

    Raises:
        FileNotFoundError: for a missing weight file.
        ValueError: for a truncated file; for tensors that are missing, or whose shapes disagree with the config.
    """
    shapes = tensor_shapes(directory)
    if not shapes:
        raise FileNotFoundError(f"{directory} has no safetensors weights: save it with `model.save_pretrained` first.")
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(expected, "all_tied_weights_keys", None) or {})
    for key, tensor in expected.state_dict().items():
        if key in shapes and shapes[key] != tuple(tensor.shape):
            raise ValueError(
                f"{directory}: {key} has shape {shapes[key]}, but config.json asks for {tuple(tensor.shape)}. Weights "
                "and config belong to different models."
            )
        if key not in shapes and key not in tied:
            raise ValueError(f"{directory}: the weights lack {key}, which config.json asks for.")


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """A directory to fill: it becomes `destination` when the block ends, and vanishes if the block fails."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is private
        os.rename(unfinished, destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
