"""What a store notes of its last steps, calls of one token, so that `crop` can undo them (DESIGN section 4)."""

from dataclasses import dataclass

import torch

NUM_STEPS = 32  # so many tokens, fed one at a time, can be rolled back without `record_past`


@dataclass
class Step:
    """
    What one step took from the runs of a store.

    Attributes:
        overwritten: the ring's entry that the token came into, as it was, `[B * G, ...]` by name; None: no row's ring
            was full.
        evicted: what the budget evicted, `[B * G, ...]` by name; None: nothing.
        is_evicted: `[B, G]` bool, where it did.
        num_final: `[B]`, the store's before it did.
        rows: `[B']` int64, which of its rows were selected since, before the next step; None: all as they were.
    """

    overwritten: dict[str, torch.Tensor] | None = None
    evicted: dict[str, torch.Tensor] | None = None
    is_evicted: torch.Tensor | None = None
    num_final: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def note_rows(self, rows: torch.Tensor) -> None:
        """Rows are selected. Only noted: beams are reordered after every token, and few steps are ever undone."""
        self.rows = rows if self.rows is None else self.rows[rows]

    def of_rows(self, rows: torch.Tensor, num_groups: int) -> "Step":
        """The step of `rows` [B'] of its rows."""
        overwritten, evicted = (
            states and {name: x.unflatten(0, (-1, num_groups))[rows].flatten(0, 1) for name, x in states.items()}
            for states in (self.overwritten, self.evicted)
        )
        is_evicted, num_final = (x if x is None else x[rows] for x in (self.is_evicted, self.num_final))
        return Step(overwritten, evicted, is_evicted, num_final)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held in memory."""
        return list(self.state().values())

    def state(self) -> dict[str, torch.Tensor]:
        """All that is held in memory, by name: "evicted.key" is the key of `evicted`."""
        nested = {"overwritten": self.overwritten, "evicted": self.evicted}
        states = {f"{field}.{name}": x for field, each in nested.items() for name, x in (each or {}).items()}
        plain = {name: getattr(self, name) for name in ("is_evicted", "num_final", "rows")}
        return states | {name: x for name, x in plain.items() if x is not None}

    @classmethod
    def of_state(cls, states: dict[str, torch.Tensor]) -> "Step":
        """The step that `state` gave the states of."""
        fields: dict = {}
        for name, x in states.items():
            field, _, entry = name.partition(".")
            if entry:
                fields.setdefault(field, {})[entry] = x
            else:
                fields[field] = x
        return cls(**fields)


def of_todays_rows(steps: list[Step], num_groups: int) -> list[Step]:
    """`steps` as if they had been taken with the rows that were selected since."""
    rows, selected = None, []
    for step in reversed(steps):
        if step.rows is not None:
            rows = step.rows if rows is None else step.rows[rows]
        selected.append(step if rows is None else step.of_rows(rows, num_groups))
    return selected[::-1]
