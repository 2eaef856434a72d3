"""
Form "selected", one token a row on a cache of fixed size, in place and without asking the device anything.

A group that does not select a row's token costs that row nothing: its programs return before they read a weight or the
cache. What they would have written is never read.
"""

import torch
import triton
import triton.language as tl

from ..layout import FixedKeyValues, HeadWeights
from .builds import KernelBuild
from .gather_project import channel_pairs

BLOCK_PAIRS = 8  # pairs of channels that a program projects: few, as one row has few active groups to fill a GPU with
BLOCK_INPUT = 256  # channels of the hidden states read at a time
BLOCK_OUTPUT = 32  # channels of the output that a program projects one group's heads into
BLOCK_SUM = 32  # groups added up at a time


def entry_block(head_dim: int) -> int:
    """Cached entries read at a time: as many as registers hold, of keys, values and output."""
    return 64 if head_dim <= 128 else 32


@triton.jit
def is_active(score_ptr, valid_ptr, row, group, num_groups):
    """Whether a group selects a row's token."""
    active = tl.load(score_ptr + row * num_groups + group) > float("-inf")
    if valid_ptr is not None:
        active = active & (tl.load(valid_ptr + row) != 0)
    return active


@triton.jit
def _project(
    hidden_ptr,  # [B, D]
    query_weight_ptr,  # [G, R * d, D]
    key_weight_ptr,  # [G, d, D]
    value_weight_ptr,  # [G, d, D]
    query_bias_ptr,  # [G, R * d] or None, as the next two
    key_bias_ptr,  # [G, d]
    value_bias_ptr,  # [G, d]
    cos_ptr,  # [B, ROTARY_DIM]
    sin_ptr,  # [B, ROTARY_DIM]
    score_ptr,  # [B, G]
    valid_ptr,  # [B] or None
    projected_ptr,  # [B, G, R + 2, d] float32: rotated queries, rotated key, value
    num_groups,
    hidden_size,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group, row = tl.program_id(1), tl.program_id(2)
    if not is_active(score_ptr, valid_ptr, row, group, num_groups):
        return
    blocks_per_head: tl.constexpr = (HEAD_DIM // 2 + BLOCK_PAIRS - 1) // BLOCK_PAIRS
    head = tl.program_id(0) // blocks_per_head
    pair = tl.program_id(0) % blocks_per_head * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    first, second, in_head = channel_pairs(pair, HEAD_DIM, ROTARY_DIM)
    weight_row = group.to(tl.int64) * HEAD_DIM
    if head < HEADS:
        weight_row = weight_row * HEADS + head * HEAD_DIM
        weight_ptr = query_weight_ptr
    elif head == HEADS:
        weight_ptr = key_weight_ptr
    else:
        weight_ptr = value_weight_ptr
    weight_ptr += weight_row * hidden_size

    total_1 = tl.zeros([BLOCK_PAIRS, BLOCK_D], tl.float32)
    total_2 = tl.zeros([BLOCK_PAIRS, BLOCK_D], tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < hidden_size
        states = tl.load(hidden_ptr + row.to(tl.int64) * hidden_size + column, mask=inside, other=0.0).to(tl.float32)
        mask = in_head[:, None] & inside[None, :]
        weight_1 = tl.load(weight_ptr + first[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)
        weight_2 = tl.load(weight_ptr + second[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)
        total_1 += weight_1.to(tl.float32) * states[None, :]
        total_2 += weight_2.to(tl.float32) * states[None, :]
    output_1, output_2 = tl.sum(total_1, 1), tl.sum(total_2, 1)

    if query_bias_ptr is not None:
        if head < HEADS:
            bias_ptr = query_bias_ptr
        elif head == HEADS:
            bias_ptr = key_bias_ptr
        else:
            bias_ptr = value_bias_ptr
        output_1 += tl.load(bias_ptr + weight_row + first, mask=in_head, other=0.0).to(tl.float32)
        output_2 += tl.load(bias_ptr + weight_row + second, mask=in_head, other=0.0).to(tl.float32)
    rotated = pair < tl.where(head <= HEADS, ROTARY_DIM // 2, 0)  # not the value
    angle = row * ROTARY_DIM + pair
    cos_1 = tl.load(cos_ptr + angle, mask=rotated, other=1.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + angle, mask=rotated, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + angle + ROTARY_DIM // 2, mask=rotated, other=1.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + angle + ROTARY_DIM // 2, mask=rotated, other=0.0).to(tl.float32)
    projected_ptr += ((row * num_groups + group).to(tl.int64) * (HEADS + 2) + head) * HEAD_DIM
    tl.store(projected_ptr + first, output_1 * cos_1 - output_2 * sin_1, mask=in_head)
    tl.store(projected_ptr + second, output_2 * cos_2 + output_1 * sin_2, mask=in_head)


@triton.jit
def _place_of_entry(
    score_ptr,  # [C] of one row and group
    position_ptr,  # [C]
    count,
    budget,
    new_score,
    BLOCK_C: tl.constexpr,
):
    """
    Slot of a new entry: behind the others, or, if they fill the budget, where the entry of lowest score is, of several
    the latest. `budget` if that is the new entry itself.
    """
    slot = count
    if count >= budget:
        lowest = tl.full([BLOCK_C], float("inf"), tl.float32)
        for start in range(0, count, BLOCK_C):
            entry = start + tl.arange(0, BLOCK_C)
            lowest = tl.minimum(lowest, tl.load(score_ptr + entry, mask=entry < count, other=float("inf")))
        lowest_score = tl.min(lowest, 0)
        latest = tl.full([BLOCK_C], -1, tl.int64)  # position of the entry and its slot, in one number
        for start in range(0, count, BLOCK_C):
            entry = start + tl.arange(0, BLOCK_C)
            score = tl.load(score_ptr + entry, mask=entry < count, other=float("inf"))
            position = tl.load(position_ptr + entry, mask=entry < count, other=-1).to(tl.int64)
            latest = tl.maximum(latest, tl.where(score == lowest_score, position << 32 | entry, -1))
        slot = tl.where(new_score > lowest_score, tl.max(latest, 0).to(tl.int32), budget)
    return slot


@triton.jit
def _insert_and_attend(
    projected_ptr,  # [B, G, R + 2, d] float32
    score_ptr,  # [B, G]
    valid_ptr,  # [B] or None
    key_ptr,  # [B, G, C, d]
    value_ptr,  # [B, G, C, d]
    position_ptr,  # [B, G, C]
    kept_score_ptr,  # [B, G, C]
    count_ptr,  # [B, G]
    num_evicted_ptr,  # [B, G]
    num_tokens_ptr,  # [B]
    heads_ptr,  # [B, G, R, d] float32
    num_groups,
    capacity,  # C
    budget,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1)
    if not is_active(score_ptr, valid_ptr, row, group, num_groups):
        return
    place = (row * num_groups + group).to(tl.int64)
    channel = tl.arange(0, BLOCK_HEAD)
    in_head = channel < HEAD_DIM
    projected_ptr += place * (HEADS + 2) * HEAD_DIM
    key_ptr += place * capacity * HEAD_DIM
    value_ptr += place * capacity * HEAD_DIM
    position_ptr += place * capacity
    kept_score_ptr += place * capacity
    dtype = key_ptr.dtype.element_ty
    # As the cache will hold them, also in this step.
    new_key = tl.load(projected_ptr + HEADS * HEAD_DIM + channel, mask=in_head, other=0.0).to(dtype)
    new_value = tl.load(projected_ptr + (HEADS + 1) * HEAD_DIM + channel, mask=in_head, other=0.0).to(dtype)
    new_score = tl.load(score_ptr + place)

    count = tl.load(count_ptr + place)
    new_slot = _place_of_entry(kept_score_ptr, position_ptr, count, budget, new_score, BLOCK_C)
    is_full = count >= budget
    count = tl.minimum(count + 1, budget)
    for head in tl.static_range(HEADS):
        query = tl.load(projected_ptr + head * HEAD_DIM + channel, mask=in_head, other=0.0) * SCALE
        # One running maximum, sum and output for each of the lanes, brought together at the end. The maximum starts
        # below every score but finite, so that lanes without an entry need no care: exp(-inf - highest) is 0.
        highest = tl.full([BLOCK_C], -1e38, tl.float32)
        total = tl.zeros([BLOCK_C], tl.float32)
        output = tl.zeros([BLOCK_C, BLOCK_HEAD], tl.float32)
        for start in range(0, count, BLOCK_C):
            entry = start + tl.arange(0, BLOCK_C)
            is_new = (entry == new_slot)[:, None]  # not read from memory, which is written below
            mask = (entry < count)[:, None] & in_head[None, :] & ~is_new
            read = entry[:, None] * HEAD_DIM + channel[None, :]
            key = tl.where(is_new, new_key[None, :], tl.load(key_ptr + read, mask=mask, other=0.0))
            value = tl.where(is_new, new_value[None, :], tl.load(value_ptr + read, mask=mask, other=0.0))
            scores = tl.sum(key.to(tl.float32) * query[None, :], 1)
            scores = tl.where(entry < count, scores, float("-inf"))
            higher = tl.maximum(highest, scores)
            decay = tl.exp(highest - higher)
            weight = tl.exp(scores - higher)
            total = total * decay + weight
            output = output * decay[:, None] + weight[:, None] * value.to(tl.float32)
            highest = higher
        rescale = tl.exp(highest - tl.max(highest, 0))
        result = tl.sum(output * rescale[:, None], 0) / tl.sum(total * rescale, 0)
        tl.store(heads_ptr + (place * HEADS + head) * HEAD_DIM + channel, result, mask=in_head)

    tl.debug_barrier()  # no warp reads the state from here on
    if new_slot < budget:
        tl.store(key_ptr + new_slot * HEAD_DIM + channel, new_key, mask=in_head)
        tl.store(value_ptr + new_slot * HEAD_DIM + channel, new_value, mask=in_head)
        tl.store(position_ptr + new_slot, tl.load(num_tokens_ptr + row).to(tl.int32))
        tl.store(kept_score_ptr + new_slot, new_score)
    tl.store(count_ptr + place, count)
    if is_full:
        tl.store(num_evicted_ptr + place, tl.load(num_evicted_ptr + place) + 1)


@triton.jit
def _project_group_output(
    heads_ptr,  # [B, G, R, d] float32
    weight_ptr,  # [G, D, R * d]
    score_ptr,  # [B, G]
    gate_ptr,  # [B, G]
    valid_ptr,  # [B] or None
    output_ptr,  # [B, G, D] float32
    num_groups,
    hidden_size,
    QUERY_DIM: tl.constexpr,  # R * d
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group, row = tl.program_id(1), tl.program_id(2)
    if not is_active(score_ptr, valid_ptr, row, group, num_groups):
        return
    place = (row * num_groups + group).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden_size
    weight_ptr += group.to(tl.int64) * hidden_size * QUERY_DIM
    total = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    for start in range(0, QUERY_DIM, BLOCK_Q):
        channel = start + tl.arange(0, BLOCK_Q)
        in_query = channel < QUERY_DIM
        heads = tl.load(heads_ptr + place * QUERY_DIM + channel, mask=in_query, other=0.0)
        mask = inside[:, None] & in_query[None, :]
        weight = tl.load(weight_ptr + column[:, None] * QUERY_DIM + channel[None, :], mask=mask, other=0.0)
        total += weight.to(tl.float32) * heads[None, :]
    gate = tl.load(gate_ptr + place).to(tl.float32)
    tl.store(output_ptr + place * hidden_size + column, tl.sum(total, 1) * gate, mask=inside)


@triton.jit
def _sum_active_groups(
    group_output_ptr,  # [B, G, D] float32
    score_ptr,  # [B, G]
    valid_ptr,  # [B] or None
    output_ptr,  # [B, D]
    num_groups,
    hidden_size,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden_size
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    end = num_groups
    if valid_ptr is not None:
        end = tl.where(tl.load(valid_ptr + row) != 0, num_groups, 0)
    for start in range(0, end, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        place = row * num_groups + group
        active = tl.load(score_ptr + place, mask=group < num_groups, other=float("-inf")) > float("-inf")
        mask = active[:, None] & inside[None, :]
        total += tl.load(group_output_ptr + place[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)
    tl.store(output_ptr + row * hidden_size + column, tl.sum(total, 0).to(output_ptr.dtype.element_ty), mask=inside)


def decode_selected(
    hidden_states: torch.Tensor,
    weights: HeadWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    score: torch.Tensor,
    gate: torch.Tensor,
    valid: torch.Tensor | None,
    state: FixedKeyValues,
    budget: int,
) -> torch.Tensor:
    """
    Same function as `mosa_hf.kernels.decode.decode_selected`; biases all or none, and sums in a fixed order.

    Everything stays on the device and nothing is allocated by size of the data, so CUDA graphs can hold it.

    Raises:
        ValueError: for a budget that the state cannot hold, or a state that is not contiguous.
    """
    if not 1 <= budget <= state.key.shape[2]:
        raise ValueError(f"`budget` must be between 1 and the capacity {state.key.shape[2]}, got {budget}.")
    if not all(kept.is_contiguous() for kept in state):
        raise ValueError("`state` must be contiguous: it is updated where it is.")
    return _decode_selected(
        hidden_states,
        *(None if weight is None else weight.contiguous() for weight in weights),
        cos,
        sin,
        score,
        gate,
        None if valid is None else valid.contiguous(),
        state.key,
        state.value,
        state.position,
        state.score,
        state.count,
        state.num_evicted,
        state.num_tokens,
        budget,
    )


@torch.library.custom_op(
    "mosa::decode_selected",
    mutates_args=("kept_key", "kept_value", "kept_position", "kept_score", "count", "num_evicted", "num_tokens"),
)
def _decode_selected(
    hidden_states: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    output_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    score: torch.Tensor,
    gate: torch.Tensor,
    valid: torch.Tensor | None,
    kept_key: torch.Tensor,
    kept_value: torch.Tensor,
    kept_position: torch.Tensor,
    kept_score: torch.Tensor,
    count: torch.Tensor,
    num_evicted: torch.Tensor,
    num_tokens: torch.Tensor,
    budget: int,
) -> torch.Tensor:
    batch_size, hidden_size = hidden_states.shape
    num_groups, head_dim, _ = key_weight.shape
    query_dim = query_weight.shape[1]
    num_heads = query_dim // head_dim
    hidden_states, score, gate = hidden_states.contiguous(), score.contiguous(), gate.contiguous()
    output = torch.empty_like(hidden_states)
    scratch = {"device": hidden_states.device, "dtype": torch.float32}
    projected = torch.empty(batch_size, num_groups, num_heads + 2, head_dim, **scratch)
    heads = torch.empty(batch_size, num_groups, num_heads, head_dim, **scratch)
    group_output = torch.empty(batch_size, num_groups, hidden_size, **scratch)
    with torch.cuda.device_of(hidden_states):
        _project[((num_heads + 2) * triton.cdiv(head_dim // 2, BLOCK_PAIRS), num_groups, batch_size)](
            hidden_states,
            query_weight,
            key_weight,
            value_weight,
            query_bias,
            key_bias,
            value_bias,
            cos.contiguous(),
            sin.contiguous(),
            score,
            valid,
            projected,
            num_groups,
            hidden_size,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=cos.shape[-1],
            BLOCK_PAIRS=BLOCK_PAIRS,
            BLOCK_D=BLOCK_INPUT,
            num_warps=4,
        )
        _insert_and_attend[(num_groups, batch_size)](
            projected,
            score,
            valid,
            kept_key,
            kept_value,
            kept_position,
            kept_score,
            count,
            num_evicted,
            num_tokens,
            heads,
            num_groups,
            kept_key.shape[2],
            budget,
            SCALE=head_dim**-0.5,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_HEAD=triton.next_power_of_2(head_dim),
            BLOCK_C=entry_block(head_dim),
            num_warps=8,
        )
        _project_group_output[(triton.cdiv(hidden_size, BLOCK_OUTPUT), num_groups, batch_size)](
            heads,
            output_weight,
            score,
            gate,
            valid,
            group_output,
            num_groups,
            hidden_size,
            QUERY_DIM=query_dim,
            BLOCK_Q=min(128, triton.next_power_of_2(query_dim)),
            BLOCK_D=BLOCK_OUTPUT,
            num_warps=4,
        )
        _sum_active_groups[(triton.cdiv(hidden_size, 128), batch_size)](
            group_output,
            score,
            valid,
            output,
            num_groups,
            hidden_size,
            BLOCK_G=BLOCK_SUM,
            BLOCK_D=128,
            num_warps=4,
        )
    num_tokens += 1 if valid is None else valid
    return output


@_decode_selected.register_fake
def _(hidden_states, *_):
    return torch.empty_like(hidden_states)


def production_builds() -> list[KernelBuild]:
    def tensors(kind: str, *names: str) -> dict[str, str]:
        return {f"{name}_ptr": kind for name in names}

    call = {"score_ptr": "*fp32", "valid_ptr": "*i1", "num_groups": "i32", "hidden_size": "i32:16"}
    biases = {f"{name}_bias_ptr": None for name in ("query", "key", "value")}
    project = tensors("*bf16", "hidden", "query_weight", "key_weight", "value_weight", "cos", "sin")
    project |= {"projected_ptr": "*fp32"} | call
    attend = tensors("*bf16", "key", "value") | tensors("*i32", "position", "count", "num_evicted")
    attend |= tensors("*fp32", "projected", "kept_score", "heads", "score") | {"num_tokens_ptr": "*i64"}
    attend |= {"valid_ptr": "*i1", "num_groups": "i32", "capacity": "i32", "budget": "i32"}
    output = {"heads_ptr": "*fp32", "weight_ptr": "*bf16", "gate_ptr": "*fp32", "output_ptr": "*fp32"} | call
    total = {"group_output_ptr": "*fp32", "output_ptr": "*bf16"} | call
    head_dim = 128
    head = {"HEADS": 4, "HEAD_DIM": head_dim}
    projecting = {**head, "ROTARY_DIM": head_dim, "BLOCK_PAIRS": BLOCK_PAIRS, "BLOCK_D": BLOCK_INPUT, **biases}
    attending = {**head, "SCALE": head_dim**-0.5, "BLOCK_HEAD": head_dim, "BLOCK_C": entry_block(head_dim)}
    projecting_back = {"QUERY_DIM": 4 * head_dim, "BLOCK_Q": 128, "BLOCK_D": BLOCK_OUTPUT}
    summing = {"BLOCK_G": BLOCK_SUM, "BLOCK_D": 128}
    name = f"decode_selected d={head_dim}"
    return [
        KernelBuild(f"{name} project", _project, project, projecting, 4, 3),
        KernelBuild(f"{name} insert and attend", _insert_and_attend, attend, attending, 8, 3),
        KernelBuild(f"{name} output", _project_group_output, output, projecting_back, 4, 3),
        KernelBuild("decode_selected sum", _sum_active_groups, total, summing, 4, 3),
    ]
