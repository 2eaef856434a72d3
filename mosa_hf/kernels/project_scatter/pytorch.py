"""Output projections added to the selected tokens, a few groups at a time, as in `gather_project`."""

import torch
from torch.autograd.function import once_differentiable

from ..gather_project.pytorch import gather_rows, group_blocks


class ProjectScatter(torch.autograd.Function):
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

    @staticmethod
    def forward(heads, gate, token, weight, num_tokens):
        _, hidden_size, width = weight.shape
        output = heads.new_zeros(num_tokens, hidden_size, dtype=torch.promote_types(heads.dtype, torch.float32))
        for groups in group_blocks(token, width, hidden_size):
            gated = heads[groups] * gate[groups, :, None]
            update = torch.bmm(gated, weight[groups].transpose(1, 2)).flatten(0, 1)
            output.index_add_(0, token[groups].flatten(), update.to(output.dtype))
        return output

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        heads, gate, token, weight = ctx.saved_tensors
        learns_heads, learns_gate, _, learns_weight, _ = ctx.needs_input_grad
        grad_heads = torch.empty_like(heads) if learns_heads else None
        grad_gate = torch.empty_like(gate) if learns_gate else None
        grad_weight = torch.empty_like(weight) if learns_weight else None
        for groups in group_blocks(token, weight.shape[2], weight.shape[1]):
            rows = gather_rows(grad, token[groups]).to(heads.dtype)  # [g, N, D]
            if learns_weight:
                gated = heads[groups] * gate[groups, :, None]
                torch.bmm(rows.transpose(1, 2), gated, out=grad_weight[groups])
            if learns_heads or learns_gate:
                grad_gated = torch.bmm(rows, weight[groups])
            if learns_gate:
                torch.sum(grad_gated * heads[groups], -1, out=grad_gate[groups])
            if learns_heads:
                torch.mul(grad_gated, gate[groups, :, None], out=grad_heads[groups])
        return grad_heads, grad_gate, None, grad_weight, None
