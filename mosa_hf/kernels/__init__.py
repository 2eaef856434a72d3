"""Backends of the MoSA heads. They know tensors only; `reference` is the specification that tests compare with."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from . import portable, reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference, "torch": portable}
_chosen: str | None = None


def _load_triton() -> None:
    if importlib.util.find_spec("triton") is not None:
        _BACKENDS["triton"] = importlib.import_module(".triton", __name__)


if torch.version.cuda or torch.version.hip:  # elsewhere, when it is asked for
    _load_triton()


def backend(states: torch.Tensor | None = None) -> ModuleType:
    """
    The module whose `selected_heads`, `all_attention`, `decode_selected` and `decode_all` the MoSA heads call on
    tensors like `states`: what `use_backend` chose; else Triton on a GPU, PyTorch elsewhere.
    """
    if _chosen is not None:
        return _BACKENDS[_chosen]
    # Triton's kernels add up in float32: a float64 model wants more.
    on_gpu = states is not None and states.device.type == "cuda" and states.dtype != torch.float64
    return _BACKENDS["triton"] if on_gpu and "triton" in _BACKENDS else portable


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Run every MoSA head on the named backend inside the `with` block: "reference" (slow and obvious), "torch" or
    "triton" (on a GPU, or on Triton's interpreter: `TRITON_INTERPRET=1` before anything imports Triton).

    Raises:
        ValueError: for a name that is not available.
    """
    global _chosen
    if name == "triton" and name not in _BACKENDS:
        _load_triton()
    if name not in _BACKENDS:
        raise ValueError(f"Backend {name!r} is not available; choose one of {sorted(_BACKENDS)}.")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous
