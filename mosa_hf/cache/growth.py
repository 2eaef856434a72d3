"""How the memory of a sparse store grows: with what is appended, or not at all. In nothing else do the two differ."""

import math
from dataclasses import dataclass

import torch

SLACK = 64  # one free entry for so many that a run holds: little memory against a copy of all for each new entry


@dataclass  # not a named tuple, which exporters that take a cache apart would build wrongly
class Memory:
    """Where the runs of every row and group lie in a flat memory."""

    start: torch.Tensor  # [B, G] int64, first entry of each run
    capacity: torch.Tensor  # [B, G] int64, entries that a run may have
    size: int  # entries in all
    stride: int | None  # see `Runs.stride`


class Growing:
    """Runs move to larger memory when one of them is full; see `Fixed` for the attributes."""

    is_fixed = False
    limit = None
    overflows = False

    def memory(self, count: torch.Tensor) -> Memory:
        """For runs of `count` [B, G] entries and a little slack behind each."""
        capacity = count + count // SLACK + 1
        start = capacity.flatten().cumsum(0).view_as(count) - capacity
        return Memory(start, capacity, int(capacity.sum()), None)


class Fixed:
    """
    Runs have room for `window + capacity` entries each and never move, as a compiled decoding step needs. More
    selected tokens than `capacity` are evicted as by a budget of that size.

    Args:
        window: tokens that a store holds whether selected or not.
        capacity: selected tokens of a row and group, those in the window included.
        budget: `mosa_cache_budget`, which is below the capacity or None.

    Attributes:
        limit: selected tokens beyond which the lowest score is evicted; None: no limit.
        overflows: whether an eviction was not asked for by a budget.
    """

    is_fixed = True

    def __init__(self, window: int, capacity: int, budget: int | None):
        self.overflows = budget is None or budget > capacity
        self.limit = capacity if budget is None else min(budget, capacity)
        # Without a window, a token is appended before the one that makes way for it is evicted.
        self.stride = window + self.limit + (window == 0)

    def memory(self, count: torch.Tensor) -> Memory:
        """For runs of any `count` [B, G] up to the capacity."""
        start = torch.arange(count.numel(), device=count.device).view_as(count) * self.stride
        return Memory(start, torch.full_like(count, self.stride), count.numel() * self.stride, self.stride)


def static_capacity(max_cache_len: int, sparsity: float) -> int:
    """
    Selected tokens for which a static cache has capacity in each row and group: twice the share that `mosa_sparsity`
    asks for and 64 more, since a threshold selects more of some texts than of others; at most all tokens.
    """
    return min(max_cache_len, math.ceil(2 * max_cache_len / sparsity) + 64)
