"""
Output projections of the selected tokens, added to the tokens they belong to.

A token collects from all groups that selected it, with atomic additions in float32, or in a fixed order under
`torch.use_deterministic_algorithms`. The projected rows of the slots [B, G, K, D] exist in that case only.
"""

import torch
import triton
import triton.language as tl

from ..derivatives import refuse_second_gradient
from ..gather_project.triton import weight_gradient
from ..triton_builds import COUNTS, SLOTS, KernelBuild, tensors
from ..triton_slots import add_to_tokens, gather, group_slots, launch, launch_scatter, load_piece, piece_of_head, tiles


@triton.jit(do_not_specialize=COUNTS)
def _project_scatter(
    heads_ptr, gate_ptr, weight_ptr,  # [B, G, R, K, d], [B, G, K] float32, [G, D, R * d]
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    output_ptr,  # see `add_to_tokens`
    batch_size, num_tokens, num_groups, num_slots, hidden_size, num_heads,
    NUM_PIECES: tl.constexpr, HEAD_DIM: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    row, slot, token, filled = group_slots(
        tl.program_id(0), group, index_ptr, count_ptr, batch_size, num_tokens, num_groups, num_slots, BLOCK_K
    )
    if tl.max(filled.to(tl.int32), 0) == 0:
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden_size
    weight_ptr += group.to(tl.int64) * hidden_size * num_heads * HEAD_DIM
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for piece in range(num_heads * NUM_PIECES):
        heads = load_piece(
            heads_ptr, piece, num_heads, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
        )
        head, channel, in_head = piece_of_head(piece, HEAD_DIM, BLOCK_HEAD)
        weight = tl.load(
            weight_ptr + column[None, :] * (num_heads * HEAD_DIM) + head * HEAD_DIM + channel[:, None],
            mask=in_head[:, None] & inside[None, :],
            other=0.0,
        )  # [BLOCK_HEAD, BLOCK_D]
        total = tl.dot(heads, weight, total, input_precision="ieee")

    place = (row * num_groups + group) * num_slots + slot
    total *= tl.load(gate_ptr + place, mask=filled, other=0.0)[:, None]
    add_to_tokens(
        output_ptr, total, column, hidden_size, group, num_groups, row, slot, num_slots, token, filled, ATOMIC
    )


@triton.jit(do_not_specialize=COUNTS)
def _heads_gradient(
    grad_ptr,  # [B, T, D]
    heads_ptr, gate_ptr, weight_ptr,  # [B, G, R, K, d], [B, G, K] float32, [G, D, R * d]
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    heads_grad_ptr, gate_grad_ptr,  # as the heads and the gate
    batch_size, num_tokens, num_groups, num_slots, hidden_size, num_heads,
    NUM_PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row, slot, token, filled = group_slots(
        tl.program_id(0), group, index_ptr, count_ptr, batch_size, num_tokens, num_groups, num_slots, BLOCK_K
    )
    has_any = tl.max(filled.to(tl.int32), 0) > 0
    place = (row * num_groups + group) * num_slots + slot
    gate = tl.load(gate_ptr + place, mask=filled, other=0.0)
    gate_grad = tl.zeros([BLOCK_K], tl.float32)
    weight_ptr += group.to(tl.int64) * hidden_size * num_heads * HEAD_DIM
    for piece in range(num_heads * NUM_PIECES):
        head, channel, in_head = piece_of_head(piece, HEAD_DIM, BLOCK_HEAD)
        total = tl.zeros([BLOCK_K, BLOCK_HEAD], tl.float32)
        if has_any:
            for start in range(0, hidden_size, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                inside = column < hidden_size
                grad = gather(grad_ptr, token, filled, column, hidden_size)  # [BLOCK_K, BLOCK_D]
                weight = tl.load(
                    weight_ptr + column[:, None] * (num_heads * HEAD_DIM) + head * HEAD_DIM + channel[None, :],
                    mask=inside[:, None] & in_head[None, :],
                    other=0.0,
                )  # [BLOCK_D, BLOCK_HEAD]
                total = tl.dot(grad, weight, total, input_precision="ieee")
            heads = load_piece(
                heads_ptr, piece, num_heads, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
            )
            gate_grad += tl.sum(total * heads.to(tl.float32), 1)
            total *= gate[:, None]
        heads_place = ((row * num_groups + group) * num_heads + head) * num_slots + slot
        tl.store(
            heads_grad_ptr + heads_place[:, None] * HEAD_DIM + channel[None, :],
            total.to(heads_grad_ptr.dtype.element_ty),
            mask=(row < batch_size)[:, None] & in_head[None, :],
        )
    tl.store(gate_grad_ptr + place, gate_grad, mask=row < batch_size)


@torch.library.custom_op("mosa::project_scatter", mutates_args=())
def project_scatter(
    heads: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """
    Sum over the groups that selected a token of its gate times its heads through W_O.

    Args:
        heads: `[B, G, R, K, d]`.
        gate: `[B, G, K]` float32; empty slots are not read.
        weight: `[G, D, R * d]`, of the heads' dtype.
        index: `[B, G, K]` int32, the token of each slot.
        count: `[B, G]` int32, filled slots.
        num_tokens: T.

    Returns:
        `[B, T, D]` of the heads' dtype, summed in float32; zero for tokens that no group selected.
    """
    num_heads, head_dim = heads.shape[2], heads.shape[4]
    tile = tiles(head_dim, heads.dtype)
    output = launch_scatter(
        _project_scatter, (heads, gate, weight), index, count, num_tokens, weight.shape[1], num_heads, tile
    )
    return output.to(heads.dtype)


@project_scatter.register_fake
def _(heads, gate, weight, index, count, num_tokens):
    return heads.new_empty(heads.shape[0], num_tokens, weight.shape[1])


@torch.library.custom_op("mosa::project_scatter_heads_gradient", mutates_args=())
def heads_gradient(
    grad: torch.Tensor,
    heads: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of heads `[B, G, R, K, d]` and gate `[B, G, K]` from `grad` [B, T, D]; 0 in empty slots."""
    _, num_groups, num_heads, _, head_dim = heads.shape
    tile = tiles(head_dim, heads.dtype)
    _, num_tokens, hidden_size = grad.shape
    heads_grad, gate_grad = heads.new_empty(heads.shape), gate.new_empty(gate.shape)
    tensors = (grad, heads, gate, weight, index, count, heads_grad, gate_grad)
    launch(
        _heads_gradient, (tile.blocks(index), num_groups), tensors, index, num_tokens, hidden_size, num_heads,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.in_pieces(tile.head),
    )  # fmt: skip
    return heads_grad, gate_grad


@heads_gradient.register_fake
def _(grad, heads, gate, weight, index, count):
    return heads.new_empty(heads.shape), gate.new_empty(gate.shape)


def _save(ctx, inputs, output) -> None:
    heads, gate, weight, index, count, _ = inputs
    ctx.save_for_backward(heads, gate, weight, index, count)


def _backward(ctx, grad):
    heads, gate, weight, index, count = ctx.saved_tensors
    heads_grad = gate_grad = weight_grad = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        heads_grad, gate_grad = heads_gradient(grad, heads, gate, weight, index, count)
    if ctx.needs_input_grad[2]:
        # The gradient of a projection from tokens to heads, the other way round.
        gated = (heads * gate[:, :, None, :, None]).to(heads.dtype)
        weight_grad = weight_gradient(grad, index, count, gated)[0].transpose(1, 2).contiguous()
    return heads_grad, gate_grad, weight_grad, None, None, None


project_scatter.register_autograd(_backward, setup_context=_save)
refuse_second_gradient(heads_gradient)


def production_builds() -> list[KernelBuild]:
    slots = SLOTS | tensors("*fp32", "gate") | {"hidden_size": "i32:16"}
    builds = []
    for head_dim in (64, 128):
        tile = tiles(head_dim, torch.bfloat16)
        inner, outer = {"ATOMIC": True} | tile.in_pieces(tile.inner), tile.in_pieces(tile.head)
        heads = {"num_heads": "i32"} | slots
        forward = tensors("*bf16", "heads", "weight") | tensors("*fp32", "output") | heads
        backward = tensors("*bf16", "grad", "heads", "weight", "heads_grad") | tensors("*fp32", "gate_grad") | heads
        name, warps = f"project_scatter d={head_dim}", tile.num_warps
        builds += [
            KernelBuild(name, _project_scatter, forward, inner, tile.scatter_warps, 2),
            KernelBuild(f"{name} heads gradient", _heads_gradient, backward, outer, warps, tile.num_stages),
        ]
    return builds
