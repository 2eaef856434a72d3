"""The paper's heads, specified (docs/design.md, section 2): every token projected, every pair scored, then masked."""

import torch

from ..attend import attend
from ..entries import PackedKeyValues, Remember
from ..rotary import rotate
from ..tensors import HeadWeights, KeyValues, Tokens, join


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | Remember | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Selected tokens attend to the selected tokens up to themselves that a cache budget has not evicted by then; nothing
    else gets an output.

    Args:
        hidden_states: `[B, T, D]`.
        weights: the groups' projections.
        tokens: of the call.
        past: the selected tokens of earlier calls; or, of one token a row, what takes it in and says what it reads.

    Returns:
        output `[B, T, D]`, and the keys and values that a cache has to append.
    """
    query, key, value = project(hidden_states, weights, tokens)
    selected = tokens.selected.transpose(1, 2)  # [B, G, T]
    new = of_all(key, value, tokens)
    if callable(past):
        keys = join(past(new).pad())
    else:
        keys = join(None if past is None else past.pad(), new)

    assert keys.valid is not None  # `join` spells it out
    mask = keys.valid[:, :, None] & (keys.position[:, :, None] <= tokens.position[:, None, :, None])  # [B, G, T, S]
    if keys.evicted_at is not None:
        mask = mask & (tokens.position[:, None, :, None] < keys.evicted_at[:, :, None])
    if tokens.segment is not None:
        mask = mask & (tokens.segment[:, None, :, None] == tokens.segment[:, None, None, :])
    heads = attend(query, keys.key, keys.value, mask)  # [B, G, R, T, d]
    heads = heads * (tokens.gate.transpose(1, 2) * selected)[:, :, None, :, None].to(heads.dtype)
    return project_output(heads, weights), new


def of_all(key: torch.Tensor, value: torch.Tensor, tokens: Tokens) -> KeyValues:
    """What a cache has to append of the keys and values `[B, G, T, d]` of all tokens: a slot for each."""
    selected = tokens.selected.transpose(1, 2)
    evicted_at, score = (None if x is None else x.transpose(1, 2) for x in (tokens.evicted_at, tokens.score))
    return KeyValues(key, value, tokens.position[:, None].expand_as(selected), selected, None, evicted_at, score)


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
