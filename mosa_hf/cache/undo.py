"""What a store notes of its last single tokens, so that `crop` can undo them (docs/design.md, section 4)."""

from dataclasses import dataclass

import torch

from .memory import EntryMemory

MAX_UNDO = 32  # so many tokens, fed one at a time, can be rolled back without `record_past`


@dataclass
class UndoRecord:
    """
    What one call of a single token took from the memory of a store.

    Attributes:
        num_groups: G.
        overwritten: the ring's entry that the token came into, as it was, `[B * G, ...]` by name; None: no row's ring
            was full.
        evicted: what the budget evicted, `[B * G, ...]` by name; None: nothing.
        is_evicted: `[B, G]` bool, where it did.
        num_final: `[B]`, the log's before it did.
        rows: `[B']` int64, which of its rows were selected since, before the next call; None: all as they were.
    """

    num_groups: int
    overwritten: dict[str, torch.Tensor] | None = None
    evicted: dict[str, torch.Tensor] | None = None
    is_evicted: torch.Tensor | None = None
    num_final: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def of_rows(self, rows: torch.Tensor) -> "UndoRecord":
        """The record of `rows` [B'] of its rows."""
        overwritten, evicted = (
            states and {name: x.unflatten(0, (-1, self.num_groups))[rows].flatten(0, 1) for name, x in states.items()}
            for states in (self.overwritten, self.evicted)
        )
        is_evicted, num_final = (x if x is None else x[rows] for x in (self.is_evicted, self.num_final))
        return UndoRecord(self.num_groups, overwritten, evicted, is_evicted, num_final)

    def undo(self, memory: EntryMemory, num_stored: torch.Tensor, removed: torch.Tensor, window: int) -> None:
        """
        Give back to `memory`, which has room for one more entry in every range, what the call took.

        Args:
            memory: of the store, changed in place.
            num_stored: `[B]`, tokens that the memory knew of after the call.
            removed: `[B]`, 1 where the call's token is real, 0 where it was padding.
            window: of the store.
        """
        start = memory.start
        if self.evicted is not None and self.is_evicted is not None:
            position = self.evicted["position"].view_as(start)
            is_kept = self.is_evicted & (position < (num_stored - window)[:, None])
            target = torch.where(is_kept, start + memory.length, memory.null)
            if window:  # it stayed there, no longer selected
                target = torch.where(self.is_evicted & ~is_kept, start + position % window, target)
            memory.put(target, **self.evicted)
            memory.length = memory.length + is_kept
        num_stored = num_stored - removed
        is_real = (removed > 0)[:, None]
        is_full = is_real & (num_stored >= window)[:, None]
        # From the kept entries goes what the call has added to them: the token that left the window for the new one;
        # where there is no window, the new one.
        goes = is_full.expand_as(start)
        if window:
            goes = goes & (False if self.overwritten is None else self.overwritten["selected"].view_as(start))
        entry = start + memory.length - 1  # where nothing is ever evicted, it is the last of its range
        if "position" in memory.states:
            entries, filled = memory.slots()
            is_kept = filled & (torch.arange(entries.shape[-1], device=entries.device) >= window)
            added = (num_stored - window)[:, None, None]
            found = goes[..., None] & is_kept & (memory.states["position"][entries] == added)
            goes, entry = found.any(-1), (entries * found).sum(-1)  # of one at most
        memory.remove(entry, goes)
        if window:
            if self.overwritten is not None:
                entry = start + (num_stored % window)[:, None]
                memory.put(torch.where(is_full, entry, memory.null), **self.overwritten)
            memory.length = memory.length - (is_real & ~is_full).long()

    def state(self) -> dict[str, torch.Tensor]:
        """All that is held in memory, by name: "evicted.key" is the key of `evicted`."""
        nested = {"overwritten": self.overwritten, "evicted": self.evicted}
        states = {f"{field}.{name}": x for field, each in nested.items() for name, x in (each or {}).items()}
        plain = {name: getattr(self, name) for name in ("is_evicted", "num_final", "rows")}
        return states | {name: x for name, x in plain.items() if x is not None}


def of_todays_rows(records: list[UndoRecord]) -> list[UndoRecord]:
    """`records` as if their calls had been made with the rows that were selected since."""
    rows, selected = None, []
    for record in reversed(records):
        if record.rows is not None:
            rows = record.rows if rows is None else record.rows[rows]
        selected.append(record if rows is None else record.of_rows(rows))
    return selected[::-1]
