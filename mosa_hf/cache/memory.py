"""The memory of a sparse store: entries, a packed range of them for each row and group."""

from typing import Any

import torch

from ..kernels.entry_codes import encoded
from ..kernels.tensors import NEVER, Entries, PackedKeyValues, Rows

SLACK = 64  # one free entry for so many that a range holds: little memory against a copy of all for each new entry


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

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        num_groups: int,
        has_position: bool,
        has_score: bool,
        is_coded: bool = False,
    ):
        self.length = torch.zeros(len(key), num_groups, dtype=torch.int64, device=key.device)
        self.num_selected, self.num_evicted = torch.zeros_like(self.length), torch.zeros_like(self.length)
        self.states = {"key": key.new_zeros(0, key.shape[-1]), "value": value.new_zeros(0, value.shape[-1])}
        if is_coded:
            self.states = encoded(self.states)
        if has_position:
            self.states["position"] = self.length.new_zeros(0, dtype=torch.int32)
        self.states["selected"] = self.length.new_zeros(0, dtype=torch.bool)
        if has_score:  # of bfloat16's precision; in the model's dtype, because exporters turn a cache into that
            self.states["score"] = key.new_zeros(0, dtype=torch.promote_types(key.dtype, torch.bfloat16))
        self._allocate(self.length, self.length.numel() * _slack(key.device))

    def __getstate__(self) -> dict[str, Any]:
        # Views of the memory would be pickled as memory of their own, into which nobody writes.
        return self.__dict__ | {"last_read": None}

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        counts = [self.start, self.capacity, self.length, self.num_selected, self.num_evicted]
        return [*self.states.values(), *counts]

    # Where ranges lie, and how they grow

    def _allocate(self, length: torch.Tensor, num_entries: int | None = None) -> None:
        """Empty memory for ranges of `length` [B, G] entries; `num_entries` in all, if that is known."""
        # [B, G], [B, G], and the null entry
        self.start, self.capacity, self.null = self._places(length, num_entries)
        self.states = {name: own.new_zeros(self.null + 1, *own.shape[1:]) for name, own in self.states.items()}
        self.free = 0
        # What `read` returned on a CPU, until a range gets longer, or moves.
        self.last_read: PackedKeyValues | None = None

    def _places(self, length: torch.Tensor, num_entries: int | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        """First entries and capacities `[B, G]` for ranges of `length` [B, G] entries; and how many entries in all."""
        capacity = _capacity(length)
        num_entries = int(capacity.sum()) if num_entries is None else num_entries
        return capacity.flatten().cumsum(0).view_as(length) - capacity, capacity, num_entries

    def _ask(self, length: torch.Tensor) -> tuple[int, int, int | None]:
        """
        Of ranges of `length` [B, G] entries: how many more fit into every one, how long the longest is, and how many
        entries new memory for them has. A GPU is asked once.
        """
        if not length.numel():
            return 1, 0, 0
        # Of other rows than there were, it is not asked how many fit.
        room = self.capacity - length if self.capacity.shape == length.shape else length
        if length.device.type == "cpu":
            return int(room.min()), int(length.max()), None
        free, longest, num_entries = torch.stack((room.min(), length.max(), _capacity(length).sum())).tolist()
        return free, longest, num_entries

    def may_change(self, states: torch.Tensor) -> bool:
        """Whether `states`, of what is held, may be written to."""
        return may_change(states)

    def may_change_all(self) -> bool:
        return all(map(self.may_change, self.states.values()))

    def replaced(self, counts: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`new`, which may be written to `counts`."""
        return new

    def make_room(
        self, kept: PackedKeyValues | None, stays: torch.Tensor | None, offset: int, length: torch.Tensor
    ) -> None:
        """
        Ranges get `length` [B, G] entries. Behind the first `offset` of each, those of `kept` that `stays` [B, G, S]
        names (None: all) are held; the others are left to the caller.
        """
        free, longest, num_entries = self._ask(length)
        if free < 0 or stays is not None or not self.may_change_all():
            self._keep(kept, stays, offset, length, num_entries)
            free = self._least_free(length)
        self.length, self.max_length, self.free, self.last_read = length, longest, free, None

    def _set_length(self, length: torch.Tensor, longest: int) -> None:
        """New ranges have `length` [B, G] entries, the longest one so many."""
        self.length, self.max_length, self.free, self.last_read = length, longest, self._least_free(length), None

    def _least_free(self, length: torch.Tensor) -> int:
        """At least so many more entries than `length` [B, G] fit into ranges that have just been made for those."""
        return int((self.capacity - length).min()) if length.device.type == "cpu" and length.numel() else GPU_SLACK

    def lengthen(self, new: torch.Tensor | int | None) -> None:
        super().lengthen(new)
        self.free, self.max_length, self.last_read = self.free - 1, self.max_length + 1, None

    def reserve_one(self) -> None:
        """Make room for one more entry in every range."""
        if self.free > 0:
            return
        longer = self.length + 1
        free, longest, num_entries = self._ask(longer)
        if free < (0 if longer.device.type == "cpu" else MIN_FREE):
            self._move(longer, num_entries)
            free = self._least_free(longer)
        self.free, self.max_length = free + 1, longest - 1

    def reserve(self, num_more: int) -> None:
        """Move the ranges to memory of their own, with room for `num_more` entries in each."""
        self._lay_out(*self.slots(), self.length + num_more)
        self.length, self.max_length = self.length.clone(), self.max_length + num_more

    def repack(self, entries: torch.Tensor, stays: torch.Tensor) -> None:
        """Hold those of `entries` [B, G, S] that stay, in their order, in new memory."""
        length = stays.sum(-1)
        _, longest, num_entries = self._ask(length)
        self._lay_out(entries, stays, length, num_entries)
        self._set_length(length, longest)
        if "score" in self.states:
            entries, filled = self.slots()
            self.num_selected = (self.states["selected"][entries] & filled).sum(-1)

    def _lay_out(
        self, entries: torch.Tensor, stays: torch.Tensor, length: torch.Tensor, num_entries: int | None = None
    ) -> None:
        """Those of `entries` [B, G, S] that stay, in new memory for ranges of `length` [B, G] entries, or fewer."""
        old = self.states
        self._allocate(length, num_entries)
        target = self.start[..., None] + stays.cumsum(-1) - 1
        if stays.device.type == "cpu":
            target, source = target[stays], entries[stays]
        else:  # which would have to count them
            target, source = torch.where(stays, target, self.null).flatten(), entries.flatten()
        for name, own in self.states.items():
            own.index_copy_(0, target, old[name].index_select(0, source))

    def _move(self, length: torch.Tensor, num_entries: int | None) -> None:
        """The ranges as they are, in new memory for `length` [B, G] entries, `num_entries` in all."""
        if length.device.type != "cpu":
            self._lay_out(*self.slots(), length, num_entries)
            return
        old, old_start = self.states, self.start
        self._allocate(length, num_entries)
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

    def behind(self, offset: int, num_before: torch.Tensor) -> PackedKeyValues | None:
        """`packed`; None if there are none, as far as that is known without asking the device."""
        packed = self.packed(min(self.max_length - offset, self.limit), offset, num_before)
        return packed if packed.max_length > 0 else None

    def read(self) -> PackedKeyValues:
        """All entries, for a single token a row. Asks no device."""
        # Exporters that take a cache apart build views of the memory as memory of their own.
        if self.last_read is not None and self.last_read.key is self.states["key"]:
            return self.last_read
        packed = self._packed(self.start, self.length, self.max_length)
        if torch.compiler.is_compiling() or self.length.device.type != "cpu":
            return packed
        self.last_read = packed._replace(parts=packed.split())
        return self.last_read

    def remove(self, entry: torch.Tensor, where: torch.Tensor) -> None:
        super().remove(entry, where)
        self.last_read = None

    def deselect(self, entries: torch.Tensor) -> None:
        self.states["selected"] = self.states["selected"].index_fill(0, entries, False)

    def write(self, target: torch.Tensor, writes: torch.Tensor, rows: Rows) -> None:
        """Write the slots of `rows` [B, G, S, ...], by name, to the entries `target` [B, G, S], where `writes`."""
        # No shape may depend on data in a graph, and a GPU would be waited for.
        is_whole = torch.compiler.is_compiling() or target.device.type != "cpu"
        index = torch.where(writes, target, self.null) if is_whole else target[writes]
        rows = {name: rows[name] if is_whole else rows[name][writes] for name in self.states if name in rows}
        if "key_scale" in self.states:
            rows = encoded(rows)
        for name, own in self.states.items():
            new = rows[name].to(own.dtype)
            if self.may_change(own):
                own.index_put_((index,), new.detach())
            else:
                self.states[name] = own.index_put((index,), new)

    def _keep(
        self,
        kept: PackedKeyValues | None,
        stays: torch.Tensor | None,
        offset: int,
        length: torch.Tensor,
        num_entries: int | None = None,
    ) -> None:
        """Of `make_room`: hold what is kept, in memory for ranges of `length` [B, G] entries."""
        old = self.states
        if not self.is_fixed:
            self._allocate(length, num_entries)
        if kept is None:
            return
        entries, filled = kept.slots()
        filled = filled if stays is None else filled & stays
        target = torch.where(filled, self.start[..., None] + offset + filled.cumsum(-1) - 1, self.null)
        for name, own in list(self.states.items()):
            rows = old[name].index_select(0, entries.flatten()).unflatten(0, entries.shape)
            own.index_put_((target,), rows)


def _capacity(length: torch.Tensor) -> torch.Tensor:
    """Entries `[B, G]` that new ranges have for `length` [B, G]."""
    return length + length // SLACK + _slack(length.device)


def _slack(device: torch.device) -> int:
    return 1 if device.type == "cpu" else GPU_SLACK


def may_change(states: torch.Tensor) -> bool:
    """Whether a cache may write into its tensors: not if autograd may have saved them, or inference mode made them."""
    if torch.is_grad_enabled() or states.requires_grad:
        return False
    return torch.is_inference_mode_enabled() or not states.is_inference()
