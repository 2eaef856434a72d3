"""Backends of the MoSA heads. They know tensors only; `reference` is the specification that tests compare with."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from . import portable, reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference, "torch": portable}
_active = "torch"


def backend() -> ModuleType:
    """The module whose `selected_heads` and `all_attention` the MoSA heads call."""
    return _BACKENDS[_active]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Run every MoSA head on the named backend inside the `with` block: "reference" (slow and obvious) or "torch".

    Raises:
        ValueError: for a name that is not available.
    """
    global _active
    if name not in _BACKENDS:
        raise ValueError(f"Backend {name!r} is not available; choose one of {sorted(_BACKENDS)}.")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous
