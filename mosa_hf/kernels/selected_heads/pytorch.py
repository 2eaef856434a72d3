"""The paper's heads wherever PyTorch runs: gathered rows, batched matmuls, fused attention.

Selections are sorted by position, so that a query reads a prefix of the slots (docs/design.md, section 5). A group's
slots of all rows of the batch lie together, `[G, B * K]`: they share its weights.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..derivatives import once
from ..entries import PackedKeyValues, Remember
from ..gather_project.pytorch import gather_project
from ..indexing import of_slots
from ..opaque import opaque_op
from ..project_scatter.pytorch import project_scatter
from ..selected_positions.pytorch import selected_positions
from ..tensors import HeadWeights, KeyValues, Tokens
from . import reference


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | Remember | None = None
) -> tuple[torch.Tensor, KeyValues]:
    """
    Same function as `reference.selected_heads`; only selected tokens are projected. In a compiled graph all are, for a
    cache: where there is none, the compiler leaves that out.
    """
    if callable(past) or (torch.compiler.is_compiling() and past is not None):  # every shape has to be known
        return reference.selected_heads(hidden_states, weights, tokens, past)
    if torch.compiler.is_compiling():
        _, key, value = reference.project(hidden_states, weights, tokens)
        output = opaque_selected_heads(hidden_states, *weights[:7], *tokens[:7], tokens.evicted_at)
        return output, reference.of_all(key, value, tokens)
    device_type, dtype = hidden_states.device.type, hidden_states.dtype
    if not torch.is_autocast_enabled(device_type):
        output, new = _selected_heads(hidden_states, weights, tokens, past)
        return output.to(dtype), new
    hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    weights = HeadWeights._make(None if x is None else x.to(hidden_states.dtype) for x in weights)
    with torch.autocast(device_type, enabled=False):
        output, new = _selected_heads(hidden_states, weights, tokens, past)
    return output.to(dtype), new


def _selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | None
) -> tuple[torch.Tensor, KeyValues]:
    batch_size, num_tokens, _ = hidden_states.shape
    num_groups, head_dim, _ = weights.key.shape
    index, filled = selected_positions(tokens.selected)  # [B, G, K]
    num_slots = index.shape[-1]
    row = torch.arange(batch_size, device=index.device)[:, None]
    token = (index.transpose(0, 1) + row * num_tokens).flatten(1)  # [G, B * K], into the tokens of all rows

    def by_slot(states: torch.Tensor) -> torch.Tensor:  # [B, G, K] -> [G, B * K]
        return states.transpose(0, 1).flatten(1)

    gate = by_slot(of_slots(tokens.gate, index))
    # The router learns from the selected tokens alone, rather than from a gradient of all tokens' logits.
    sparse = weights.router is not None and gate.dtype == hidden_states.dtype
    router = (weights.router, weights.router_bias) if sparse else (None, None)
    query, key, value, slot_gate = gather_project(
        hidden_states.flatten(0, 1),
        token,
        tokens.cos.flatten(0, 1),
        tokens.sin.flatten(0, 1),
        gate.detach() if sparse else None,
        *(*weights[:3], router[0]),
        *(*weights[4:7], router[1]),
    )
    gate = gate if slot_gate is None else slot_gate

    query, key, value = (
        states.view(num_groups, batch_size, num_slots, states.shape[2] // head_dim, head_dim).transpose(2, 3)
        for states in (query, key, value)
    )  # [G, B, R or 1, K, d]
    position = of_slots(tokens.position, index)  # [B, G, K]
    evicted_at, score = (None if x is None else of_slots(x, index) for x in (tokens.evicted_at, tokens.score))
    new_key, new_value = (states[:, :, 0].transpose(0, 1) for states in (key, value))
    new = KeyValues(new_key, new_value, position, filled, None, evicted_at, score)

    # Empty slots come last: a causal read of the slots never meets them before a filled slot's own turn.
    mask, old = None, None if past is None else past.pad()
    if past is not None or tokens.segment is not None or evicted_at is not None:
        segment = None if tokens.segment is None else of_slots(tokens.segment, index)
        mask = _mask(new, segment, old).transpose(0, 1).flatten(0, 1)[:, None]  # [G * B, 1, K, S]
    if old is not None:
        key, value = (
            torch.cat((before.transpose(0, 1)[:, :, None], states), dim=3)
            for before, states in ((old.key, key), (old.value, value))
        )
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
    heads = once(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None))

    heads = heads.transpose(1, 2).flatten(2).view(*token.shape, weights.output.shape[2])
    gate = (gate * by_slot(filled)).to(heads.dtype)
    output = project_scatter(heads, gate, token, weights.output, batch_size * num_tokens)
    return output.unflatten(0, (batch_size, num_tokens)), new


def _mask(new: KeyValues, segment: torch.Tensor | None, old: KeyValues | None) -> torch.Tensor:
    """
    What slots read of the cached keys `old` and of the slots `new` up to themselves, `[B, G, K, S]` bool.
    `segment`: `[B, G, K]`.
    """
    num_slots = new.position.shape[2]
    mask = torch.ones(num_slots, num_slots, dtype=torch.bool, device=new.position.device).tril()  # [K, K]
    mask = mask.expand(*new.position.shape, num_slots)
    if segment is not None:
        mask = mask & (segment[..., :, None] == segment[..., None, :])
    if new.evicted_at is not None:
        mask = mask & (new.position[..., :, None] < new.evicted_at[..., None, :])
    if old is None:
        return mask
    assert old.valid is not None  # `pad` spells it out
    of_old = old.valid[:, :, None].expand(-1, -1, num_slots, -1)
    if old.evicted_at is not None:
        of_old = of_old & (new.position[..., :, None] < old.evicted_at[..., None, :])
    return torch.cat((of_old, mask), dim=-1)


def _run(hidden_states: torch.Tensor, *inputs: Any) -> torch.Tensor:
    weights, tokens = HeadWeights(*inputs[:7]), Tokens(*inputs[7:14])._replace(evicted_at=inputs[14])
    return selected_heads(hidden_states, weights, tokens)[0]


opaque_selected_heads = opaque_op(
    "selected_heads",
    _run,
    "Tensor hidden_states, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? query_bias, "
    "Tensor? key_bias, Tensor? value_bias, Tensor position, Tensor? valid, Tensor? segment, Tensor cos, Tensor sin, "
    "Tensor selected, Tensor gate, Tensor? evicted_at",
    learn=(0, 1, 2, 3, 4, 5, 6, 7, 14),  # hidden states, weights and biases, gate
)
