"""The paper's heads wherever PyTorch runs: gathered rows, batched matmuls, fused attention.

Selections are sorted by position, so that a query reads a prefix of the slots (docs/design.md, section 5). A group's
slots of all rows of the batch lie together, `[G, B * K]`: they share its weights.
"""

import torch
import torch.nn.functional as F

from ..gather_project.pytorch import gather_project
from ..opaque import opaque_op
from ..project_scatter.pytorch import project_scatter
from ..selected_positions.pytorch import selected_positions
from ..tensors import HeadWeights, KeyValues, PackedKeyValues, Tokens
from . import reference


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: PackedKeyValues | None = None
) -> tuple[torch.Tensor, KeyValues | None]:
    """
    Same function as `reference.selected_heads`; only selected tokens are projected. In a compiled graph without a
    `past`, there is nothing to append: None.
    """
    if torch.compiler.is_compiling():
        if past is not None:  # every shape has to be known
            return reference.selected_heads(hidden_states, weights, tokens, past)
        return opaque_selected_heads(hidden_states, *weights[:7], *tokens[:7], tokens.evicted_at), None
    device_type, dtype = hidden_states.device.type, hidden_states.dtype
    if not torch.is_autocast_enabled(device_type):
        output, new = _selected_heads(hidden_states, weights, tokens, past)
        return output.to(dtype), new
    hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    weights = HeadWeights(*(None if x is None else x.to(hidden_states.dtype) for x in weights))
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

    def gather(states: torch.Tensor | None) -> torch.Tensor | None:  # [B, T] or [B, T, G] -> [B, G, K]
        if states is None:
            return None
        states = states[:, None].expand(-1, num_groups, -1) if states.ndim == 2 else states.transpose(1, 2)
        return states.gather(2, index)

    def by_slot(states: torch.Tensor) -> torch.Tensor:  # [B, G, K] -> [G, B * K]
        return states.transpose(0, 1).flatten(1)

    gate = by_slot(gather(tokens.gate))
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
    gate = slot_gate if sparse else gate

    query, key, value = (
        states.view(num_groups, batch_size, num_slots, states.shape[2] // head_dim, head_dim).transpose(2, 3)
        for states in (query, key, value)
    )  # [G, B, R or 1, K, d]
    position, evicted_at = gather(tokens.position), gather(tokens.evicted_at)  # [B, G, K]
    key_values = (states[:, :, 0].transpose(0, 1) for states in (key, value))
    new = KeyValues(*key_values, position, filled, None, evicted_at, gather(tokens.score))

    # Empty slots come last: a causal read of the slots never meets them before a filled slot's own turn.
    mask = None
    if past is not None or tokens.segment is not None or evicted_at is not None:
        mask = torch.ones(num_slots, num_slots, dtype=torch.bool, device=index.device).tril()  # [K, K]
        mask = mask.expand(batch_size, num_groups, num_slots, num_slots)
        if tokens.segment is not None:
            segment = gather(tokens.segment)
            mask = mask & (segment[..., :, None] == segment[..., None, :])
        if evicted_at is not None:
            mask = mask & (position[..., :, None] < evicted_at[..., None, :])
        past = None if past is None else past.pad()
        if past is not None:
            past_mask = past.valid[:, :, None].expand(-1, -1, num_slots, -1)
            if past.evicted_at is not None:
                past_mask = past_mask & (position[..., :, None] < past.evicted_at[..., None, :])
            mask = torch.cat((past_mask, mask), dim=-1)
            key, value = (
                torch.cat((old.transpose(0, 1)[:, :, None], states), dim=3)
                for old, states in ((past.key, key), (past.value, value))
            )
        mask = mask.transpose(0, 1).flatten(0, 1)[:, None]  # [G * B, 1, K, S]
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)

    heads = heads.transpose(1, 2).flatten(2).view(*token.shape, weights.output.shape[2])
    gate = (gate * by_slot(filled)).to(heads.dtype)
    output = project_scatter(heads, gate, token, weights.output, batch_size * num_tokens)
    return output.unflatten(0, (batch_size, num_tokens)), new


def _run(hidden_states: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    weights, tokens = HeadWeights(*inputs[:7]), Tokens(*inputs[7:14], evicted_at=inputs[14])
    return selected_heads(hidden_states, weights, tokens)[0]


opaque_selected_heads = opaque_op(
    "selected_heads",
    _run,
    "Tensor hidden_states, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? query_bias, "
    "Tensor? key_bias, Tensor? value_bias, Tensor position, Tensor? valid, Tensor? segment, Tensor cos, Tensor sin, "
    "Tensor selected, Tensor gate, Tensor? evicted_at",
    learn=(0, 1, 2, 3, 4, 5, 6, 7, 14),  # hidden states, weights and biases, gate
)
