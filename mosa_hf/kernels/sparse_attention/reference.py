"""The specification (docs/design.md, section 2): every pair is scored, then masked."""

import torch
import torch.nn.functional as F

from ..attend import attend
from ..entries import PackedKeyValues
from ..tensors import KeyValues, join


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
    Attention of sparse groups: query t reads { j <= t : (j selected and t < evicted_at_j) or t - j < window }.

    Args:
        query: `[B, G, R, T, d]`, rotated; padding on the left.
        recent: the last tokens in sequence order, the T queries' own included, selected or not.
        cached: selected tokens that lie before `recent`.
        position: `[B, T]` int64, of the queries.
        segment: `[B, T]` int64, packed sequences, which come without earlier tokens; None: one sequence a row.
        window: tokens that a query reads whether selected or not, itself included.
        far_bias: `[B, G, S]`, added to the scores of `recent` keys that are `window` or more tokens behind the query.
        scale: factor on the scores; None: d ** -0.5.
        softcap: c of c · tanh(score / c); None: none. The bias is added after it.
        sinks: `[G, R]`, the score of one more key in every softmax, whose value is 0.

    Returns:
        `[B, G, R, T, d]`; zero where a query has nothing to read.
    """
    keys = join(None if cached is None else cached.pad(), recent)
    distance = position[:, None, :, None] - keys.position[:, :, None]  # [B, G, T, S]
    in_window = distance < window
    assert keys.valid is not None and keys.selected is not None  # `join` spells them out
    readable = keys.selected[:, :, None]
    if keys.evicted_at is not None:
        readable = readable & (position[:, None, :, None] < keys.evicted_at[:, :, None])
    mask = keys.valid[:, :, None] & (distance >= 0) & (readable | in_window)
    if segment is not None:
        mask = mask & (segment[:, None, :, None] == segment[:, None, None, :])
    bias = None
    if far_bias is not None:
        num_cached = keys.key.shape[2] - far_bias.shape[2]
        bias = F.pad(far_bias, (num_cached, 0))[:, :, None].masked_fill(in_window, 0.0)
    return attend(query, keys.key, keys.value, mask, bias, scale, softcap, sinks)
