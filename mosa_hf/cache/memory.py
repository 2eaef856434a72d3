"""The memory of a sparse store: entries, a packed range of them for each row and group."""

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.capture import is_captured
from ..kernels.entries import Entries, PackedKeyValues
from ..kernels.entry_codes import Rows, encoded
from ..kernels.tensors import NEVER

SLACK = 64  # one free entry for so many that a range holds: little memory against a copy of all for each new entry
AHEAD = 16  # entries that a range may have free for tokens which are sure to come
# A GPU that had to be asked how full ranges are would be waited for: it is asked every so many tokens.
GPU_SLACK, MIN_FREE = 40, 24


class EntryMemory(Entries):
    """
    Entries in memory that grows when a range is full.

    Args:
        key, value: `[B, ., ., d]`, what entries are like.
        num_groups: G.
        has_position, has_score: whether entries have these.
        is_coded: whether keys and values are stored as codes.
    """

    is_fixed = False
    stride: int | None = None  # see `PackedKeyValues`
    limit = NEVER  # at most so many selected entries has a range
    # Bounds that are known without asking the device: `max_length`, and
    free = 0  # at least so many more entries fit into every range
    max_length = 0
    is_full: bool  # every range has `max_length` entries

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        num_groups: int,
        has_position: bool,
        has_score: bool,
        is_coded: bool = False,
    ):
        self.is_full = False
        self.length = torch.zeros(len(key), num_groups, dtype=torch.int64, device=key.device)
        self.num_selected, self.num_evicted = (
            torch.zeros_like(self.length) if has_score else self.length.new_empty(0) for _ in range(2)
        )
        self.states = {"key": key.new_empty(1, key.shape[-1]), "value": value.new_empty(1, value.shape[-1])}
        if is_coded:
            self.states = encoded(self.states)
        if has_position:
            self.states["position"] = self.length.new_empty(1, dtype=torch.int32)
        self.states["selected"] = self.length.new_empty(1, dtype=torch.bool)
        if has_score:  # of bfloat16's precision; in the model's dtype, because exporters turn a cache into that
            self.states["score"] = key.new_empty(1, dtype=torch.promote_types(key.dtype, torch.bfloat16))
        # None but the null entry yet: how many the first ranges have is asked when there is something for them.
        self.start, self.null, self.capacities = self.length, 0, [0] * self.length.numel()
        self.last_read: PackedKeyValues | None = None  # what `read` returned on a CPU, while that is true

    def __getstate__(self) -> dict[str, Any]:
        # Views of the memory would be pickled as memory of their own, into which nobody writes.
        return self.__dict__ | {"last_read": None}

    @property
    def capacity(self) -> torch.Tensor:
        """`[B, G]` int64, for how many entries a range has room."""
        return torch.tensor(self.capacities, device=self.length.device).view_as(self.length)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        counts = [self.start, self.length, self.num_selected, self.num_evicted]
        return [*self.states.values(), *counts]

    # Where ranges lie, and how they grow

    def _allocate(self, start: torch.Tensor, capacities: list[int]) -> None:
        """Empty memory for ranges from `start` [B, G] on, which lie side by side and have these `capacities`."""
        self.start, self.capacities, self.null = start, capacities, sum(capacities)
        self.stride = capacities[0] if len(set(capacities)) == 1 else None
        self.states = {name: own.new_zeros(self.null + 1, *own.shape[1:]) for name, own in self.states.items()}
        self.last_read = None

    def _places(self, length: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        """First entries `[B, G]` and capacities for ranges of `length` [B, G], which the host knows as `lengths`."""
        most, is_cpu = max(lengths, default=0), length.device.type == "cpu"
        slack = most // SLACK + (1 if is_cpu else GPU_SLACK)
        if len(set(lengths)) == 1:
            return evenly_spaced(length, most + slack), [most + slack] * len(lengths)
        if is_cpu:
            return _side_by_side(length + length // SLACK + 1), [each + each // SLACK + 1 for each in lengths]
        return _side_by_side(length + slack), [each + slack for each in lengths]  # fewer operations than one for each

    def _ask(self, length: torch.Tensor) -> list[int]:
        """`length` [B, G] as the host knows it, which a GPU is asked for."""
        return length.flatten().tolist()

    def _least_free(self, lengths: list[int]) -> int:
        """How many more entries than `lengths` fit into every range."""
        return min((x - y for x, y in zip(self.capacities, lengths, strict=True)), default=1)

    def may_change(self, *held: torch.Tensor) -> bool:
        """Whether all of these, of what is held, may be written to."""
        return may_change(*held)

    def replaced(self, counts: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`new`, which may be written to `counts`."""
        return new

    def make_room(
        self,
        kept: PackedKeyValues | None,
        stays: torch.Tensor | None,
        offset: int,
        length: torch.Tensor,
        lengths: list[int] | None = None,
    ) -> None:
        """
        Ranges get `length` [B, G] entries, which the host may know as `lengths`. Behind the first `offset` of each,
        those of `kept` that `stays` [B, G, S] names (None: all) are held; the others are left to the caller.
        """
        lengths = self._ask(length) if lengths is None else lengths
        lacks_room = self.null == 0 or self._least_free(lengths) < 0  # the null entry may be read, even of no tokens
        old = self.states
        if lacks_room or stays is not None or not self.may_change(*old.values()):
            if not self.is_fixed:
                self._allocate(*self._places(length, lengths))
            if kept is not None:
                entries, filled = kept.slots()
                filled = filled if stays is None else filled & stays
                target = torch.where(filled, self.start[..., None] + offset + filled.cumsum(-1) - 1, self.null)
                for name, own in self.states.items():
                    rows = old[name].index_select(0, entries.flatten()).unflatten(0, entries.shape)
                    own.index_put_((target,), rows)
        self._set_length(length, lengths)

    def _set_length(self, length: torch.Tensor, lengths: list[int]) -> None:
        """Ranges have `length` [B, G] entries, which the host knows as `lengths`."""
        self.length, self.max_length, self.last_read = length, max(lengths, default=0), None
        self.is_full = len(set(lengths)) == 1
        self.free = self._least_free(lengths)

    def lengthen(self, new: torch.Tensor | int | None) -> None:
        super().lengthen(new)
        self.is_full = self.is_full and isinstance(new, int)
        self.free, self.max_length, self.last_read = self.free - 1, self.max_length + 1, None

    def reserve_one(self, num_certain: int = 1) -> None:
        """Make room for one more entry in every range; so many they will need whatever is selected."""
        if self.free > 0:
            return
        lengths = self._ask(self.length)
        if self._least_free(lengths) <= (0 if self.length.device.type == "cpu" else MIN_FREE):
            self._move(lengths, max(min(num_certain, AHEAD), 1))
        self._set_length(self.length, lengths)

    def reserve(self, num_more: int) -> None:
        """Move the ranges to memory of their own, with room for `num_more` entries in each."""
        longer = self.length + num_more
        self._lay_out(*self.slots(), *self._places(longer, self._ask(longer)))
        self.length, self.max_length, self.is_full = self.length.clone(), self.max_length + num_more, False

    def repack(self, entries: torch.Tensor, stays: torch.Tensor) -> None:
        """Hold those of `entries` [B, G, S] that stay, in their order, in new memory."""
        length = stays.sum(-1)
        lengths = self._ask(length)
        self._lay_out(entries, stays, *self._places(length, lengths))
        self._set_length(length, lengths)
        if "score" in self.states:
            entries, filled = self.slots()
            self.num_selected = (self.states["selected"][entries] & filled).sum(-1)

    def _lay_out(self, entries: torch.Tensor, stays: torch.Tensor, start: torch.Tensor, capacities: list[int]) -> None:
        """Those of `entries` [B, G, S] that stay, in new memory, see `_allocate`."""
        old = self.states
        self._allocate(start, capacities)
        target = self.start[..., None] + stays.cumsum(-1) - 1
        if stays.device.type == "cpu":
            target, source = target[stays], entries[stays]
        else:  # which would have to count them
            target, source = torch.where(stays, target, self.null).flatten(), entries.flatten()
        for name, own in self.states.items():
            own.index_copy_(0, target, old[name].index_select(0, source))

    def _move(self, lengths: list[int], num_more: int) -> None:
        """The ranges as they are, of `lengths`, in new memory with room for so many more."""
        places = self._places(self.length + num_more, [each + num_more for each in lengths])
        if self.length.device.type != "cpu":
            self._lay_out(*self.slots(), *places)
            return
        old, old_stride, old_start = self.states, self.stride, self.start
        self._allocate(*places)
        if old_stride is not None and self.stride is not None:
            for name, own in self.states.items():
                source, target = (_first_of_each(x, len(lengths), max(lengths)) for x in (old[name], own))
                target.copy_(source)
            return
        for source, target, num in zip(
            old_start.flatten().tolist(), self.start.flatten().tolist(), lengths, strict=True
        ):
            for name, own in self.states.items():  # in a third of the time that indices take
                own[target : target + num] = old[name][source : source + num]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was. Asks no GPU."""
        num_rows, num_groups = self.length.shape
        of_rows = [self.capacities[i : i + num_groups] for i in range(0, len(self.capacities), num_groups or 1)]
        most = [max(each) for each in zip(*of_rows, strict=True)]
        is_even, is_cpu = all(each == most for each in of_rows), rows.device.type == "cpu"
        if not is_even and not is_cpu:
            end = F.pad(self.start.flatten()[1:], (0, 1), value=self.null).view_as(self.start)
            capacity = (end - self.start).amax(0).expand_as(self.start)
            self._lay_out(*self.slots(), _side_by_side(capacity), most * num_rows)
        entries, filled = self.slots() if is_cpu and not is_even else (None, None)
        self.length = self.length[rows]
        if "score" in self.states:
            self.num_selected, self.num_evicted = self.num_selected[rows], self.num_evicted[rows]
        if entries is not None and filled is not None:
            self.repack(entries[rows], filled[rows])
            return
        # Rows lie as each other do: they are taken whole.
        size = sum(most)
        for name, own in self.states.items():
            selected = own[: self.null].unflatten(0, (num_rows, size)).index_select(0, rows)
            self.states[name] = torch.cat((selected.flatten(0, 1), own[self.null :]))
        self.start = self.start[:1] + torch.arange(len(rows), device=rows.device)[:, None] * size
        self.capacities, self.null, self.last_read = most * len(rows), len(rows) * size, None

    # What ranges hold

    def behind(self, offset: int, num_before: torch.Tensor) -> PackedKeyValues | None:
        """`packed`; None if there are none, as far as that is known without asking the device."""
        packed = self.packed(min(self.max_length - offset, self.limit), offset, num_before)
        return packed if packed.max_length > 0 else None

    def read(self) -> PackedKeyValues:
        """All entries, for a single token a row. Asks no device."""
        # Exporters that take a cache apart build views of the memory as memory of their own.
        if self.last_read is not None and self.last_read.key is self.states["key"]:
            return self.last_read
        is_host = self.length.device.type == "cpu" and not torch.compiler.is_compiling()
        is_even = is_host and self.is_full and self.stride is not None
        packed = self._packed(self.start, self.length, self.max_length, is_full=is_even)
        if is_host:
            self.last_read = packed = packed if is_even else packed._replace(parts=packed.split())
        return packed

    def remove(self, entry: torch.Tensor, where: torch.Tensor) -> None:
        super().remove(entry, where)
        self.last_read, self.is_full = None, False

    def deselect(self, entries: torch.Tensor) -> None:
        self.states["selected"] = self.states["selected"].index_fill(0, entries, False)

    def write(self, target: torch.Tensor, rows: Rows, has_null: bool = True) -> None:
        """Write the slots of `rows` [B, G, S, ...], by name, to the entries `target` [B, G, S], null ones maybe."""
        # No shape may depend on data in a graph, and a GPU would be waited for.
        is_whole = not has_null or torch.compiler.is_compiling() or target.device.type != "cpu"
        writes = None if is_whole else target != self.null
        index = target if writes is None else target[writes]
        rows = {name: rows[name] if writes is None else rows[name][writes] for name in self.states if name in rows}
        if "key_scale" in self.states:
            rows = encoded(rows)
        for name, own in self.states.items():
            new = rows[name].to(own.dtype)
            if self.may_change(own):
                own.index_put_((index,), new.detach())
            else:
                self.states[name] = own.index_put((index,), new)

    def may_write_first(self) -> bool:
        """Whether `write_first` may be called: ranges lie evenly, and their memory may be written to."""
        return self.stride is not None and not is_captured() and self.may_change(*self.states.values())

    def write_first(self, rows: Rows) -> None:
        """Write the slots of `rows` [B, G, S, ...], by name, to the first S entries of ranges that lie evenly."""
        rows = {name: rows[name] for name in self.states if name in rows}
        for name, new in (encoded(rows) if "key_scale" in self.states else rows).items():
            first = _first_of_each(self.states[name], len(self.capacities), new.shape[2])
            first.copy_(new.detach().flatten(0, 1))


def evenly_spaced(length: torch.Tensor, stride: int) -> torch.Tensor:
    """First entries `[B, G]` of ranges like those of `length` that have room for `stride` entries each."""
    return torch.arange(0, length.numel() * stride, stride, device=length.device).view_as(length)


def _first_of_each(states: torch.Tensor, num_ranges: int, length: int) -> torch.Tensor:
    """Of what is held, the first entries `[num_ranges, length, ...]` of ranges that lie evenly, as a view."""
    return states[:-1].unflatten(0, (num_ranges, -1))[:, :length]  # without the null entry


def _side_by_side(capacity: torch.Tensor) -> torch.Tensor:
    """First entries `[B, G]` of ranges that have room for `capacity` [B, G] entries."""
    return capacity.flatten().cumsum(0).view_as(capacity) - capacity


def may_change(*held: torch.Tensor) -> bool:
    """Whether a cache may write into its tensors: not if autograd may have saved them, or inference mode made them."""
    if torch.is_grad_enabled() or [states for states in held if states.requires_grad]:
        return False
    return torch.is_inference_mode_enabled() or not [states for states in held if states.is_inference()]
