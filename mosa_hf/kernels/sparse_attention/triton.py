"""Attention of sparse groups on a GPU: the far keys become slots, and what each query reads a range of them."""

import torch
import torch.nn.functional as F

from ..entries import PackedKeyValues
from ..indexing import gather_slots
from ..prefix_attention.triton import FarKeys, WindowKeys, after_packed, prefix_attention
from ..tensors import KeyValues


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

    The device is asked for the largest number of selected tokens beyond the window, where `recent` does not say it. A
    compiled graph makes do without and takes memory for as many as there could be; kernels pass over the empty slots.
    """
    if query.numel() == 0:
        return query
    num_queries, num_recent = query.shape[3], recent.key.shape[2]
    dtype = recent.value.dtype
    assert recent.selected is not None  # of all tokens, some are not
    selected = recent.selected if recent.valid is None else recent.selected & recent.valid  # [B, G, N]
    # Before the slot at which a query stands, those that are a window away or more are far.
    num_far = num_slots = max(num_recent - window, 0)
    # [B, G, F], up to a slot
    count = selected[..., :num_far].cumsum(-1, dtype=torch.int32) if recent.far_up_to is None else recent.far_up_to
    before = F.pad(count, (num_recent - num_far, 0))[..., num_recent - num_queries :]  # [B, G, T], far of a query
    start = window_start = None
    if recent.valid is not None:
        window_start = num_recent - recent.valid.sum(-1, keepdim=True)
    if segment is not None:  # packed sequences come without a cache: queries and recent slots coincide
        slot = torch.arange(num_queries, device=query.device)
        changes = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0))
        segment_start = torch.where(changes, slot, 0).cummax(-1).values[:, None]  # [B, 1, T]
        start = F.pad(selected.cumsum(-1), (1, 0)).gather(-1, segment_start.expand_as(before))
        window_start = segment_start if window_start is None else torch.maximum(window_start, segment_start)

    # Far slots: cached entries, then the selected recent tokens.
    if num_far and not torch.compiler.is_compiling():
        num_slots = int(count[..., -1].max()) if recent.num_far is None else recent.num_far
    wanted = torch.arange(1, num_slots + 1, dtype=count.dtype, device=query.device)
    index = torch.searchsorted(count, wanted.expand(*count.shape[:2], -1).contiguous())  # [B, G, K]
    if num_slots and (torch.compiler.is_compiling() or window == 0):
        index = index.clamp(max=num_far - 1)  # of groups that select fewer
    # Autocast may leave rotated queries and keys in float32: back to what values were projected in.
    far = FarKeys(
        gather_slots(recent.key, index).to(dtype),
        gather_slots(recent.value, index),
        start,
        before,
        None if far_bias is None else gather_slots(far_bias, index),
        None if recent.evicted_at is None else gather_slots(recent.evicted_at, index),
    )
    window_keys = WindowKeys(recent.key.to(dtype), recent.value, window_start, window) if window else None
    return prefix_attention(
        query.to(dtype), after_packed(cached, far), window_keys, position[:, None], scale, softcap, sinks
    )
