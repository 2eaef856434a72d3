"""Softmax attention under a mask, with scale, softcap and sinks: what references and PyTorch forms share."""

import torch


def scaled(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, softcap: float | None = None
) -> torch.Tensor:
    """
    Scores `[..., R, T, S]` of keys that R heads share.

    Args:
        query: `[..., R, T, d]`.
        key: `[..., S, d]`.
        scale: factor on q · k; None: d ** -0.5.
        softcap: c of c · tanh(score / c), which bounds the scaled scores; None: none.
    """
    scores = query @ key.unsqueeze(-3).transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """
    Weights, in float32 at least; all zero where nothing is read.

    Args:
        scores: `[..., S]`, -inf for what is not read.
        sinks: one more score, whose weight is left out; broadcasts to `[...]`.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(nothing, 0.0).softmax(-1, dtype=dtype).masked_fill(nothing, 0.0)
    sinks = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1, dtype=dtype)[..., :-1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention of each group.

    Args:
        query: `[B, G, R, T, d]`.
        key, value: `[B, G, S, d]`.
        mask: `[B, G, T, S]` bool, the keys that a query reads.
        bias: `[B, G, T, S]`, added to the scores after the softcap.
        scale, softcap: see `scaled`.
        sinks: `[G, R]`, the score of one more key in every softmax, whose value is 0.

    Returns:
        `[B, G, R, T, d]` in the dtype of `query`, computed in float32 at least; zero where a query reads nothing.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = scaled(query.to(dtype), key.to(dtype), scale, softcap)
    if bias is not None:
        scores = scores + bias[:, :, None]
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    weights = softmax(scores, None if sinks is None else sinks[..., None])
    return (weights @ value.to(dtype)[:, :, None]).to(query.dtype)
