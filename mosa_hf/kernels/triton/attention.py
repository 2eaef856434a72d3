"""
Attention of queries that each read a range of sorted keys: a prefix of the selected ones, and a sliding window.

Selections are sorted by position, so what a query reads of them is a range of slots and never a mask (DESIGN
section 2). A program holds a tile of queries with all R heads of a group as its rows, so that keys are read once for
all of them, and visits only key blocks that some row of the tile reads: work is O(T * (K + window)).
"""

from typing import NamedTuple

import torch


class FarKeys(NamedTuple):
    """Selected tokens in ascending position; query i reads the slots start[i] <= s < end[i]."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    start: torch.Tensor | None  # [B, G or 1, T] int; None: 0. Nonzero for packed sequences, or padding in front
    end: torch.Tensor  # [B, G or 1, T] int, at most S; a query with end <= start reads nothing
    bias: torch.Tensor | None = None  # [B, G, S], added to the scores of a slot
    until: torch.Tensor | None = None  # [B, G, S] int: the slot is read by queries of lower `position` only


class NearKeys(NamedTuple):
    """Consecutive tokens, selected or not; query i reads the slots start[i] <= s < end[i]."""

    key: torch.Tensor  # [B, G, N, d]
    value: torch.Tensor  # [B, G, N, d]
    start: torch.Tensor | None  # [B, G or 1, T] int; None: 0
    end: torch.Tensor  # [B, G or 1, T] int, at most N


def prefix_attention(
    query: torch.Tensor,
    far: FarKeys,
    near: NearKeys | None = None,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One softmax over what each query reads of `far` and of `near`, scores scaled by d ** -0.5.

    Any ranges give right results. They are fast where neighbouring queries read neighbouring slots: a tile of queries
    visits every slot between the first and the last that one of them reads.

    Args:
        query: `[B, G, R, T, d]`, d <= 256, float32, float16 or bfloat16, as keys and values.
        far: the selected keys. "selected" form: `FarKeys(key, value, None, i + 1)` and nothing else.
        near: the window, or other keys.
        position: `[B, G or 1, T]` int, of the queries; needed with `far.until`.

    Returns:
        `[B, G, R, T, d]`; zero where a query reads nothing. Gradients flow to queries, keys, values and the bias, and
        are deterministic.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
    """
    raise NotImplementedError
