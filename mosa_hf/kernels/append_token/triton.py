"""One more token on a GPU, in one launch: a program for each range, which looks for what to evict if it must."""

import torch
import triton
import triton.language as tl

from ..entries import Entries
from ..triton_builds import KernelBuild
from .reference import Taken, Token

# Of what entries hold, in the order of the kernel's.
NAMES = ("key", "value", "key_scale", "value_scale", "selected", "position", "score")
BLOCK_SLOTS = 256  # entries of a range that are compared at once when a budget evicts


def append_token(
    entries: Entries,
    token: Token,
    num_stored: torch.Tensor,
    window: int,
    budget: int | None = None,
    notes: bool = False,
    common: int | None = None,
) -> Taken:
    """Same function as `reference.append_token`; `common` is of no use."""
    names = [name for name in NAMES if name in entries.states]
    num_ranges = entries.start.numel()
    evicts = budget is not None and token.score is not None

    def rows() -> list[torch.Tensor]:
        return [states.new_empty(num_ranges, *states.shape[1:]) for states in (entries.states[x] for x in names)]

    overwritten, evicted = rows() if notes and window else [], rows() if notes and evicts else []
    is_evicted = torch.empty_like(entries.start, dtype=torch.bool) if evicted else None
    _append(
        [entries.states[name] for name in names], entries.start, entries.length, entries.num_selected,
        entries.num_evicted, num_stored, None if token.valid is None else token.valid.contiguous(), token.key,
        token.value, token.selected, token.score, overwritten, evicted, is_evicted, "position" in names, window,
        budget if evicts else None,
    )  # fmt: skip
    entries.lengthen(None)
    return Taken(
        dict(zip(names, overwritten, strict=True)) if overwritten else None,
        dict(zip(names, evicted, strict=True)) if evicted else None,
        is_evicted,
    )


@triton.jit
def _copy_row(source, i, target, j, where, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of `source` [., DIM] into row j of `target`, if `where`."""
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM * where.to(tl.int32)
    tl.store(target + j * DIM + channel, tl.load(source + i * DIM + channel, mask=mask), mask=mask)


@triton.jit
def _put_row(row, states, scale, i, where, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A new `row` [DIM] into row i of `states` [., DIM], if `where`; as codes where there is a `scale` [.]."""
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM * where.to(tl.int32)
    row = tl.load(row + channel, mask=mask, other=0.0)
    if scale is not None:
        row = row.to(tl.float32)
        largest = tl.max(tl.abs(row), 0)
        tl.store(scale + i, largest.to(scale.dtype.element_ty), mask=where)
        step = tl.div_rn(largest, 127.0)
        row = tl.div_rn(row, tl.where(step == 0.0, 1.0, step))
        row = row + 12582912.0 - 12582912.0  # 1.5 * 2 ** 23: rounds half to even, as PyTorch does
    tl.store(states + i * DIM + channel, row.to(states.dtype.element_ty), mask=mask)


@triton.jit
def _copy_entry(
    key, value, key_scale, value_scale, selected, position, score, i,
    to_key, to_value, to_key_scale, to_value_scale, to_selected, to_position, to_score, j, where,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    _copy_row(key, i, to_key, j, where, KEY_DIM, BLOCK_KEY)
    _copy_row(value, i, to_value, j, where, VALUE_DIM, BLOCK_VALUE)
    if key_scale is not None:
        tl.store(to_key_scale + j, tl.load(key_scale + i, mask=where, other=0.0), mask=where)
        tl.store(to_value_scale + j, tl.load(value_scale + i, mask=where, other=0.0), mask=where)
    tl.store(to_selected + j, tl.load(selected + i, mask=where, other=0) != 0, mask=where)
    if position is not None:
        tl.store(to_position + j, tl.load(position + i, mask=where, other=0), mask=where)
    if score is not None:
        tl.store(to_score + j, tl.load(score + i, mask=where, other=0.0), mask=where)


@triton.jit(do_not_specialize=["num_groups"])
def append_entry(
    key, value, key_scale, value_scale, selected, position, score,  # [N + 1, ...], the memory
    start, length, num_selected, num_evicted,  # [B, G]
    num_stored, valid,  # [B]
    new_key, new_value, new_selected, new_score,  # [B, G, ...]
    old_key, old_value, old_key_scale, old_value_scale, old_selected, old_position, old_score,  # the ring's entry
    out_key, out_value, out_key_scale, out_value_scale, out_selected, out_position, out_score,  # what is evicted
    is_evicted,  # [B * G], as the rows above
    num_groups, key_row, key_group, value_row, value_group, selected_row, selected_group, score_row, score_group,
    WINDOW: tl.constexpr, BUDGET: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)  # of the ranges
    row, group = (i // num_groups).to(tl.int64), (i % num_groups).to(tl.int64)
    first = tl.load(start + i).to(tl.int64)
    size = tl.load(length + i).to(tl.int64)
    seen = tl.load(num_stored + row).to(tl.int64)
    is_selected = tl.load(new_selected + row * selected_row + group * selected_group) != 0
    if WINDOW > 0:
        is_real = seen >= 0
        if valid is not None:
            is_real = tl.load(valid + row) != 0
        entry = first + seen % WINDOW
        is_full = seen >= WINDOW
        if old_key is not None:
            _copy_entry(
                key, value, key_scale, value_scale, selected, position, score, entry,
                old_key, old_value, old_key_scale, old_value_scale, old_selected, old_position, old_score, i,
                seen >= 0, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE,
            )  # fmt: skip
        leaves = is_full & is_real & (tl.load(selected + entry, mask=is_full, other=0) != 0)
        _copy_entry(
            key, value, key_scale, value_scale, selected, position, score, entry,
            key, value, key_scale, value_scale, selected, position, score, first + size, leaves,
            KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE,
        )  # fmt: skip
        size += (leaves | (is_real & ~is_full)).to(tl.int64)
    else:
        is_real = is_selected
        entry = first + size
        size += is_selected.to(tl.int64)
    tl.debug_barrier()  # all have read the entry
    _put_row(new_key + row * key_row + group * key_group, key, key_scale, entry, is_real, KEY_DIM, BLOCK_KEY)
    _put_row(
        new_value + row * value_row + group * value_group, value, value_scale, entry, is_real, VALUE_DIM, BLOCK_VALUE
    )
    tl.store(selected + entry, is_selected, mask=is_real)
    if position is not None:
        tl.store(position + entry, seen.to(tl.int32), mask=is_real)
    if BUDGET is not None:
        new = tl.load(new_score + row * score_row + group * score_group)
        tl.store(score + entry, new.to(score.dtype.element_ty), mask=is_real)
        held = tl.load(num_selected + i) + is_selected.to(tl.int64)
        is_over = held > BUDGET
        slot_out = tl.zeros_like(size).to(tl.int32)
        tl.debug_barrier()  # the entry is there
        if is_over:
            lowest = tl.full([BLOCK_SLOTS], float("inf"), tl.float32)
            latest = tl.full([BLOCK_SLOTS], -1, tl.int32)
            place = tl.zeros([BLOCK_SLOTS], tl.int32)
            for block in range(0, size.to(tl.int32), BLOCK_SLOTS):
                slot = block + tl.arange(0, BLOCK_SLOTS)
                counts = tl.load(selected + first + slot, mask=slot < size, other=0) != 0
                own = tl.load(score + first + slot, mask=counts, other=float("inf")).to(tl.float32)
                since = tl.load(position + first + slot, mask=counts, other=-1)
                goes_first = counts & ((own < lowest) | ((own == lowest) & (since > latest)))
                lowest = tl.where(goes_first, own, lowest)
                latest = tl.where(goes_first, since, latest)
                place = tl.where(goes_first, slot, place)
            is_lowest = lowest == tl.min(lowest, 0)
            position_out = tl.max(tl.where(is_lowest, latest, -1), 0)
            slot_out = tl.sum(tl.where(is_lowest & (latest == position_out), place, 0), 0)
        entry_out = first + slot_out
        if is_evicted is not None:  # in any case, since undoing writes it somewhere
            tl.store(is_evicted + i, is_over)
            _copy_entry(
                key, value, key_scale, value_scale, selected, position, score, entry_out,
                out_key, out_value, out_key_scale, out_value_scale, out_selected, out_position, out_score, i,
                seen >= 0, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE,
            )  # fmt: skip
        tl.debug_barrier()  # all have read what goes
        if is_over:
            # In the window it stays, no longer selected; a kept entry is removed: the last one takes its place.
            tl.store(selected + entry_out, False)
            is_kept = slot_out >= WINDOW
            is_last = slot_out == size - 1
            _copy_entry(
                key, value, key_scale, value_scale, selected, position, score, first + size - 1,
                key, value, key_scale, value_scale, selected, position, score, entry_out, is_kept & ~is_last,
                KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE,
            )  # fmt: skip
            size -= is_kept.to(tl.int64)
            tl.store(num_evicted + i, tl.load(num_evicted + i) + 1)
        tl.store(num_selected + i, held - is_over.to(tl.int64))
    tl.store(length + i, size)


@torch.library.custom_op(
    "mosa::append_token",
    mutates_args=("states", "length", "num_selected", "num_evicted", "overwritten", "evicted", "is_evicted"),
)
def _append(
    states: list[torch.Tensor],
    start: torch.Tensor, length: torch.Tensor, num_selected: torch.Tensor, num_evicted: torch.Tensor,
    num_stored: torch.Tensor, valid: torch.Tensor | None,
    new_key: torch.Tensor, new_value: torch.Tensor, new_selected: torch.Tensor, new_score: torch.Tensor | None,
    overwritten: list[torch.Tensor], evicted: list[torch.Tensor], is_evicted: torch.Tensor | None,
    has_position: bool, window: int, budget: int | None,
) -> None:  # fmt: skip
    has_scale = states[0].dtype == torch.int8
    has = (True, True, has_scale, has_scale, True, has_position, len(states) > 3 + 2 * has_scale + has_position)

    def seven(rows: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """One of each of `NAMES`."""
        given = iter(rows)
        return [next(given, None) if each else None for each in has]

    if start.numel() == 0:
        return
    new = [x if x is None or x.stride(-1) == 1 or i > 1 else x.contiguous()
           for i, x in enumerate((new_key, new_value, new_selected, new_score))]  # fmt: skip
    strides = [stride for x in new for stride in ((0, 0) if x is None else x.stride()[:2])]
    key_dim, value_dim = states[0].shape[1], states[1].shape[1]
    with torch.cuda.device_of(start):
        append_entry[(start.numel(),)](
            *seven(states), start, length, num_selected, num_evicted, num_stored, valid, *new, *seven(overwritten),
            *seven(evicted), is_evicted, start.shape[1], *strides, WINDOW=window, BUDGET=budget, KEY_DIM=key_dim,
            VALUE_DIM=value_dim, BLOCK_KEY=triton.next_power_of_2(max(1, key_dim)),
            BLOCK_VALUE=triton.next_power_of_2(max(1, value_dim)), BLOCK_SLOTS=BLOCK_SLOTS, num_warps=4,
        )  # fmt: skip


@_append.register_fake
def _(states, start, *others):
    return None


def production_builds() -> list[KernelBuild]:
    """bfloat16: a growing store that notes what it takes, one of codes, and one with a budget."""
    sizes = {"KEY_DIM": 128, "VALUE_DIM": 128, "BLOCK_KEY": 128, "BLOCK_VALUE": 128, "BLOCK_SLOTS": BLOCK_SLOTS}
    names = append_entry.arg_names
    noted = {name for name in names if name.startswith(("old_", "out_"))} | {"is_evicted"}
    budget = {"position", "score", "new_score"} | {name for name in noted if name.endswith(("position", "score"))}
    scales = {name for name in names if name.endswith("_scale")}
    dynamic, builds = budget | {name for name in noted if not name.startswith("old_")}, []
    for form, absent, given in (
        ("dynamic", dynamic | scales, {"BUDGET": None}),
        ("dynamic int8", dynamic - {"old_key_scale", "old_value_scale"}, {"BUDGET": None}),
        ("dynamic budget", scales, {"BUDGET": 512}),
        ("static", noted | scales, {"BUDGET": 1088}),
    ):
        constants = {"WINDOW": 512, **given, **sizes, **dict.fromkeys(absent | {"valid"})}
        signature = {}
        for name in names:
            if name not in constants:
                kind = "*bf16" if name.endswith(("key", "value", "score", "scale")) else "*i64"
                kind = "*i8" if "int8" in form and name.endswith(("key", "value")) and name[:3] != "new" else kind
                kind = "*i1" if name.endswith("selected") and not name.startswith("num") else kind
                kind = "*i1" if name == "is_evicted" else "*i32" if name.endswith("position") else kind
                signature[name] = "i32" if name.endswith(("_row", "_group", "groups")) else kind
        builds.append(KernelBuild(f"append_entry {form} d=128", append_entry, signature, constants, 4, 3))
    return builds
