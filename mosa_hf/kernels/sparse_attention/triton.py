"""Attention of sparse groups on a GPU: the far keys become slots, and what each query reads a range of them."""

import torch
import torch.nn.functional as F

from ..prefix_attention.triton import FarKeys, WindowKeys, after_packed, prefix_attention
from ..tensors import KeyValues, PackedKeyValues, gather_slots


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
    Same function as `reference.sparse_attention`, computed and returned in the dtype of values. Relies on padding
    being on the left of `recent` and of the queries; what padding queries get is any finite number.

    The device is asked for the largest number of selected tokens beyond the window. A compiled graph makes do without
    and takes memory for as many as there could be; kernels pass over the empty slots.
    """
    if query.numel() == 0:
        return query
    num_queries, num_recent = query.shape[3], recent.key.shape[2]
    device, dtype = query.device, recent.value.dtype
    # The recent slots that the queries stand at; before slot `reach` keys are far.
    slot = num_recent - num_queries + torch.arange(num_queries, device=device)  # [T]
    reach = (slot - window + 1).clamp(min=0)
    assert recent.selected is not None  # of all tokens, some are not
    selected = recent.selected if recent.valid is None else recent.selected & recent.valid  # [B, G, N]
    before = F.pad(selected.cumsum(-1), (1, 0))  # [B, G, N + 1], selected tokens in the slots before
    start, end = None, before.index_select(-1, reach)  # [B, G, T]
    window_start = reach
    if recent.valid is not None:
        window_start = torch.maximum(reach, num_recent - recent.valid.sum(-1, keepdim=True))
    if segment is not None:  # packed sequences come without a cache: queries and recent slots coincide
        changes = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0))
        segment_start = torch.where(changes, slot, 0).cummax(-1).values[:, None]  # [B, 1, T]
        start = before.gather(-1, segment_start.expand_as(end))
        window_start = torch.maximum(window_start, segment_start)

    # Far slots: cached entries, then the selected recent tokens.
    num_far = num_slots = max(num_recent - window, 0)
    if num_far and not torch.compiler.is_compiling():
        num_slots = int(before[..., num_far].max())
    place = torch.where(selected[..., :num_far], before[..., :num_far], num_slots)  # the last one holds what is not
    token = torch.arange(num_far, device=device).expand_as(place)
    index = place.new_zeros(*place.shape[:2], num_slots + 1).scatter_(2, place, token)[..., :num_slots]  # [B, G, K]
    # Autocast may leave rotated queries and keys in float32: back to what values were projected in.
    far = FarKeys(
        gather_slots(recent.key, index).to(dtype),
        gather_slots(recent.value, index),
        start,
        end,
        None if far_bias is None else gather_slots(far_bias, index),
        None if recent.evicted_at is None else gather_slots(recent.evicted_at, index),
    )
    window_keys = WindowKeys(recent.key.to(dtype), recent.value, window_start, slot + 1) if window else None
    return prefix_attention(
        query.to(dtype), after_packed(cached, far), window_keys, position[:, None], scale, softcap, sinks
    )
