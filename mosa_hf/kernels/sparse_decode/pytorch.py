"""A decoding step wherever PyTorch runs: each range of the cache is read where it lies."""

import torch
import torch.nn.functional as F

from ..attend import scaled, softmax
from ..derivatives import once
from ..entries import PackedKeyValues, plain

LOOP = 16  # up to so many ranges, a step on a CPU visits them one by one: cheaper than to bring them into one tensor


def sparse_decode(
    query: torch.Tensor,
    packed: PackedKeyValues,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same function as `reference.sparse_decode`."""
    is_coded = packed.key_scale is not None  # whose ranges are never all decoded at once
    is_even = packed.is_full and packed.stride is not None
    if is_coded or (packed.start.numel() <= LOOP and not is_even):
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            return _one_by_one(query, packed, scale, softcap, sinks)
    if packed.max_length == 0:
        return query.new_zeros(*query.shape[:-1], packed.value.shape[-1])
    key, value, filled = packed.padded_view()
    return _all_at_once(query, key, value, filled, scale, softcap, sinks)


def _all_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    filled: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Key and value `[B * G, S, d]`, of which `filled` [B * G, S] are read; None: all."""
    if softcap is None and sinks is None:
        # Fused attention sees a batch of rows x groups, and the heads, which share a group's keys, as its queries.
        mask, rows = None if filled is None else filled[:, None, None], query.flatten(0, 1)[:, None]
        heads = F.scaled_dot_product_attention(rows, key[:, None], value[:, None], attn_mask=mask, scale=scale)
        return once(heads).reshape(*query.shape[:-1], -1)
    key, value = (states.unflatten(0, query.shape[:2]) for states in (key, value))
    scores = scaled(query[:, :, :, None], key, scale, softcap)[:, :, :, 0]  # [B, G, R, S]
    if filled is not None:
        scores = scores.masked_fill(~filled.view(*query.shape[:2], 1, -1), -torch.inf)
    return softmax(scores, sinks).to(value.dtype) @ value


def _one_by_one(
    query: torch.Tensor,
    packed: PackedKeyValues,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Each range by itself: the group's heads are the rows of a matrix."""
    is_plain = softcap is None and sinks is None
    heads = []
    for i, (one, part) in enumerate(zip(query.flatten(0, 1).unbind(), packed.split(), strict=True)):
        key, value = plain(*part)
        if key.shape[0] == 0:
            heads.append(one.new_zeros(one.shape[0], value.shape[-1]))
        elif is_plain:
            rows, key, value = [states.view(1, 1, *states.shape) for states in (one, key, value)]
            heads.append(once(F.scaled_dot_product_attention(rows, key, value, scale=scale)).flatten(0, 2))
        else:
            scores = scaled(one[:, None], key, scale, softcap)[:, 0]  # [R, S]
            weights = softmax(scores, None if sinks is None else sinks[i % query.shape[1]])
            heads.append(weights.to(value.dtype) @ value)
    return torch.cat(heads).view(*query.shape[:-1], -1)
