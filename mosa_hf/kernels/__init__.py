"""
Operations of MoSA, on tensors: a folder each, in which `reference` is the specification, `pytorch` runs anywhere and
`triton` on GPUs.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

import torch

from .capture import is_captured, is_exported
from .derivatives import is_transformed
from .head_dim import TRITON_HEAD_DIM


class Backend(NamedTuple):
    """One implementation of every operation."""

    sparse_attention: Callable
    sparse_decode: Callable
    selected_heads: Callable
    append_token: Callable


FILES = {"reference": "reference", "torch": "pytorch", "triton": "triton"}  # a backend's files in each folder
_backends: dict[str, Backend] = {}
_chosen: str | None = None
_has_gpu_build = bool(torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton") is not None
_is_old: dict[int, bool] = {}  # GPU → whether it is one on which Triton's kernels are not worth running


def _is_worth_it(device: torch.device) -> bool:
    """Whether Triton's kernels are worth running on a GPU: before sm_80 they spill 13 KB a thread."""
    index = device.index or 0
    if index not in _is_old and not torch.compiler.is_compiling():
        _is_old[index] = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return not _is_old.get(index, False)


def _load(name: str) -> Backend:
    if name not in _backends:
        modules = {operation: import_module(f"{__name__}.{operation}.{FILES[name]}") for operation in Backend._fields}
        _backends[name] = Backend(*(getattr(module, operation) for operation, module in modules.items()))
    return _backends[name]


for _name in ("reference", "torch", *(["triton"] if _has_gpu_build else [])):
    _load(_name)


def backend(states: torch.Tensor, key_dim: int | None = None, value_dim: int | None = None) -> Backend:
    """
    The operations that run on tensors like `states`: what `use_backend` chose; else the reference in a program that is
    exported, which holds PyTorch's own operators then, and under transforms of `torch.func`; else Triton on a GPU of
    sm_80 or later, PyTorch elsewhere, for float64, and for heads that Triton's kernels do not take.

    Args:
        states: of which device and dtype count.
        key_dim: channels of a head's keys; None: it does not depend on them.
        value_dim: of its values; None: as many.
    """
    if _chosen is not None:
        return _backends[_chosen]
    if is_exported() or is_transformed():
        return _backends["reference"]
    # Triton's kernels add up in float32: a float64 model wants more.
    on_gpu = states.device.type == "cuda" and states.dtype != torch.float64
    fits = key_dim is None or (key_dim <= TRITON_HEAD_DIM and value_dim in (None, key_dim))
    return _backends["triton" if on_gpu and _has_gpu_build and fits and _is_worth_it(states.device) else "torch"]


def is_free() -> bool:
    """Whether attention may be computed by others, call by call: nobody has chosen a backend or captures it."""
    return _chosen is None and not is_captured() and not is_transformed()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Run every operation on the named backend inside the `with` block: "reference" (slow and obvious), "torch" or
    "triton" (on a GPU, or on Triton's interpreter: `TRITON_INTERPRET=1` before anything imports Triton).

    Raises:
        ValueError: for a name that is not available.
    """
    global _chosen
    available = [each for each in FILES if each != "triton" or importlib.util.find_spec("triton") is not None]
    if name not in available:
        raise ValueError(f"Backend {name!r} is not available; choose one of {available}.")
    _load(name)
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous
