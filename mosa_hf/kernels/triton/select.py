"""From what the routers say to slots: the positions of each group's selected tokens, in ascending order."""

import torch
import triton
import triton.language as tl

from .builds import KernelBuild

# A program owns some groups and walks over the tokens. `[B, T, G]` is contiguous along the groups, so a few of them
# are read together; more would leave too few programs when the batch is small.
BLOCK_GROUPS = 8
BLOCK_TOKENS = 256


@triton.jit
def _append(index_ptr, chosen, token, num_before, row, group, num_groups, num_slots):
    """Write the `chosen` [BLOCK_T, BLOCK_G] tokens into their groups' next slots; returns the new counts [BLOCK_G]."""
    chosen = chosen.to(tl.int32)
    slot = num_before[None, :] + tl.cumsum(chosen, 0) - 1
    place = (row * num_groups + group)[None, :] * num_slots + slot
    fits = (chosen > 0) & (slot < num_slots) & (group < num_groups)[None, :]
    tl.store(index_ptr + place, tl.broadcast_to(token[:, None], slot.shape), mask=fits)
    return num_before + tl.sum(chosen, 0)


@triton.jit
def _selected_positions(
    selected_ptr,  # [B, T, G]
    index_ptr,  # [B, G, K]
    count_ptr,  # [B, G]
    num_tokens,
    num_groups,
    num_slots,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    count = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        place = (row * num_tokens + token)[:, None] * num_groups + group[None, :]
        inside = (token < num_tokens)[:, None] & (group < num_groups)[None, :]
        chosen = tl.load(selected_ptr + place, mask=inside, other=0) != 0
        count = _append(index_ptr, chosen, token, count, row, group, num_groups, num_slots)
    tl.store(count_ptr + row * num_groups + group, tl.minimum(count, num_slots), mask=group < num_groups)


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
    index = selected.new_zeros(batch_size, num_groups, num_slots, dtype=torch.int32)
    count = selected.new_empty(batch_size, num_groups, dtype=torch.int32)
    grid = (batch_size, triton.cdiv(num_groups, BLOCK_GROUPS))
    with torch.cuda.device_of(selected):
        _selected_positions[grid](
            selected.contiguous(),
            index,
            count,
            num_tokens,
            num_groups,
            num_slots,
            BLOCK_T=BLOCK_TOKENS,
            BLOCK_G=BLOCK_GROUPS,
        )
    return index, count


@selected_positions.register_fake
def _(selected: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, _, num_groups = selected.shape
    index = selected.new_empty(batch_size, num_groups, num_slots, dtype=torch.int32)
    return index, selected.new_empty(batch_size, num_groups, dtype=torch.int32)


@triton.jit
def _rank_keys(logits_ptr, valid_ptr, first_ptr, token, row, group, num_tokens, num_groups):
    """
    Logits [BLOCK_T, BLOCK_G] as unsigned integers in the same order: 0 for tokens that cannot be chosen, which is
    below every float, and the greatest of all floats for tokens that must be.
    """
    real = token < num_tokens
    place = (row * num_tokens + token)[:, None] * num_groups + group[None, :]
    logits = tl.load(logits_ptr + place, mask=real[:, None] & (group < num_groups)[None, :], other=0.0)
    if first_ptr is not None:
        first = tl.load(first_ptr + row * num_tokens + token, mask=real, other=0) != 0
        logits = tl.where(first[:, None], float("inf"), logits)
    if valid_ptr is not None:
        real = real & (tl.load(valid_ptr + row * num_tokens + token, mask=real, other=0) != 0)
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.uint32, bitcast=True)  # -0 and 0 are a tie
    keys = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    return tl.where(real[:, None], keys, 0)


@triton.jit
def _expert_choice(
    logits_ptr,  # [B, T, G]
    quota_ptr,  # [B]
    valid_ptr,  # [B, T] or None
    first_ptr,  # [B, T] or None
    index_ptr,  # [B, G, K]
    count_ptr,  # [B, G]
    num_tokens,
    num_groups,
    num_slots,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    quota = tl.load(quota_ptr + row)

    # The quota-th largest key, from its highest bit down: the largest number that at least `quota` keys reach.
    last = tl.zeros([BLOCK_G], tl.uint32)
    bit = tl.full([BLOCK_G], 1 << 31, tl.uint32)
    for _ in range(32):
        attempt = last | bit
        num_reached = tl.zeros([BLOCK_G], tl.int32)
        for start in range(0, num_tokens, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            keys = _rank_keys(logits_ptr, valid_ptr, first_ptr, token, row, group, num_tokens, num_groups)
            num_reached += tl.sum((keys >= attempt[None, :]).to(tl.int32), 0)
        last = tl.where(num_reached >= quota, attempt, last)
        bit >>= 1

    num_above = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        keys = _rank_keys(logits_ptr, valid_ptr, first_ptr, token, row, group, num_tokens, num_groups)
        num_above += tl.sum((keys > last[None, :]).to(tl.int32), 0)

    # Everything above it, and of the ties the earliest.
    places_for_ties = quota - num_above
    count = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        keys = _rank_keys(logits_ptr, valid_ptr, first_ptr, token, row, group, num_tokens, num_groups)
        tie = (keys == last[None, :]).to(tl.int32)
        earlier_ties = tl.cumsum(tie, 0) - tie
        chosen = (keys > last[None, :]) | ((tie > 0) & (earlier_ties < places_for_ties[None, :]))
        places_for_ties -= tl.sum(tie, 0)
        count = _append(index_ptr, chosen, token, count, row, group, num_groups, num_slots)
    tl.store(count_ptr + row * num_groups + group, count, mask=group < num_groups)


@torch.library.custom_op("mosa::select_expert_choice", mutates_args=())
def select_expert_choice(
    logits: torch.Tensor,
    quota: torch.Tensor,
    num_slots: int,
    valid: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of the highest logits, ties to the earlier token: `routing.select_by_expert_choice` of one sequence a
    row, without sorting.

    Args:
        logits: `[B, T, G]` float32, no NaN.
        quota: `[B]` int32, tokens that each group takes of a row: at most its valid tokens, at most `num_slots`.
        num_slots: K.
        valid: `[B, T]` bool, False on padding.
        first: `[B, T]` bool, tokens that take a place in any case.

    Returns:
        index `[B, G, K]` int32, ascending positions, 0 in empty slots, which come last; and count `[B, G]` int32.
    """
    batch_size, num_tokens, num_groups = logits.shape
    index = quota.new_zeros(batch_size, num_groups, num_slots)
    count = quota.new_empty(batch_size, num_groups)
    grid = (batch_size, triton.cdiv(num_groups, BLOCK_GROUPS))
    with torch.cuda.device_of(logits):
        _expert_choice[grid](
            logits.contiguous(),
            quota,
            None if valid is None else valid.contiguous(),
            None if first is None else first.contiguous(),
            index,
            count,
            num_tokens,
            num_groups,
            num_slots,
            BLOCK_T=BLOCK_TOKENS,
            BLOCK_G=BLOCK_GROUPS,
        )
    return index, count


@select_expert_choice.register_fake
def _(logits, quota, num_slots, valid=None, first=None) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, _, num_groups = logits.shape
    return quota.new_empty(batch_size, num_groups, num_slots), quota.new_empty(batch_size, num_groups)


def production_builds() -> list[KernelBuild]:
    sizes = {name: "i32" for name in ("num_tokens", "num_groups", "num_slots")}
    slots = {"index_ptr": "*i32", "count_ptr": "*i32"}
    blocks = {"BLOCK_T": BLOCK_TOKENS, "BLOCK_G": BLOCK_GROUPS}
    routers = {"logits_ptr": "*fp32", "quota_ptr": "*i32", "valid_ptr": "*i1", "first_ptr": "*i1"}
    compaction = {"selected_ptr": "*i1", **slots, **sizes}
    return [
        KernelBuild("selected_positions", _selected_positions, compaction, blocks, 4, 3),
        KernelBuild("expert_choice", _expert_choice, {**routers, **slots, **sizes}, blocks, 4, 3),
    ]
