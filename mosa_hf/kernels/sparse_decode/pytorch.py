"""A decoding step wherever PyTorch runs: each run of the cache is read where it lies."""

import torch
import torch.nn.functional as F

from ..attend import scaled
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
    scores = scores.masked_fill(~filled[:, :, None], torch.finfo(scores.dtype).min)
    weights = _softmax(scores, None if sinks is None else sinks.expand(len(query), -1, -1))
    return weights.masked_fill(~filled[:, :, None], 0.0) @ value


def _run_by_run(
    query: torch.Tensor, runs: Runs, scale: float | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    num_groups = query.shape[1]
    is_fused = softcap is None and sinks is None
    heads = []
    queries = query.flatten(0, 1)  # [B * G, R, d]
    places = zip(runs.start.flatten().tolist(), runs.count.flatten().tolist(), strict=True)
    for i, (start, count) in enumerate(places):
        if count == 0:
            heads.append(torch.zeros_like(queries[i]))
            continue
        key, value = runs.key[start : start + count], runs.value[start : start + count]  # [S, d]
        if is_fused:
            # The R heads as rows of one query matrix.
            heads.append(F.scaled_dot_product_attention(queries[None, i], key[None], value[None], scale=scale)[0])
        else:
            scores = scaled(queries[i, :, None], key, scale, softcap)[:, 0]  # [R, S]
            heads.append(_softmax(scores, None if sinks is None else sinks[i % num_groups]) @ value)
    return torch.stack(heads).view(query.shape)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Of `scores` [..., R, S], with one more score `sinks` [..., R] where there are any."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(-1, dtype=dtype).to(scores.dtype)
    joined = torch.cat((scores, sinks[..., None].to(scores.dtype)), dim=-1)
    return joined.softmax(-1, dtype=dtype)[..., :-1].to(scores.dtype)
