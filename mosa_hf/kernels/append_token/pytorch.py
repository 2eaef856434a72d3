"""One more token wherever PyTorch runs: on a CPU, what no range needs is left out."""

import torch

from ..entries import Entries
from . import reference
from .reference import Taken, Token


def append_token(
    entries: Entries,
    token: Token,
    num_stored: torch.Tensor,
    window: int,
    budget: int | None = None,
    notes: bool = False,
    common: int | None = None,
) -> Taken:
    """Same function as `reference.append_token`."""
    is_host = num_stored.device.type == "cpu"
    if common is None and token.valid is None and is_host and not torch.compiler.is_compiling():
        lengths = set(num_stored.tolist())
        common = lengths.pop() if len(lengths) == 1 else None
    return reference.append_token(entries, token, num_stored, window, budget, notes, common, _is_any)


def _is_any(mask: torch.Tensor) -> bool:
    """Whether a mask holds a True, as far as it may be looked at."""
    return mask.device.type != "cpu" or torch.compiler.is_compiling() or bool(mask.any())
