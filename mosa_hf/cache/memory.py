"""The memory of a sparse store: entries, a packed range of them for each row and group."""

from typing import Any

import torch

from ..kernels.tensors import NEVER, PackedKeyValues

Rows = dict[str, torch.Tensor]  # what some entries hold, by name
SLACK = 64  # one free entry for so many that a range holds: little memory against a copy of all for each new entry


class EntryMemory:
    """
    One range of consecutive entries for each row and group, all in one flat memory, which grows when a range is full.
    Its last entry is the *null entry*, which is in no range: what is written there counts for nothing.

    Args:
        key, value: `[B, ., ., d]`, what entries are like.
        num_groups: G.
        has_position, has_score: whether entries have these.
    """

    is_fixed = False
    stride: int | None = None  # see `PackedKeyValues`
    limit = NEVER  # at most so many selected entries has a range
    # Bounds that are known without asking the device.
    free = 0  # at least so many more entries fit into every range
    max_length = 0  # at most so many entries has a range

    def __init__(self, key: torch.Tensor, value: torch.Tensor, num_groups: int, has_position: bool, has_score: bool):
        self.length = torch.zeros(len(key), num_groups, dtype=torch.int64, device=key.device)  # [B, G] of each range
        self.num_selected = torch.zeros_like(self.length)  # [B, G] int64, selected entries, only with a budget
        self.num_evicted = torch.zeros_like(self.length)  # [B, G] int64, by the budget
        # What is held of every entry, [N + 1, ...] by name. Position and score count for selected ones only.
        self.states = {"key": key.new_zeros(0, key.shape[-1]), "value": value.new_zeros(0, value.shape[-1])}
        if has_position:
            self.states["position"] = self.length.new_zeros(0, dtype=torch.int32)
        self.states["selected"] = self.length.new_zeros(0, dtype=torch.bool)
        if has_score:  # of bfloat16's precision; in the model's dtype, because exporters turn a cache into that
            self.states["score"] = key.new_zeros(0, dtype=torch.promote_types(key.dtype, torch.bfloat16))
        self._allocate(self.length)

    def __getstate__(self) -> dict[str, Any]:
        # Views of the memory would be pickled as memory of their own, into which nobody writes.
        return self.__dict__ | {"last_read": None}

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        counts = [self.start, self.capacity, self.length, self.num_selected, self.num_evicted]
        return [*self.states.values(), *counts]

    # Where ranges lie, and how they grow

    def _allocate(self, length: torch.Tensor) -> None:
        """Empty memory for ranges of `length` [B, G] entries."""
        self.start, self.capacity, self.null = self._places(length)  # [B, G], [B, G], and the null entry
        self.states = {name: own.new_zeros(self.null + 1, *own.shape[1:]) for name, own in self.states.items()}
        self.free = 0
        self.last_read: PackedKeyValues | None = None  # on a CPU, until a range gets longer, or moves

    def _places(self, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """First entries and capacities `[B, G]` for ranges of `length` [B, G] entries; and how many entries in all."""
        capacity = length + length // SLACK + 1
        return capacity.flatten().cumsum(0).view_as(length) - capacity, capacity, int(capacity.sum())

    def may_change(self, states: torch.Tensor) -> bool:
        """Whether `states`, of what is held, may be written to."""
        return may_change(states)

    def replaced(self, counts: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`new`, which may be written to `counts`."""
        return new

    def set_length(self, length: torch.Tensor) -> None:
        """Ranges have `length` [B, G] entries now."""
        self.length, self.last_read = length, None
        if length.numel():
            self.max_length = int(length.max())
            self.free = int((self.capacity - length).min())

    def lengthen(self, new: torch.Tensor | int) -> None:
        """`new` [B, G] entries more, one of each range at most."""
        self.length.add_(new)
        self.free, self.max_length, self.last_read = self.free - 1, self.max_length + 1, None

    def reserve_one(self) -> None:
        """Make room for one more entry in every range."""
        if self.free > 0:
            return
        length = self.length + 1
        free = int((self.capacity - length).min())
        if free < 0:
            self._move(length)
            free = int((self.capacity - length).min())
        self.free, self.max_length = free + 1, int(self.length.max())

    def reserve(self, num_more: int) -> None:
        """Move the ranges to memory of their own, with room for `num_more` entries in each."""
        self._lay_out(*self.slots(), self.length + num_more)
        self.length, self.max_length = self.length.clone(), self.max_length + num_more

    def repack(self, entries: torch.Tensor, stays: torch.Tensor) -> None:
        """Hold those of `entries` [B, G, S] that stay, in their order, in new memory."""
        length = stays.sum(-1)
        self._lay_out(entries, stays, length)
        self.set_length(length)
        if "score" in self.states:
            entries, filled = self.slots()
            self.num_selected = (self.states["selected"][entries] & filled).sum(-1)

    def _lay_out(self, entries: torch.Tensor, stays: torch.Tensor, length: torch.Tensor) -> None:
        """Those of `entries` [B, G, S] that stay, in new memory for ranges of `length` [B, G] entries, or fewer."""
        old = self.states
        self._allocate(length)
        target, source = (self.start[..., None] + stays.cumsum(-1) - 1)[stays], entries[stays]
        for name, own in self.states.items():
            own.index_copy_(0, target, old[name].index_select(0, source))

    def _move(self, length: torch.Tensor) -> None:
        """The ranges as they are, in new memory for `length` [B, G] entries."""
        if length.device.type != "cpu":
            self._lay_out(*self.slots(), length)
            return
        old, old_start = self.states, self.start
        self._allocate(length)
        ranges = [x.flatten().tolist() for x in (old_start, self.start, self.length)]
        for source, target, num in zip(*ranges, strict=True):  # in a third of the time that indices take
            for name, own in self.states.items():
                own[target : target + num] = old[name][source : source + num]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        entries, filled = self.slots()
        counts = self.length, self.num_selected, self.num_evicted
        self.length, self.num_selected, self.num_evicted = (each[rows] for each in counts)
        self.repack(entries[rows], filled[rows])

    # What ranges hold

    def packed(self, max_length: int, offset: int = 0, num_before: torch.Tensor | None = None) -> PackedKeyValues:
        """The entries behind the first `offset` of each range, of which it has `num_before` [B, 1] so far."""
        start, length = self.start, self.length
        if num_before is not None:
            start, length = start + offset, length - num_before
        if not torch.compiler.is_compiling() and length.device.type == "cpu":
            max_length = int(length.max()) if length.numel() else 0
        key, value = self.states["key"], self.states["value"]
        return PackedKeyValues(key, value, start, length, max_length, self.stride, offset)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ranges, padded: entries `[B, G, S]` int64 and which of them are filled."""
        return self.packed(self.max_length).slots()

    def behind(self, offset: int, num_before: torch.Tensor) -> PackedKeyValues | None:
        """`packed`; None if there are none, as far as that is known without asking the device."""
        packed = self.packed(min(self.max_length - offset, self.limit), offset, num_before)
        return packed if packed.max_length > 0 else None

    def read(self) -> PackedKeyValues:
        """All entries, for a single token a row. Asks no device."""
        if self.last_read is not None:
            return self.last_read
        key, value = self.states["key"], self.states["value"]
        packed = PackedKeyValues(key, value, self.start, self.length, self.max_length, self.stride)
        if torch.compiler.is_compiling() or self.length.device.type != "cpu":
            return packed
        self.last_read = packed._replace(parts=packed.split())
        return self.last_read

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
        self.last_read = None

    def deselect(self, entries: torch.Tensor) -> None:
        self.states["selected"] = self.states["selected"].index_fill(0, entries, False)

    def write(self, target: torch.Tensor, writes: torch.Tensor, rows: Rows) -> None:
        """Write the slots of `rows` [B, G, S, ...], by name, to the entries `target` [B, G, S], where `writes`."""
        is_compiling = torch.compiler.is_compiling()  # no shape may depend on data then
        index = torch.where(writes, target, self.null) if is_compiling else target[writes]
        for name, own in self.states.items():
            new = (rows[name] if is_compiling else rows[name][writes]).to(own.dtype)
            if self.may_change(own):
                own.index_put_((index,), new.detach())
            else:
                self.states[name] = own.index_put((index,), new)

    def keep(
        self, kept: PackedKeyValues | None, stays: torch.Tensor | None, offset: int, length: torch.Tensor
    ) -> None:
        """
        Hold the entries `kept` where `stays` [B, G, S] (None: all), behind the first `offset` of each range, in memory
        for ranges of `length` [B, G] entries. The first ones are left to the caller.
        """
        old = self.states
        if not self.is_fixed:
            self._allocate(length)
        if kept is None:
            return
        entries, filled = kept.slots()
        filled = filled if stays is None else filled & stays
        target = torch.where(filled, self.start[..., None] + offset + filled.cumsum(-1) - 1, self.null)
        for name, own in list(self.states.items()):
            rows = old[name].index_select(0, entries.flatten()).unflatten(0, entries.shape)
            own.index_put_((target,), rows)


def may_change(states: torch.Tensor) -> bool:
    """Whether a cache may write into its tensors: not if autograd may have saved them, or inference mode made them."""
    if torch.is_grad_enabled() or states.requires_grad:
        return False
    return torch.is_inference_mode_enabled() or not states.is_inference()
