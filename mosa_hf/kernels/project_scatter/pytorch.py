"""Output projections added to the selected tokens, a few groups at a time, as in `gather_project`."""

import torch
from torch.autograd.function import once_differentiable

from ..gather_project.pytorch import gather_rows, group_blocks


class ProjectScatter(torch.autograd.Function):
    """
    Args:
        heads: `[G, N, R * d]`, zero in empty slots.
        token: `[G, N]` int64, each group's slots: which of the M tokens.
        weight: `[G, D, R * d]`.
        num_tokens: M.

    Returns:
        `[M, D]`, in float32 at least: many groups may add into one token.
    """

    @staticmethod
    def forward(heads, token, weight, num_tokens):
        _, hidden_size, width = weight.shape
        output = heads.new_zeros(num_tokens, hidden_size, dtype=torch.promote_types(heads.dtype, torch.float32))
        for groups in group_blocks(token, width, hidden_size):
            update = torch.bmm(heads[groups], weight[groups].transpose(1, 2)).flatten(0, 1)
            output.index_add_(0, token[groups].flatten(), update.to(output.dtype))
        return output

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        heads, token, weight = ctx.saved_tensors
        grad_heads, grad_weight = (
            torch.empty_like(x, memory_format=torch.contiguous_format) if learns else None
            for x, learns in zip((heads, weight), ctx.needs_input_grad[:3:2])
        )
        for groups in group_blocks(token, weight.shape[2], weight.shape[1]):
            rows = gather_rows(grad, token[groups]).to(heads.dtype)  # [g, N, D]
            if grad_heads is not None:
                torch.bmm(rows, weight[groups], out=grad_heads[groups])
            if grad_weight is not None:
                torch.bmm(rows.transpose(1, 2), heads[groups], out=grad_weight[groups])
        return grad_heads, None, grad_weight, None
