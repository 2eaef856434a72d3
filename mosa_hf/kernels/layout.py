"""The tensors that MoSA kernels exchange. Kernels know tensors only, never configs or modules.

Letters used throughout: B rows of the batch, T tokens of this call, S tokens read from a cache, D hidden size,
d head size, G groups (one router, key head and value head each), R query heads a group, K slots for selected tokens.
"""

from typing import NamedTuple

import torch

NEVER = torch.iinfo(torch.int64).max  # an `until` that no position reaches


class HeadWeights(NamedTuple):
    """Projections of one layer's MoSA heads, group by group."""

    query: torch.Tensor  # [G, R * d, D]
    key: torch.Tensor  # [G, d, D]
    value: torch.Tensor  # [G, d, D]
    output: torch.Tensor  # [G, D, R * d]
    query_bias: torch.Tensor | None = None  # [G, R * d]
    key_bias: torch.Tensor | None = None  # [G, d]
    value_bias: torch.Tensor | None = None  # [G, d]


class Tokens(NamedTuple):
    """The tokens of one call: where they stand and what the routers said of them.

    A token's `position` counts the real (not padding) tokens before it in its row, cached ones included, so it does
    not depend on padding. Rotary angles are separate: they come with `cos` and `sin`.
    """

    position: torch.Tensor  # [B, T] int64
    valid: torch.Tensor | None  # [B, T] bool, False on padding; None: no padding. Padding is on the left only.
    segment: torch.Tensor | None  # [B, T] int64, which packed sequence a token belongs to; None: one sequence a row
    cos: torch.Tensor  # [B, T, rotary_dim], rotary_dim <= d
    sin: torch.Tensor  # [B, T, rotary_dim]
    selected: torch.Tensor  # [B, T, G] bool, False on padding
    # [B, T, G]: factor on outputs ("selected") or log-bias on far keys ("all"); None: neutral
    gate: torch.Tensor | None
    score: torch.Tensor | None = None  # [B, T, G], what a cache budget compares: logits, inf if never to be evicted
    until: torch.Tensor | None = None  # [B, T, G] int64, see `KeyValues`; only form "selected" reads it here


class KeyValues(NamedTuple):
    """Keys (rotated) and values of some tokens, each group with its own tokens, in ascending position."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    position: torch.Tensor  # [B, G, S] int64
    valid: torch.Tensor | None  # [B, G, S] bool, False on empty slots; None: every slot is filled
    selected: torch.Tensor | None  # [B, G, S] bool; None: every filled slot holds a selected token
    # [B, G, S] int64: the first position whose query no longer reads this selected token, because a cache budget has
    # evicted it (its window still reads it); None: no budget
    until: torch.Tensor | None = None
    score: torch.Tensor | None = None  # [B, G, S], see `Tokens`; None: no budget


class RaggedKeyValues(NamedTuple):
    """
    Keys (rotated) and values of selected tokens, as a growing cache holds them: a run of entries for each row and
    group, with room to grow between the runs.
    """

    key: torch.Tensor  # [N, d]
    value: torch.Tensor  # [N, d]
    position: torch.Tensor  # [N] int32, ascending within a run
    start: torch.Tensor  # [B, G] int64, the first entry of each run
    count: torch.Tensor  # [B, G] int64, entries of each run
    until: torch.Tensor | None = None  # [N] int64, see `KeyValues`
    score: torch.Tensor | None = None  # [N], see `Tokens`; None: no budget

    def slots(self, groups: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The runs of `groups` (all by default), padded: entries `[B, G, S]` int64 and which of them are filled."""
        count, start = (x if groups is None else x[:, groups] for x in (self.count, self.start))
        slot = torch.arange(int(count.max()) if count.numel() else 0, device=count.device)
        filled = slot < count[..., None]  # [B, G, S]
        return torch.where(filled, start[..., None] + slot, 0), filled

    def pad(self, groups: torch.Tensor | None = None) -> KeyValues | None:
        """The entries of `groups` (all by default) with empty slots at the end; None if there are none."""
        entries, filled = self.slots(groups)
        if filled.shape[-1] == 0:
            return None
        until, score = (None if states is None else states[entries] for states in (self.until, self.score))
        return KeyValues(
            self.key[entries], self.value[entries], self.position[entries].long(), filled, None, until, score
        )


class FixedKeyValues(NamedTuple):
    """
    A cache of fixed size, updated in place: up to C selected tokens of each row and group in no particular order, and
    a ring of the last W tokens (W = `window` of form "all"; 0 where there is no window), token p in slot p % W.
    """

    key: torch.Tensor  # [B, G, C, d]
    value: torch.Tensor  # [B, G, C, d]
    position: torch.Tensor  # [B, G, C] int32
    score: torch.Tensor  # [B, G, C] float32, router logits; inf for tokens that are never evicted
    count: torch.Tensor  # [B, G] int32: slots 0 .. count - 1 are filled
    num_evicted: torch.Tensor  # [B, G] int32, selected tokens given up so far because there were too many
    ring_key: torch.Tensor  # [B, G, W, d]
    ring_value: torch.Tensor  # [B, G, W, d]
    ring_score: (
        torch.Tensor
    )  # [B, G, W] float32; -inf where the slot is empty or its token not (or no longer) selected
    num_tokens: torch.Tensor  # [B] int64, real tokens seen


def join(*parts: KeyValues | None) -> KeyValues:
    """All of these keys in one, masks spelled out, `until` where any part has one, and scores where all have them."""
    parts = [part for part in parts if part is not None]
    true = [torch.ones_like(part.position, dtype=torch.bool) for part in parts]
    until = score = None
    if any(part.until is not None for part in parts):
        until = [torch.full_like(part.position, NEVER) if part.until is None else part.until for part in parts]
        until = torch.cat(until, dim=2)
    if all(part.score is not None for part in parts):
        score = torch.cat([part.score for part in parts], dim=2)
    return KeyValues(
        torch.cat([part.key for part in parts], dim=2),
        torch.cat([part.value for part in parts], dim=2),
        torch.cat([part.position for part in parts], dim=2),
        torch.cat([t if part.valid is None else part.valid for part, t in zip(parts, true, strict=True)], dim=2),
        torch.cat([t if part.selected is None else part.selected for part, t in zip(parts, true, strict=True)], dim=2),
        until,
        score,
    )


def gather_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [B, G, S, ...] at slots `index` [B, G, K], or [B, 1, K] where it is the same for all groups."""
    channels = states.shape[3:]
    index = index.expand(-1, states.shape[1], -1)
    return states.gather(2, index.view(index.shape + (1,) * len(channels)).expand(index.shape + channels))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels of `states` [..., d]; the others pass through."""
    rotary_dim = cos.shape[-1]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated
