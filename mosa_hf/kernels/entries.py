"""The entries of a cache, as kernels read them and write to them. `cache` says when these grow and what goes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .entry_codes import Rows, decode
from .tensors import KeyValues


class PackedKeyValues(NamedTuple):
    """
    Keys (rotated) and values as a cache holds them: a range of consecutive entries for each row and group, in no
    particular order.
    """

    key: torch.Tensor  # [N, d]; codes, if there are scales
    value: torch.Tensor  # [N, d]
    start: torch.Tensor  # [B, G] int64, the first entry of each range
    length: torch.Tensor  # [B, G] int64, entries of each range
    max_length: int  # no range has more entries: an upper bound that is known without asking the device
    # Ranges that lie evenly: range i (of B * G) starts at entry `i * stride + offset`. None: they lie anywhere.
    stride: int | None = None
    offset: int = 0
    evicted_at: torch.Tensor | None = None  # [N] int64, see `KeyValues`
    is_full: bool = False  # it is known that every range has `max_length` entries
    parts: list[tuple[torch.Tensor, ...]] | None = None  # what `split` gives, if that is at hand
    key_scale: torch.Tensor | None = None  # [N], of codes, see `entry_codes`; None: keys and values are what they are
    value_scale: torch.Tensor | None = None  # [N]

    def held(self) -> tuple[torch.Tensor, ...]:
        """What `plain` takes, of all entries `[N, ...]`: key and value, and their scales if these are codes."""
        scales = () if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)
        return self.key, self.value, *scales

    def split(self) -> list[tuple[torch.Tensor, ...]]:
        """`held`, of each range. Asks the device how many entries a range has."""
        if self.parts is not None:
            return self.parts
        starts, counts = self.start.flatten().tolist(), self.length.flatten().tolist()
        ranges = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return list(zip(*([x[each] for each in ranges] for x in self.held()), strict=True))

    def at(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value `[..., d]` of `entries` [...]."""
        # By index_select: the gradient of indexing adds rows up in an order that changes from run to run.
        return plain(*(x.index_select(0, entries.flatten()).view(entries.shape + x.shape[1:]) for x in self.held()))

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ranges, padded to S = `max_length`: entries `[B, G, S]` int64 and which of them are filled."""
        slot = torch.arange(self.max_length, device=self.length.device)
        filled = slot < self.length[..., None]
        return torch.where(filled, self.start[..., None] + slot, 0), filled

    def pad(self) -> KeyValues | None:
        """The entries, empty slots behind each range, position -1 for want of one; None if there are no slots."""
        if self.max_length == 0:
            return None
        entries, filled = self.slots()
        evicted_at = None if self.evicted_at is None else self.evicted_at[entries]
        return KeyValues(*self.at(entries), torch.full_like(entries, -1), filled, None, evicted_at)

    def padded_view(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Key and value `[B * G, S, d]` and which slots are filled `[B * G, S]` (None: all), S = `max_length`; no copy
        where ranges lie evenly and entries are no codes. Slots that are not filled may hold anything finite.
        """
        filled: torch.Tensor | None = None
        if self.stride is None:
            entries, filled = (x.flatten(0, 1) for x in self.slots())
            return *self.at(entries), filled
        if not self.is_full:
            filled = torch.arange(self.max_length, device=self.length.device) < self.length.flatten()[:, None]
        slots = slice(self.offset, self.offset + self.max_length)
        shape = (self.start.numel(), self.stride)
        views = [x[: shape[0] * shape[1]].view(shape + x.shape[1:])[:, slots] for x in self.held()]
        return *plain(*views), filled


# What the queries of a call may read: packed entries, for one token a row; else what is recent, and what is cached.
Readable = PackedKeyValues | tuple[KeyValues, PackedKeyValues | None]
# Takes in the selected tokens of a call of one token a row, and says what those read, themselves included.
Remember = Callable[[KeyValues], PackedKeyValues]


def plain(key: torch.Tensor, value: torch.Tensor, *scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value `[..., d]` as attention reads them: decoded, if there are `scales` [...] of both."""
    return (decode(key, scales[0]), decode(value, scales[1])) if scales else (key, value)


class Entries:
    """
    What a store holds: a range of consecutive entries for each row and group, all in one flat memory. Its last entry
    is the *null entry*, which is in no range: what is written there counts for nothing.
    """

    # What is held of every entry, [N + 1, ...] by name: "key", "value", "selected"; with codes for keys and values
    # "key_scale" and "value_scale"; and "position" and "score", which count for selected ones only and may be missing.
    states: Rows
    start: torch.Tensor  # [B, G] int64, the first entry of each range
    length: torch.Tensor  # [B, G] int64, of each range
    num_selected: torch.Tensor  # [B, G] int64, selected entries, only with a budget
    num_evicted: torch.Tensor  # [B, G] int64, by the budget
    null: int  # the null entry
    max_length: int  # at most so many entries has a range
    stride: int | None  # see `PackedKeyValues`

    def lengthen(self, new: torch.Tensor | int | None) -> None:
        """`new` [B, G] entries more, one of each range at most; None: `length` says so already."""
        if new is not None:
            self.length.add_(new)

    def packed(self, max_length: int, offset: int = 0, num_before: torch.Tensor | None = None) -> PackedKeyValues:
        """The entries behind the first `offset` of each range, of which it has `num_before` [B, 1] so far."""
        start, length = self.start, self.length
        if num_before is not None:
            start, length = start + offset, length - num_before
        if not torch.compiler.is_compiling() and length.device.type == "cpu":
            max_length = int(length.max()) if length.numel() else 0
        return self._packed(start, length, max_length, offset)

    def _packed(
        self, start: torch.Tensor, length: torch.Tensor, max_length: int, offset: int = 0, is_full: bool = False
    ) -> PackedKeyValues:
        key, value = self.states["key"], self.states["value"]
        key_scale, value_scale = self.states.get("key_scale"), self.states.get("value_scale")
        ranges = (start, length, max_length, self.stride, offset)
        return PackedKeyValues(key, value, *ranges, is_full=is_full, key_scale=key_scale, value_scale=value_scale)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ranges, padded: entries `[B, G, S]` int64 and which of them are filled."""
        return self.packed(self.max_length).slots()

    def gather(self, entries: torch.Tensor) -> Rows:
        """A copy of what `entries` [B, G] hold, `[B * G, ...]` by name."""
        entries = entries.flatten()
        return {name: own.index_select(0, entries) for name, own in self.states.items()}

    def put(self, entries: torch.Tensor, **rows: torch.Tensor) -> None:
        """Let `entries` [B, G] hold `rows` [B * G, ...], by name."""
        entries = entries.flatten()
        for name, new in rows.items():
            own = self.states[name]
            own.index_copy_(0, entries, new if new.dtype == own.dtype else new.to(own.dtype))

    def remove(self, entry: torch.Tensor, where: torch.Tensor) -> None:
        """Remove an `entry` [B, G] of each range `where` [B, G] is True: the last one takes its place."""
        last = torch.where(where, self.start + self.length - 1, self.null)
        self.put(torch.where(where, entry, self.null), **self.gather(last))
        self.length.sub_(where.long())
