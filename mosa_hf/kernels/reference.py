"""The specification: DESIGN section 2 written out. Every token is projected and every pair is scored, then masked."""

import torch

from .decode import decode_all, decode_selected
from .layout import HeadWeights, KeyValues, RaggedKeyValues, Tokens, join, rotate

__all__ = ["all_attention", "decode_all", "decode_selected", "selected_heads"]


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: KeyValues | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Form "selected": selected tokens attend to the selected tokens up to themselves that a cache budget has not evicted
    by then; nothing else gets an output.

    Args:
        hidden_states: `[B, T, D]`.
        weights: the groups' projections.
        tokens: `gate` is the factor on a selected token's output, sigmoid(z) in the paper.
        past: the selected tokens of earlier calls.

    Returns:
        output `[B, T, D]`, and the keys and values that a cache has to append.
    """
    query, key, value = project(hidden_states, weights, tokens)
    selected = tokens.selected.transpose(1, 2)  # [B, G, T]
    until, score = (None if x is None else x.transpose(1, 2) for x in (tokens.until, tokens.score))
    new = KeyValues(key, value, tokens.position[:, None].expand_as(selected), selected, None, until, score)
    keys = join(past, new)

    mask = keys.valid[:, :, None] & (keys.position[:, :, None] <= tokens.position[:, None, :, None])  # [B, G, T, S]
    if keys.until is not None:
        mask = mask & (tokens.position[:, None, :, None] < keys.until[:, :, None])
    if tokens.segment is not None:
        mask = mask & (tokens.segment[:, None, :, None] == tokens.segment[:, None, None, :])
    heads = attend(query, keys, mask)  # [B, G, R, T, d]
    heads = heads * (tokens.gate.transpose(1, 2) * selected)[:, :, None, :, None].to(heads.dtype)
    return project_output(heads, weights), new


def all_attention(
    query: torch.Tensor,
    near: KeyValues,
    kept: KeyValues | RaggedKeyValues | None,
    tokens: Tokens,
    window: int,
    far_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Form "all": query t reads { j <= t : (j selected and t < until_j) or t - j < window }.

    Args:
        query: `[B, G, R, T, d]`, rotated.
        near: the last tokens in sequence order, the T queries' own included, selected or not.
        kept: selected tokens that lie before `near`.
        tokens: of the T queries.
        window: tokens that a query reads whether selected or not, itself included.
        far_bias: `[B, G, S]` added to the scores of `near` keys that are `window` or more tokens behind the query.

    Returns:
        `[B, G, R, T, d]`; zero where a query has nothing to read.
    """
    keys = join(kept.pad() if isinstance(kept, RaggedKeyValues) else kept, near)
    distance = tokens.position[:, None, :, None] - keys.position[:, :, None]  # [B, G, T, S]
    recent = distance < window
    kept_on = keys.selected[:, :, None]
    if keys.until is not None:
        kept_on = kept_on & (tokens.position[:, None, :, None] < keys.until[:, :, None])
    mask = keys.valid[:, :, None] & (distance >= 0) & (kept_on | recent)
    if tokens.segment is not None:
        mask = mask & (tokens.segment[:, None, :, None] == tokens.segment[:, None, None, :])
    bias = None
    if far_bias is not None:
        num_kept = keys.key.shape[2] - far_bias.shape[2]
        bias = torch.nn.functional.pad(far_bias, (num_kept, 0))[:, :, None].masked_fill(recent, 0.0)
    return attend(query, keys, mask, bias)


def attend(query: torch.Tensor, keys: KeyValues, mask: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention `[B, G, R, T, d]` over the keys where `mask` [B, G, T, S]; zero where it is empty."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bgrtd,bgsd->bgrts", query.to(dtype), keys.key.to(dtype)) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, :, None]
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    nothing = ~mask.any(-1)[:, :, None, :, None]
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return torch.einsum("bgrts,bgsd->bgrtd", weights, keys.value.to(dtype)).to(query.dtype)


def project(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries `[B, G, R, T, d]`, rotated keys and values `[B, G, T, d]` of every token."""
    query, key, value = (
        torch.einsum("btn,gon->bgto", hidden_states, weight) + (0.0 if bias is None else bias[None, :, None])
        for weight, bias in (
            (weights.query, weights.query_bias),
            (weights.key, weights.key_bias),
            (weights.value, weights.value_bias),
        )
    )
    query = query.unflatten(-1, (-1, key.shape[-1])).transpose(2, 3)  # [B, G, R, T, d]
    cos, sin = tokens.cos[:, None], tokens.sin[:, None]
    return rotate(query, cos[:, None], sin[:, None]), rotate(key, cos, sin), value


def project_output(heads: torch.Tensor, weights: HeadWeights) -> torch.Tensor:
    """Sum over groups and heads of `heads` [B, G, R, T, d] times W_O: `[B, T, D]`."""
    output = weights.output.unflatten(-1, (heads.shape[2], -1))  # [G, D, R, d]
    return torch.einsum("bgrtd,gnrd->btn", heads, output)
