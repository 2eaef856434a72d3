"""
A decoding step on a GPU: each range of a cache is read where it lies.

One query a group would leave the device idle, so long ranges are cut into splits that are read side by side and then
combined. Nothing is asked of the device, and the grids depend on shapes alone: CUDA graphs can hold the step.
"""

import torch
import triton
import triton.language as tl

from ..prefix_attention.triton import (
    LOWEST,
    add_to_softmax,
    load_rows,
    padded_dim,
    scaled_scores,
    start_softmax,
    store_rows,
)
from ..tensors import PackedKeyValues
from ..triton_builds import KernelBuild
from . import pytorch

BLOCK_SLOTS = 32  # entries scored at once; with NUM_STAGES of them in flight no head size spills registers
NUM_STAGES = 3
MAX_ROWS = 32  # query heads of a program
PROGRAMS = 256  # about two a multiprocessor: enough to draw the full memory bandwidth
SPLIT_SLOTS = 128  # no fewer entries a split, so that combining costs little beside reading
MAX_SPLITS = 64  # combined by one program, which holds their outputs in registers


def sparse_decode(
    query: torch.Tensor,
    packed: PackedKeyValues,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same function as `reference.sparse_decode`, for d <= 256; where gradients are wanted, that of `pytorch`."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, packed.key, packed.value)):
        return pytorch.sparse_decode(query, packed, scale, softcap, sinks)
    return decode_packed(query, packed, scale=scale, softcap=softcap, sinks=sinks)


def decode_packed(
    query: torch.Tensor,
    packed: PackedKeyValues,
    last: tuple[torch.Tensor, torch.Tensor] | None = None,
    limits: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `reference.sparse_decode`, not differentiable, of ranges that may have one more entry elsewhere, and limits.

    Args:
        query: `[B, G, R, d]`.
        packed: what each row and group reads.
        last: key and value `[B, G, d]` that each range is read with, also an empty one; None: none.
        limits: `[B, G]` int64, given with `packed.evicted_at` and `last`: the query's position, and `evicted_at` of
            `last` (see `KeyValues`).
        scale, softcap, sinks: as in `reference.sparse_attention`.

    Returns:
        `[B, G, R, d]`.

    Raises:
        ValueError: for heads larger than 256.
    """
    head_dim, dtype = query.shape[-1], packed.value.dtype
    if head_dim > 256:
        raise ValueError(f"Head size {head_dim} is larger than 256.")
    heads = _decode(
        query.to(dtype).contiguous(),
        packed.key.to(dtype).contiguous(),
        packed.value.contiguous(),
        packed.start.contiguous(),
        packed.length.contiguous(),
        packed.max_length,
        *((None, None) if last is None else (states.to(dtype).contiguous() for states in last)),
        *((None,) * 3 if limits is None else (x.contiguous() for x in (packed.evicted_at, *limits))),
        head_dim**-0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        None if sinks is None else sinks.float().contiguous(),
    )
    return heads.to(query.dtype)


@triton.jit
def decode_attend(
    query,  # [B, G, R, d]
    key, value,  # [N, d]
    start, count,  # [B, G]
    last_key, last_value,  # [B, G, d]
    evicted_at,  # [N]
    position, last_evicted_at,  # [B, G]
    sinks,  # [G, R]
    output,  # [B, G, splits, R, d], of each split by itself; not written where one reads nothing
    lse,  # [B, G, splits, R], base 2; -inf where a split reads nothing. None: there is one split
    num_groups,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)  # among those of all rows of the batch
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    head = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = head < HEADS
    partial = (group * num_splits + split) * HEADS
    # A split reads whole blocks, as many as every other.
    num_slots = tl.load(count + group).to(tl.int32)
    share = tl.cdiv(tl.cdiv(num_slots, BLOCK_SLOTS), num_splits) * BLOCK_SLOTS
    begin = split * share
    stop = tl.minimum(begin + share, num_slots)

    is_first = split == 0  # which also reads what lies outside of the range
    if is_first | (begin < stop):
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + group % num_groups * HEADS + head, mask=present, other=0.0)
            sink = tl.where(is_first, sink, float("-inf"))
        row_max, row_sum = start_softmax(sink, BLOCK_ROWS)
        weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        q = load_rows(query + group * HEADS * HEAD_DIM, head, present, HEAD_DIM, BLOCK_DIM)
        if last_key is not None:
            channel = tl.arange(0, BLOCK_DIM)
            last = group * HEAD_DIM + channel
            k_last = tl.load(last_key + last, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
            v_last = tl.load(last_value + last, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
            score = scaled_scores(tl.sum(q.to(tl.float32) * k_last[None, :], 1), SCALE, SOFTCAP)[0]  # [M]
            is_read = is_first
            if evicted_at is not None:
                is_read = is_read & (tl.load(position + group) < tl.load(last_evicted_at + group))
            score = tl.where(is_read, score, float("-inf"))
            new_max = tl.maximum(row_max, score)
            weight = tl.exp2(score - new_max)
            row_sum = row_sum * tl.exp2(row_max - new_max) + weight
            weighted = weight[:, None] * v_last[None, :]
            row_max = new_max
        first = tl.load(start + group).to(tl.int64)
        for block in range(begin, stop, BLOCK_SLOTS):
            slot = block + tl.arange(0, BLOCK_SLOTS)
            filled = slot < stop
            k = load_rows(key + first * HEAD_DIM, slot, filled, HEAD_DIM, BLOCK_DIM)  # [N, d]
            scores = scaled_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), SCALE, SOFTCAP)[0]  # [M, N]
            reads = filled
            if evicted_at is not None:
                reads = reads & (tl.load(position + group) < tl.load(evicted_at + first + slot, mask=filled, other=0))
            scores = tl.where(reads[None, :], scores, float("-inf"))
            row_max, row_sum, weighted = add_to_softmax(
                scores, value + first * HEAD_DIM, slot, filled, row_max, row_sum, weighted, HEAD_DIM, BLOCK_DIM
            )
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # nothing read: zeros
        weighted = weighted / row_sum[:, None]
        store_rows(output + partial * HEAD_DIM, head, present, weighted, HEAD_DIM, BLOCK_DIM)
        if lse is not None:
            tl.store(lse + partial + head, row_max + tl.log2(row_sum), mask=present)
    else:
        if lse is not None:
            tl.store(lse + partial + head, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), mask=present)


@triton.jit
def decode_combine(
    split_output,  # [B, G, splits, R, d] float32
    split_lse,  # [B, G, splits, R]
    output,  # [B, G, R, d]
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """A program weighs the splits of one head by their sums of exponentials."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = group * NUM_SPLITS * HEADS + tl.arange(0, NUM_SPLITS) * HEADS + head
    lse = tl.load(split_lse + row)
    states = load_rows(split_output, row, lse > float("-inf"), HEAD_DIM, BLOCK_DIM)
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), LOWEST))
    weights_sum = tl.sum(weights, 0)
    weights = weights / tl.where(weights_sum > 0, weights_sum, 1.0)
    states = tl.sum(weights[:, None] * states, 0)  # [d]
    channel = tl.arange(0, BLOCK_DIM)
    output += (group * HEADS + head) * HEAD_DIM
    tl.store(output + channel, states.to(output.dtype.element_ty), mask=channel < HEAD_DIM)


@torch.library.custom_op("mosa::sparse_decode", mutates_args=())
def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    max_length: int,
    last_key: torch.Tensor | None,
    last_value: torch.Tensor | None,
    evicted_at: torch.Tensor | None,
    position: torch.Tensor | None,
    last_evicted_at: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Of contiguous tensors, as `decode_packed` prepares them."""
    batch_size, num_groups, num_heads, head_dim = query.shape
    output = torch.empty_like(query)
    if query.numel() == 0:
        return output
    num_ranges = batch_size * num_groups
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(num_heads)))
    row_blocks = triton.cdiv(num_heads, rows)
    num_splits = min(triton.cdiv(PROGRAMS, num_ranges * row_blocks), triton.cdiv(max_length, SPLIT_SLOTS), MAX_SPLITS)
    num_splits = triton.next_power_of_2(max(1, num_splits))  # few builds, as a cache grows
    split_output, lse = output, None
    if num_splits > 1:
        split_output = query.new_empty(batch_size, num_groups, num_splits, num_heads, head_dim, dtype=torch.float32)
        lse = split_output.new_empty(split_output.shape[:-1])
    sizes = {"HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_DIM": padded_dim(head_dim)}
    with torch.cuda.device_of(query):
        decode_attend[(num_ranges, num_splits, row_blocks)](
            query, key, value, start, count, last_key, last_value, evicted_at, position, last_evicted_at, sinks,
            split_output, lse, num_groups, SCALE=scale, SOFTCAP=softcap, BLOCK_ROWS=rows, BLOCK_SLOTS=BLOCK_SLOTS,
            **sizes, num_warps=4, num_stages=NUM_STAGES,
        )  # fmt: skip
        if num_splits > 1:
            decode_combine[(num_ranges, num_heads)](split_output, lse, output, NUM_SPLITS=num_splits, **sizes)
    return output


@_decode.register_fake
def _(query, *others):
    return torch.empty_like(query)


def production_builds() -> list[KernelBuild]:
    """bfloat16, in splits: sparse groups, also of many heads with softcap and sinks; and the paper's heads."""
    types = {
        "*bf16": "query key value last_key last_value",
        "*fp32": "sinks output lse",
        "*i64": "start count evicted_at position last_evicted_at",
    }
    types = {name: kind for kind, names in types.items() for name in names.split()} | {"num_groups": "i32"}
    range_only = dict.fromkeys(("last_key", "last_value", "evicted_at", "position", "last_evicted_at"))
    forms = (
        ("sparse", 4, {"sinks": None, "SOFTCAP": None, **range_only}),
        ("sparse softcap sinks", MAX_ROWS, {"SOFTCAP": 50.0, **range_only}),
        ("paper", 1, {"sinks": None, "SOFTCAP": None}),
    )
    builds = []
    for head_dim in (64, 128, 256):
        sizes = {"HEAD_DIM": head_dim, "BLOCK_DIM": head_dim}
        for form, num_heads, given in forms:
            constants = {"SCALE": head_dim**-0.5, "HEADS": num_heads, "BLOCK_SLOTS": BLOCK_SLOTS, **sizes, **given}
            constants["BLOCK_ROWS"] = max(16, num_heads)
            signature = {name: types[name] for name in decode_attend.arg_names if name not in constants}
            name = f"decode_attend {form} d={head_dim} R={num_heads}"
            builds.append(KernelBuild(name, decode_attend, signature, constants, 4, NUM_STAGES))
        constants = {"HEADS": 4, "NUM_SPLITS": MAX_SPLITS, **sizes}
        signature = {"split_output": "*fp32", "split_lse": "*fp32", "output": "*bf16"}
        builds.append(KernelBuild(f"decode_combine d={head_dim}", decode_combine, signature, constants, 4, 3))
    return builds
