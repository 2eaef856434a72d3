"""The tensors that MoSA kernels exchange. Kernels know tensors only, never configs or modules.

Letters used throughout: B rows of the batch, T tokens of this call, S tokens read from a cache, D hidden size,
d head size, G groups (one router, key head and value head each), R query heads a group, K slots for selected tokens.
"""

from typing import NamedTuple

import torch

NEVER = torch.iinfo(torch.int64).max  # an `evicted_at` that no position reaches


class HeadWeights(NamedTuple):
    """Projections of one layer's MoSA heads, group by group."""

    query: torch.Tensor  # [G, R * d, D]
    key: torch.Tensor  # [G, d, D]
    value: torch.Tensor  # [G, d, D]
    output: torch.Tensor  # [G, D, R * d]
    query_bias: torch.Tensor | None = None  # [G, R * d]
    key_bias: torch.Tensor | None = None  # [G, d]
    value_bias: torch.Tensor | None = None  # [G, d]
    # If given, `Tokens.gate` is sigmoid(x · router + router_bias), and a kernel may pass its gradient on to these and
    # to the selected tokens instead of to `gate`, which costs as much as the logits of all tokens.
    router: torch.Tensor | None = None  # [G, D]
    router_bias: torch.Tensor | None = None  # [G]


class Tokens(NamedTuple):
    """The tokens of one call of the paper's heads: where they stand and what the routers said of them.

    A token's `position` counts the real (not padding) tokens before it in its row, cached ones included, so it does
    not depend on padding. Rotary angles are separate: they come with `cos` and `sin`.
    """

    position: torch.Tensor  # [B, T] int64
    valid: torch.Tensor | None  # [B, T] bool, False on padding; None: no padding. Padding is on the left only.
    segment: torch.Tensor | None  # [B, T] int64, which packed sequence a token belongs to; None: one sequence a row
    cos: torch.Tensor  # [B, T, rotary_dim], rotary_dim <= d
    sin: torch.Tensor  # [B, T, rotary_dim]
    selected: torch.Tensor  # [B, T, G] bool, False on padding
    gate: torch.Tensor  # [B, T, G], factor on a selected token's output: sigmoid(z) in the paper
    score: torch.Tensor | None = None  # [B, T, G], what a cache budget compares: logits, inf if never to be evicted
    evicted_at: torch.Tensor | None = None  # [B, T, G] int64, see `KeyValues`
    num_selected: int | None = None  # of the row and group that has most; None: ask the device


class KeyValues(NamedTuple):
    """Keys (rotated) and values of some tokens, each group with its own tokens, in ascending position."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    position: torch.Tensor  # [B, G, S] int64
    valid: torch.Tensor | None  # [B, G, S] bool, False on empty slots; None: every slot is filled
    selected: torch.Tensor | None  # [B, G, S] bool; None: every filled slot holds a selected token
    # [B, G, S] int64: the first position whose query no longer reads this selected token, because a cache budget has
    # evicted it (its window still reads it); None: no budget
    evicted_at: torch.Tensor | None = None
    score: torch.Tensor | None = None  # [B, G, S], see `Tokens`; None: no budget
    # Selected tokens of these that are out of the last one's window, of the group that has most. None: ask the device
    num_far: int | None = None
    far_up_to: torch.Tensor | None = None  # [B, G, F] int64, the F tokens out of it: how many are selected up to each


def join(*parts: KeyValues | None) -> KeyValues:
    """All of these keys in one, masks spelled out; `evicted_at` where any has it, and scores where all have them."""
    given = [part for part in parts if part is not None]
    true = [torch.ones_like(part.position, dtype=torch.bool) for part in given]
    scores = [part.score for part in given if part.score is not None]
    evicted_at = None
    if any(part.evicted_at is not None for part in given):
        never = [torch.full_like(part.position, NEVER) for part in given]
        evicted_at = _cat([part.evicted_at for part in given], never)
    return KeyValues(
        torch.cat([part.key for part in given], dim=2),
        torch.cat([part.value for part in given], dim=2),
        torch.cat([part.position for part in given], dim=2),
        _cat([part.valid for part in given], true),
        _cat([part.selected for part in given], true),
        evicted_at,
        torch.cat(scores, dim=2) if len(scores) == len(given) else None,
    )


def _cat(states: list[torch.Tensor | None], missing: list[torch.Tensor]) -> torch.Tensor:
    """`states` [B, G, S] in one, those that are None replaced."""
    return torch.cat([x if x is not None else other for x, other in zip(states, missing, strict=True)], dim=2)
