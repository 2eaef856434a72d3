"""One more token wherever PyTorch runs: on a CPU, what no range needs is left out."""

import torch

from ..tensors import Entries
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
    may_look = num_stored.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_look and common is None and token.valid is None:
        lengths = set(num_stored.tolist())
        common = lengths.pop() if len(lengths) == 1 else None
    return reference.append_token(
        entries, token, num_stored, window, budget, notes, common, lambda mask: not may_look or bool(mask.any())
    )
