"""
A decoding step on a GPU: each range of a cache is read where it lies.

One query a group would leave the device idle, so ranges are cut into chunks of one size that are read side by side and
then combined: long ranges have more of them, and a program behind the end of its range is done at once. Nothing is
asked of the device, and the grids depend on shapes alone: CUDA graphs can hold the step.
"""

from itertools import product

import torch
import triton
import triton.language as tl

from ..entries import PackedKeyValues
from ..head_dim import check_head_dim
from ..prefix_attention.triton import (
    LOWEST,
    add_to_softmax,
    load_entries,
    load_rows,
    padded_dim,
    scaled_scores,
    start_softmax,
    store_rows,
)
from ..triton_builds import DTYPES, HEAD_DIMS, LABELS, KernelBuild
from . import pytorch

MAX_ROWS = 32  # query heads of a program
# Chunks that a step is cut into if all ranges are as long as the longest may be: with ranges as unequal as routers
# make them, two thirds of them are empty, and the rest keeps about 264 programs at once busy to the end.
CHUNKS = 16 * 264
MAX_CHUNKS = 256  # of a range, whose outputs are held until they are combined
COMBINED = 16  # chunks that are combined at once


def tile(block_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Entries scored at once, query heads of a program, warps, stages: so that nothing spills, nor exceeds 64 KB."""
    if dtype == torch.float32 and block_dim >= 128:
        return 16, 16, 4, 2
    return 32, MAX_ROWS, 8 if block_dim > 128 else 4, 3


def spills_codes(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether registers do not hold codes and what they stand for; found by compiling ahead of time."""
    return dtype == torch.float32 and head_dim > 64


def chunk_size(max_length: int, num_programs: int, block: int) -> int:
    """Entries of a chunk, where `num_programs` read ranges of `max_length` entries at most; whole blocks."""
    size = max(triton.cdiv(max_length * num_programs, CHUNKS), triton.cdiv(max_length, MAX_CHUNKS), 1)
    return triton.cdiv(size, block) * block


def sparse_decode(
    query: torch.Tensor,
    packed: PackedKeyValues,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Same function as `reference.sparse_decode`, for d <= 256; where gradients are wanted, and for codes that would
    spill, that of `pytorch`.
    """
    head_dim = query.shape[-1]
    dtype = (packed.value if packed.value_scale is None else packed.value_scale).dtype
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, packed.key, packed.value))
    if learns or (packed.value_scale is not None and spills_codes(head_dim, dtype)):
        return pytorch.sparse_decode(query, packed, scale, softcap, sinks)
    check_head_dim(head_dim)
    return _decode(
        query.to(dtype).contiguous(),
        (packed.key.to(dtype) if packed.key_scale is None else packed.key).contiguous(), packed.value.contiguous(),
        None if packed.key_scale is None else packed.key_scale.to(dtype), packed.value_scale,
        packed.start.contiguous(), packed.length.contiguous(), packed.max_length,
        head_dim**-0.5 if scale is None else float(scale), None if softcap is None else float(softcap),
        None if sinks is None else sinks.float().contiguous(),
    ).to(query.dtype)  # fmt: skip


@triton.jit(do_not_specialize=["num_groups", "chunk"])
def decode_attend(
    query,  # [B, G, R, d]
    key, value,  # [N, d]
    key_scale, value_scale,  # [N]
    start, count,  # [B, G]
    sinks,  # [G, R]
    output,  # [B, G, chunks, R, d], of each chunk by itself; not written behind the end of a range
    lse,  # [B, G, chunks, R], base 2; not written behind the end of a range. None: there is one chunk
    num_groups, chunk,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)  # among those of all rows of the batch
    place = tl.program_id(1)
    head = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = head < HEADS
    partial = (group * tl.num_programs(1) + place) * HEADS
    num_slots = tl.load(count + group).to(tl.int32)
    begin = place * chunk
    stop = tl.minimum(begin + chunk, num_slots)
    is_first = place == 0  # which also reads the sinks, of an empty range too
    if is_first | (begin < stop):
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + group % num_groups * HEADS + head, mask=present, other=0.0)
            sink = tl.where(is_first, sink, float("-inf"))
        row_max, row_sum = start_softmax(sink, BLOCK_ROWS)
        weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        q = load_rows(query + group * HEADS * HEAD_DIM, head, present, HEAD_DIM, BLOCK_DIM)
        first = tl.load(start + group).to(tl.int64)
        for block in range(begin, stop, BLOCK_SLOTS):
            slot = block + tl.arange(0, BLOCK_SLOTS)
            filled = slot < stop
            k = load_entries(  # [N, d]
                key + first * HEAD_DIM, None if key_scale is None else key_scale + first,
                slot, filled, HEAD_DIM, BLOCK_DIM,
            )  # fmt: skip
            scores = scaled_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), SCALE, SOFTCAP)[0]  # [M, N]
            scores = tl.where(filled[None, :], scores, float("-inf"))
            v = load_entries(
                value + first * HEAD_DIM, None if value_scale is None else value_scale + first,
                slot, filled, HEAD_DIM, BLOCK_DIM,
            )  # fmt: skip
            row_max, row_sum, weighted = add_to_softmax(scores, v, row_max, row_sum, weighted)
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # nothing read: zeros
        weighted = weighted / row_sum[:, None]
        store_rows(output + partial * HEAD_DIM, head, present, weighted, HEAD_DIM, BLOCK_DIM)
        if lse is not None:
            tl.store(lse + partial + head, row_max + tl.log2(row_sum), mask=present)


@triton.jit(do_not_specialize=["num_chunks", "chunk"])
def decode_combine(
    chunk_output,  # [B, G, chunks, R, d] float32
    chunk_lse,  # [B, G, chunks, R]
    count,  # [B, G]
    output,  # [B, G, R, d]
    num_chunks, chunk,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COMBINED: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """A program weighs the chunks of one head by their sums of exponentials."""
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_filled = tl.maximum(tl.cdiv(tl.load(count + group).to(tl.int32), chunk), 1)
    highest = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([BLOCK_DIM], tl.float32)
    for block in range(0, num_filled, COMBINED):
        place = block + tl.arange(0, COMBINED)
        row = (group * num_chunks + place) * HEADS + head
        lse = tl.load(chunk_lse + row, mask=place < num_filled, other=float("-inf"))
        states = load_rows(chunk_output, row, place < num_filled, HEAD_DIM, BLOCK_DIM)
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        rescale, weights = tl.exp2(highest - new_highest), tl.exp2(lse - new_highest)
        weighted = weighted * rescale + tl.sum(weights[:, None] * states, 0)
        total = total * rescale + tl.sum(weights, 0)
        highest = new_highest
    weighted = weighted / tl.where(total > 0, total, 1.0)
    channel = tl.arange(0, BLOCK_DIM)
    output += (group * HEADS + head) * HEAD_DIM
    tl.store(output + channel, weighted.to(output.dtype.element_ty), mask=channel < HEAD_DIM)


@torch.library.custom_op("mosa::sparse_decode", mutates_args=())
def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    key_scale: torch.Tensor | None, value_scale: torch.Tensor | None,
    start: torch.Tensor, count: torch.Tensor, max_length: int,
    scale: float, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Takes contiguous tensors, as `sparse_decode` prepares them."""
    batch_size, num_groups, num_heads, head_dim = query.shape
    output = torch.empty_like(query)
    if query.numel() == 0:
        return output
    num_ranges, block_dim = batch_size * num_groups, padded_dim(head_dim)
    block_slots, max_rows, num_warps, num_stages = tile(block_dim, query.dtype)
    rows = min(max_rows, max(16, triton.next_power_of_2(num_heads)))
    row_blocks = triton.cdiv(num_heads, rows)
    chunk = chunk_size(max_length, num_ranges * row_blocks, block_slots)
    num_chunks = max(1, triton.cdiv(max_length, chunk))
    chunk_output, lse = output, None
    if num_chunks > 1:
        chunk_output = query.new_empty(batch_size, num_groups, num_chunks, num_heads, head_dim, dtype=torch.float32)
        lse = chunk_output.new_empty(chunk_output.shape[:-1])
    sizes = {"HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_DIM": block_dim}
    with torch.cuda.device_of(query):
        decode_attend[(num_ranges, num_chunks, row_blocks)](
            query, key, value, key_scale, value_scale, start, count, sinks, chunk_output, lse, num_groups, chunk,
            SCALE=scale, SOFTCAP=softcap, BLOCK_ROWS=rows, BLOCK_SLOTS=block_slots, **sizes, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
        if num_chunks > 1:
            decode_combine[(num_ranges, num_heads)](
                chunk_output, lse, count, output, num_chunks, chunk, COMBINED=COMBINED, **sizes
            )
    return output


@_decode.register_fake
def _(query, *others):
    return torch.empty_like(query)


def production_builds() -> list[KernelBuild]:
    """Each dtype and head size: of few heads a group, of many with softcap and sinks, and of codes."""
    plain = dict.fromkeys(("key_scale", "value_scale"))
    forms = (
        ("", 4, plain | {"sinks": None, "SOFTCAP": None}),
        (" softcap sinks", MAX_ROWS, plain | {"SOFTCAP": 50.0}),
        (" int8", 4, {"sinks": None, "SOFTCAP": None}),
    )
    builds = []
    for head_dim, (kind, dtype) in product(HEAD_DIMS, DTYPES.items()):
        types = {"*i64": "start count", "*fp32": "sinks output lse chunk_output chunk_lse"}
        types = {name: each for each, names in types.items() for name in names.split()}
        types |= dict.fromkeys(("query", "key", "value", "key_scale", "value_scale"), f"*{kind}")
        types |= dict.fromkeys(("num_groups", "num_chunks", "chunk"), "i32")
        sizes = {"HEAD_DIM": head_dim, "BLOCK_DIM": padded_dim(head_dim)}
        block_slots, max_rows, num_warps, num_stages = tile(padded_dim(head_dim), dtype)
        for form, num_heads, given in forms:
            if form == " int8" and spills_codes(head_dim, dtype):
                continue
            constants = {"SCALE": head_dim**-0.5, "HEADS": num_heads, "BLOCK_SLOTS": block_slots, **sizes, **given}
            constants["BLOCK_ROWS"] = min(max_rows, max(16, num_heads))
            types |= dict.fromkeys(("key", "value"), "*i8" if form == " int8" else f"*{kind}")
            signature = {name: types[name] for name in decode_attend.arg_names if name not in constants}
            name = f"decode_attend{form}{LABELS[kind]} d={head_dim} R={num_heads}"
            builds.append(KernelBuild(name, decode_attend, signature, constants, num_warps, num_stages))
        if kind != "bf16":
            continue
        constants = {"HEADS": 4, "COMBINED": COMBINED, **sizes}
        signature = {name: types[name] for name in decode_combine.arg_names if name not in constants}
        signature["output"] = f"*{kind}"
        builds.append(KernelBuild(f"decode_combine d={head_dim}", decode_combine, signature, constants, 4, 3))
    return builds
