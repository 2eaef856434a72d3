"""
Projections of the selected tokens alone: rotated queries and keys, and values, straight from the hidden states.

The rows of selected tokens are gathered inside the matmul, where they are read as the next tile of its left factor; a
tensor of gathered rows [B, G, K, D] never exists. One launch serves query, key and value. The rotation mixes pairs of
channels, so a tile holds the first channels and the second channels of its pairs apart, and rotates before it stores.
"""

import torch
import triton
import triton.language as tl

from ..derivatives import refuse_second_gradient
from ..triton_builds import COUNTS, SLOTS, KernelBuild, tensors
from ..triton_slots import add_to_tokens, gather, group_slots, launch, launch_scatter, load_piece, piece_of_head, tiles


@triton.jit
def channel_pairs(pair, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """
    First and second channels of the pairs that the rotation mixes, for `pair` [N] from 0 to d / 2, and whether they
    are in the head. The channels that the rotation leaves alone form pairs behind the others; a head that is not
    rotated (ROTARY_DIM = 0) is cut in the middle.
    """
    first = pair
    second = pair + HEAD_DIM // 2
    if ROTARY_DIM > 0 and ROTARY_DIM < HEAD_DIM:
        first = tl.where(pair < ROTARY_DIM // 2, pair, pair + ROTARY_DIM // 2)
        second = tl.where(pair < ROTARY_DIM // 2, pair + ROTARY_DIM // 2, pair + HEAD_DIM // 2)
    return first, second, pair < HEAD_DIM // 2


@triton.jit
def pair_angles(angle_ptr, token, filled, pair, neutral, ROTARY_DIM: tl.constexpr):
    """`cos` or `sin` of the tokens for the first and the second channels of the pairs, each [BLOCK, pairs]."""
    place = token[:, None] * ROTARY_DIM + pair[None, :]
    rotated = filled[:, None] & (pair < ROTARY_DIM // 2)[None, :]
    first = tl.load(angle_ptr + place, mask=rotated, other=neutral).to(tl.float32)
    second = tl.load(angle_ptr + place + ROTARY_DIM // 2, mask=rotated, other=neutral).to(tl.float32)
    return first, second


@triton.jit
def of_head(head, num_heads, query, key, value):
    """What belongs to a `head` of R = `num_heads` of the query, or behind them to that of the key, or of the value."""
    return tl.where(head < num_heads, query, tl.where(head == num_heads, key, value))


@triton.jit(do_not_specialize=COUNTS)
def _gather_project(
    hidden_ptr,  # [B, T, D]
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    query_weight_ptr, key_weight_ptr, value_weight_ptr,  # [G, R * d, D], [G, d, D], [G, d, D]
    query_bias_ptr, key_bias_ptr, value_bias_ptr,  # [G, R * d], [G, d], [G, d], or None of all three
    cos_ptr, sin_ptr,  # [B, T, ROTARY_DIM]
    query_ptr, key_ptr, value_ptr,  # [B, G, R, K, d], [B, G, K, d], [B, G, K, d]
    batch_size, num_tokens, num_groups, num_slots, hidden_size,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, NUM_PAIR_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place, group = tl.program_id(1) // NUM_PAIR_BLOCKS, tl.program_id(2)
    num_queries = tl.num_programs(1) // NUM_PAIR_BLOCKS - 2  # R
    # Of several heads for the query, and of one for key and value.
    head, num_heads = tl.where(place < num_queries, place, 0), tl.where(place < num_queries, num_queries, 1)
    weight_ptr = of_head(place, num_queries, query_weight_ptr, key_weight_ptr, value_weight_ptr)
    output_ptr = of_head(place, num_queries, query_ptr, key_ptr, value_ptr)
    row, slot, token, filled = group_slots(
        tl.program_id(0), group, index_ptr, count_ptr, batch_size, num_tokens, num_groups, num_slots, BLOCK_K
    )
    pair = tl.program_id(1) % NUM_PAIR_BLOCKS * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    first, second, in_head = channel_pairs(pair, HEAD_DIM, ROTARY_DIM)
    weight_row = (group * num_heads + head).to(tl.int64) * HEAD_DIM
    output_1 = tl.zeros([BLOCK_K, BLOCK_PAIRS], tl.float32)
    output_2 = tl.zeros([BLOCK_K, BLOCK_PAIRS], tl.float32)

    if tl.max(filled.to(tl.int32), 0) > 0:
        for start in range(0, hidden_size, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = column < hidden_size
            states = gather(hidden_ptr, token, filled, column, hidden_size)  # [BLOCK_K, BLOCK_D]
            weight = weight_ptr + weight_row * hidden_size + column[:, None]
            mask = inside[:, None] & in_head[None, :]
            weight_1 = tl.load(weight + first[None, :] * hidden_size, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_PAIRS]
            weight_2 = tl.load(weight + second[None, :] * hidden_size, mask=mask, other=0.0)
            output_1 = tl.dot(states, weight_1, output_1, input_precision="ieee")
            output_2 = tl.dot(states, weight_2, output_2, input_precision="ieee")
        if query_bias_ptr is not None:
            bias_ptr = of_head(place, num_queries, query_bias_ptr, key_bias_ptr, value_bias_ptr)
            output_1 += tl.load(bias_ptr + weight_row + first, mask=in_head, other=0.0).to(tl.float32)[None, :]
            output_2 += tl.load(bias_ptr + weight_row + second, mask=in_head, other=0.0).to(tl.float32)[None, :]
        rotated = filled & (slot < tl.where(place <= num_queries, num_slots, 0))  # of the value none
        cos_1, cos_2 = pair_angles(cos_ptr, token, rotated, pair, 1.0, ROTARY_DIM)
        sin_1, sin_2 = pair_angles(sin_ptr, token, rotated, pair, 0.0, ROTARY_DIM)
        output_1, output_2 = output_1 * cos_1 - output_2 * sin_1, output_2 * cos_2 + output_1 * sin_2
        output_1 = tl.where(filled[:, None], output_1, 0.0)  # the bias
        output_2 = tl.where(filled[:, None], output_2, 0.0)

    output = output_ptr + (((row * num_groups + group) * num_heads + head) * num_slots + slot)[:, None] * HEAD_DIM
    mask = (row < batch_size)[:, None] & in_head[None, :]
    dtype = output_ptr.dtype.element_ty
    tl.store(output + first[None, :], output_1.to(dtype), mask=mask)
    tl.store(output + second[None, :], output_2.to(dtype), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _unrotate(
    grad_ptr,  # [B, G, H, K, d]
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    cos_ptr, sin_ptr,  # [B, T, ROTARY_DIM]
    output_ptr,  # [B, G, H, K, d]
    batch_size, num_tokens, num_groups, num_slots,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, NUM_PAIR_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    head, group = tl.program_id(1) // NUM_PAIR_BLOCKS, tl.program_id(2)
    num_heads = tl.num_programs(1) // NUM_PAIR_BLOCKS
    row, slot, token, filled = group_slots(
        tl.program_id(0), group, index_ptr, count_ptr, batch_size, num_tokens, num_groups, num_slots, BLOCK_K
    )
    pair = tl.program_id(1) % NUM_PAIR_BLOCKS * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    first, second, in_head = channel_pairs(pair, HEAD_DIM, ROTARY_DIM)
    place = (((row * num_groups + group) * num_heads + head) * num_slots + slot)[:, None] * HEAD_DIM
    mask = filled[:, None] & in_head[None, :]
    grad_1 = tl.load(grad_ptr + place + first[None, :], mask=mask, other=0.0).to(tl.float32)
    grad_2 = tl.load(grad_ptr + place + second[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_1, cos_2 = pair_angles(cos_ptr, token, filled, pair, 1.0, ROTARY_DIM)
    sin_1, sin_2 = pair_angles(sin_ptr, token, filled, pair, 0.0, ROTARY_DIM)
    dtype = output_ptr.dtype.element_ty
    tl.store(output_ptr + place + first[None, :], (grad_1 * cos_1 + grad_2 * sin_2).to(dtype), mask=mask)
    tl.store(output_ptr + place + second[None, :], (grad_2 * cos_2 - grad_1 * sin_1).to(dtype), mask=mask)


@triton.jit
def _load_weight(
    weight_ptr,  # [G, H * d, D]
    piece, num_heads, group, column, hidden_size, HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """Weight of a piece of a head for a block of hidden channels, [BLOCK_HEAD, BLOCK_D]."""
    head, channel, in_head = piece_of_head(piece, HEAD_DIM, BLOCK_HEAD)
    mask = in_head[:, None] & (column < hidden_size)[None, :]
    weight_ptr += (group.to(tl.int64) * num_heads + head) * HEAD_DIM * hidden_size
    return tl.load(weight_ptr + channel[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _hidden_gradient(
    query_grad_ptr, key_grad_ptr, value_grad_ptr,  # [B, G, R, K, d], [B, G, K, d] twice, before the rotation
    query_weight_ptr, key_weight_ptr, value_weight_ptr,  # [G, R * d, D], [G, d, D], [G, d, D]
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
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for piece in range(num_heads * NUM_PIECES):
        grad = load_piece(
            query_grad_ptr, piece, num_heads, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
        )
        weight = _load_weight(query_weight_ptr, piece, num_heads, group, column, hidden_size, HEAD_DIM, BLOCK_HEAD)
        total = tl.dot(grad, weight, total, input_precision="ieee")
    for piece in range(NUM_PIECES):
        grad = load_piece(
            key_grad_ptr, piece, 1, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
        )
        weight = _load_weight(key_weight_ptr, piece, 1, group, column, hidden_size, HEAD_DIM, BLOCK_HEAD)
        total = tl.dot(grad, weight, total, input_precision="ieee")
        grad = load_piece(
            value_grad_ptr, piece, 1, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
        )
        weight = _load_weight(value_weight_ptr, piece, 1, group, column, hidden_size, HEAD_DIM, BLOCK_HEAD)
        total = tl.dot(grad, weight, total, input_precision="ieee")
    add_to_tokens(
        output_ptr, total, column, hidden_size, group, num_groups, row, slot, num_slots, token, filled, ATOMIC
    )


@triton.jit(do_not_specialize=COUNTS)
def _weight_gradient(
    hidden_ptr,  # [B, T, D]
    grad_ptr,  # [B, G, H, K, d], before the rotation
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    weight_grad_ptr, bias_grad_ptr,  # [G, H * d, D], [G, H * d]
    batch_size, num_tokens, num_groups, num_slots, hidden_size,
    NUM_PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    piece, group = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) // NUM_PIECES
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden_size
    total = tl.zeros([BLOCK_HEAD, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_HEAD], tl.float32)
    for block in range(tl.cdiv(batch_size * num_slots, BLOCK_K)):
        row, slot, token, filled = group_slots(
            block, group, index_ptr, count_ptr, batch_size, num_tokens, num_groups, num_slots, BLOCK_K
        )
        if tl.max(filled.to(tl.int32), 0) > 0:
            grad = load_piece(
                grad_ptr, piece, num_heads, group, num_groups, row, slot, num_slots, filled, HEAD_DIM, BLOCK_HEAD
            )
            states = gather(hidden_ptr, token, filled, column, hidden_size)  # [BLOCK_K, BLOCK_D]
            total = tl.dot(tl.trans(grad), states, total, input_precision="ieee")
            bias += tl.sum(grad.to(tl.float32), 0)

    head, channel, in_head = piece_of_head(piece, HEAD_DIM, BLOCK_HEAD)
    weight_row = (group * num_heads + head).to(tl.int64) * HEAD_DIM
    dtype = weight_grad_ptr.dtype.element_ty
    weight_grad_ptr += weight_row * hidden_size
    mask = in_head[:, None] & inside[None, :]
    tl.store(weight_grad_ptr + channel[:, None] * hidden_size + column[None, :], total.to(dtype), mask=mask)
    if tl.program_id(0) == 0:  # every block of columns has the same sums
        tl.store(bias_grad_ptr + weight_row + channel, bias.to(dtype), mask=in_head)


@torch.library.custom_op("mosa::gather_project", mutates_args=())
def gather_project(
    hidden_states: torch.Tensor, index: torch.Tensor, count: torch.Tensor,
    query_weight: torch.Tensor, key_weight: torch.Tensor, value_weight: torch.Tensor,
    query_bias: torch.Tensor | None, key_bias: torch.Tensor | None, value_bias: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Queries, keys and values of the tokens in the slots.

    Args:
        hidden_states: `[B, T, D]`.
        index: `[B, G, K]` int32, the token of each slot.
        count: `[B, G]` int32, filled slots.
        query_weight: `[G, R * d, D]`, of the hidden states' dtype, as all weights and biases; d, rotary_dim even.
        key_weight, value_weight: `[G, d, D]`.
        query_bias: `[G, R * d]` or None.
        key_bias, value_bias: `[G, d]`, or None as the query's.
        cos, sin: `[B, T, rotary_dim]`; not differentiated.

    Returns:
        rotated query `[B, G, R, K, d]`, rotated key and value `[B, G, K, d]`; zero in empty slots.
    """
    _, num_tokens, hidden_size = hidden_states.shape
    num_groups, head_dim, _ = key_weight.shape
    tile = tiles(head_dim, hidden_states.dtype)
    query, key, value = _empty(hidden_states, index, count, query_weight, key_weight)
    weights = (query_weight, key_weight, value_weight, query_bias, key_bias, value_bias)
    grid = (tile.blocks(index), (query.shape[2] + 2) * triton.cdiv(head_dim // 2, tile.pairs), num_groups)
    tensors = (hidden_states, index, count, *weights, cos, sin, query, key, value)
    launch(
        _gather_project, grid, tensors, index, num_tokens, hidden_size,
        BLOCK_D=tile.hidden, num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.in_pairs(cos.shape[-1]),
    )  # fmt: skip
    return query, key, value


@gather_project.register_fake
def _empty(hidden_states, index, count, query_weight, key_weight, *others):
    (batch_size, num_groups, num_slots), head_dim = index.shape, key_weight.shape[1]
    num_heads = query_weight.shape[1] // head_dim
    query = hidden_states.new_empty(batch_size, num_groups, num_heads, num_slots, head_dim)
    return query, *(hidden_states.new_empty(batch_size, num_groups, num_slots, head_dim) for _ in range(2))


@torch.library.custom_op("mosa::unrotate", mutates_args=())
def unrotate(
    grad: torch.Tensor, index: torch.Tensor, count: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """
    Gradient of what was rotated, from `grad` [B, G, H, K, d] of its rotation; empty slots are left as they are.

    An extra pass over few tokens, which keeps the angles out of the matmuls of the backward: there they would take the
    registers that tiles need.
    """
    _, num_groups, num_heads, _, head_dim = grad.shape
    tile = tiles(head_dim, grad.dtype)
    output = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grid = (tile.blocks(index), num_heads * triton.cdiv(head_dim // 2, tile.pairs), num_groups)
    tensors = (grad, index, count, cos, sin, output)
    launch(_unrotate, grid, tensors, index, cos.shape[1], num_warps=8, **tile.in_pairs(cos.shape[-1]))
    return output


@unrotate.register_fake
def _(grad, index, count, cos, sin):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@torch.library.custom_op("mosa::gather_project_hidden_gradient", mutates_args=())
def hidden_gradient(
    query_grad: torch.Tensor, key_grad: torch.Tensor, value_grad: torch.Tensor,
    index: torch.Tensor, count: torch.Tensor,
    query_weight: torch.Tensor, key_weight: torch.Tensor, value_weight: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:  # fmt: skip
    """
    Gradient `[B, T, D]` for the hidden states, from gradients before the rotation: `query_grad` [B, G, R, K, d],
    `key_grad` and `value_grad` [B, G, 1, K, d].
    """
    num_heads, head_dim = query_grad.shape[2], query_grad.shape[4]
    tensors = (query_grad, key_grad, value_grad, query_weight, key_weight, value_weight)
    tile = tiles(head_dim, query_grad.dtype)
    output = launch_scatter(_hidden_gradient, tensors, index, count, num_tokens, key_weight.shape[2], num_heads, tile)
    return output.to(key_grad.dtype)


@hidden_gradient.register_fake
def _(query_grad, key_grad, value_grad, index, count, query_weight, key_weight, value_weight, num_tokens):
    return key_grad.new_empty(key_grad.shape[0], num_tokens, key_weight.shape[2])


@torch.library.custom_op("mosa::gather_project_weight_gradient", mutates_args=())
def weight_gradient(
    hidden_states: torch.Tensor, index: torch.Tensor, count: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradients `[G, H * d, D]` and `[G, H * d]` of one projection's weight and bias, from `grad` [B, G, H, K, d] before
    the rotation.
    """
    _, num_tokens, hidden_size = hidden_states.shape
    _, num_groups, num_heads, _, head_dim = grad.shape
    tile = tiles(head_dim, grad.dtype)
    weight_grad, bias_grad = _empty_weights(hidden_states, index, count, grad)
    grid = (triton.cdiv(hidden_size, tile.hidden), num_heads * triton.cdiv(head_dim, tile.head), num_groups)
    tensors = (hidden_states, grad, index, count, weight_grad, bias_grad)
    launch(
        _weight_gradient, grid, tensors, index, num_tokens, hidden_size,
        num_warps=tile.num_warps, num_stages=2, **tile.in_pieces(tile.head),
    )  # fmt: skip
    return weight_grad, bias_grad


@weight_gradient.register_fake
def _empty_weights(hidden_states, index, count, grad):
    _, num_groups, num_heads, _, head_dim = grad.shape
    bias_grad = grad.new_empty(num_groups, num_heads * head_dim)
    return grad.new_empty(*bias_grad.shape, hidden_states.shape[2]), bias_grad


def _save(ctx, inputs, output) -> None:
    hidden_states, index, count, query_weight, key_weight, value_weight, *_, cos, sin = inputs
    ctx.save_for_backward(hidden_states, index, count, query_weight, key_weight, value_weight, cos, sin)


def _backward(ctx, query_grad, key_grad, value_grad):
    hidden_states, index, count, *weights, cos, sin = ctx.saved_tensors
    slots = (index, count)
    grads = (
        unrotate(query_grad, *slots, cos, sin),
        unrotate(key_grad.unsqueeze(2), *slots, cos, sin),
        value_grad.unsqueeze(2),
    )
    hidden_grad = None
    if ctx.needs_input_grad[0]:
        hidden_grad = hidden_gradient(*grads, *slots, *weights, hidden_states.shape[1])
    weight_grads, bias_grads = [], []
    for i, grad in enumerate(grads):
        needs_weight, needs_bias = ctx.needs_input_grad[3 + i], ctx.needs_input_grad[6 + i]
        weight_grad = bias_grad = None
        if needs_weight or needs_bias:  # frozen projections cost nothing
            weight_grad, bias_grad = weight_gradient(hidden_states, *slots, grad)
        weight_grads.append(weight_grad if needs_weight else None)
        bias_grads.append(bias_grad if needs_bias else None)
    return hidden_grad, None, None, *weight_grads, *bias_grads, None, None


gather_project.register_autograd(_backward, setup_context=_save)
refuse_second_gradient(unrotate)
refuse_second_gradient(hidden_gradient)
refuse_second_gradient(weight_gradient)


def production_builds() -> list[KernelBuild]:
    builds = []
    for head_dim in (64, 128):
        tile = tiles(head_dim, torch.bfloat16)
        rotation, outer = tile.in_pairs(head_dim), tile.in_pieces(tile.head)
        projection = dict.fromkeys(("query_bias_ptr", "key_bias_ptr", "value_bias_ptr")) | rotation
        projection["BLOCK_D"] = tile.hidden
        inner = {"ATOMIC": True} | tile.in_pieces(tile.inner)
        forward = tensors("*bf16", "hidden", "query_weight", "key_weight", "value_weight", "cos", "sin")
        forward |= tensors("*bf16", "query", "key", "value") | SLOTS | {"hidden_size": "i32:16"}
        unrotated = tensors("*bf16", "grad", "cos", "sin", "output") | SLOTS
        hidden = tensors("*bf16", "query_grad", "key_grad", "value_grad", "query_weight", "key_weight", "value_weight")
        hidden |= SLOTS | tensors("*fp32", "output") | {"hidden_size": "i32:16", "num_heads": "i32"}
        weight = tensors("*bf16", "hidden", "grad", "weight_grad", "bias_grad") | SLOTS | {"hidden_size": "i32:16"}
        name, warps = f"gather_project d={head_dim}", tile.num_warps
        builds += [
            KernelBuild(name, _gather_project, forward, projection, warps, tile.num_stages),
            KernelBuild(f"{name} unrotate", _unrotate, unrotated, rotation, 8, 3),
            KernelBuild(f"{name} hidden gradient", _hidden_gradient, hidden, inner, tile.scatter_warps, 2),
            KernelBuild(f"{name} weight gradient", _weight_gradient, weight, outer, warps, 2),
        ]
    return builds
