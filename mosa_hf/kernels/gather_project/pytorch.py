"""Projections of the selected tokens alone, a few groups at a time, so that gathered rows stay in the CPU's cache."""

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch

from ..derivatives import is_differentiated_again, plain_gradients
from ..rotary import rotate

BLOCK_SIZE = 3 * 2**17  # elements of gathered rows: more of them leave the cache, and cost page faults


def blocks_of_groups(
    token: torch.Tensor, hidden_size: int, *lists: Sequence[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, tuple[tuple[Any, ...], ...]]]:
    """
    `token` [G, N] and `lists` of tensors `[G, ...]` (or None) in equal blocks of groups that have few rows `[N, D]`;
    on a GPU all in one. Each block: its tokens, and each of the lists.
    """
    num_groups, num_slots = token.shape
    num_blocks = 1
    if token.device.type == "cpu":
        most = max(1, BLOCK_SIZE // max(1, num_slots * hidden_size))
        num_blocks = math.ceil(num_groups / most)
    slots = token.chunk(num_blocks)  # in half the time of `split`

    def split(tensors: Sequence[torch.Tensor | None]) -> Iterator[tuple[Any, ...]]:
        return zip(*(repeat(None, len(slots)) if x is None else x.chunk(num_blocks) for x in tensors), strict=True)

    return zip(slots, zip(*map(split, lists), strict=True), strict=True)


def gather_rows(states: torch.Tensor, token: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Rows `[g, N, ...]` of `states` [M, ...] at `token` [g, N], in the memory of `out`, those of as many groups or
    more, where it is given. Several times faster than indexing.
    """
    out = None if out is None else out[: len(token)].flatten(0, 1)
    return torch.index_select(states, 0, token.flatten(), out=out).view(*token.shape, *states.shape[1:])


def _rotate(
    states: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor, transposed: bool = False
) -> None:
    """
    Rotate the first channels of every head of `states` [G, N, heads * d] in place by angles `[G, N, rotary_dim]`, or
    by the transposed matrix, as a gradient is.
    """
    (cos_1, cos_2), (sin_1, sin_2) = (angle[:, :, None].chunk(2, dim=-1) for angle in (cos, sin))
    if transposed:
        sin_1, sin_2 = -sin_2, -sin_1
    first, second = states.unflatten(-1, (-1, head_dim))[..., : cos.shape[-1]].chunk(2, dim=-1)
    turned = (second * cos_2).addcmul_(first, sin_2)
    first.mul_(cos_1).addcmul_(second, sin_1, value=-1)
    second.copy_(turned)


def gather_project(
    hidden_states: torch.Tensor, token: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gate: torch.Tensor | None,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, router: torch.Tensor | None,
    query_bias: torch.Tensor | None, key_bias: torch.Tensor | None, value_bias: torch.Tensor | None,
    router_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
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
    inputs = (hidden_states, token, cos, sin, gate, query, key, value, router)
    biases = (query_bias, key_bias, value_bias, router_bias)
    # Without a gradient, to apply a function takes longer than some of the calls.
    return (_GatherProject.apply if torch.is_grad_enabled() else _forward)(*inputs, *biases)


def _forward(
    hidden_states, token, cos, sin, gate, query, key, value, router, query_bias, key_bias, value_bias, router_bias
):
    weights, biases = (query, key, value), (query_bias, key_bias, value_bias)
    states = [hidden_states.new_empty(*token.shape, weight.shape[1]) for weight in weights]
    columns = [weight.transpose(1, 2) for weight in weights]
    rows = None  # one buffer for all blocks: fresh memory costs page faults
    for slots, block in blocks_of_groups(token, hidden_states.shape[1], columns, states):
        rows = gather_rows(hidden_states, slots, out=rows)
        for weight, projected in zip(*block, strict=True):
            torch.bmm(rows, weight, out=projected)
    for projected, bias in zip(states, biases, strict=True):
        if bias is not None:
            projected += bias[:, None]
    cos, sin = (gather_rows(angle, token) for angle in (cos, sin))
    for projected in states[:2]:
        _rotate(projected, key.shape[1], cos, sin)
    return *states, None if gate is None else gate.clone()


def _plain(
    hidden_states, token, cos, sin, gate, query, key, value, router, query_bias, key_bias, value_bias, router_bias
):
    """The same in operations that can be differentiated again and again."""
    rows = hidden_states[token]  # [G, N, D]

    def project(weight, bias):
        states = rows @ weight.transpose(1, 2)
        return states if bias is None else states + bias[:, None]

    angles = [angle[token][:, :, None] for angle in (cos, sin)]
    states = [project(weight, bias) for weight, bias in ((query, query_bias), (key, key_bias))]
    states = [rotate(each.unflatten(-1, (-1, key.shape[1])), *angles).flatten(2) for each in states]
    states.append(project(value, value_bias))
    if gate is None:
        return tuple(states)
    bias = None if router_bias is None else router_bias[:, None]
    return *states, project(router[:, None], bias)[..., 0].sigmoid()


class _GatherProject(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # PyTorch inspects the signature in every call: a short one takes less
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_query, grad_key, grad_value, grad_gate):
        if is_differentiated_again(grad_query):
            given = tuple(filter(torch.is_tensor, (grad_query, grad_key, grad_value, grad_gate)))
            return plain_gradients(_plain, ctx.saved_tensors, ctx.needs_input_grad, given)
        hidden_states, token, cos, sin, gate, *weights = ctx.saved_tensors[:9]
        learns_rows, learns_weight, learns_bias = (
            ctx.needs_input_grad[part] for part in (0, slice(5, 9), slice(9, 13))
        )
        cos, sin = (gather_rows(angle, token) for angle in (cos, sin))
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in (grad_query, grad_key)]
        for grad in grads:
            _rotate(grad, weights[1].shape[1], cos, sin, transposed=True)
        grads.append(grad_value)
        if gate is not None:
            grads.append((grad_gate * gate * (1 - gate))[..., None])  # [G, N, 1]
            weights[3] = weights[3][:, None]
        grad_weights = [
            torch.empty_like(x) if learns else None for x, learns in zip(weights, learns_weight, strict=True)
        ]
        grad_biases = [x.sum(1) if learns else None for x, learns in zip(grads, learns_bias, strict=False)]
        grad_biases += [None] * (4 - len(grads))
        total = None
        if learns_rows:
            total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))

        lists = (grads, weights[: len(grads)], grad_weights[: len(grads)])
        rows = None
        for slots, block in blocks_of_groups(token, hidden_states.shape[1], *lists):
            rows = gather_rows(hidden_states, slots, out=rows)
            for grad, _, grad_weight in zip(*block, strict=True):
                if grad_weight is not None:
                    torch.bmm(grad.transpose(1, 2), rows, out=grad_weight)
            if total is not None:
                (grad, *others), (weight, *other_weights), _ = block
                update = torch.bmm(grad, weight, out=rows)
                for grad, weight in zip(others, other_weights, strict=True):
                    update.baddbmm_(grad, weight)
                total.index_add_(0, slots.flatten(), update.flatten(0, 1).to(total.dtype))

        for learned in (grad_weights, grad_biases):
            if (of_router := learned[3]) is not None:
                learned[3] = of_router[:, 0]
        return None if total is None else total.to(hidden_states.dtype), *[None] * 4, *grad_weights, *grad_biases
