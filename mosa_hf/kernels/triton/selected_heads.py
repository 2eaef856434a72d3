"""Form "selected", composed of the ops: slots, projections, attention, output projection."""

import torch

from ..layout import NEVER, HeadWeights, KeyValues, Tokens, join
from .attention import FarKeys, prefix_attention
from .gather_project import gather_project
from .project_scatter import project_scatter
from .select import selected_positions


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: KeyValues | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Same function as `reference.selected_heads`.

    Outside of a compiled graph, the device is asked once for the largest number of selected tokens. A compiled graph
    makes do without and gives every group T slots: kernels pass over empty slots, but memory is taken for them.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states = hidden_states.to(dtype)
        weights = HeadWeights(*(None if weight is None else weight.to(dtype) for weight in weights))
    num_tokens = hidden_states.shape[1]
    num_slots = num_tokens if torch.compiler.is_compiling() else max(1, int(tokens.selected.sum(1).max()))
    index, count = selected_positions(tokens.selected, num_slots)  # [B, G, K], [B, G]
    query, key, value = gather_project(
        hidden_states,
        index,
        count,
        weights.query,
        weights.key,
        weights.value,
        weights.query_bias,
        weights.key_bias,
        weights.value_bias,
        tokens.cos,
        tokens.sin,
    )  # [B, G, R, K, d], [B, G, K, d], [B, G, K, d]

    slots = index.long()

    def gather(states: torch.Tensor | None) -> torch.Tensor | None:  # [B, T] or [B, T, G] -> [B, G, K]
        if states is None:
            return None
        states = states[:, None].expand(-1, slots.shape[1], -1) if states.ndim == 2 else states.transpose(1, 2)
        return states.gather(2, slots)

    slot = torch.arange(num_slots, device=index.device)
    filled = slot < count[..., None]  # [B, G, K]
    position = gather(tokens.position)  # [B, G, K]
    new = KeyValues(key, value, position, filled, None, gather(tokens.until), gather(tokens.score))
    start, end = None, torch.where(filled, slot + 1, 0)  # a slot reads the slots up to itself
    if tokens.segment is not None:  # ... of its packed sequence: from the first slot that is not of an earlier one
        segment = gather(tokens.segment).masked_fill(~filled, torch.iinfo(tokens.segment.dtype).max)
        start = torch.searchsorted(segment, segment)
    if past is None:
        far = FarKeys(key, value, start, end, until=_until(new))
    else:  # packed sequences come without a past
        keys = join(past, new)
        if keys.until is None:  # needed all the same: rows and groups have different numbers of empty slots in between
            keys = keys._replace(until=torch.full_like(keys.position, NEVER))
        far = FarKeys(keys.key, keys.value, start, torch.where(filled, past.key.shape[2] + end, 0), until=_until(keys))
    heads = prefix_attention(query, far, position=None if far.until is None else position)  # [B, G, R, K, d]

    output = project_scatter(heads, gather(tokens.gate).float(), weights.output, index, count, num_tokens)
    return output, new


def _until(keys: KeyValues) -> torch.Tensor | None:
    """`keys.until`, where empty slots end before any position."""
    return None if keys.until is None else torch.where(keys.valid, keys.until, 0)
