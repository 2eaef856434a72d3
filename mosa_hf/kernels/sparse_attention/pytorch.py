"""Attention of sparse groups wherever PyTorch runs: blocks of queries, each with the keys that it can reach."""

import torch
import torch.nn.functional as F

from ..attend import scaled, softmax
from ..opaque import opaque_op
from ..selected_positions.pytorch import selected_positions
from ..tensors import KeyValues, PackedKeyValues, gather_slots
from . import reference

QUERY_BLOCK = 64  # queries scored at once: enough for the matmuls, few masked columns


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
        recent, cached = (
            states and states._replace(key=states.key.to(dtype), value=states.value.to(dtype))
            for states in (recent, cached)
        )
    if torch.compiler.is_compiling():
        if cached is not None:  # every shape has to be known
            return reference.sparse_attention(
                query, recent, cached, position, segment, window, far_bias, scale, softcap, sinks
            )
        valid = None if recent.valid is None else recent.valid[:, 0]
        return opaque_sparse_attention(
            query, recent.key, recent.value, far_bias, sinks, recent.position[:, 0], valid, recent.selected,
            recent.evicted_at,
            position, segment, window, scale, softcap,
        )  # fmt: skip
    batch_size, num_groups, num_heads, num_queries, _ = query.shape
    num_recent = recent.key.shape[2]
    offset = num_recent - num_queries  # query i stands at recent slot offset + i
    device = query.device
    cached = None if cached is None else cached.pad()
    selected = recent.selected if recent.valid is None else recent.selected & recent.valid  # [B, G, S]

    block_starts = range(0, num_queries, QUERY_BLOCK)
    block_ends = [min(start + QUERY_BLOCK, num_queries) for start in block_starts]
    reach = sure = [0] * len(block_ends)
    bias = None
    if num_recent > window:  # some recent slot is far from some query
        index, filled = selected_positions(selected[:, :, : num_recent - window].transpose(1, 2))  # [B, G, K]
        far_key, far_value = (gather_slots(states, index) for states in (recent.key, recent.value))  # [B, G, K, d]
        bias = None if far_bias is None else far_bias.gather(2, index)
        far_evicted_at = None if recent.evicted_at is None else recent.evicted_at.gather(2, index)
        # How many of the K far slots some query of a block can reach, and how many all of its queries do.
        count = selected.cumsum(-1)  # [B, G, S]
        most, least = count.amax((0, 1)), count.amin((0, 1))
        reach = [int(most[last]) if (last := end - 1 + offset - window) >= 0 else 0 for end in block_ends]
        if segment is None and recent.evicted_at is None:
            sure = [int(least[last]) if (last := start + offset - window) >= 0 else 0 for start in block_starts]
    query_slot = offset + torch.arange(num_queries, device=device)  # [T], the recent slot that a query stands at

    outputs = []
    for start, end, num_far, num_sure in zip(block_starts, block_ends, reach, sure, strict=True):
        queries = slice(start, end)
        local = slice(max(0, offset + start - window + 1), offset + end) if window else slice(0, 0)
        positions = position[:, None, queries, None]  # [B, 1, T', 1]
        keys, values = [], []
        masks = []  # (first column, last column, what may be read there); all of the other columns may
        width = 0
        if cached is not None:
            keys.append(cached.key)
            values.append(cached.value)
            width = cached.key.shape[2]
            mask = cached.valid[:, :, None]
            if cached.evicted_at is not None:
                mask = mask & (positions < cached.evicted_at[:, :, None])
            masks.append((0, width, mask))
        far_start = width
        if num_far:
            keys.append(far_key[:, :, :num_far])
            values.append(far_value[:, :, :num_far])
            far = index[:, :, None, num_sure:num_far]
            mask = filled[:, :, None, num_sure:num_far] & (far <= query_slot[queries, None] - window)
            if recent.evicted_at is not None:
                mask = mask & (positions < far_evicted_at[:, :, None, :num_far])
            if segment is not None:  # packed sequences come without a cache: queries and recent slots coincide
                row = torch.arange(batch_size, device=device)[:, None, None, None]
                mask = mask & (segment[row, far] == segment[:, None, queries, None])
            masks.append((width + num_sure, width + num_far, mask))
            width += num_far
        if window:
            keys.append(recent.key[:, :, local])
            values.append(recent.value[:, :, local])
            mask = None
            if end - start > 1 or local.stop - local.start > window:
                distance = query_slot[queries, None] - torch.arange(num_recent, device=device)[local]
                mask = ((distance >= 0) & (distance < window))[None, None]
            if recent.valid is not None:
                valid = recent.valid[:, :, None, local]
                mask = valid if mask is None else mask & valid
            if segment is not None:
                same = segment[:, None, queries, None] == segment[:, None, None, local]
                mask = same if mask is None else mask & same
            masks.append((width, width + keys[-1].shape[2], mask))
            width += keys[-1].shape[2]
        if not keys:  # nothing to read: one key that is masked out gives zeros, and keeps the graph whole
            keys, values = [recent.key[:, :, :1]], [recent.value[:, :, :1]]
            masks, width = [(0, 1, torch.zeros(1, dtype=torch.bool, device=device))], 1

        added = None
        if bias is not None and num_far:
            added = F.pad(bias[:, :, :num_far], (far_start, width - far_start - num_far)).to(query.dtype)
            added = added[:, :, None].repeat(1, 1, end - start, 1)  # [B, G, T', S]
        elif any(mask is not None for _, _, mask in masks):
            added = query.new_zeros(batch_size, num_groups, end - start, width)
        for first, last, mask in masks:
            if mask is not None:
                added[..., first:last].masked_fill_(~mask, -torch.inf)
        keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        reads_itself = window > 0 and recent.valid is None
        outputs.append(_attention(query[:, :, :, queries], keys, values, added, reads_itself, scale, softcap, sinks))
    return torch.cat(outputs, dim=3) if outputs else query.new_zeros(query.shape)


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
            return (weights.to(value.dtype) @ value).view(query.shape)
        # The R heads share keys and mask, without a copy for each.
        key, value = (states.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1) for states in (key, value))
        added = None if added is None else added.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1)
        heads = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=added, scale=scale)
        return heads.unflatten(0, query.shape[:2])
    scores = scaled(query, key, scale, softcap)  # [B, G, R, T, S]
    if added is not None:
        scores = scores + added[:, :, None]
    weights = softmax(scores, None if sinks is None else sinks[..., None])
    return weights.to(value.dtype) @ value[:, :, None]


def _learns_in_bfloat16(*states: torch.Tensor) -> bool:
    on_cpu = all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in states)
    return on_cpu and torch.is_grad_enabled() and any(each.requires_grad for each in states)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    recent_position: torch.Tensor,
    valid: torch.Tensor | None,
    selected: torch.Tensor,
    evicted_at: torch.Tensor | None,
    position: torch.Tensor,
    segment: torch.Tensor | None,
    window: int,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    valid = None if valid is None else valid[:, None].expand_as(selected)
    recent = KeyValues(key, value, recent_position[:, None].expand_as(selected), valid, selected, evicted_at)
    return sparse_attention(query, recent, None, position, segment, window, far_bias, scale, softcap, sinks)


opaque_sparse_attention = opaque_op(
    "sparse_attention",
    _run,
    "Tensor query, Tensor key, Tensor value, Tensor? far_bias, Tensor? sinks, Tensor recent_position, Tensor? valid, "
    "Tensor selected, Tensor? evicted_at, Tensor position, Tensor? segment, int window, float? scale, float? softcap",
    learn=(0, 1, 2, 3, 4),  # queries, keys, values, bias, sinks
)
