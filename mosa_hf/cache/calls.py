"""
The calls that a sparse store has seen: how many tokens they had, and what `crop` needs to take them back.

A *column* is a token as the caller of the model passed it, padding included: rows have as many columns as each other,
but not as many tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch

from ..kernels.tensors import NEVER
from .undo import MAX_UNDO, UndoRecord, of_todays_rows


class Counts(NamedTuple):
    """What the host has to know of a call, asked all at once: a GPU makes it wait for every question."""

    length: torch.Tensor  # [B, G] int64, entries of each range after the call, if a budget evicts nothing
    lengths: list[int] | None = None  # the same, if asked
    num_far: int | None = None  # selected recent tokens out of the window, of the row and group that has most
    num_selected: int | None = None  # that a budget compares, of the one that has most; None: it can evict nothing
    up_to: torch.Tensor | None = None  # [B, G, F] int64, see `KeyValues.far_up_to`


class PendingCounts(NamedTuple):
    """`Counts` before the host knows them; see `fetch_counts`."""

    length: torch.Tensor
    up_to: torch.Tensor
    before: torch.Tensor | int  # entries of a range before the recent tokens that join it
    compares: bool  # whether a budget does
    asked: tuple[torch.Tensor, ...]  # [B, G] each: `length`, and what does not follow from it

    def known(self, lengths: list[int], joined: list[int] | None = None, compared: list[int] | None = None) -> Counts:
        if joined is None:
            assert isinstance(self.before, int)
            joined = compared = [length - self.before for length in lengths]
        num_selected = max(compared or (), default=0) if self.compares else None
        return Counts(self.length, lengths, max(joined, default=0), num_selected, self.up_to)


def fetch_counts(pending: Sequence[PendingCounts | None]) -> list[Counts | None]:
    """All of them, of which the device is asked at once and waited for once; None: nothing was to be asked."""
    if not any(pending):
        return [None] * len(pending)
    asked = [each.flatten() for one in pending if one is not None for each in one.asked]
    numbers = iter((asked[0] if len(asked) == 1 else torch.cat(asked)).tolist())
    return [one and one.known(*(list(islice(numbers, each.numel())) for each in one.asked)) for one in pending]


class CallLog:
    """
    Args:
        selected: `[B, G, T]`, for rows like whose.
        is_fixed: nothing is ever cropped: tokens are counted, in place, and calls are not noted.
    """

    def __init__(self, selected: torch.Tensor, is_fixed: bool = False):
        self.is_fixed = is_fixed
        # [B] int64: tokens that the memory knows of; and with those that it does not know of yet, if there are any.
        self.num_stored = torch.zeros(len(selected), dtype=torch.int64, device=selected.device)
        self.num_seen: torch.Tensor | None = None
        self.num_next: torch.Tensor | None = None  # when the call that goes on has ended; None: nobody has counted
        self.pending_columns = 0  # columns that it does not know of yet
        self._max_tokens = 0
        # [B] int64: `crop` cannot go back before the first; of tokens before the second the ring held none.
        self.num_final = self.num_lost = torch.zeros_like(self.num_stored) if is_fixed else self.num_stored
        self.masks: list[torch.Tensor | None] = []  # padding of the calls so far, [B, T] bool or None,
        self.lengths: list[int] = []  # and their columns
        self.records: list[UndoRecord] = []  # of the last calls, as long as each was of one column
        if is_fixed and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.num_stored)

    @property
    def num_tokens(self) -> torch.Tensor:
        """`[B]` int64, tokens seen. May change in place."""
        return self.num_stored if self.num_seen is None else self.num_seen

    @property
    def max_tokens(self) -> int:
        """
        At most so many tokens has a row, without asking the device. Where all stays in place that is known of a first
        call alone: what is captured runs on without us.
        """
        return NEVER if self.is_fixed and torch.compiler.is_compiling() else self._max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        self._max_tokens = value

    @property
    def num_columns(self) -> int:
        """Of all calls so far, where they are noted."""
        return sum(self.lengths)

    @property
    def common_length(self) -> int | None:
        """Tokens of every row, if it is known that there has been no padding."""
        most, padded = self.max_tokens, [mask for mask in self.masks if mask is not None]
        return most if most < NEVER and not padded else None

    def begin(self, mask: torch.Tensor | None, num_columns: int, num_tokens: torch.Tensor | None = None) -> None:
        """A call begins, with padding where `mask` [B, T] is False; `num_tokens` as `SparseStore.begin` takes them."""
        self.num_next = num_tokens
        if mask is None and self.masks and self.masks[-1] is None:
            self.lengths[-1] += num_columns
        elif self.max_tokens < NEVER:
            self.masks.append(mask)
            self.lengths.append(num_columns)

    def expect(self, num_columns: int, valid: torch.Tensor | None) -> None:
        """The call's columns are pending, of which `valid` [B, T] are tokens (None: all)."""
        if self.num_next is None:
            self.num_next = self.num_tokens + (num_columns if valid is None else valid.sum(1))
        self.num_seen, self.num_next = self.num_next, None
        self.pending_columns += num_columns
        self.max_tokens += num_columns if self.max_tokens < NEVER else 0

    def add_one(self, valid: torch.Tensor | None) -> None:
        """The memory knows of one column more, a token where `valid` [B] (None: everywhere)."""
        new: torch.Tensor | int = 1 if valid is None else valid
        if self.is_fixed:
            self.num_stored.add_(new)
            self._lose_count()
        else:
            self.num_stored = self.num_stored + new if self.num_next is None else self.num_next
            self._max_tokens += 1
        self.num_next = None

    def settle(self) -> None:
        """The memory knows of what was pending."""
        if self.is_fixed:
            self.num_stored.copy_(self.num_tokens)
            self._lose_count()
        else:
            self.num_stored = self.num_tokens
        self.num_seen, self.pending_columns = None, 0

    def num_before(self, num_kept: torch.Tensor | None, window: int) -> torch.Tensor | int:
        """Entries of a range before tokens that join it: the ring's, and `num_kept` [B, G] kept ones (None: none)."""
        common = self.common_length if window else 0
        num_ring = self.num_tokens.clamp(max=window)[:, None] if common is None else min(common, window)
        return num_ring if num_kept is None else num_ring + num_kept

    def pending_counts(
        self, joins: torch.Tensor, num_kept: torch.Tensor | None, compared: torch.Tensor | None, window: int
    ) -> PendingCounts:
        """Of the recent tokens `[B, G, F]` those that `joins` the kept ones, and those `compared` with by a budget."""
        up_to, before = joins.cumsum(-1), self.num_before(num_kept, window)
        joined = up_to[..., -1] if joins.shape[-1] else joins.sum(-1)
        length = joined + before
        if isinstance(before, int) and (compared is None or compared.shape == joins.shape):  # which are the same then
            asked: tuple[torch.Tensor, ...] = (length,)
        else:
            asked = (length, joined) if compared is None else (length, joined, compared.sum(-1))
        return PendingCounts(length, up_to, before, compared is not None, asked)

    def _lose_count(self) -> None:
        """What follows may be captured, and run without us."""
        self.max_tokens, self.masks, self.lengths = NEVER, [], []

    def note(self, record: UndoRecord | None) -> None:
        """The memory has taken a call in; None: not one of a column, so that nothing can be undone to before it."""
        if not self.is_fixed:
            self.records = [] if record is None else [*self.records, record][-MAX_UNDO:]

    # Going back, and other rows

    def num_removed(self, num_columns: int) -> torch.Tensor:
        """How many tokens [B] are among the last columns."""
        removed = torch.zeros_like(self.num_stored)
        for mask, length in zip(reversed(self.masks), reversed(self.lengths), strict=True):
            cut = min(num_columns, length)
            removed = removed + (cut if mask is None else mask[:, length - cut :].sum(1))
            num_columns -= cut
        return removed

    def forget(self, num_columns: int) -> None:
        """Cut off the last columns."""
        while num_columns and self.lengths:
            cut, mask = min(num_columns, self.lengths[-1]), self.masks[-1]
            self.lengths[-1] -= cut
            self.masks[-1] = None if mask is None else mask[:, : mask.shape[1] - cut]
            if self.lengths[-1] == 0:
                self.lengths.pop()
                self.masks.pop()
            num_columns -= cut

    def pop_records(self, num_records: int) -> list[UndoRecord]:
        """The last records, newest first, as if their calls had been made with today's rows."""
        records = of_todays_rows(self.records)
        num_left = len(records) - num_records
        self.records = records[:num_left]
        return records[num_left:][::-1]

    def num_croppable(self, num_columns: int, window: int) -> int:
        """How many of the last columns `crop` can forget. All of them always: nothing is needed of what was before."""
        if num_columns >= self.num_columns or not self._is_lost(num_columns, window):
            return num_columns
        return bisect_left(range(num_columns), True, key=lambda num: self._is_lost(num, window)) - 1

    def _is_lost(self, num_columns: int, window: int) -> bool:
        """Whether `crop` lacks what it needs to forget so many columns."""
        num_free = self.pending_columns + len(self.records)
        if num_columns <= num_free:
            return False
        # The rest has to be found in what the store held before them.
        free, removed = self.num_removed(num_free), self.num_removed(num_columns)
        num_tokens = self.num_tokens - removed
        records = of_todays_rows(self.records)
        num_final = next((record.num_final for record in records if record.num_final is not None), self.num_final)
        is_lost = num_tokens < num_final
        if window:
            needed = (num_tokens - window + 1).clamp(min=0)  # the first token that the next query's window covers
            is_lost = is_lost | (needed < self.num_lost.maximum(self.num_tokens - free - window))
        return bool((is_lost & (removed > free)).any())

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.records:
            last = self.records[-1]  # only noted: beams are reordered after every token, and few are ever undone
            last.rows = rows if last.rows is None else last.rows[rows]
            if len(rows) < len(self.num_stored):  # memory goes with rows
                self.records = of_todays_rows(self.records)
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]
        self.num_stored, self.num_final = self.num_stored[rows], self.num_final[rows]
        self.num_lost = self.num_lost[rows]
        if self.num_seen is not None:
            self.num_seen = self.num_seen[rows]
