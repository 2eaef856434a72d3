"""What a sparse store remembers between two calls, taken apart for a file, and put together again."""

from functools import partial
from typing import Any

import torch

from .calls import CallLog
from .memory import EntryMemory
from .store import SparseStore
from .undo import UndoRecord

Tensors = dict[str, torch.Tensor]
LOG = ("num_stored", "num_final", "num_lost")  # of a `CallLog`, [B] each
RANGES = ("start", "capacity", "length", "num_selected", "num_evicted")  # of an `EntryMemory`, [B, G] each


def store_state(store: SparseStore) -> tuple[Tensors, dict[str, Any]]:
    """All that `store` remembers, for `set_store_state` of one like it: tensors by name, and what JSON can hold."""
    tensors: Tensors = {}
    plain: dict[str, Any] = {"record_past": store.record_past, "calls": None, "memory": None}
    if (calls := store.calls) is not None:
        tensors |= {f"calls.{name}": getattr(calls, name) for name in LOG}
        if calls.num_seen is not None:
            tensors["calls.num_pending"] = calls.num_seen - calls.num_stored
        tensors |= {f"masks.{i}": mask for i, mask in enumerate(calls.masks) if mask is not None}
        for i, record in enumerate(calls.records):
            tensors |= {f"records.{i}.{name}": x for name, x in record.state().items()}
        plain["calls"] = {name: getattr(calls, name) for name in ("pending_columns", "max_tokens", "lengths")}
        plain["calls"]["num_records"] = len(calls.records)
    if (memory := store.memory) is not None:
        tensors |= {f"memory.{name}": getattr(memory, name) for name in RANGES}
        tensors |= {f"entries.{name}": x for name, x in memory.states.items()}
        plain["memory"] = {name: getattr(memory, name) for name in ("free", "max_length", "null")}
    tensors |= {f"recent.{name}": x for name, x in (store.recent or {}).items()}
    return tensors, plain


def set_store_state(store: SparseStore, tensors: Tensors, plain: dict[str, Any]) -> None:
    """
    Let `store`, which has seen nothing, remember what another one did: see `store_state`. Tensors become its own.

    Raises:
        ValueError: for states that are missing, unknown, or that no store like this can have had.
    """
    left = dict(tensors)
    part = partial(states_below, tensors=left)
    try:
        store.record_past = plain["record_past"]
        if (own := plain["calls"]) is not None:
            store.calls = calls = _call_log(part("calls"), store.is_fixed)
            calls.pending_columns, calls.max_tokens = own["pending_columns"], own["max_tokens"]
            masks, calls.lengths = part("masks"), own["lengths"]
            calls.masks = [masks.pop(str(i), None) for i in range(len(calls.lengths))]
            left |= {f"masks.{i}": mask for i, mask in masks.items()}
        if (own := plain["memory"]) is not None:
            _set_memory(store, part("memory"), part("entries"), own)
        if plain["calls"] is not None and store.calls is not None:
            num_groups = 0 if store.memory is None else store.memory.length.shape[1]
            num_records = plain["calls"]["num_records"]
            store.calls.records = [_record(part(f"records.{i}"), num_groups) for i in range(num_records)]
        store.recent = part("recent") or None
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"these are not the states of such a cache: {error}") from error
    if left:
        raise ValueError(f"there are states that no cache has: {sorted(left)}")


def states_below(prefix: str, tensors: Tensors) -> Tensors:
    """Takes those out of `tensors` whose names begin with `prefix` and a dot, and names them without."""
    names = [name for name in tensors if name.startswith(prefix + ".")]
    return {name.removeprefix(prefix + "."): tensors.pop(name) for name in names}


def _call_log(tensors: Tensors, is_fixed: bool) -> CallLog:
    calls = CallLog(tensors["num_stored"][:, None], is_fixed)
    num_stored, num_final, num_lost = (tensors.pop(name) for name in LOG)
    if is_fixed:
        calls.num_stored.copy_(num_stored)
    else:
        calls.num_stored, calls.num_final, calls.num_lost = num_stored, num_final, num_lost
    if (num_pending := tensors.pop("num_pending", None)) is not None:
        calls.num_seen = calls.num_stored + num_pending
    if tensors:
        raise KeyError(f"unknown: {sorted(tensors)}")
    return calls


def _set_memory(store: SparseStore, ranges: Tensors, entries: Tensors, plain: dict[str, Any]) -> None:
    key, value, length = entries["key"], entries["value"], ranges["length"]
    batch_size, num_groups = length.shape
    key, value = (  # as attention reads them
        x.new_empty(batch_size, num_groups, 0, x.shape[-1], dtype=entries.get(f"{name}_scale", x).dtype)
        for name, x in (("key", key), ("value", value))
    )
    memory = store._allocate(key, value, num_groups)
    if set(entries) != set(memory.states) or set(ranges) != set(RANGES):
        raise KeyError(f"other states than {[*memory.states, *RANGES]}")
    if store.is_fixed:  # where it is, as a compiled step needs
        pairs = [(own, entries[name]) for name, own in memory.states.items()]
        for own, states in pairs + [(getattr(memory, name), ranges[name]) for name in RANGES]:
            if own.shape != states.shape:
                raise ValueError(f"a state has shape {tuple(states.shape)}, not {tuple(own.shape)}")
            own.copy_(states)
    else:
        memory.states = {name: entries[name] for name in memory.states}
        memory.capacities = ranges.pop("capacity").flatten().tolist()
        for name, own in ranges.items():
            setattr(memory, name, own)
        memory.free, memory.max_length, memory.null = plain["free"], plain["max_length"], plain["null"]
    _check_memory(memory, store.calls)


def _check_memory(memory: EntryMemory, calls: CallLog | None) -> None:
    """Raise a ValueError if what is remembered can be read only beyond its memory."""
    start, length = memory.start, memory.length
    if any(len(states) != memory.null + 1 for states in memory.states.values()):
        raise ValueError(f"there are not {memory.null} entries and one more of each state")
    if start.shape != length.shape or calls is None or len(length) != len(calls.num_stored):
        raise ValueError("ranges and rows differ in number")
    capacity = memory.capacity
    is_within = (start >= 0) & (length >= 0) & (length <= capacity) & (start + capacity <= memory.null)
    if not bool(is_within.all()) or (length.numel() and int(length.max()) > memory.max_length):
        raise ValueError("a range goes beyond its memory")


def _record(tensors: Tensors, num_groups: int) -> UndoRecord:
    fields: dict[str, Any] = {}
    for name, x in tensors.items():
        field, _, entry = name.partition(".")
        if entry:
            fields.setdefault(field, {})[entry] = x
        else:
            fields[field] = x
    return UndoRecord(num_groups, **fields)
