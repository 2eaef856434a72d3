"""Output projections added to the selected tokens, a few groups at a time, as in `gather_project`."""

import torch

from ..derivatives import is_differentiated_again, plain_gradients
from ..gather_project.pytorch import blocks_of_groups, gather_rows


def project_scatter(
    heads: torch.Tensor, gate: torch.Tensor, token: torch.Tensor, weight: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """
    Args:
        heads: `[G, N, R * d]`.
        gate: `[G, N]`, zero in empty slots.
        token: `[G, N]` int64, each group's slots: which of the M tokens.
        weight: `[G, D, R * d]`.
        num_tokens: M.

    Returns:
        `[M, D]`, in float32 at least: many groups may add into one token.
    """
    return (_ProjectScatter.apply if torch.is_grad_enabled() else _forward)(heads, gate, token, weight, num_tokens)


def _forward(heads, gate, token, weight, num_tokens):
    hidden_size = weight.shape[1]
    output = heads.new_zeros(num_tokens, hidden_size, dtype=torch.promote_types(heads.dtype, torch.float32))
    gated = heads * gate[..., None]
    update = None  # one buffer for all blocks, as in `gather_project`
    for slots, (block,) in blocks_of_groups(token, hidden_size, (gated, weight.transpose(1, 2))):
        update = torch.bmm(*block, out=None if update is None else update[: len(slots)])
        output.index_add_(0, slots.flatten(), update.flatten(0, 1).to(output.dtype))
    return output


def _plain(heads, gate, token, weight, num_tokens):
    """The same in operations that can be differentiated again and again."""
    update = (heads * gate[..., None]) @ weight.transpose(1, 2)
    output = heads.new_zeros(num_tokens, weight.shape[1], dtype=torch.promote_types(heads.dtype, torch.float32))
    return (output.index_add(0, token.flatten(), update.flatten(0, 1).to(output.dtype)),)


class _ProjectScatter(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # as in `gather_project`
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.num_tokens = inputs[4]

    @staticmethod
    def backward(ctx, grad):
        if is_differentiated_again(grad):
            inputs = (*ctx.saved_tensors, ctx.num_tokens)
            return plain_gradients(_plain, inputs, ctx.needs_input_grad, (grad,))
        heads, gate, token, weight = ctx.saved_tensors
        learns_heads, learns_gate, _, learns_weight, _ = ctx.needs_input_grad
        gated = heads * gate[..., None] if learns_weight else None
        grad_weight = torch.empty_like(weight) if learns_weight else None
        grad_gated = torch.empty_like(heads) if learns_heads or learns_gate else None
        lists = ((gated, weight), (grad_weight, grad_gated))
        grad, rows = grad.to(heads.dtype), None
        for slots, ((states, block), outputs) in blocks_of_groups(token, weight.shape[1], *lists):
            rows = gather_rows(grad, slots, out=rows)  # [g, N, D]
            if learns_weight:
                torch.bmm(rows.transpose(1, 2), states, out=outputs[0])
            if grad_gated is not None:
                torch.bmm(rows, block, out=outputs[1])
        if grad_gated is None:
            return None, None, None, grad_weight, None
        grad_gate = (grad_gated * heads).sum(-1) if learns_gate else None
        grad_heads = grad_gated.mul_(gate[..., None]) if learns_heads else None
        return grad_heads, grad_gate, None, grad_weight, None
