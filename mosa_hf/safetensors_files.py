"""The safetensors files of a checkpoint directory, checked before anything is loaded."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

FLOATING = {"F64", "F32", "F16", "BF16"}  # dtypes, as safetensors names them, of weights that are not quantised
CHECKED = 65536  # numbers of a tensor that `check_finite` reads


class TensorHeader(NamedTuple):
    """What a file says of a tensor before it is read; `dtype` as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def weight_files(directory: Path) -> list[Path]:
    """
    The files that hold a checkpoint's weights, in the order in which Transformers looks for them: one file, or those
    that the index lists; none if it has no safetensors weights.

    Raises:
        FileNotFoundError: if the index lists a file that is not there.
        ValueError: for an index that cannot be read, or that names a file outside of `directory`.
    """
    single = directory / SAFE_WEIGHTS_NAME
    if single.is_file():
        return [single]
    if not (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return []
    files = [directory / name for name in sorted(set(_weight_map(directory).values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} lacks the weight file {file.name}: copy or download it again.")
    return files


def tensor_headers(directory: Path) -> dict[str, TensorHeader]:
    """
    Tensor name → header, read from the files' headers alone; empty if there are no safetensors weights.

    Raises:
        FileNotFoundError: see `weight_files`.
        ValueError: for a file that is truncated or otherwise damaged, and for an index that disagrees with the files.
    """
    files = weight_files(directory)
    headers: dict[str, TensorHeader] = {}
    for path in files:
        for name, header in file_headers(path).items():
            if name in headers:
                raise ValueError(f"{name} is both in {headers[name].file} and in {path}: keep one of them.")
            headers[name] = header
    if files and files[0].name != SAFE_WEIGHTS_NAME:
        index, listed = directory / SAFE_WEIGHTS_INDEX_NAME, _weight_map(directory)
        for name, file_name in listed.items():
            if name not in headers or headers[name].file.name != file_name:
                raise ValueError(f"{index} says that {name} is in {file_name}, which it is not.")
        if missing := sorted(headers.keys() - listed):
            raise ValueError(f"{index} lacks {missing[0]}, which is in {headers[missing[0]].file.name}.")
    return headers


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape; raises as `tensor_headers`."""
    return {name: header.shape for name, header in tensor_headers(directory).items()}


def file_headers(path: Path) -> dict[str, TensorHeader]:
    """
    Tensor name → header of one file.

    Raises:
        ValueError: for a file that is truncated or otherwise damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorHeader(tuple(x.get_shape()), x.get_dtype(), path) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or download it again.") from error


def check_finite(headers: dict[str, TensorHeader]) -> None:
    """
    Look for NaN and infinity in the first `CHECKED` numbers of each tensor of floating dtype: a diverged or damaged
    checkpoint seldom hides them, and reading all of a large one would take longer than all else.

    Raises:
        ValueError: naming file and tensor.
    """
    for path in dict.fromkeys(header.file for header in headers.values()):
        with safe_open(path, framework="pt") as file:
            for name, header in headers.items():
                if header.file != path or header.dtype not in FLOATING or 0 in header.shape:
                    continue
                numbers = file.get_slice(name)
                if header.shape:
                    row = torch.Size(header.shape[1:]).numel()
                    sample = numbers[: max(CHECKED // row, 1)]
                else:
                    sample = file.get_tensor(name)
                if not sample.isfinite().all():
                    raise ValueError(f"{path}: {name} has NaN or infinite values.")


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → file name of the index, whose file names may not lead out of the directory."""
    path = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        is_map = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no readable `weight_map` ({error!r}): copy or download it again.") from error
    if not is_map or not names:
        raise ValueError(f"{path}: `weight_map` must give a file name for each tensor.")
    for name in names.values():
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {name!r}: weight files must be safetensors files of the same directory. Pickled "
                "weights are not read; load them with Transformers and save them again, as safetensors."
            )
    return names
