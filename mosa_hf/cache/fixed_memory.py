"""Memory of a sparse store that does not grow, where `EntryMemory` does. In nothing else do the two differ."""

import math
from typing import Any, NamedTuple

import torch

from ..kernels.entries import Entries
from .memory import EntryMemory, evenly_spaced


class FixedSize(NamedTuple):
    """How much each row and group has room for."""

    selected: int  # tokens, those in the window included
    max_cache_len: int  # tokens that there will be at most


class FixedMemory(EntryMemory):
    """
    Ranges start at multiples of one capacity, `stride`, and never move, as a compiled decoding step needs. Counts stay
    where they are too, and no device is asked.

    Args:
        window, limit: entries of a range: of a ring, and of selected tokens, those in the ring included.
        max_cache_len: tokens of a row, which are all the entries that a range can need.
        like: see `EntryMemory`.
    """

    is_fixed = True

    def __init__(self, window: int, limit: int, max_cache_len: int, *like: Any):
        self.limit = limit
        # Without a window, a token is appended before the one that makes way for it is evicted.
        self.stride: int = min(window + limit + (window == 0), max_cache_len)
        self.max_length = self.stride
        super().__init__(*like)
        self._allocate(*self._places(self.length, []))
        if not torch.compiler.is_compiling():  # as upstream's static layers do: else no CUDA graphs
            for states in self.tensors():
                torch._dynamo.mark_static_address(states)

    def _places(self, length: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        return evenly_spaced(length, self.stride), [self.stride] * length.numel()

    def may_change(self, *held: torch.Tensor) -> bool:
        return True

    def replaced(self, counts: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return counts.copy_(new)

    def _set_length(self, length: torch.Tensor, lengths: list[int]) -> None:
        self.length.copy_(length)
        self.last_read = None

    def _ask(self, length: torch.Tensor) -> list[int]:
        return []

    def _least_free(self, lengths: list[int]) -> int:
        return 0  # as many as are asked for: a budget keeps them within capacity

    def lengthen(self, new: torch.Tensor | int | None) -> None:
        Entries.lengthen(self, new)
        self.last_read = None

    def reserve_one(self, num_certain: int = 1) -> None:
        pass


def static_capacity(max_cache_len: int, sparsity: float) -> int:
    """
    Selected tokens for which a static cache has capacity in each row and group: twice the share that `mosa_sparsity`
    asks for and 64 more, since a threshold selects more of some texts than of others; at most all tokens.
    """
    return min(max_cache_len, math.ceil(2 * max_cache_len / sparsity) + 64)
