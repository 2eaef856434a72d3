"""Form "selected", composed of the ops: slots, projections, attention, output projection."""

import torch

from ..layout import HeadWeights, KeyValues, Tokens
from .attention import FarKeys, NearKeys, prefix_attention
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

    def gather(states: torch.Tensor) -> torch.Tensor:  # [B, T] -> [B, G, K]
        return states[:, None].expand(-1, index.shape[1], -1).gather(2, index.long())

    slot = torch.arange(num_slots, device=index.device)
    filled = slot < count[..., None]  # [B, G, K]
    end = torch.where(filled, slot + 1, 0)  # a slot reads the slots up to itself
    start = None
    if tokens.segment is not None:  # ... of its packed sequence: from the first slot that is not of an earlier one
        segment = gather(tokens.segment).masked_fill(~filled, torch.iinfo(tokens.segment.dtype).max)
        start = torch.searchsorted(segment, segment)
    if past is None:
        heads = prefix_attention(query, FarKeys(key, value, start, end))
    else:
        num_past = past.key.shape[2]
        past_end = num_past if past.valid is None else past.valid.sum(-1, keepdim=True)  # filled slots come first
        past_end = torch.where(filled, past_end, 0)
        heads = prefix_attention(
            query, FarKeys(past.key, past.value, None, past_end), NearKeys(key, value, start, end)
        )

    gate = tokens.gate.transpose(1, 2).gather(2, index.long()).float()  # [B, G, K]
    output = project_scatter(heads, gate, weights.output, index, count, num_tokens)
    return output, KeyValues(key, value, gather(tokens.position), filled, None)
