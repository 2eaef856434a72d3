"""The weight files of a checkpoint, checked before anything is loaded."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# Dtypes, as safetensors names them, of weights that are not quantised.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHECKED = 65536  # numbers of a tensor that `check_finite` reads


class TensorHeader(NamedTuple):
    """What a file says of a tensor before it is read; `dtype` as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None  # None: of a tensor in memory


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
    files = [directory / name for name in sorted(set(weight_map(directory).values()))]
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
        index, listed = directory / SAFE_WEIGHTS_INDEX_NAME, weight_map(directory)
        held = {name: header.file.name for name, header in headers.items() if header.file is not None}
        for name, file_name in listed.items():
            if held.get(name) != file_name:
                raise ValueError(f"{index} says that {name} is in {file_name}, which it is not.")
        if missing := sorted(headers.keys() - listed):
            raise ValueError(f"{index} lacks {missing[0]}, which is in {held[missing[0]]}.")
    return headers


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


def loaded_headers(weights: Mapping[str, torch.Tensor] | Iterable[str | os.PathLike]) -> dict[str, TensorHeader]:
    """
    Tensor name → header of what Transformers has chosen to load: tensors, or files. Of files that have a tensor of one
    name, the last one counts, as there; whether an index agrees does not matter, as there.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that is truncated or otherwise damaged.
    """
    if isinstance(weights, Mapping):
        return _headers_of(weights, None)
    headers: dict[str, TensorHeader] = {}
    for path in map(Path, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} lacks the weight file {path.name}: copy or download it again.")
        headers |= file_headers(path) if path.suffix == ".safetensors" else _pickle_headers(path)
    return headers


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


def _pickle_headers(path: Path) -> dict[str, TensorHeader]:
    """As `file_headers`, of a file that `torch.save` wrote; the tensors' numbers are mapped and not read."""
    try:
        return _headers_of(load_state_dict(path), path)
    except Exception as error:  # whatever a damaged file makes PyTorch raise
        raise ValueError(f"{path} cannot be read ({error}): if it is damaged, copy or download it again.") from error


def _headers_of(tensors: Mapping[str, torch.Tensor], file: Path | None) -> dict[str, TensorHeader]:
    names = {dtype: name for name, dtype in FLOATING.items()}
    return {
        name: TensorHeader(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), file)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def weight_map(directory: Path) -> dict[str, str]:
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
