"""The paper's heads on a GPU: slots, projections of selected tokens, attention, output projection."""

import torch

from ..entries import PackedKeyValues, Remember
from ..gather_project.triton import gather_project
from ..indexing import of_slots
from ..prefix_attention.triton import FarKeys, after_packed, prefix_attention
from ..project_scatter.triton import project_scatter
from ..selected_positions.triton import selected_positions
from ..sparse_decode.triton import sparse_decode
from ..tensors import HeadWeights, KeyValues, Tokens
from .reference import of_all


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | Remember | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Same function as `reference.selected_heads`. Of a single token, only the groups that select it read weights and
    past.

    Of several tokens, the device is asked for the largest number that a group selects, where `tokens` do not say it. A
    compiled graph makes do without and gives every group T slots: kernels pass over empty slots, but memory is taken
    for them.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states = hidden_states.to(dtype)
        weights = HeadWeights._make(None if weight is None else weight.to(dtype) for weight in weights)
    num_tokens = hidden_states.shape[1]
    num_slots = num_tokens
    if num_tokens > 1 and not torch.compiler.is_compiling():
        num_selected = tokens.num_selected
        num_slots = max(1, int(tokens.selected.sum(1).max()) if num_selected is None else num_selected)
    index, count = selected_positions(tokens.selected, num_slots)  # [B, G, K], [B, G]
    query, key, value = gather_project(
        hidden_states, index, count, *weights[:3], *weights[4:7], tokens.cos, tokens.sin
    )  # [B, G, R, K, d], [B, G, K, d], [B, G, K, d]

    if callable(past):  # of a single token, slot and column are one
        new = of_all(key, value, tokens)
        read = past(new)
        read = read._replace(length=read.length * tokens.selected[:, 0])
        heads = sparse_decode(query[..., 0, :], read)[..., None, :]
        gate = tokens.gate.transpose(1, 2).float()
        return project_scatter(heads, gate, weights.output, index, count, num_tokens), new
    slots = index.long()
    end = torch.arange(1, num_slots + 1, dtype=torch.int32, device=index.device)
    filled = end <= count[..., None]  # [B, G, K]
    position = of_slots(tokens.position, slots)  # [B, G, K]
    evicted_at, score = (None if x is None else of_slots(x, slots) for x in (tokens.evicted_at, tokens.score))
    new = KeyValues(key, value, position, filled, None, evicted_at, score)
    start = None
    if tokens.segment is not None:  # a slot reads its packed sequence: from the first slot not of an earlier one
        segment = of_slots(tokens.segment, slots).masked_fill(~filled, torch.iinfo(tokens.segment.dtype).max)
        start = torch.searchsorted(segment, segment)
    far = after_packed(past, FarKeys(key, value, start, end, evicted_at=evicted_at))  # up to the slot itself
    far = far._replace(end=far.end * filled)
    heads = prefix_attention(query, far, position=position)  # [B, G, R, K, d]
    gate = of_slots(tokens.gate, slots).float()
    return project_scatter(heads, gate, weights.output, index, count, num_tokens), new
