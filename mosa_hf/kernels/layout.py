"""The tensors that MoSA kernels exchange. Kernels know tensors only, never configs or modules.

Letters used throughout: B rows of the batch, T tokens of this call, S tokens read from a cache, D hidden size,
d head size, G groups (one router, key head and value head each), R query heads a group, K slots for selected tokens.
"""

from typing import NamedTuple

import torch


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
    gate: (
        torch.Tensor | None
    )  # [B, T, G]: factor on outputs ("selected") or log-bias on far keys ("all"); None: neutral


class KeyValues(NamedTuple):
    """Keys (rotated) and values of some tokens, each group with its own tokens, in ascending position."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    position: torch.Tensor  # [B, G, S] int64
    valid: torch.Tensor | None  # [B, G, S] bool, False on empty slots; None: every slot is filled
    selected: torch.Tensor | None  # [B, G, S] bool; None: every filled slot holds a selected token


class RaggedKeyValues(NamedTuple):
    """Keys (rotated) and values of selected tokens, as a cache holds them: by row, by group, no empty slots."""

    key: torch.Tensor  # [N, d]
    value: torch.Tensor  # [N, d]
    position: torch.Tensor  # [N] int32, ascending within a row and group
    count: torch.Tensor  # [B, G] int64, entries of each row and group; N is their sum

    def pad(self, groups: torch.Tensor | None = None) -> KeyValues | None:
        """The entries of `groups` (all by default) with empty slots at the end; None if there are none."""
        count, start = self.count, self.count.flatten().cumsum(0).view_as(self.count) - self.count
        if groups is not None:
            count, start = count[:, groups], start[:, groups]
        num_slots = int(count.max()) if count.numel() else 0
        if num_slots == 0:
            return None
        slot = torch.arange(num_slots, device=count.device)
        filled = slot < count[..., None]  # [B, G, S]
        entries = (start[..., None] + slot).clamp(max=len(self.key) - 1)
        return KeyValues(self.key[entries], self.value[entries], self.position[entries].long(), filled, None)


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
    ring_score: torch.Tensor  # [B, G, W] float32; -inf where the slot is empty or its token not (or no longer) selected
    num_tokens: torch.Tensor  # [B] int64, real tokens seen


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels of `states` [..., d]; the others pass through."""
    rotary_dim = cos.shape[-1]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated
