"""The paper's heads on a GPU: slots, projections of selected tokens, attention, output projection."""

import torch

from ..gather_project.triton import gather_project
from ..prefix_attention.triton import FarKeys, after_packed, prefix_attention
from ..project_scatter.triton import project_scatter
from ..selected_positions.triton import selected_positions
from ..sparse_decode.triton import decode_packed
from ..tensors import HeadWeights, KeyValues, PackedKeyValues, Tokens


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Same function as `reference.selected_heads`. Of a single token, only the groups that select it read weights and
    past.

    Of several tokens, the device is asked once for the largest number that a group selects. A compiled graph makes do
    without and gives every group T slots: kernels pass over empty slots, but memory is taken for them.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states = hidden_states.to(dtype)
        weights = HeadWeights(*(None if weight is None else weight.to(dtype) for weight in weights[:7]))
    num_tokens = hidden_states.shape[1]
    num_slots = num_tokens
    if num_tokens > 1 and not torch.compiler.is_compiling():
        num_slots = max(1, int(tokens.selected.sum(1).max()))
    index, count = selected_positions(tokens.selected, num_slots)  # [B, G, K], [B, G]
    query, key, value = gather_project(
        hidden_states, index, count, *weights[:3], *weights[4:7], tokens.cos, tokens.sin
    )  # [B, G, R, K, d], [B, G, K, d], [B, G, K, d]

    slots = index.long()

    def gather(states):  # [B, T] or [B, T, G] -> [B, G, K]
        if states is None:
            return None
        states = states[:, None].expand(-1, slots.shape[1], -1) if states.ndim == 2 else states.transpose(1, 2)
        return states.gather(2, slots)

    slot = torch.arange(num_slots, device=index.device)
    filled = slot < count[..., None]  # [B, G, K]
    position = gather(tokens.position)  # [B, G, K]
    new = KeyValues(key, value, position, filled, None, gather(tokens.evicted_at), gather(tokens.score))
    has_limits = None if past is None else past.evicted_at is not None
    if num_tokens == 1 and has_limits == (tokens.evicted_at is not None) and not torch.is_grad_enabled():
        read = past._replace(length=torch.where(filled[..., 0], past.length, 0))
        limits = (position[..., 0], new.evicted_at[..., 0]) if has_limits else None
        heads = decode_packed(query[..., 0, :], read, (key[:, :, 0], value[:, :, 0]), limits)[..., None, :]
    else:
        start = None
        if tokens.segment is not None:  # a slot reads its packed sequence: from the first slot not of an earlier one
            segment = gather(tokens.segment).masked_fill(~filled, torch.iinfo(tokens.segment.dtype).max)
            start = torch.searchsorted(segment, segment)
        far = after_packed(
            past, FarKeys(key, value, start, slot + 1, evicted_at=new.evicted_at)
        )  # up to the slot itself
        far = far._replace(end=torch.where(filled, far.end, 0))
        heads = prefix_attention(query, far, position=position)  # [B, G, R, K, d]

    output = project_scatter(heads, gather(tokens.gate).float(), weights.output, index, count, num_tokens)
    return output, new
