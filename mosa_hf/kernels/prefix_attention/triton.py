"""
Attention of queries that each read a range of sorted keys: a prefix of the selected ones, and a sliding window.

Selections are sorted by position, so what a query reads of them is a range of slots and never a mask (docs/design.md,
section 5). A program holds a tile of queries with all R heads of a group as its rows, so that keys are read once for
all of them, and visits only key blocks that some row of the tile reads: work is O(T * (K + window)).

Row m of a group's R * T rows is head m % R of query m // R. Scores are kept in base 2, where exp2 is one instruction.
"""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..derivatives import refuse_second_gradient
from ..entries import PackedKeyValues
from ..head_dim import check_head_dim
from ..tensors import NEVER
from ..triton_builds import DTYPES, HEAD_DIMS, LABELS, KernelBuild
from .reference import FarKeys, WindowKeys

INT32_MAX = torch.iinfo(torch.int32).max
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: below every score, and finite, so that no inf - inf occurs.
LOWEST = tl.constexpr(-1e30)
# Numbers of a call: whether one of them is 1, or a multiple of 16, is worth no build of its own.
SIZES = ["num_queries", "num_far", "num_window", "window", "num_slots", "num_tiles"]
SCAN = tl.constexpr(256)  # tiles whose ranges are compared at once with a key block


def prefix_attention(
    query: torch.Tensor,
    far: FarKeys,
    window: WindowKeys | None = None,
    position: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Same function as `reference.prefix_attention`, for d <= 256, and queries, keys and values of one dtype: float32,
    float16 or bfloat16. Gradients flow to queries, keys, values, bias and sinks, and are deterministic.

    Any ranges give right results. They are fast where neighbouring queries read neighbouring slots: a tile of queries
    visits every slot between the first and the last that one of them reads. Slots before the first and after the last
    that any query of the row and group reads may hold anything.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
    """
    _check(query, far, window, position, sinks)
    batch_size, num_groups, _, num_queries, head_dim = query.shape

    def per_query(numbers):
        if numbers is None:
            return None
        return numbers.to(torch.int32).expand(batch_size, num_groups, num_queries).contiguous()

    window_key, window_value, window_start, window_size = (None, None, None, 0) if window is None else window
    return _forward(
        query, far.key.contiguous(), far.value.contiguous(), per_query(far.start), per_query(far.end),
        None if far.bias is None else far.bias.float().contiguous(),
        None if far.evicted_at is None else far.evicted_at.clamp(max=INT32_MAX).to(torch.int32).contiguous(),
        window_key, window_value, per_query(window_start),
        per_query(position) if far.evicted_at is not None else None,
        None if sinks is None else sinks.float().contiguous(),
        window_size, head_dim**-0.5 if scale is None else float(scale), None if softcap is None else float(softcap),
    )[0]  # fmt: skip


def _check(
    query: torch.Tensor,
    far: FarKeys,
    window: WindowKeys | None,
    position: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise what `prefix_attention` raises."""
    batch_size, num_groups, num_heads, num_queries, head_dim = query.shape
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"Queries are {query.dtype}; the kernels take float32, float16 and bfloat16.")
    check_head_dim(head_dim)
    if num_heads * num_queries * head_dim >= 2**31:
        raise ValueError(f"Queries {tuple(query.shape)} have 2**31 numbers or more in a group: read them in parts.")
    if far.evicted_at is not None and position is None:
        raise ValueError("`far.evicted_at` is compared with the queries' `position`, which is missing.")
    if sinks is not None and sinks.shape != (num_groups, num_heads):
        raise ValueError(f"Sinks {tuple(sinks.shape)} do not fit queries {tuple(query.shape)}.")
    for name, keys in (("far", far), ("window", window)):
        if keys is None:
            continue
        shape = (batch_size, num_groups, keys.key.shape[2], head_dim)
        if keys.key.shape != shape or keys.value.shape != shape:
            raise ValueError(
                f"{name} keys {tuple(keys.key.shape)} and values {tuple(keys.value.shape)} do not fit queries "
                f"{tuple(query.shape)}."
            )
        if keys.key.dtype != query.dtype or keys.value.dtype != query.dtype:
            raise ValueError(f"{name} keys are {keys.key.dtype}, values {keys.value.dtype}, queries {query.dtype}.")


def after_packed(packed: PackedKeyValues | None, far: FarKeys) -> FarKeys:
    """
    `far`, whose `start` is None, behind the entries of `packed`, which all of its queries read. Others have empty
    slots in front, so that every query still reads a range.
    """
    if packed is None or packed.max_length == 0:
        return far
    num_empty = packed.max_length - packed.length[..., None]  # [B, G, 1]
    slot = torch.arange(packed.max_length, device=packed.length.device) - num_empty
    entry = torch.where(slot >= 0, packed.start[..., None] + slot, 0)  # [B, G, S]
    evicted_at = None
    if packed.evicted_at is not None or far.evicted_at is not None:
        own = torch.full_like(entry, NEVER) if packed.evicted_at is None else packed.evicted_at[entry]
        later = entry.new_full(far.key.shape[:3], NEVER) if far.evicted_at is None else far.evicted_at
        evicted_at = torch.cat((own, later), dim=2)
    bias = None if far.bias is None else F.pad(far.bias, (packed.max_length, 0))
    key, value = (
        torch.cat((own.to(later.dtype), later), dim=2)
        for own, later in zip(packed.at(entry), (far.key, far.value), strict=True)
    )
    return FarKeys(key, value, num_empty, packed.max_length + far.end, bias, evicted_at)


class Tile(NamedTuple):
    """How a kernel is cut: rows (queries x heads) and key slots a block, and what the compiler is told."""

    rows: int
    slots: int
    num_warps: int
    num_stages: int


# By the padded head size: the largest tiles found that spill no registers on any target that is compiled for. Sums of
# rows x d and scores of rows x slots live in registers, so slots shrink first as d grows, then rows; 64 slots spill on
# sm_120. Four warps: on gfx942 a thread of a larger program has half the registers.
FORWARD = {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(32, 16, 4, 2)}
QUERY_GRADIENT = {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)}
# Here sums are slots x d, and there are two of them.
KEY_GRADIENT = {64: Tile(32, 64, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 32, 8, 1)}
# Exact float32 products run outside the tensor cores, with both factors in registers, by Triton's backend: for NVIDIA
# 32 slots spill at d = 64, and four warps at any size; on gfx942 eight spill at d = 256.
FLOAT32 = {
    "cuda": {64: Tile(16, 16, 8, 2), 128: Tile(16, 16, 8, 3), 256: Tile(16, 16, 8, 2)},
    "hip": {64: Tile(16, 16, 8, 2), 128: Tile(16, 16, 4, 2), 256: Tile(16, 16, 4, 1)},
}
BACKEND = "cuda" if torch.version.hip is None else "hip"


def _tile(table: dict[int, Tile], query: torch.Tensor, backend: str = BACKEND) -> Tile:
    """The entry for this head size, with no more rows than there are."""
    dim = padded_dim(query.shape[-1])
    tile = (FLOAT32[backend] if query.dtype == torch.float32 else table)[max(64, dim)]
    num_rows = query.shape[2] * query.shape[3]
    return tile._replace(rows=max(16, min(tile.rows, triton.next_power_of_2(num_rows))))


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def load_rows(states, row, present, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows [N] of `states` [., d] as [N, BLOCK_DIM]; zeros where not `present` and beyond d."""
    return _load_at(states, row * HEAD_DIM, present, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _load_at(states, place, present, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The same of rows that begin at `place` [N]."""
    channel = tl.arange(0, BLOCK_DIM)
    mask = present[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(states + place[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_entries(states, scale, entry, present, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """`load_rows`; with a `scale` [.], `states` are codes, and decoded as `entry_codes` says."""
    rows = load_rows(states, entry, present, HEAD_DIM, BLOCK_DIM)
    if scale is not None:
        own = tl.load(scale + entry, mask=present, other=0.0)
        rows = (rows.to(tl.float32) * tl.div_rn(own.to(tl.float32), 127.0)[:, None]).to(own.dtype)
    return rows


@triton.jit
def store_rows(states, row, present, values, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    _store_at(states, row * HEAD_DIM, present, values, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _store_at(states, place, present, values, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    channel = tl.arange(0, BLOCK_DIM)
    mask = present[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(states + place[:, None] + channel[None, :], values.to(states.dtype.element_ty), mask=mask)


@triton.jit
def _load_ranges(start, end, offset, query, present):
    """First and end slot that queries [M] read, from [T] numbers at `offset`; (0, 0) where not `present`."""
    last = tl.load(end + offset + query, mask=present, other=0)
    if start is None:
        first = tl.zeros_like(last)
    else:
        first = tl.load(start + offset + query, mask=present, other=0)
    return first, last


@triton.jit
def _hull(first, last, num_slots):
    """First and end slot of all that some row reads; (num_slots, 0) where no row reads anything."""
    reads = first < last
    return tl.min(tl.where(reads, first, num_slots), 0), tl.max(tl.where(reads, last, 0), 0)


@triton.jit
def scaled_scores(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in base 2 of `products` q · k after the softcap, and the softcap's tanh (no use without a softcap)."""
    if SOFTCAP is None:
        tanh = products
        scores = products * (SCALE * LOG2_E)
    else:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(products * (2.0 * LOG2_E * SCALE / SOFTCAP)))
        scores = tanh * (SOFTCAP * LOG2_E)
    return scores, tanh


@triton.jit
def _masked(scores, slot, num_slots, offset, bias, evicted_at, first, last, position):
    """
    `scores` in base 2 plus the bias, -inf where a query does not read the slot. `slot` runs along one axis, the
    queries' `first`, `last` and `position` along the other: [1, N] and [M, 1], or [N, 1] and [1, M].
    """
    if bias is not None:
        scores += tl.load(bias + offset + slot, mask=slot < num_slots, other=0.0) * LOG2_E
    reads = (slot >= first) & (slot < last)
    if evicted_at is not None:
        reads = reads & (position < tl.load(evicted_at + offset + slot, mask=slot < num_slots, other=0))
    return tl.where(reads, scores, float("-inf"))


@triton.jit
def start_softmax(sink, BLOCK_ROWS: tl.constexpr):
    """Running maximum and sum [M] of rows that have read nothing but a `sink` [M], in natural base; None: nothing."""
    if sink is None:
        row_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    else:
        row_max = tl.maximum(sink * LOG2_E, LOWEST)
        row_sum = tl.exp2(sink * LOG2_E - row_max)
    return row_max, row_sum


@triton.jit
def add_to_softmax(scores, v, row_max, row_sum, weighted):
    """Online softmax: rows [M] read the values `v` [N, d] as well, whose `scores` are [M, N]."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    weighted = tl.dot(weights.to(v.dtype), v, weighted * rescale[:, None], input_precision="ieee")
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    return new_max, row_sum, weighted


@triton.jit
def _read(
    q, row_max, row_sum, weighted,  # the rows and what they have read before: [M, d], [M], [M], [M, d]
    key, value, key_step, value_step, bias, evicted_at, num_slots, group, first, last, position,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One source of keys: the group's, from one slot to the next `key_step` and `value_step` numbers apart."""
    offset = group * num_slots
    begin, stop = _hull(first, last, num_slots)
    within = tl.arange(0, BLOCK_SLOTS)
    for block in range(begin, stop, BLOCK_SLOTS):
        slot, place = block + within, tl.cast(block, tl.int64)
        k = _load_at(key + place * key_step, within * key_step, slot < stop, HEAD_DIM, BLOCK_DIM)  # [N, d]
        scores = scaled_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), SCALE, SOFTCAP)[0]  # [M, N]
        scores = _masked(
            scores, slot[None, :], num_slots, offset, bias, evicted_at,
            first[:, None], last[:, None], position[:, None],
        )  # fmt: skip
        v = _load_at(value + place * value_step, within * value_step, slot < stop, HEAD_DIM, BLOCK_DIM)  # [N, d]
        row_max, row_sum, weighted = add_to_softmax(scores, v, row_max, row_sum, weighted)
    return row_max, row_sum, weighted


@triton.jit(do_not_specialize=SIZES)
def prefix_forward(
    query,  # [B, G, R, T, d]
    far_key, far_value,  # [B, G, S, d]
    far_start, far_end,  # [B, G, T]
    far_bias, far_evicted_at,  # [B, G, S]
    window_key, window_value,  # [B, G, N, d]
    window_start,  # [B, G, T]
    position,  # [B, G, T]
    sinks,  # [B, G, R]
    output,  # [B, G, R, T, d]
    lse,  # [B, G, R, T]: log2 of the sum of 2 ** score, LOWEST where nothing is read
    num_groups, num_queries, num_far, num_window, window,
    query_b, query_g, query_r, query_t, output_b, output_g, output_r, output_t,  # strides
    key_b, key_g, key_n, value_b, value_g, value_n,  # of the window's
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # late queries read most: start with them
    group = tl.program_id(0).to(tl.int64)  # among those of all rows of the batch
    b, g = group // num_groups, group % num_groups
    group_queries = group * num_queries
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < num_queries * HEADS
    i, head = row // HEADS, row % HEADS
    i_position = i if position is None else tl.load(position + group_queries + i, mask=present, other=0)
    place = head * query_r + i.to(tl.int64) * query_t
    q = _load_at(query + b * query_b + g * query_g, place, present, HEAD_DIM, BLOCK_DIM)

    sink = None
    if sinks is not None:
        sink = tl.load(sinks + group * HEADS + head, mask=present, other=0.0)
    row_max, row_sum = start_softmax(sink, BLOCK_ROWS)
    weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    first, last = _load_ranges(far_start, far_end, group_queries, i, present)
    first_key = group * num_far * HEAD_DIM
    row_max, row_sum, weighted = _read(
        q, row_max, row_sum, weighted, far_key + first_key, far_value + first_key, HEAD_DIM, HEAD_DIM,
        far_bias, far_evicted_at, num_far, group, first, last, i_position,
        SCALE, SOFTCAP, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
    )  # fmt: skip
    if window_key is not None:
        last = tl.where(present, num_window - num_queries + i + 1, 0)
        first = tl.maximum(last - window, 0)
        if window_start is not None:
            first = tl.maximum(first, tl.load(window_start + group_queries + i, mask=present, other=0))
        row_max, row_sum, weighted = _read(
            q, row_max, row_sum, weighted, window_key + b * key_b + g * key_g,
            window_value + b * value_b + g * value_g, key_n, value_n, None, None, num_window, group, first, last,
            i_position, SCALE, SOFTCAP, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
        )  # fmt: skip

    row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # nothing read: zeros
    weighted = weighted / row_sum[:, None]
    place = head * output_r + i.to(tl.int64) * output_t
    _store_at(output + b * output_b + g * output_g, place, present, weighted, HEAD_DIM, BLOCK_DIM)
    tl.store(lse + (group * HEADS + head) * num_queries + i, row_max + tl.log2(row_sum), mask=present)


@triton.jit
def _read_gradient(
    q, output_grad, lse, delta, q_grad,  # of the rows: [M, d], [M, d], [M], [M], [M, d]
    key, value, bias, evicted_at, num_slots, begin, stop, group, first, last, position,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """`q_grad` plus what the rows' gradient gets from one source of keys, still without SCALE."""
    offset = group * num_slots
    for block in range(begin, stop, BLOCK_SLOTS):
        slot = block + tl.arange(0, BLOCK_SLOTS)
        k = load_rows(key + offset * HEAD_DIM, slot, slot < stop, HEAD_DIM, BLOCK_DIM)  # [N, d]
        scores, tanh = scaled_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), SCALE, SOFTCAP)  # [M, N]
        scores = _masked(
            scores, slot[None, :], num_slots, offset, bias, evicted_at,
            first[:, None], last[:, None], position[:, None],
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        v = load_rows(value + offset * HEAD_DIM, slot, slot < stop, HEAD_DIM, BLOCK_DIM)  # [N, d]
        weights_grad = tl.dot(output_grad, tl.trans(v), input_precision="ieee")
        scores_grad = weights * (weights_grad - delta[:, None])
        if SOFTCAP is not None:
            scores_grad *= 1.0 - tanh * tanh
        q_grad = tl.dot(scores_grad.to(k.dtype), k, q_grad, input_precision="ieee")
    return q_grad


@triton.jit(do_not_specialize=SIZES)
def prefix_query_gradient(
    query,  # [B, G, R, T, d]
    far_key, far_value,  # [B, G, S, d]
    far_start, far_end,  # [B, G, T]
    far_bias, far_evicted_at,  # [B, G, S]
    window_key, window_value,  # [B, G, N, d]
    window_start, window_end,  # [B, G, T]
    position,  # [B, G, T]
    output, output_grad,  # [B, G, R, T, d]
    lse,  # [B, G, R, T]
    query_grad,  # [B, G, R, T, d]
    delta,  # [B, G, R, T], output · output_grad: left for `prefix_key_gradient`, as the hulls are
    far_hull, window_hull,  # [2, B, G, tiles], first and end slot that a tile reads
    num_queries, num_far, num_window,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    num_groups, num_tiles = tl.num_programs(0), tl.num_programs(1)
    tile = num_tiles - 1 - tl.program_id(1)
    group = tl.program_id(0).to(tl.int64)
    group_queries = group * num_queries
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = row < num_queries * HEADS
    i = row // HEADS
    row = row % HEADS * num_queries + i  # in [R, T]
    i_position = i if position is None else tl.load(position + group_queries + i, mask=present, other=0)
    do = load_rows(output_grad + group_queries * HEADS * HEAD_DIM, row, present, HEAD_DIM, BLOCK_DIM)
    o = load_rows(output + group_queries * HEADS * HEAD_DIM, row, present, HEAD_DIM, BLOCK_DIM)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + group_queries * HEADS + row, row_delta, mask=present)
    row_lse = tl.load(lse + group_queries * HEADS + row, mask=present, other=0.0)
    q = load_rows(query + group_queries * HEADS * HEAD_DIM, row, present, HEAD_DIM, BLOCK_DIM)

    q_grad = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    first, last = _load_ranges(far_start, far_end, group_queries, i, present)
    begin, stop = _hull(first, last, num_far)
    tl.store(far_hull + group * num_tiles + tile, begin)
    tl.store(far_hull + (num_groups + group) * num_tiles + tile, stop)
    q_grad = _read_gradient(
        q, do, row_lse, row_delta, q_grad, far_key, far_value, far_bias, far_evicted_at, num_far, begin, stop, group,
        first, last, i_position, SCALE, SOFTCAP, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
    )  # fmt: skip
    if window_key is not None:
        first, last = _load_ranges(window_start, window_end, group_queries, i, present)
        begin, stop = _hull(first, last, num_window)
        tl.store(window_hull + group * num_tiles + tile, begin)
        tl.store(window_hull + (num_groups + group) * num_tiles + tile, stop)
        q_grad = _read_gradient(
            q, do, row_lse, row_delta, q_grad, window_key, window_value, None, None, num_window, begin, stop, group,
            first, last, i_position, SCALE, SOFTCAP, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
        )  # fmt: skip
    q_grad = q_grad * SCALE
    store_rows(query_grad + group_queries * HEADS * HEAD_DIM, row, present, q_grad, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=SIZES)
def prefix_key_gradient(
    query,  # [B, G, R, T, d]
    key, value,  # [B, G, S, d], one source
    start, end,  # [B, G, T]
    bias, evicted_at,  # [B, G, S]
    position,  # [B, G, T]
    output_grad,  # [B, G, R, T, d]
    lse, delta,  # [B, G, R, T]
    hull,  # [2, B, G, tiles]
    key_grad, value_grad,  # [B, G, S, d]
    bias_grad,  # [B, G, S]
    num_queries, num_slots, num_tiles,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """A block of keys sums up over the rows that read it, in their order: no atomics, the same sum in every run."""
    block = tl.program_id(1) * BLOCK_SLOTS  # early slots are read by most queries: start with them
    num_groups = tl.num_programs(0)
    group = tl.program_id(0).to(tl.int64)
    group_queries, offset = group * num_queries, group * num_slots
    slot = block + tl.arange(0, BLOCK_SLOTS)

    # The rows that read this block lie in the tiles from the first to the last whose hull meets it.
    lowest = tl.full([SCAN], 0, tl.int32) + num_tiles
    highest = tl.zeros([SCAN], tl.int32)
    first_slot = tl.full([SCAN], 0, tl.int32) + num_slots
    last_slot = tl.zeros([SCAN], tl.int32)
    for tiles in range(0, num_tiles, SCAN):
        tile = tiles + tl.arange(0, SCAN)
        begin = tl.load(hull + group * num_tiles + tile, mask=tile < num_tiles, other=num_slots)
        stop = tl.load(hull + (num_groups + group) * num_tiles + tile, mask=tile < num_tiles, other=0)
        meets = (begin < block + BLOCK_SLOTS) & (stop > block)
        lowest = tl.minimum(lowest, tl.where(meets, tile, num_tiles))
        highest = tl.maximum(highest, tl.where(meets, tile + 1, 0))
        first_slot = tl.minimum(first_slot, tl.where(meets, begin, num_slots))
        last_slot = tl.maximum(last_slot, tl.where(meets, stop, 0))
    num_rows = num_queries * HEADS
    first_row = tl.min(lowest, 0) * TILE_ROWS
    last_row = tl.minimum(tl.max(highest, 0) * TILE_ROWS, num_rows)

    is_read = (slot >= tl.min(first_slot, 0)) & (slot < tl.max(last_slot, 0))
    k = load_rows(key + offset * HEAD_DIM, slot, is_read, HEAD_DIM, BLOCK_DIM)  # [N, d]
    v = load_rows(value + offset * HEAD_DIM, slot, is_read, HEAD_DIM, BLOCK_DIM)
    k_grad = tl.zeros([BLOCK_SLOTS, BLOCK_DIM], tl.float32)
    v_grad = tl.zeros([BLOCK_SLOTS, BLOCK_DIM], tl.float32)
    b_grad = tl.zeros([BLOCK_SLOTS], tl.float32)
    for rows in range(first_row, last_row, BLOCK_ROWS):
        row = rows + tl.arange(0, BLOCK_ROWS)
        present = row < num_rows
        i = row // HEADS
        row = row % HEADS * num_queries + i  # in [R, T]
        first, last = _load_ranges(start, end, group_queries, i, present)
        i_position = i if position is None else tl.load(position + group_queries + i, mask=present, other=0)
        q = load_rows(query + group_queries * HEADS * HEAD_DIM, row, present, HEAD_DIM, BLOCK_DIM)  # [M, d]
        scores, tanh = scaled_scores(tl.dot(k, tl.trans(q), input_precision="ieee"), SCALE, SOFTCAP)  # [N, M]
        scores = _masked(
            scores, slot[:, None], num_slots, offset, bias, evicted_at,
            first[None, :], last[None, :], i_position[None, :],
        )  # fmt: skip
        row_lse = tl.load(lse + group_queries * HEADS + row, mask=present, other=0.0)
        weights = tl.exp2(scores - row_lse[None, :])
        do = load_rows(output_grad + group_queries * HEADS * HEAD_DIM, row, present, HEAD_DIM, BLOCK_DIM)
        v_grad = tl.dot(weights.to(do.dtype), do, v_grad, input_precision="ieee")
        weights_grad = tl.dot(v, tl.trans(do), input_precision="ieee")
        row_delta = tl.load(delta + group_queries * HEADS + row, mask=present, other=0.0)
        scores_grad = weights * (weights_grad - row_delta[None, :])
        if bias_grad is not None:
            b_grad += tl.sum(scores_grad, 1)
        if SOFTCAP is not None:
            scores_grad *= 1.0 - tanh * tanh
        k_grad = tl.dot(scores_grad.to(q.dtype), q, k_grad, input_precision="ieee")
    present_slot = slot < num_slots
    store_rows(key_grad + offset * HEAD_DIM, slot, present_slot, k_grad * SCALE, HEAD_DIM, BLOCK_DIM)
    store_rows(value_grad + offset * HEAD_DIM, slot, present_slot, v_grad, HEAD_DIM, BLOCK_DIM)
    if bias_grad is not None:
        tl.store(bias_grad + offset + slot, b_grad, mask=present_slot)


@torch.library.custom_op("mosa::prefix_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    far_key: torch.Tensor, far_value: torch.Tensor, far_start: torch.Tensor | None, far_end: torch.Tensor,
    far_bias: torch.Tensor | None, far_evicted_at: torch.Tensor | None,
    window_key: torch.Tensor | None, window_value: torch.Tensor | None, window_start: torch.Tensor | None,
    position: torch.Tensor | None, sinks: torch.Tensor | None,
    window: int, scale: float, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Output `[B, G, R, T, d]`, laid out as the queries are, and lse `[B, G, R, T]`. Queries and the window's keys and
    values may lie as projections leave them; all else is contiguous, as `prefix_attention` prepares it.
    """
    batch_size, num_groups, num_heads, num_queries, head_dim = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    steps = [0] * 6
    if window_key is not None and window_value is not None:
        window_key, window_value = (x if x.stride(-1) == 1 else x.contiguous() for x in (window_key, window_value))
        steps = [*window_key.stride()[:3], *window_value.stride()[:3]]
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if query.numel() == 0:
        return output, lse
    tile = _tile(FORWARD, query)
    num_far, num_window = far_key.shape[2], 0 if window_key is None else window_key.shape[2]
    if sinks is not None:
        sinks = sinks.expand(batch_size, -1, -1).contiguous()
    with torch.cuda.device_of(query):
        prefix_forward[(batch_size * num_groups, triton.cdiv(num_heads * num_queries, tile.rows))](
            query, far_key, far_value, far_start, far_end, far_bias, far_evicted_at,
            window_key, window_value, window_start, position, sinks, output, lse,
            num_groups, num_queries, num_far, num_window, window, *query.stride()[:4], *output.stride()[:4],
            *steps, SCALE=scale, SOFTCAP=softcap, HEADS=num_heads, HEAD_DIM=head_dim,
            BLOCK_ROWS=tile.rows, BLOCK_SLOTS=tile.slots, BLOCK_DIM=padded_dim(head_dim),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return output, lse


@_forward.register_fake
def _(query, *others):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("mosa::prefix_attention_backward", mutates_args=())
def _backward(
    output_grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor,
    query: torch.Tensor,
    far_key: torch.Tensor, far_value: torch.Tensor, far_start: torch.Tensor | None, far_end: torch.Tensor,
    far_bias: torch.Tensor | None, far_evicted_at: torch.Tensor | None,
    window_key: torch.Tensor | None, window_value: torch.Tensor | None, window_start: torch.Tensor | None,
    position: torch.Tensor | None, sinks: torch.Tensor | None,
    window: int, scale: float, softcap: float | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the inputs `LEARN`; an empty tensor for an input that is None."""
    batch_size, num_groups, num_heads, num_queries, head_dim = query.shape
    # One layout for the kernels to be compiled for: the copies are linear in tokens, as attention is not.
    query, output = query.contiguous(), output.contiguous()
    window_end = None
    if window_key is not None and window_value is not None:
        window_key, window_value = window_key.contiguous(), window_value.contiguous()
        slot = torch.arange(num_queries, dtype=torch.int32, device=query.device)
        window_end = (slot + window_key.shape[2] - num_queries + 1).expand(batch_size, num_groups, -1).contiguous()
        first = (window_end - window).clamp(min=0)
        window_start = first if window_start is None else torch.maximum(first, window_start)
    grads = _gradients_like(query, far_key, far_value, far_bias, window_key, window_value, sinks)
    if query.numel() == 0:
        return [grad.zero_() for grad in grads]
    query_grad, *far_grads, far_bias_grad, window_key_grad, window_value_grad, sinks_grad = grads
    sizes = {
        "SCALE": scale, "SOFTCAP": softcap, "HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_DIM": padded_dim(head_dim)
    }  # fmt: skip
    tile = _tile(QUERY_GRADIENT, query)
    num_tiles = triton.cdiv(num_heads * num_queries, tile.rows)
    delta = torch.empty_like(lse)
    far_hull, window_hull = query.new_empty(2, 2, batch_size, num_groups, num_tiles, dtype=torch.int32)
    num_far, num_window = far_key.shape[2], 0 if window_key is None else window_key.shape[2]

    def key_gradient(key, value, start, end, bias, evicted_at, position, hull, key_grads, bias_grad):
        num_slots = key.shape[2]
        if num_slots == 0:
            return
        key_tile = _tile(KEY_GRADIENT, query)
        prefix_key_gradient[(batch_size * num_groups, triton.cdiv(num_slots, key_tile.slots))](
            query, key, value, start, end, bias, evicted_at, position, output_grad, lse, delta, hull,
            *key_grads, bias_grad, num_queries, num_slots, num_tiles, **sizes,
            TILE_ROWS=tile.rows, BLOCK_ROWS=key_tile.rows, BLOCK_SLOTS=key_tile.slots,
            num_warps=key_tile.num_warps, num_stages=key_tile.num_stages,
        )  # fmt: skip

    with torch.cuda.device_of(query):
        prefix_query_gradient[(batch_size * num_groups, num_tiles)](
            query, far_key, far_value, far_start, far_end, far_bias, far_evicted_at,
            window_key, window_value, window_start, window_end, position, output, output_grad, lse,
            query_grad, delta, far_hull, window_hull, num_queries, num_far, num_window, **sizes,
            BLOCK_ROWS=tile.rows, BLOCK_SLOTS=tile.slots, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        key_gradient(
            far_key, far_value, far_start, far_end, far_bias, far_evicted_at, position, far_hull,
            far_grads, None if far_bias is None else far_bias_grad,
        )  # fmt: skip
        if window_key is not None:
            window_grads = window_key_grad, window_value_grad
            key_gradient(
                window_key, window_value, window_start, window_end, None, None, None, window_hull, window_grads, None
            )
    if sinks is not None:  # a key of value 0
        weights = torch.exp2(sinks[..., None] * LOG2_E.value - lse)  # [B, G, R, T]
        sinks_grad.copy_(-(weights * delta).sum((0, 3)))
    return grads


@_backward.register_fake
def _(output_grad, output, lse, *inputs):
    return _gradients_like(*(inputs[i] for i in LEARN))


# Of `_forward`, the inputs that have gradients: query, far key and value, far bias, window key and value, sinks.
LEARN = (0, 1, 2, 5, 7, 8, 11)


def _gradients_like(query: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor]:
    return [
        query.new_empty(0 if x is None else x.shape, dtype=(query if x is None else x).dtype) for x in (query, *others)
    ]


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, output_grad, _):
    output, lse, *tensors = ctx.saved_tensors
    learned = _backward(output_grad.contiguous(), output, lse, *tensors, ctx.window, ctx.scale, ctx.softcap)
    grads = [None] * (len(tensors) + 3)  # window, scale and softcap have none
    for i, grad in zip(LEARN, learned, strict=True):
        grads[i] = None if tensors[i] is None else grad
    return tuple(grads)


_forward.register_autograd(_differentiate, setup_context=_save)
refuse_second_gradient(_backward)


def production_builds() -> list[KernelBuild]:
    """
    Sparse groups with every optional argument and four query heads a group, the largest build of each kernel, in each
    dtype and head size; in bfloat16 also without softcap and sinks, and the paper's heads, one source of keys and one
    query head.
    """
    types = {
        "*": "query far_key far_value window_key window_value key value "
        "output output_grad query_grad key_grad value_grad",
        "*i32": "far_start far_end far_evicted_at window_start window_end start end evicted_at position "
        "far_hull window_hull hull",
        "*fp32": "far_bias bias sinks lse delta bias_grad",
        "i32": "num_groups num_queries num_far num_window window num_slots num_tiles",
        "i32:16": "query_b query_g query_r query_t output_b output_g output_r output_t "
        "key_b key_g key_n value_b value_g value_n",
    }
    types = {name: kind for kind, names in types.items() for name in names.split()}
    absent = (
        "far_start far_bias far_evicted_at window_key window_value window_start window_end window_hull "
        "start bias evicted_at position"
    )
    plain = dict.fromkeys(("sinks", "SOFTCAP"))
    forms = (
        ("sparse", 4, plain),
        ("sparse softcap sinks", 4, {"SOFTCAP": 50.0}),
        ("paper", 1, dict.fromkeys((*absent.split(), "bias_grad")) | plain),
    )
    kernels = ((prefix_forward, FORWARD), (prefix_query_gradient, QUERY_GRADIENT), (prefix_key_gradient, KEY_GRADIENT))
    builds = []
    for head_dim, (kind, dtype), (form, num_heads, given), (function, table), backend in product(
        HEAD_DIMS, DTYPES.items(), forms, kernels, FLOAT32
    ):
        if kind != "bf16" and form != "sparse softcap sinks":
            continue
        like = torch.empty(1, 1, num_heads, max(1, 4096 // num_heads), head_dim, dtype=dtype, device="meta")
        tile = _tile(table, like, backend)
        constants = {
            **given,
            "SCALE": head_dim**-0.5, "HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_DIM": padded_dim(head_dim),
            "BLOCK_ROWS": tile.rows, "BLOCK_SLOTS": tile.slots, "TILE_ROWS": _tile(QUERY_GRADIENT, like, backend).rows,
        }  # fmt: skip
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {name: types[name] for name in function.arg_names if name not in constants}
        signature = {name: f"*{kind}" if each == "*" else each for name, each in signature.items()}
        name = f"{function.__name__} {form}{LABELS[kind]} d={head_dim} R={num_heads}"
        builds.append(KernelBuild(name, function, signature, constants, tile.num_warps, tile.num_stages, backend))
    return builds
