"""Turns what is selected into slots, in one pass over the tokens."""

import torch
import triton
import triton.language as tl

from ..triton_builds import KernelBuild

# A program owns some groups and walks over the tokens. `[B, T, G]` is contiguous along the groups, so a few of them
# are read together; more would leave too few programs when the batch is small.
BLOCK_GROUPS = 8
BLOCK_TOKENS = 256
NUM_WARPS = 8  # with four, sm_120 spills


@triton.jit
def _selected_positions(
    selected_ptr, index_ptr, count_ptr,  # [B, T, G], [B, G, K], [B, G]
    num_tokens, num_groups, num_slots, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    count = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        place = (row * num_tokens + token)[:, None] * num_groups + group[None, :]
        inside = (token < num_tokens)[:, None] & (group < num_groups)[None, :]
        chosen = (tl.load(selected_ptr + place, mask=inside, other=0) != 0).to(tl.int32)
        slot = count[None, :] + tl.cumsum(chosen, 0) - 1
        place = (row * num_groups + group)[None, :] * num_slots + slot
        fits = (chosen > 0) & (slot < num_slots)
        tl.store(index_ptr + place, tl.broadcast_to(token[:, None], slot.shape), mask=fits)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + row * num_groups + group, tl.minimum(count, num_slots), mask=group < num_groups)
    for start in range(0, num_slots, BLOCK_T):
        slot = (start + tl.arange(0, BLOCK_T))[:, None]
        place = (row * num_groups + group)[None, :] * num_slots + slot
        is_empty = (slot >= count[None, :]) & (slot < num_slots) & (group < num_groups)[None, :]
        tl.store(index_ptr + place, tl.zeros([BLOCK_T, BLOCK_G], tl.int32), mask=is_empty)


@torch.library.custom_op("mosa::selected_positions", mutates_args=())
def selected_positions(selected: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Slots of selected tokens.

    Args:
        selected: `[B, T, G]` bool, False on padding.
        num_slots: K. Of a group that selects more tokens, the first K are taken.

    Returns:
        index `[B, G, K]` int32, ascending positions, 0 in empty slots, which come last; and count `[B, G]` int32.
    """
    batch_size, num_tokens, num_groups = selected.shape
    index, count = _empty(selected, num_slots)
    grid = (batch_size, triton.cdiv(num_groups, BLOCK_GROUPS))
    with torch.cuda.device_of(selected):
        _selected_positions[grid](
            selected.contiguous(), index, count, num_tokens, num_groups, num_slots,
            BLOCK_T=BLOCK_TOKENS, BLOCK_G=BLOCK_GROUPS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return index, count


@selected_positions.register_fake
def _empty(selected: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, _, num_groups = selected.shape
    index = selected.new_empty(batch_size, num_groups, num_slots, dtype=torch.int32)
    return index, selected.new_empty(batch_size, num_groups, dtype=torch.int32)


def production_builds() -> list[KernelBuild]:
    arguments = {"selected_ptr": "*i1", "index_ptr": "*i32", "count_ptr": "*i32"}
    arguments |= {name: "i32" for name in ("num_tokens", "num_groups", "num_slots")}
    blocks = {"BLOCK_T": BLOCK_TOKENS, "BLOCK_G": BLOCK_GROUPS}
    return [KernelBuild("selected_positions", _selected_positions, arguments, blocks, NUM_WARPS, 3)]
