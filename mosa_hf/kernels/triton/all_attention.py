"""Form "all", composed of the ops: the far keys become slots, and what each query reads a range of them."""

import torch
import torch.nn.functional as F

from ..layout import NEVER, KeyValues, RaggedKeyValues, Tokens, gather_slots
from .attention import FarKeys, NearKeys, prefix_attention
from .select import selected_positions


def all_attention(
    query: torch.Tensor,
    near: KeyValues,
    kept: KeyValues | RaggedKeyValues | None,
    tokens: Tokens,
    window: int,
    far_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Same function as `reference.all_attention`. Relies on padding being on the left of `near` and of the queries.

    The device is asked for the largest number of selected tokens, and of kept ones. A compiled graph makes do without
    and takes memory for as many as there could be; kernels pass over the empty slots.
    """
    num_queries, num_near = query.shape[3], near.key.shape[2]
    device, dtype = query.device, near.value.dtype
    # The near slots that the queries stand at; before slot `reach` keys are far.
    slot = num_near - num_queries + torch.arange(num_queries, device=device)  # [T]
    reach = (slot - window + 1).clamp(min=0)
    selected = near.selected if near.valid is None else near.selected & near.valid  # [B, G, N]
    before = F.pad(selected.cumsum(-1), (1, 0))  # [B, G, N + 1], selected tokens in the slots before
    start, end = None, before.index_select(-1, reach)  # [B, G, T]
    near_start = reach
    if near.valid is not None:
        near_start = torch.maximum(reach, num_near - near.valid.sum(-1, keepdim=True))
    if tokens.segment is not None:  # packed sequences come without a cache: queries and near slots coincide
        changes = F.pad(tokens.segment[:, 1:] != tokens.segment[:, :-1], (1, 0))
        segment_start = torch.where(changes, slot, 0).cummax(-1).values[:, None]  # [B, 1, T]
        start = before.gather(-1, segment_start.expand_as(end))
        near_start = torch.maximum(near_start, segment_start)

    # Far slots: kept entries, those of shorter groups at the end of their part, then the selected near tokens.
    num_far = max(num_near - window, 0)
    num_slots = num_far
    if num_far and not torch.compiler.is_compiling():
        num_slots = int(before[..., num_far].max())
    index, _ = selected_positions(selected[..., :num_far].transpose(1, 2), num_slots)  # [B, G, K]
    index, entry = index.long(), None
    kept_key = kept_value = kept_until = None
    num_kept = 0
    if kept is not None:
        kept_key, kept_value, _, run_start, run_length, kept_until, *_ = _as_runs(kept)
        is_padded = isinstance(kept, KeyValues) and torch.compiler.is_compiling()
        num_kept = kept.key.shape[2] if is_padded else int(run_length.max())
    if num_kept:
        num_empty = num_kept - run_length[..., None]  # [B, G, 1]
        kept_slot = torch.arange(num_kept, device=device) - num_empty
        entry = torch.where(kept_slot >= 0, run_start[..., None] + kept_slot, 0)  # [B, G, S - K]
        start, end = num_empty, num_kept + end

    bias = until = None
    if far_bias is not None:
        bias = _far_slots(None, entry, far_bias, index, empty=0.0)
    if near.until is not None or kept_until is not None:
        near_until = torch.full_like(near.position, NEVER) if near.until is None else near.until
        until = _far_slots(kept_until, entry, near_until, index, empty=NEVER)

    # Autocast may leave rotated queries and keys in float32: back to what values were projected in.
    far = FarKeys(
        _far_slots(kept_key, entry, near.key, index).to(dtype),
        _far_slots(kept_value, entry, near.value, index),
        start,
        end,
        bias,
        until,
    )
    window_keys = NearKeys(near.key.to(dtype), near.value, near_start, slot + 1) if window else None
    return prefix_attention(query.to(dtype), far, window_keys, tokens.position[:, None])


def _as_runs(kept: KeyValues | RaggedKeyValues) -> RaggedKeyValues:
    """`kept` with its filled slots, which come first in each row and group, as runs of entries."""
    if isinstance(kept, RaggedKeyValues):
        return kept
    batch_size, num_groups, num_slots = kept.position.shape
    run = torch.arange(batch_size * num_groups, device=kept.key.device).view(batch_size, num_groups)
    count = torch.full_like(run, num_slots) if kept.valid is None else kept.valid.sum(-1)
    states = (None if x is None else x.flatten(0, 2) for x in (kept.key, kept.value, kept.position, kept.until))
    key, value, position, until = states
    return RaggedKeyValues(key, value, position, run * num_slots, count, until)


def _far_slots(
    of_kept: torch.Tensor | None,
    entry: torch.Tensor | None,
    of_near: torch.Tensor,
    index: torch.Tensor,
    empty: float = 0.0,
) -> torch.Tensor:
    """
    What the far slots hold, [B, G, S, ...]: `of_kept` [., ...] (None: `empty`) at `entry` [B, G, S - K], where there
    are any, and then `of_near` [B, G, N, ...] at `index` [B, G, K].
    """
    states = gather_slots(of_near, index)
    if entry is None:
        return states
    channels = of_near.shape[3:]
    if of_kept is None:
        first = states.new_full(entry.shape + channels, empty)
    else:
        first = of_kept.index_select(0, entry.flatten()).view(entry.shape + channels)
    return torch.cat((first, states), dim=2)
