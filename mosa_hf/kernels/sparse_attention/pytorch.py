"""Attention of sparse groups wherever PyTorch runs: blocks of queries, each with the keys that it can reach."""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..attend import scaled, softmax
from ..derivatives import once
from ..entries import PackedKeyValues
from ..indexing import gather_slots
from ..opaque import opaque_op
from ..selected_positions.pytorch import selected_positions
from ..tensors import KeyValues
from . import reference

QUERY_BLOCK = 64  # queries scored at once: enough for the matmuls, few masked columns


class FarSlots(NamedTuple):
    """The selected recent tokens that are out of the window of some query, K a group, in ascending position."""

    slot: torch.Tensor  # [B, G, K] int64, of `recent`
    filled: torch.Tensor  # [B, G, K] bool, False behind the last of a group
    key: torch.Tensor  # [B, G, K, d]
    value: torch.Tensor  # [B, G, K, d]
    bias: torch.Tensor | None  # [B, G, K]
    evicted_at: torch.Tensor | None  # [B, G, K]
    most: torch.Tensor  # [S] on the CPU, how many of the K stand up to a recent slot, in the group that has most
    least: torch.Tensor  # [S] on the CPU, and in the one that has least


class Columns(NamedTuple):
    """Keys that a block of T queries scores side by side, and what may be read of them."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    # [B, G, T, S'] bool (or 1 for any of B, G and T), of the last S' keys; every query reads the others. None: all
    mask: torch.Tensor | None
    bias: torch.Tensor | None = None  # [B, G, S], added to the scores


def sparse_attention(
    query: torch.Tensor,
    recent: KeyValues,
    cached: PackedKeyValues | None,
    position: torch.Tensor,
    segment: torch.Tensor | None,
    window: int,
    far_bias: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Same function as `reference.sparse_attention`, block of queries by block: a block scores the cached keys, the
    selected recent keys up to its window, and its window. Relies on padding being on the left of `recent` and of the
    queries.
    """
    if torch.is_autocast_enabled(query.device.type):  # once, as attention itself would in every block
        dtype = torch.get_autocast_dtype(query.device.type)
        query = query.to(dtype)
        recent = recent._replace(key=recent.key.to(dtype), value=recent.value.to(dtype))
    if torch.compiler.is_compiling():
        if cached is not None:  # every shape has to be known
            return reference.sparse_attention(
                query, recent, cached, position, segment, window, far_bias, scale, softcap, sinks
            )
        valid = None if recent.valid is None else recent.valid[:, 0]
        return opaque_sparse_attention(
            query, recent.key, recent.value, far_bias, sinks, recent.position[:, 0], valid, recent.selected,
            recent.evicted_at, position, segment, window, scale, softcap,
        )  # fmt: skip
    if query.numel() == 0:
        return query.new_zeros(*query.shape[:-1], recent.value.shape[-1])
    num_queries, num_recent = query.shape[3], recent.key.shape[2]
    padded = None if cached is None else cached.pad()
    if padded is not None:
        padded = padded._replace(key=padded.key.to(recent.key.dtype), value=padded.value.to(recent.value.dtype))
    far = _far_slots(recent, far_bias, window) if num_recent > window else None
    reads_itself = window > 0 and recent.valid is None
    outputs = []
    for start in range(0, num_queries, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, num_queries))
        slots = range(num_recent - num_queries + start, num_recent - num_queries + queries.stop)  # that they stand at
        positions = position[:, None, queries, None]  # [B, 1, T, 1]
        columns = [
            None if padded is None else _kept_columns(padded, positions),
            None if far is None else _far_columns(far, slots, positions, segment, window),
            _window_columns(recent, slots, segment, window) if window else None,
        ]
        block = query[:, :, :, queries]
        key, value, added = _side_by_side(block, [each for each in columns if each is not None], recent)
        outputs.append(_attention(block, key, value, added, reads_itself, scale, softcap, sinks))
    return torch.cat(outputs, dim=3)


def _far_slots(recent: KeyValues, far_bias: torch.Tensor | None, window: int) -> FarSlots:
    """Finds what is far of S > `window` recent tokens. `far_bias`: `[B, G, S]`."""
    assert recent.selected is not None  # of all tokens, some are not
    selected = recent.selected if recent.valid is None else recent.selected & recent.valid  # [B, G, S]
    num_far = selected.shape[2] - window
    index, filled = selected_positions(selected[:, :, :num_far].transpose(1, 2))  # [B, G, K]
    key, value = (gather_slots(states, index) for states in (recent.key, recent.value))  # [B, G, K, d]
    bias, evicted_at = (
        None if states is None else states.gather(2, index) for states in (far_bias, recent.evicted_at)
    )
    count = selected.cumsum(-1)  # [B, G, S]
    most, least = torch.stack((count.amax((0, 1)), count.amin((0, 1)))).cpu()  # a device is asked once a call
    return FarSlots(index, filled, key, value, bias, evicted_at, most, least)


def _kept_columns(cached: KeyValues, positions: torch.Tensor) -> Columns:
    """The cached keys for queries at `positions` [B, 1, T, 1]."""
    assert cached.valid is not None  # `pad` spells it out
    mask = cached.valid[:, :, None]
    if cached.evicted_at is not None:
        mask = mask & (positions < cached.evicted_at[:, :, None])
    return Columns(cached.key, cached.value, mask)


def _far_columns(
    far: FarSlots, slots: range, positions: torch.Tensor, segment: torch.Tensor | None, window: int
) -> Columns | None:
    """The far keys that some query reaches, for queries at recent slots `slots` and `positions` [B, 1, T, 1]."""
    num_far = int(far.most[slots[-1] - window]) if slots[-1] >= window else 0
    if num_far == 0:
        return None
    num_sure = 0  # as many of them all queries read
    if segment is None and far.evicted_at is None and slots[0] >= window:
        num_sure = int(far.least[slots[0] - window])
    slot = far.slot[:, :, None, num_sure:num_far]
    own = torch.arange(slots.start, slots.stop, device=slot.device)  # [T]
    mask = far.filled[:, :, None, num_sure:num_far] & (slot <= own[:, None] - window)
    if far.evicted_at is not None:
        mask = mask & (positions < far.evicted_at[:, :, None, :num_far])
    if segment is not None:  # packed sequences come without a cache: queries and recent slots coincide
        row = torch.arange(len(segment), device=slot.device)[:, None, None, None]
        mask = mask & (segment[row, slot] == segment[:, None, slots.start : slots.stop, None])
    bias = None if far.bias is None else far.bias[:, :, :num_far]
    return Columns(far.key[:, :, :num_far], far.value[:, :, :num_far], mask, bias)


def _window_columns(recent: KeyValues, slots: range, segment: torch.Tensor | None, window: int) -> Columns:
    """The recent keys that are in the window of some query, for queries at recent slots `slots`."""
    first, end = max(0, slots.start - window + 1), slots.stop
    mask = None
    if len(slots) > 1 or end - first > window:
        slot = torch.arange(first, end, device=recent.key.device)
        distance = slot[slots.start - first :, None] - slot  # [T, S]
        mask = ((distance >= 0) & (distance < window))[None, None]
    if recent.valid is not None:
        valid = recent.valid[:, :, None, first:end]
        mask = valid if mask is None else mask & valid
    if segment is not None:
        same = segment[:, None, slots.start : end, None] == segment[:, None, None, first:end]
        mask = same if mask is None else mask & same
    return Columns(recent.key[:, :, first:end], recent.value[:, :, first:end], mask)


def _side_by_side(
    query: torch.Tensor, columns: list[Columns], recent: KeyValues
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Key and value `[B, G, S, d]` of all columns, and what is added to the scores of `query`, `[B, G, T, S]`."""
    if not columns:  # nothing to read: one key that is masked out gives zeros, and keeps the graph whole
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        columns = [Columns(recent.key[:, :, :1], recent.value[:, :, :1], nothing)]
    ends = list(accumulate(each.key.shape[2] for each in columns))
    num_queries, num_keys = query.shape[3], ends[-1]
    added = None
    for each, end in zip(columns, ends, strict=True):
        if each.bias is not None:
            bias = F.pad(each.bias, (end - each.bias.shape[2], num_keys - end)).to(query.dtype)
            added = bias[:, :, None].repeat(1, 1, num_queries, 1)
    for each, end in zip(columns, ends, strict=True):
        if each.mask is not None:
            if added is None:
                added = query.new_zeros(*query.shape[:2], num_queries, num_keys)
            added[..., end - each.mask.shape[3] : end].masked_fill_(~each.mask, -torch.inf)
    return torch.cat([each.key for each in columns], dim=2), torch.cat([each.value for each in columns], dim=2), added


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None,
    reads_itself: bool,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """
    `query` [B, G, R, T, d] against its group's `key`, `value` [B, G, S, d], `added` [B, G, T, S] to the scores.
    `reads_itself`: no query reads nothing.
    """
    num_heads = query.shape[2]
    if softcap is None and sinks is None:
        if reads_itself and added is not None and _learns_in_bfloat16(query, key, value):
            # PyTorch's fused backward pass is three times as slow on CPUs as these products, which hold the weights.
            added = added.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1).flatten(1, 2)
            rows, key, value = query.flatten(0, 1).flatten(1, 2), key.flatten(0, 1), value.flatten(0, 1)
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            weights = torch.baddbmm(added, rows, key.transpose(1, 2), alpha=scale).softmax(-1)
            return (weights.to(value.dtype) @ value).view(*query.shape[:-1], -1)
        # The R heads share keys and mask, without a copy for each.
        key, value = (states.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1) for states in (key, value))
        added = None if added is None else added.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1)
        heads = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=added, scale=scale)
        return once(heads).unflatten(0, query.shape[:2])
    scores = scaled(query, key, scale, softcap)  # [B, G, R, T, S]
    if added is not None:
        scores = scores + added[:, :, None]
    weights = softmax(scores, None if sinks is None else sinks[..., None])
    return weights.to(value.dtype) @ value[:, :, None]


def _learns_in_bfloat16(*states: torch.Tensor) -> bool:
    on_cpu = all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in states)
    return on_cpu and torch.is_grad_enabled() and any(each.requires_grad for each in states)


def _run(
    query, key, value, far_bias, sinks, key_position, valid, selected, evicted_at, position, segment,
    window, scale, softcap,
) -> torch.Tensor:  # fmt: skip
    valid = None if valid is None else valid[:, None].expand_as(selected)
    recent = KeyValues(key, value, key_position[:, None].expand_as(selected), valid, selected, evicted_at)
    return sparse_attention(query, recent, None, position, segment, window, far_bias, scale, softcap, sinks)


opaque_sparse_attention = opaque_op(
    "sparse_attention",
    _run,
    "Tensor query, Tensor key, Tensor value, Tensor? far_bias, Tensor? sinks, Tensor key_position, Tensor? valid, "
    "Tensor selected, Tensor? evicted_at, Tensor position, Tensor? segment, int window, float? scale, float? softcap",
    learn=(0, 1, 2, 3, 4),  # queries, keys, values, bias, sinks
    channels=2,
)
