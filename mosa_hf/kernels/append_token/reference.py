"""
One more token in every row of a store's memory, specified (docs/design.md, section 4): the ring's entry that it comes
into, the selected token that leaves the window for it, and the lowest score that a budget then evicts.
"""

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
) -> Taken:
    """
    Args:
        entries: changed in place; every range has room for one more.
        token: of each row.
        num_stored: `[B]` int64, tokens before it.
        window: entries of the ring; 0: selected tokens alone are held.
        budget: evict the lowest score where a range has more selected tokens than this; of equal ones the latest.
        notes: whether what is taken is returned.
        common: what `num_stored` holds, if that is known and the same in every row, none of which has padding: of use
            to a backend that can leave something out.
    """
    held = None
    if window:
        entry, leaving, added = to_ring(entries, token.valid, num_stored, window)
        held = entries.gather(entry)
        entries.put(behind(entries, leaving), **held)
    else:
        entry, added = behind(entries, token.selected), token.selected
    entries.lengthen(added)
    entries.put(entry, **rows_of(entries, token, num_stored))
    overwritten = held if notes else None
    if budget is None or token.score is None:
        return Taken(overwritten)
    entries.num_selected.add_(token.selected)
    return Taken(overwritten, *evict_lowest(entries, entries.num_selected > budget, window, notes))


def behind(entries: Entries, where: torch.Tensor) -> torch.Tensor:
    """The entry `[B, G]` behind each range `where` [B, G] is True, elsewhere the null entry."""
    return torch.where(where, entries.start + entries.length, entries.null)


def to_ring(
    entries: Entries, valid: torch.Tensor | None, num_stored: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The ring's entry for a token, whether what it holds is selected and leaves the window, so that it is kept, and
    whether its range has one entry more then: all `[B, G]`.
    """
    entry = entries.start + (num_stored % window)[:, None]
    is_full = (num_stored >= window)[:, None]
    leaving = entries.states["selected"].index_select(0, entry.flatten()).view_as(entry) & is_full
    added = leaving | ~is_full
    if valid is not None:
        leaving, added = leaving & valid[:, None], added & valid[:, None]
        entry = torch.where(valid[:, None], entry, entries.null)
    return entry, leaving, added


def rows_of(entries: Entries, token: Token, num_stored: torch.Tensor, is_ranked: bool = True) -> Rows:
    """What `entries` hold of a token, `[B * G, ...]` by name; if it `is_ranked`, with what a budget compares."""
    rows = {"key": token.key.flatten(0, 1), "value": token.value.flatten(0, 1), "selected": token.selected.flatten()}
    if "key_scale" in entries.states:
        rows = encoded(rows)
    if is_ranked and "position" in entries.states:
        rows["position"] = num_stored[:, None].expand_as(token.selected).flatten()
        if token.score is not None:
            rows["score"] = token.score.flatten()
    return rows


def evict_lowest(entries: Entries, over: torch.Tensor, window: int, notes: bool) -> tuple[Rows | None, torch.Tensor]:
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
