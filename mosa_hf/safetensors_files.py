"""The safetensors files of a checkpoint directory, checked before anything is loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def weight_files(directory: Path) -> list[Path]:
    """
    The files that hold a checkpoint's weights; none if it has no safetensors weights.

    Raises:
        FileNotFoundError: if the index lists a file that is not there.
    """
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [path for path in [directory / SAFE_WEIGHTS_NAME] if path.is_file()]
    files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} lacks the weight file {file.name}: copy or download it again.")
    return files


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of a checkpoint's tensors, read from the files' headers alone.

    Raises:
        FileNotFoundError: see `weight_files`.
        ValueError: for a file that is truncated or otherwise damaged.
    """
    shapes = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}): copy or download it again.") from error
    return shapes
