"""The fast path that runs wherever PyTorch runs (backend "torch"): gathered rows, batched matmuls, fused attention.

Selections are sorted by position, so that a query reads a prefix of the slots (DESIGN section 2).
"""

import torch
import torch.nn.functional as F

from .decode import decode_all, decode_selected
from .layout import HeadWeights, KeyValues, RaggedKeyValues, Tokens, gather_slots, rotate

__all__ = ["all_attention", "decode_all", "decode_selected", "selected_heads", "selected_positions"]

DECODE_LOOP = 16  # up to so many rows x groups, a decode step visits them one by one
QUERY_BLOCK = 64  # queries of "all" form attention scored at once: enough for the matmuls, few masked columns


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: KeyValues | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """Same function as `reference.selected_heads`; only selected tokens are projected."""
    batch_size, num_tokens, hidden_size = hidden_states.shape
    num_groups, head_dim, _ = weights.key.shape
    index, filled = selected_positions(tokens.selected)  # [B, G, K]
    num_slots = index.shape[-1]
    row = torch.arange(batch_size, device=index.device)[:, None, None]
    token = (row * num_tokens + index).flatten()  # [B * G * K], into the tokens of all rows

    def gather(states: torch.Tensor) -> torch.Tensor:  # [B, T, ...] -> [B, G, K, ...]
        # Not by indexing: the gradient of that adds rows up in an order that changes from run to run.
        return states.flatten(0, 1).index_select(0, token).unflatten(0, index.shape)

    slots = gather(hidden_states).transpose(0, 1).flatten(1, 2)  # [G, B * K, D]
    query, key, value = (
        _per_group(slots, weight, bias).unflatten(1, (batch_size, num_slots)).transpose(0, 1)  # [B, G, K, out]
        for weight, bias in (
            (weights.query, weights.query_bias),
            (weights.key, weights.key_bias),
            (weights.value, weights.value_bias),
        )
    )
    query = query.unflatten(-1, (-1, head_dim)).transpose(2, 3)  # [B, G, R, K, d]
    cos, sin = gather(tokens.cos), gather(tokens.sin)  # [B, G, K, rotary_dim]
    query, key = rotate(query, cos[:, :, None], sin[:, :, None]), rotate(key, cos, sin)
    position = gather(tokens.position)  # [B, G, K]
    until, score = (
        None if states is None else states.transpose(1, 2).gather(2, index) for states in (tokens.until, tokens.score)
    )
    new = KeyValues(key, value, position, filled, None, until, score)

    # Empty slots come last: a causal read of the slots never meets them before a filled slot's own turn.
    if past is None and tokens.segment is None and until is None:
        heads = _attention(query, key, value, is_causal=True)
    else:
        mask = torch.ones(num_slots, num_slots, dtype=torch.bool, device=index.device).tril()  # [K, K]
        mask = mask.expand(batch_size, num_groups, num_slots, num_slots)
        if tokens.segment is not None:
            segment = gather(tokens.segment)
            mask = mask & (segment[..., :, None] == segment[..., None, :])
        if until is not None:
            mask = mask & (position[..., :, None] < until[..., None, :])
        if past is not None:
            past_mask = torch.ones_like(past.position, dtype=torch.bool) if past.valid is None else past.valid
            past_mask = past_mask[:, :, None].expand(-1, -1, num_slots, -1)
            if past.until is not None:
                past_mask = past_mask & (position[..., :, None] < past.until[..., None, :])
            mask = torch.cat((past_mask, mask), dim=-1)
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
        heads = _attention(query, key, value, mask)

    gate = tokens.gate.transpose(1, 2).gather(2, index) * filled  # [B, G, K]
    heads = heads * gate[:, :, None, :, None].to(heads.dtype)
    heads = heads.permute(1, 0, 3, 2, 4).flatten(1, 2).flatten(2)  # [G, B * K, R * d]
    update = _per_group(heads, weights.output).unflatten(1, (batch_size, num_slots)).transpose(0, 1)  # [B, G, K, D]

    # Many groups add into one token: sum in float32, as a matmul would.
    output = update.new_zeros(
        batch_size * num_tokens, hidden_size, dtype=torch.promote_types(update.dtype, torch.float32)
    )
    output = output.index_add(0, token, update.flatten(0, 2).to(output.dtype))
    return output.to(hidden_states.dtype).view(batch_size, num_tokens, hidden_size), new


def all_attention(
    query: torch.Tensor,
    near: KeyValues,
    kept: KeyValues | RaggedKeyValues | None,
    tokens: Tokens,
    window: int,
    far_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Same function as `reference.all_attention`, block of queries by block: a block scores the kept keys, the selected
    near keys up to its window, and its window. Relies on padding being on the left of `near` and of the queries.
    """
    batch_size, num_groups, num_heads, num_queries, _ = query.shape
    num_near = near.key.shape[2]
    offset = num_near - num_queries  # query i stands at near slot offset + i
    device = query.device
    if isinstance(kept, RaggedKeyValues):
        if num_queries == 1 and num_near <= window and kept.count.numel() <= DECODE_LOOP:
            return _decode(query, near, kept, tokens.position)
        kept = kept.pad()
    selected = near.selected if near.valid is None else near.selected & near.valid  # [B, G, S]

    block_starts = range(0, num_queries, QUERY_BLOCK)
    block_ends = [min(start + QUERY_BLOCK, num_queries) for start in block_starts]
    reach = sure = [0] * len(block_ends)
    bias = None
    if num_near > window:  # some near slot is far from some query
        index, filled = selected_positions(selected[:, :, : num_near - window].transpose(1, 2))  # [B, G, K]
        far_key, far_value = (gather_slots(states, index) for states in (near.key, near.value))  # [B, G, K, d]
        bias = None if far_bias is None else far_bias.gather(2, index)
        far_until = None if near.until is None else near.until.gather(2, index)
        # How many of the K far slots some query of a block can reach, and how many all of its queries do.
        count = selected.cumsum(-1)  # [B, G, S]
        most, least = count.amax((0, 1)).tolist(), count.amin((0, 1)).tolist()
        reach = [most[last] if (last := end - 1 + offset - window) >= 0 else 0 for end in block_ends]
        if tokens.segment is None and near.until is None:
            sure = [least[last] if (last := start + offset - window) >= 0 else 0 for start in block_starts]
    query_slot = offset + torch.arange(num_queries, device=device)  # [T], the near slot that a query stands at

    outputs = []
    for start, end, num_far, num_sure in zip(block_starts, block_ends, reach, sure, strict=True):
        queries = slice(start, end)
        local = slice(max(0, offset + start - window + 1), offset + end) if window else slice(0, 0)
        positions = tokens.position[:, None, queries, None]  # [B, 1, T', 1]
        keys, values = [], []
        masks = []  # (first column, last column, what may be read there); all of the other columns may
        width = 0
        if kept is not None:
            keys.append(kept.key)
            values.append(kept.value)
            width = kept.key.shape[2]
            mask = None if kept.valid is None else kept.valid[:, :, None]
            if kept.until is not None:
                alive = positions < kept.until[:, :, None]
                mask = alive if mask is None else mask & alive
            masks.append((0, width, mask))
        far_start = width
        if num_far:
            keys.append(far_key[:, :, :num_far])
            values.append(far_value[:, :, :num_far])
            far = index[:, :, None, num_sure:num_far]
            mask = filled[:, :, None, num_sure:num_far] & (far <= query_slot[queries, None] - window)
            if near.until is not None:
                mask = mask & (positions < far_until[:, :, None, :num_far])
            if tokens.segment is not None:  # packed sequences come without a cache: queries and near slots coincide
                row = torch.arange(batch_size, device=device)[:, None, None, None]
                mask = mask & (tokens.segment[row, far] == tokens.segment[:, None, queries, None])
            masks.append((width + num_sure, width + num_far, mask))
            width += num_far
        if window:
            keys.append(near.key[:, :, local])
            values.append(near.value[:, :, local])
            mask = None
            if end - start > 1:
                distance = query_slot[queries, None] - torch.arange(num_near, device=device)[local]
                mask = ((distance >= 0) & (distance < window))[None, None]
            if near.valid is not None:
                valid = near.valid[:, :, None, local]
                mask = valid if mask is None else mask & valid
            if tokens.segment is not None:
                same = tokens.segment[:, None, queries, None] == tokens.segment[:, None, None, local]
                mask = same if mask is None else mask & same
            masks.append((width, width + keys[-1].shape[2], mask))
            width += keys[-1].shape[2]
        if not keys:  # nothing to read: one key that is masked out gives zeros, and keeps the graph whole
            keys, values = [near.key[:, :, :1]], [near.value[:, :, :1]]
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
        outputs.append(_attention(query[:, :, :, queries], torch.cat(keys, dim=2), torch.cat(values, dim=2), added))
    return torch.cat(outputs, dim=3)


def _decode(query: torch.Tensor, near: KeyValues, kept: RaggedKeyValues, position: torch.Tensor) -> torch.Tensor:
    """
    `all_attention` of a single token, all of whose `near` keys are in its window: reads the cached entries where they
    are, which at long contexts is cheaper than to bring them into one padded tensor.
    """
    batch_size, num_groups, num_heads, _, head_dim = query.shape
    outputs = []
    runs = zip(kept.start.flatten().tolist(), kept.count.flatten().tolist(), strict=True)
    for i, (start, count) in enumerate(runs):
        row, group = divmod(i, num_groups)
        run = slice(start, start + count)
        queries = query[row, group, :, 0] * head_dim**-0.5  # [R, d]
        far_scores, near_scores = queries @ kept.key[run].T, queries @ near.key[row, group].T  # [R, S]
        # Not -inf: a row whose token is padding may have nothing to read, and must stay finite.
        lowest = torch.finfo(near_scores.dtype).min
        if near.valid is not None:
            near_scores = near_scores.masked_fill(~near.valid[row, group], lowest)
        if kept.until is not None:
            far_scores = far_scores.masked_fill(position[row] >= kept.until[run], lowest)
        scores = torch.cat((far_scores, near_scores), dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        outputs.append(weights[:, :count] @ kept.value[run] + weights[:, count:] @ near.value[row, group])
    return torch.stack(outputs).view(batch_size, num_groups, num_heads, 1, head_dim)


def selected_positions(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selected tokens of each group in ascending order.

    Args:
        selected: `[B, T, G]` bool.

    Returns:
        index `[B, G, K]` int64, K the largest count, and filled `[B, G, K]` bool; empty slots come last and hold 0.
    """
    selected = selected.transpose(1, 2)  # [B, G, T]
    count = selected.sum(-1)  # [B, G]
    filled = torch.arange(int(count.max()), device=selected.device) < count[..., None]
    index = torch.zeros(filled.shape, dtype=torch.int64, device=selected.device)
    index[filled] = selected.nonzero()[:, 2]  # row by row, group by group, ascending: the order of the filled slots
    return index, filled


def _per_group(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` [G, N, in] through each group's `weight` [G, out, in]."""
    product = torch.bmm(rows, weight.transpose(1, 2))
    return product if bias is None else product + bias[:, None]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """
    `query` [B, G, R, T, d] against its group's `key`, `value` [B, G, S, d] under `mask` [B, G, T, S] (bool, or added
    to the scores). The R heads of a group become rows of one query matrix, so that its keys are read once.
    """
    batch_size, num_groups, num_heads, num_queries, head_dim = query.shape
    if is_causal:
        if num_heads > 1:
            key, value = (states[:, :, None].expand(-1, -1, num_heads, -1, -1) for states in (key, value))
            query, key, value = (states.flatten(1, 2) for states in (query, key, value))
        else:
            query = query[:, :, 0]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.view(batch_size, num_groups, num_heads, num_queries, head_dim)
    # The R heads share keys and mask, without a copy for each.
    key, value = (states.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1) for states in (key, value))
    mask = None if mask is None else mask.flatten(0, 1)[:, None].expand(-1, num_heads, -1, -1)  # [B * G, R, T, S]
    output = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, attn_mask=mask)
    return output.unflatten(0, (batch_size, num_groups))
