"""Projections of the selected tokens alone, a few groups at a time, so that gathered rows stay in the CPU's cache."""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

BLOCK_SIZE = 2**20  # elements of gathered rows and weights: larger ones leave the cache, and cost page faults


def group_blocks(token: torch.Tensor, width: int, hidden_size: int) -> Iterator[slice]:
    """The groups of `token` [G, N] in blocks of few rows and weights `[N + width, D]`; on a GPU all in one."""
    num_groups, num_slots = token.shape
    size = max(1, BLOCK_SIZE // ((num_slots + width) * hidden_size)) if token.device.type == "cpu" else num_groups
    return (slice(start, start + size) for start in range(0, num_groups, size))


def gather_rows(states: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Rows `[g, N, ...]` of `states` [M, ...] at `token` [g, N]. Several times faster than indexing."""
    return states.index_select(0, token.flatten()).unflatten(0, token.shape)


def _signed(sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """The sine of a rotation, `[M, rotary_dim]`, as a factor of the other half of the channels."""
    first, second = sin.chunk(2, dim=1)
    return torch.cat((second, -first) if back else (-first, second), dim=1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, token: torch.Tensor) -> None:
    """Rotate the first channels of `heads` [g, N, heads, d] in place."""
    heads = heads[..., : cos.shape[1]]
    other_half = torch.cat(heads.chunk(2, dim=-1)[::-1], dim=-1)
    cos, signed_sin = (gather_rows(angle, token)[:, :, None] for angle in (cos, signed_sin))
    heads.mul_(cos).addcmul_(other_half, signed_sin)


class GatherProject(torch.autograd.Function):
    """
    Queries, keys and values of each group's slots, queries and keys rotated. The backward gathers the rows again.

    Args:
        hidden_states: `[M, D]`, the tokens of all rows of the batch.
        token: `[G, N]` int64, each group's slots: which of the M tokens.
        cos, sin: `[M, rotary_dim]`.
        gate: `[G, N]`, sigmoid of the slots' router logits, which `router` learns from; or None.
        query, key, value: weights `[G, R * d, D]`, `[G, d, D]` and `[G, d, D]`.
        router: `[G, D]`; None without `gate`.
        query_bias, key_bias, value_bias, router_bias: `[G, R * d]`, `[G, d]`, `[G, d]` and `[G]`, or None.

    Returns:
        query `[G, N, R * d]`, key and value `[G, N, d]`, and `gate`, now with a gradient (None without).
    """

    @staticmethod
    def forward(
        hidden_states, token, cos, sin, gate, query, key, value, router, query_bias, key_bias, value_bias, router_bias
    ):
        sizes = [query.shape[1], key.shape[1], value.shape[1]]
        signed_sin = _signed(sin)
        states = hidden_states.new_empty(*token.shape, sum(sizes))
        for groups in group_blocks(token, sum(sizes), hidden_states.shape[1]):
            rows = gather_rows(hidden_states, token[groups])
            weight = torch.cat((query[groups], key[groups], value[groups]), dim=1)
            block = torch.bmm(rows, weight.transpose(1, 2), out=states[groups])
            if query_bias is not None:
                block += torch.cat((query_bias[groups], key_bias[groups], value_bias[groups]), dim=1)[:, None]
            # Queries and key [g, N, R + 1, d], without the value.
            _rotate(block.unflatten(-1, (-1, sizes[1]))[..., :-1, :], cos, signed_sin, token[groups])
        return *states.split(sizes, dim=-1), None if gate is None else gate.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:9])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value, grad_gate):
        hidden_states, token, cos, sin, gate, *weights = ctx.saved_tensors
        learns_rows, learns_weight, learns_bias = (
            ctx.needs_input_grad[part] for part in (0, slice(5, 9), slice(9, 13))
        )
        grads = [grad_query, grad_key, grad_value]
        if gate is not None:
            grads.append((grad_gate * gate * (1 - gate))[..., None])  # [G, N, 1]
            weights[3] = weights[3][:, None]
        sizes = [weight.shape[1] for weight in weights[:3]]
        signed_sin = _signed(sin, back=True)
        grad_weights, grad_biases = [None] * 4, [None] * 4
        for i, weight in enumerate(weights):
            if learns_weight[i]:
                grad_weights[i] = torch.empty_like(weight)
            if learns_bias[i]:
                grad_biases[i] = weight.new_empty(weight.shape[:2])
        total = None
        if learns_rows:
            total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))

        for groups in group_blocks(token, sum(sizes), hidden_states.shape[1]):
            rows = gather_rows(hidden_states, token[groups])
            block = torch.cat([grad[groups] for grad in grads[:3]], dim=-1)
            _rotate(block.unflatten(-1, (-1, sizes[1]))[..., :-1, :], cos, signed_sin, token[groups])
            update = None
            for i, grad in enumerate((*block.split(sizes, dim=-1), *(grad[groups] for grad in grads[3:]))):
                if learns_weight[i]:
                    torch.bmm(grad.transpose(1, 2), rows, out=grad_weights[i][groups])
                if learns_bias[i]:
                    torch.sum(grad, 1, out=grad_biases[i][groups])
                if learns_rows:
                    weight = weights[i][groups]
                    update = torch.bmm(grad, weight) if update is None else update.baddbmm_(grad, weight)
            if learns_rows:
                total.index_add_(0, token[groups].flatten(), update.flatten(0, 1).to(total.dtype))

        for of_router in (grad_weights, grad_biases):
            of_router[3] = None if of_router[3] is None else of_router[3][:, 0]
        return None if total is None else total.to(hidden_states.dtype), *[None] * 4, *grad_weights, *grad_biases
