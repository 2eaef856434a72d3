"""A decoding step wherever PyTorch runs: each run of the cache is read where it lies."""

import torch
import torch.nn.functional as F

from ..attend import capped, scaled, softmax
from ..tensors import Runs

LOOP = 16  # up to so many runs, a step on a CPU visits them one by one: cheaper than to bring them into one tensor


def sparse_decode(
    query: torch.Tensor,
    runs: Runs,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same function as `reference.sparse_decode`."""
    is_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_cpu and runs.start.numel() <= LOOP:
        return _run_by_run(query, runs, scale, softcap, sinks)
    if runs.max_count == 0:
        return torch.zeros_like(query)
    key, value, filled = runs.padded_view()
    if softcap is None and sinks is None:
        # The batch that fused attention sees is rows x groups; its heads share the group's keys.
        num_heads = query.shape[2]
        query, key, value = query.flatten(0, 1)[:, :, None], key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]
        key, value = (states.expand(-1, num_heads, -1, -1) for states in (key, value))
        mask = filled.flatten(0, 1)[:, None, None]
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return heads.view(*runs.start.shape, num_heads, -1)
    scores = scaled(query[:, :, :, None], key, scale, softcap)[:, :, :, 0]  # [B, G, R, S]
    scores = scores.masked_fill(~filled[:, :, None], -torch.inf)
    return softmax(scores, sinks).to(value.dtype) @ value


def _run_by_run(
    query: torch.Tensor, runs: Runs, scale: float | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Plain products: for a few rows and keys, fused attention costs more to call than it saves."""
    num_groups, head_dim = query.shape[1], query.shape[3]
    queries = (query * (head_dim**-0.5 if scale is None else scale)).flatten(0, 1).unbind()  # B * G of [R, d]
    starts, counts = runs.start.flatten().tolist(), runs.count.flatten().tolist()
    heads = []
    for i, (one, start, count) in enumerate(zip(queries, starts, counts, strict=True)):
        if count == 0:
            heads.append(torch.zeros_like(one))
            continue
        scores = capped(one @ runs.key.narrow(0, start, count).t(), softcap)  # [R, S]
        if sinks is None:
            weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        else:
            weights = softmax(scores, sinks[i % num_groups])
        heads.append(weights.to(query.dtype) @ runs.value.narrow(0, start, count))
    return torch.stack(heads).view(query.shape)
