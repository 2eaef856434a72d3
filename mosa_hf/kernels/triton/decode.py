"""
One token a row of form "all" on a cache of fixed size, updated in place (DESIGN sections 2 to 4).

Three launches whose grids depend on shapes alone, and no look at the device's numbers from the host: the step can be
captured in a CUDA graph. The token enters the cache; the queries attend, kept entries and ring cut into splits that
run side by side, since a single query a group would leave the device idle; the splits are combined.
"""

import torch
import triton
import triton.language as tl

from ..layout import FixedKeyValues
from .attention import LOWEST, _load_rows, _padded_dim, _read, _store_rows
from .builds import KernelBuild

BLOCK_SLOTS = 32  # keys scored at once; with NUM_STAGES of them in flight no head size spills registers
NUM_STAGES = 3
BLOCK_SCORES = 512  # router logits compared at once when an entry has to be given up
PROGRAMS = 256  # about two a multiprocessor: enough to draw the full memory bandwidth
MAX_SPLITS = 64  # combined by one program, which holds their outputs in registers


def decode_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    valid: torch.Tensor | None,
    state: FixedKeyValues,
    budget: int,
) -> torch.Tensor:
    """
    Same function as `mosa_hf.kernels.decode.decode_all`; padding gets any finite number.

    Raises:
        ValueError: for a state that is not contiguous, or a budget larger than it can hold.
    """
    if not 0 < budget <= state.key.shape[2]:
        raise ValueError(f"A budget of {budget} tokens does not fit {state.key.shape[2]} entries.")
    if not all(x.is_contiguous() for x in state):
        raise ValueError("The cache is updated in place and must be contiguous.")
    return _decode(
        query.contiguous(), key.contiguous(), value.contiguous(), score.float().contiguous(), valid, *state, budget
    )


@triton.jit
def _lowest(
    score, position, num_slots, new_slot, new_score, new_position, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """
    Of the selected tokens in slots 0 .. num_slots - 1, and of a new one in `new_slot`, whatever memory says of that:
    the lowest score, the slot that has it (of several the latest position; -1: none is selected), and how many there
    are. Positions come from memory; those of a ring (None) follow from its newest token.
    """
    best_score = tl.full([BLOCK], float("inf"), tl.float32)
    best_position = tl.full([BLOCK], -1, tl.int32)
    best_slot = tl.full([BLOCK], -1, tl.int32)
    num_selected = tl.zeros([BLOCK], tl.int32)
    for block in range(0, tl.maximum(num_slots, new_slot + 1), BLOCK):
        slot = block + tl.arange(0, BLOCK)
        slot_score = tl.load(score + slot, mask=slot < num_slots, other=float("-inf"))
        slot_score = tl.where(slot == new_slot, new_score, slot_score)
        if position is None:
            slot_position = new_position - (new_slot - slot + WINDOW) % WINDOW
        else:
            slot_position = tl.load(position + slot, mask=slot < num_slots, other=0)
            slot_position = tl.where(slot == new_slot, new_position, slot_position)
        selected = slot_score > float("-inf")
        lower = (slot_score < best_score) | ((slot_score == best_score) & (slot_position > best_position))
        lower = lower & selected
        best_score = tl.where(lower, slot_score, best_score)
        best_position = tl.where(lower, slot_position, best_position)
        best_slot = tl.where(lower, slot, best_slot)
        num_selected += selected.to(tl.int32)
    lowest = tl.min(best_score, 0)
    latest = tl.max(tl.where(best_score == lowest, best_position, -1), 0)
    lowest_slot = tl.max(tl.where((best_score == lowest) & (best_position == latest), best_slot, -1), 0)
    return lowest, lowest_slot, tl.sum(num_selected, 0)


@triton.jit
def _copy(target, target_slot, source, source_slot, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    channel = tl.arange(0, BLOCK_DIM)
    states = tl.load(source + source_slot * HEAD_DIM + channel, mask=channel < HEAD_DIM)
    tl.store(target + target_slot * HEAD_DIM + channel, states, mask=channel < HEAD_DIM)


@triton.jit
def decode_take_in(
    key, value,  # [B, G, d]
    score,  # [B, G]
    valid,  # [B]
    kept_key, kept_value,  # [B, G, C, d]
    kept_position, kept_score,  # [B, G, C]
    count, num_evicted,  # [B, G]
    ring_key, ring_value,  # [B, G, W, d]
    ring_score,  # [B, G, W]
    num_tokens,  # [B]
    num_groups, capacity, budget,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SCORES: tl.constexpr,
):  # fmt: skip
    """
    A program takes the token of one row and group into the cache. It is a single warp, and reads nothing that it has
    written: threads would otherwise have to wait for each other.
    """
    group = tl.program_id(0).to(tl.int64)  # among those of all rows
    is_real = True if valid is None else tl.load(valid + group // num_groups)
    if is_real:
        kept, ring = group * capacity, group * WINDOW
        token = tl.load(num_tokens + group // num_groups).to(tl.int32)  # its position
        token_score = tl.load(score + group)
        is_selected = token_score > float("-inf")
        num_kept = tl.load(count + group)

        # What enters the kept entries, if it is selected: the token that leaves the ring; without a ring, the new one.
        if WINDOW > 0:
            ring_slot = token % WINDOW
            entering_score = tl.load(ring_score + ring + ring_slot)
        else:
            entering_score = token_score
        entering_position = token - WINDOW
        enters = entering_score > float("-inf")
        place = num_kept
        end = num_kept + enters.to(tl.int32)

        if is_selected:  # others add nothing to the budget
            if WINDOW > 0:
                in_ring, in_ring_slot, num_in_ring = _lowest(
                    ring_score + ring, None, WINDOW, ring_slot, token_score, token, WINDOW, BLOCK_SCORES
                )
            else:
                num_in_ring = 0
            if end + num_in_ring > budget:
                tl.store(num_evicted + group, tl.load(num_evicted + group) + 1)
                in_kept, in_kept_slot, _ = _lowest(
                    kept_score + kept, kept_position + kept, num_kept,
                    num_kept, entering_score, entering_position, WINDOW, BLOCK_SCORES,
                )  # fmt: skip
                from_ring = False
                if WINDOW > 0:
                    from_ring = in_ring <= in_kept  # tokens of the ring are later than kept ones
                    if from_ring:
                        tl.store(ring_score + ring + in_ring_slot, float("-inf"))
                        token_score = tl.where(in_ring_slot == ring_slot, float("-inf"), token_score)
                if not from_ring:
                    place = in_kept_slot
                    end -= 1
                    if not enters:  # the last entry takes the place of the one that goes
                        _copy(kept_key, kept + place, kept_key, kept + end, HEAD_DIM, BLOCK_DIM)
                        _copy(kept_value, kept + place, kept_value, kept + end, HEAD_DIM, BLOCK_DIM)
                        tl.store(kept_position + kept + place, tl.load(kept_position + kept + end))
                        tl.store(kept_score + kept + place, tl.load(kept_score + kept + end))

        if enters & (place < end):  # else it is itself the one that goes
            if WINDOW > 0:
                _copy(kept_key, kept + place, ring_key, ring + ring_slot, HEAD_DIM, BLOCK_DIM)
                _copy(kept_value, kept + place, ring_value, ring + ring_slot, HEAD_DIM, BLOCK_DIM)
            else:
                _copy(kept_key, kept + place, key, group, HEAD_DIM, BLOCK_DIM)
                _copy(kept_value, kept + place, value, group, HEAD_DIM, BLOCK_DIM)
            tl.store(kept_position + kept + place, entering_position)
            tl.store(kept_score + kept + place, entering_score)
        tl.store(count + group, end)
        if WINDOW > 0:
            _copy(ring_key, ring + ring_slot, key, group, HEAD_DIM, BLOCK_DIM)
            _copy(ring_value, ring + ring_slot, value, group, HEAD_DIM, BLOCK_DIM)
            tl.store(ring_score + ring + ring_slot, token_score)


@triton.jit
def _share(num_slots, split, NUM_SPLITS: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """First and end slot that a split reads: whole blocks, as many for each split."""
    size = tl.cdiv(tl.cdiv(num_slots, BLOCK_SLOTS), NUM_SPLITS) * BLOCK_SLOTS
    return split * size, tl.minimum((split + 1) * size, num_slots)


@triton.jit
def decode_attend(
    query,  # [B, G, R, d]
    valid,  # [B]
    kept_key, kept_value,  # [B, G, C, d]
    count,  # [B, G]
    ring_key, ring_value,  # [B, G, W, d]
    num_tokens,  # [B]
    output,  # [B, G, NUM_SPLITS, R, d] float32, of each split by itself; not written where it reads nothing
    lse,  # [B, G, NUM_SPLITS, R], base 2; -inf where the split reads nothing
    num_groups, capacity,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_ROWS)
    present = head < HEADS
    first, last = _share(tl.load(count + group), split, NUM_SPLITS, BLOCK_SLOTS)
    reads = first < last
    if WINDOW > 0:
        # Shares of a short ring and of few kept entries fall to different splits.
        seen = tl.load(num_tokens + group // num_groups).to(tl.int32)
        seen += 1 if valid is None else tl.load(valid + group // num_groups).to(tl.int32)
        ring_first, ring_last = _share(tl.minimum(seen, WINDOW), NUM_SPLITS - 1 - split, NUM_SPLITS, BLOCK_SLOTS)
        reads = reads | (ring_first < ring_last)

    partial = (group * NUM_SPLITS + split) * HEADS
    if reads:
        q = _load_rows(query + group * HEADS * HEAD_DIM, head, present, HEAD_DIM, BLOCK_DIM)
        row_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
        weighted = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        row_max, row_sum, weighted = _read(
            q, row_max, row_sum, weighted, kept_key, kept_value, None, None, capacity, group,
            first + tl.zeros_like(head), last + tl.zeros_like(head), head,
            SCALE, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
        )  # fmt: skip
        if WINDOW > 0:
            row_max, row_sum, weighted = _read(
                q, row_max, row_sum, weighted, ring_key, ring_value, None, None, WINDOW, group,
                ring_first + tl.zeros_like(head), ring_last + tl.zeros_like(head), head,
                SCALE, HEAD_DIM, BLOCK_SLOTS, BLOCK_DIM,
            )  # fmt: skip
        _store_rows(output + partial * HEAD_DIM, head, present, weighted / row_sum[:, None], HEAD_DIM, BLOCK_DIM)
        tl.store(lse + partial + head, row_max + tl.log2(row_sum), mask=present)
    else:
        tl.store(lse + partial + head, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), mask=present)


@triton.jit
def decode_combine(
    split_output,  # [B, G, NUM_SPLITS, R, d]
    split_lse,  # [B, G, NUM_SPLITS, R]
    valid,  # [B]
    num_tokens,  # [B]
    output,  # [B, G, R, d]
    num_groups,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """A program weighs the splits of one head by their sums of exponentials. The last kernel: it counts the token."""
    head = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    row = split * HEADS + head
    lse = tl.load(split_lse + group * NUM_SPLITS * HEADS + row, mask=split < NUM_SPLITS, other=float("-inf"))
    states = _load_rows(
        split_output + group * NUM_SPLITS * HEADS * HEAD_DIM, row, lse > float("-inf"), HEAD_DIM, BLOCK_DIM
    )
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), LOWEST))
    weights_sum = tl.sum(weights, 0)
    weights = weights / tl.where(weights_sum > 0, weights_sum, 1.0)
    states = tl.sum(weights[:, None] * states, 0)  # [d]
    channel = tl.arange(0, BLOCK_DIM)
    offset = (group * HEADS + head) * HEAD_DIM
    tl.store(output + offset + channel, states.to(output.dtype.element_ty), mask=channel < HEAD_DIM)

    if head == 0:
        if group % num_groups == 0:
            batch_row = group // num_groups
            is_real = 1 if valid is None else tl.load(valid + batch_row).to(tl.int64)
            tl.store(num_tokens + batch_row, tl.load(num_tokens + batch_row) + is_real)


STATE = ("kept_key", "kept_value", "kept_position", "kept_score", "count", "num_evicted", "ring_key", "ring_value")
STATE += ("ring_score", "num_tokens")


@torch.library.custom_op("mosa::decode_all", mutates_args=STATE)
def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    valid: torch.Tensor | None,
    kept_key: torch.Tensor,
    kept_value: torch.Tensor,
    kept_position: torch.Tensor,
    kept_score: torch.Tensor,
    count: torch.Tensor,
    num_evicted: torch.Tensor,
    ring_key: torch.Tensor,
    ring_value: torch.Tensor,
    ring_score: torch.Tensor,
    num_tokens: torch.Tensor,
    budget: int,
) -> torch.Tensor:
    batch_size, num_groups, num_heads, head_dim = query.shape
    capacity, window = kept_key.shape[2], ring_key.shape[2]
    num_programs = batch_size * num_groups
    dims = {"HEAD_DIM": head_dim, "BLOCK_DIM": _padded_dim(head_dim)}
    num_splits = min(triton.cdiv(PROGRAMS, num_programs), triton.cdiv(capacity + window, BLOCK_SLOTS), MAX_SPLITS)
    split_output = query.new_empty(batch_size, num_groups, num_splits, num_heads, head_dim, dtype=torch.float32)
    split_lse = split_output.new_empty(split_output.shape[:-1])
    output = torch.empty_like(query)
    with torch.cuda.device_of(query):
        decode_take_in[(num_programs,)](
            key, value, score, valid, kept_key, kept_value, kept_position, kept_score, count, num_evicted,
            ring_key, ring_value, ring_score, num_tokens, num_groups, capacity, budget,
            WINDOW=window, BLOCK_SCORES=BLOCK_SCORES, **dims, num_warps=1,
        )  # fmt: skip
        decode_attend[(num_splits, num_programs)](
            query, valid, kept_key, kept_value, count, ring_key, ring_value, num_tokens, split_output, split_lse,
            num_groups, capacity, SCALE=head_dim**-0.5, WINDOW=window, HEADS=num_heads, NUM_SPLITS=num_splits,
            BLOCK_ROWS=max(16, triton.next_power_of_2(num_heads)), BLOCK_SLOTS=BLOCK_SLOTS, **dims,
            num_warps=4, num_stages=NUM_STAGES,
        )  # fmt: skip
        decode_combine[(num_heads, num_programs)](
            split_output, split_lse, valid, num_tokens, output, num_groups,
            HEADS=num_heads, NUM_SPLITS=num_splits, BLOCK_SPLITS=triton.next_power_of_2(num_splits), **dims,
            num_warps=4,
        )  # fmt: skip
    return output


@_decode.register_fake
def _(query, *others):
    return torch.empty_like(query)


def production_builds() -> list[KernelBuild]:
    """bfloat16, four query heads a group, padding present, with a window and without."""
    names = {
        "*bf16": "query key value kept_key kept_value ring_key ring_value",
        "*fp32": "score kept_score ring_score lse split_output split_lse",
        "*i1": "valid",
        "*i32": "kept_position count num_evicted",
        "*i64": "num_tokens",
        "i32": "num_groups capacity budget",
    }
    types = {name: kind for kind, group in names.items() for name in group.split()}
    builds = []
    for head_dim, window in ((64, 64), (128, 64), (256, 64), (64, 0)):
        constants = {
            "SCALE": head_dim**-0.5, "WINDOW": window, "HEADS": 4, "HEAD_DIM": head_dim, "BLOCK_DIM": head_dim,
            "NUM_SPLITS": 32, "BLOCK_SPLITS": 32, "BLOCK_ROWS": 16, "BLOCK_SLOTS": BLOCK_SLOTS,
            "BLOCK_SCORES": BLOCK_SCORES,
        }  # fmt: skip
        for function, output, num_warps in (
            (decode_take_in, None, 1),
            (decode_attend, "*fp32", 4),
            (decode_combine, "*bf16", 4),
        ):
            signature = {**types, "output": output}
            builds.append(
                KernelBuild(
                    f"{function.__name__} d={head_dim} R=4 window={window}",
                    function,
                    {name: signature[name] for name in function.arg_names if name in signature},
                    {name: value for name, value in constants.items() if name in function.arg_names},
                    num_warps=num_warps,
                    num_stages=NUM_STAGES,
                )
            )
    return builds
