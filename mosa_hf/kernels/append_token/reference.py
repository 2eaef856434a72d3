"""
One more token in every row of a store's memory, specified (docs/design.md, section 4): the ring's entry that it comes
into, the selected token that leaves the window for it, and the lowest score that a budget then evicts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..entries import Entries
from ..entry_codes import Rows, encoded


class Token(NamedTuple):
    """A token of each row, as groups see it."""

    key: torch.Tensor  # [B, G, d]
    value: torch.Tensor  # [B, G, d]
    selected: torch.Tensor  # [B, G] bool, False on padding
    score: torch.Tensor | None  # [B, G], what a budget compares; None: no budget
    valid: torch.Tensor | None  # [B] bool, False where it is padding; None: nowhere


class Taken(NamedTuple):
    """What the memory held before, for who may have to give it back."""

    overwritten: Rows | None = None  # the ring's entry that the token came into, [B * G, ...] by name; None: no ring
    evicted: Rows | None = None  # what the budget evicted, [B * G, ...] by name; None: nothing
    is_evicted: torch.Tensor | None = None  # [B, G] bool, where it did


def append_token(
    entries: Entries,
    token: Token,
    num_stored: torch.Tensor,
    window: int,
    budget: int | None = None,
    notes: bool = False,
    common: int | None = None,
    is_any: Callable[[torch.Tensor], bool] = lambda mask: True,
) -> Taken:
    """
    Args:
        entries: changed in place; every range has room for one more.
        token: of each row.
        num_stored: `[B]` int64, tokens before it.
        window: entries of the ring; 0: selected tokens alone are held.
        budget: evict the lowest score where a range has more selected tokens than this; of equal ones the latest.
        notes: whether what is taken is returned.
        common: what `num_stored` holds, if that is known and the same in every row, none of which has padding.
        is_any: whether a mask holds a True, if that can be known.
    """
    selected, overwritten = token.selected, None
    if window:
        entry, overwritten = _to_ring(entries, token.valid, num_stored, window, notes, common, is_any)
    else:
        entry = torch.where(selected, entries.start + entries.length, entries.null)
        entries.lengthen(selected)
    rows = {"key": token.key.flatten(0, 1), "value": token.value.flatten(0, 1), "selected": selected.flatten()}
    if "key_scale" in entries.states:
        rows = encoded(rows)
    # Of tokens that are not selected, neither position nor score is ever looked at.
    is_ranked = "position" in entries.states and is_any(selected)
    if is_ranked:
        rows["position"] = num_stored[:, None].expand_as(selected).flatten()
    if is_ranked and token.score is not None:
        rows["score"] = token.score.flatten()
    entries.put(entry, **rows)
    if budget is None or "score" not in rows:
        return Taken(overwritten)
    entries.num_selected.add_(selected)
    over = entries.num_selected > budget  # [B, G]
    return Taken(overwritten, *_evict_lowest(entries, over, window, notes)) if is_any(over) else Taken(overwritten)


def _to_ring(
    entries: Entries,
    valid: torch.Tensor | None,
    num_stored: torch.Tensor,
    window: int,
    notes: bool,
    common: int | None,
    is_any: Callable[[torch.Tensor], bool],
) -> tuple[torch.Tensor, Rows | None]:
    """The ring's entry `[B, G]` for a token, and what it held. What leaves the window there is kept if selected."""
    start, null = entries.start, entries.null
    if common is not None:  # the same entry of every range
        entry, is_full = start + common % window, None
        if common < window:
            entries.lengthen(1)
            return entry, None
    else:
        entry = start + (num_stored % window)[:, None]
        is_full = (num_stored >= window)[:, None]
    overwritten = entries.gather(entry) if notes else None
    if overwritten is None:
        leaving = entries.states["selected"].index_select(0, entry.flatten())
    else:
        leaving = overwritten["selected"]
    leaving = added = leaving.view_as(entry)
    if is_full is not None:
        leaving, added = leaving & is_full, leaving | ~is_full
        if valid is not None:
            leaving, added = leaving & valid[:, None], added & valid[:, None]
            entry = torch.where(valid[:, None], entry, null)
    keeps = is_any(leaving)
    if keeps:
        rows = entries.gather(entry) if overwritten is None else overwritten
        entries.put(torch.where(leaving, start + entries.length, null), **rows)
    if keeps or is_full is not None:
        entries.lengthen(added)
    return entry, overwritten


def _evict_lowest(entries: Entries, over: torch.Tensor, window: int, notes: bool) -> tuple[Rows | None, torch.Tensor]:
    """Where a range has one selected token more than the budget allows, evict the lowest score."""
    states = entries.states
    slots, filled = entries.slots()
    if not slots.shape[-1]:  # nothing is held
        return None, over
    selected = states["selected"][slots] & filled
    slot = lowest_score(states["score"][slots], states["position"][slots], selected)  # [B, G]
    entry = torch.where(over, entries.start + slot, entries.null)
    evicted = entries.gather(entry) if notes else None
    # In the window it stays, no longer selected; a kept entry is removed.
    states["selected"].index_fill_(0, entry.flatten(), False)
    entries.remove(entry, over & (slot >= window))
    entries.num_selected.sub_(over.long())
    entries.num_evicted.add_(over)
    return evicted, over


def lowest_score(score: torch.Tensor, position: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """
    The slot `[B, G]` of the selected token that a budget evicts first, where there is one too many: the lowest score,
    of equal ones the latest. Arguments as in `routing.budget.within_budget`.
    """
    score = score.masked_fill(~selected, torch.inf)
    is_lowest = selected & (score == score.amin(-1, keepdim=True))
    return position.masked_fill(~is_lowest, -1).argmax(-1)
