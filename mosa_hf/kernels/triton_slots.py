"""How kernels are launched on the selected tokens and walk them, and how they add rows back to tokens.

A *slot* is a place for one selected token: slot k of row b and group g holds token `index[b, g, k]` if
k < `count[b, g]`, else it is empty. A group's slots of all rows of the batch are visited one row after another, as one
list of B * K: with a high sparsity a single row has too few of them to fill a block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .triton_builds import KernelBuild, tensors


class Tiles(NamedTuple):
    """Sizes of matmul tiles of one head size and dtype."""

    head_dim: int
    slots: int  # rows: fills tensor cores, and groups with few tokens waste little of it
    hidden: int  # channels of hidden states
    head: int  # channels of a head where they are columns of the product; a larger head is cut into pieces
    inner: int  # channels of a head where the product sums over them
    num_warps: int  # enough that accumulators stay in registers
    scatter_warps: int  # where rows are added to tokens: addresses of atomic additions take registers as well
    num_stages: int  # tiles in flight in a long loop

    @property
    def pairs(self) -> int:
        """Pairs of channels that hold as many channels as `head`, and no fewer than a tensor core takes."""
        return max(16, self.head // 2)

    def blocks(self, index: torch.Tensor) -> int:
        """How many blocks of slots `index` [B, G, K] has in each group."""
        return triton.cdiv(len(index) * index.shape[2], self.slots)

    def in_pairs(self, rotary_dim: int) -> dict[str, int]:
        """Constants of a kernel that walks the heads in pairs of channels."""
        sizes = {"HEAD_DIM": self.head_dim, "ROTARY_DIM": rotary_dim, "BLOCK_K": self.slots, "BLOCK_PAIRS": self.pairs}
        return sizes | {"NUM_PAIR_BLOCKS": triton.cdiv(self.head_dim // 2, self.pairs)}

    def in_pieces(self, size: int) -> dict[str, int]:
        """Constants of a kernel that walks the heads in pieces of `size` channels, and hidden channels."""
        sizes = {"HEAD_DIM": self.head_dim, "BLOCK_K": self.slots, "BLOCK_D": self.hidden, "BLOCK_HEAD": size}
        return sizes | {"NUM_PIECES": triton.cdiv(self.head_dim, size)}


def tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The table that every projection reads."""
    head = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:  # exact products run outside of tensor cores, with both factors in registers
        return Tiles(head_dim, 32, 32, min(head, 32), min(head, 32), 4, 4, 2)
    return Tiles(head_dim, 64, 64, min(head, 128), min(head, 64), 4 if head_dim <= 64 else 8, 8, 3)


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | None],
    index: torch.Tensor,
    num_tokens: int,
    *sizes: int,
    **options: Any,
) -> None:
    """Launch `kernel` on `tensors`, made contiguous; then come B, T, G and K of the slots `index`, and `sizes`."""
    batch_size, num_groups, num_slots = index.shape
    states = [None if each is None else each.contiguous() for each in tensors]
    if 0 in grid:
        return
    with torch.cuda.device_of(index):
        kernel[grid](*states, batch_size, num_tokens, num_groups, num_slots, *sizes, **options)


@triton.jit
def group_slots(
    block, group,
    index_ptr, count_ptr,  # [B, G, K], [B, G]
    batch_size, num_tokens, num_groups, num_slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Block `block` of a group's slots.

    Returns, each [BLOCK]: the row, the slot in it, the token (counted over all rows), and whether the slot is filled.
    """
    place = block * BLOCK + tl.arange(0, BLOCK)
    row = (place // num_slots).to(tl.int64)
    slot = place % num_slots
    count = tl.load(count_ptr + row * num_groups + group, mask=row < batch_size, other=0)
    filled = slot < count
    token = tl.load(index_ptr + (row * num_groups + group) * num_slots + slot, mask=filled, other=0)
    return row, slot, row * num_tokens + token, filled


@triton.jit
def gather(states_ptr, token, filled, column, hidden_size):
    """Hidden channels `column` [BLOCK_D] of the tokens of a block of slots, [BLOCK, BLOCK_D]; 0 in empty slots."""
    mask = filled[:, None] & (column < hidden_size)[None, :]
    return tl.load(states_ptr + token[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)


@triton.jit
def piece_of_head(piece, HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr):
    """The head of a piece, counted over a group's heads, its channels [BLOCK_HEAD], and which are in the head."""
    num_pieces: tl.constexpr = (HEAD_DIM + BLOCK_HEAD - 1) // BLOCK_HEAD
    channel = piece % num_pieces * BLOCK_HEAD + tl.arange(0, BLOCK_HEAD)
    return piece // num_pieces, channel, channel < HEAD_DIM


@triton.jit
def load_piece(
    heads_ptr,  # [B, G, H, K, d]
    piece, num_heads, group, num_groups, row, slot, num_slots, filled,
    HEAD_DIM: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """A piece of a head in a block of slots, [BLOCK, BLOCK_HEAD]; 0 in empty slots."""
    head, channel, in_head = piece_of_head(piece, HEAD_DIM, BLOCK_HEAD)
    place = ((row * num_groups + group) * num_heads + head) * num_slots + slot
    mask = filled[:, None] & in_head[None, :]
    return tl.load(heads_ptr + place[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)


@triton.jit
def add_to_tokens(
    output_ptr,  # ATOMIC: [B, T, D] float32, added to; else [B, G, K, D] float32, filled slots are written
    rows,  # [BLOCK, BLOCK_D] float32
    column, hidden_size, group, num_groups, row, slot, num_slots, token, filled, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add a block of slots' rows to their tokens, or, if not ATOMIC, leave them in the slots for `sum_by_token`."""
    mask = filled[:, None] & (column < hidden_size)[None, :]
    if ATOMIC:
        tl.atomic_add(output_ptr + token[:, None] * hidden_size + column[None, :], rows, mask=mask, sem="relaxed")
    else:
        place = (row * num_groups + group) * num_slots + slot
        tl.store(output_ptr + place[:, None] * hidden_size + column[None, :], rows, mask=mask)


def launch_scatter(
    kernel: JITFunction,
    tensors: Sequence[torch.Tensor],
    index: torch.Tensor,
    count: torch.Tensor,
    num_tokens: int,
    hidden_size: int,
    num_heads: int,
    tile: Tiles,
) -> torch.Tensor:
    """
    Launch a kernel that ends in `add_to_tokens`: on `tensors`, the slots `index` [B, G, K], `count` [B, G] and its
    output. A token collects from all groups that selected it: with atomic additions, or, under
    `torch.use_deterministic_algorithms`, in a fixed order.

    Returns:
        `[B, T, D]` float32.
    """
    atomic = not torch.are_deterministic_algorithms_enabled()
    if atomic:
        output = index.new_zeros(len(index), num_tokens, hidden_size, dtype=torch.float32)
    else:
        output = index.new_empty(*index.shape, hidden_size, dtype=torch.float32)
    grid = (tile.blocks(index), triton.cdiv(hidden_size, tile.hidden), index.shape[1])
    launch(
        kernel, grid, (*tensors, index, count, output), index, num_tokens, hidden_size, num_heads,
        ATOMIC=atomic, num_warps=tile.scatter_warps, num_stages=2, **tile.in_pieces(tile.inner),
    )  # fmt: skip
    return output if atomic else sum_by_token(output, index, count, num_tokens)


@triton.jit
def _sum_by_token(
    rows_ptr, order_ptr, start_ptr,  # [B * G * K, D], [B * G * K], [B * T + 1]
    output_ptr,  # [B, T, D]
    hidden_size, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden_size
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.load(start_ptr + token), tl.load(start_ptr + token + 1)):
        row = tl.load(order_ptr + i).to(tl.int64)
        total += tl.load(rows_ptr + row * hidden_size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * hidden_size + column, total, mask=inside)


def sum_by_token(rows: torch.Tensor, index: torch.Tensor, count: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Add up the rows of the slots that hold the same token, always in the order of the groups: unlike atomic additions,
    bit for bit the same in every run.

    Args:
        rows: `[B, G, K, D]`; rows of empty slots are not read.
        index: `[B, G, K]` int32.
        count: `[B, G]` int32.
        num_tokens: T.

    Returns:
        `[B, T, D]` float32.
    """
    batch_size, num_groups, num_slots, hidden_size = rows.shape
    device = rows.device
    first_token = torch.arange(batch_size, device=device)[:, None, None] * num_tokens
    filled = torch.arange(num_slots, device=device) < count[..., None]
    token = torch.where(filled, first_token + index, batch_size * num_tokens).flatten()  # empty slots go last
    token, order = token.sort(stable=True)
    start = torch.searchsorted(token, torch.arange(batch_size * num_tokens + 1, device=device))
    output = rows.new_empty(batch_size, num_tokens, hidden_size, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(hidden_size))
    with torch.cuda.device_of(rows):
        grid = (batch_size * num_tokens, triton.cdiv(hidden_size, block))
        _sum_by_token[grid](rows, order, start, output, hidden_size, BLOCK_D=block)
    return output


def production_builds() -> list[KernelBuild]:
    signature = tensors("*fp32", "rows", "output") | tensors("*i64", "order", "start") | {"hidden_size": "i32"}
    return [KernelBuild("sum_by_token D=1024", _sum_by_token, signature, {"BLOCK_D": 1024}, 4, 3)]
