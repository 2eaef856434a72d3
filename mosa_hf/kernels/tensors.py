"""The tensors that MoSA kernels exchange. Kernels know tensors only, never configs or modules.

Letters used throughout: B rows of the batch, T tokens of this call, S tokens read from a cache, D hidden size,
d head size, G groups (one router, key head and value head each), R query heads a group, K slots for selected tokens.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from .capture import is_captured
from .entry_codes import Rows, decode

NEVER = torch.iinfo(torch.int64).max  # an `evicted_at` that no position reaches
TRITON_HEAD_DIM = 256  # up to which blocks of keys and values fit into a GPU's shared memory


def check_head_dim(head_dim: int) -> None:
    """Raise a ValueError for heads that Triton's kernels do not take."""
    if head_dim > TRITON_HEAD_DIM:
        raise ValueError(f"`head_dim` {head_dim} is more than {TRITON_HEAD_DIM}: choose `use_backend('torch')`.")


class HeadWeights(NamedTuple):
    """Projections of one layer's MoSA heads, group by group."""

    query: torch.Tensor  # [G, R * d, D]
    key: torch.Tensor  # [G, d, D]
    value: torch.Tensor  # [G, d, D]
    output: torch.Tensor  # [G, D, R * d]
    query_bias: torch.Tensor | None = None  # [G, R * d]
    key_bias: torch.Tensor | None = None  # [G, d]
    value_bias: torch.Tensor | None = None  # [G, d]
    # If given, `Tokens.gate` is sigmoid(x · router + router_bias), and a kernel may pass its gradient on to these and
    # to the selected tokens instead of to `gate`, which costs as much as the logits of all tokens.
    router: torch.Tensor | None = None  # [G, D]
    router_bias: torch.Tensor | None = None  # [G]


class Tokens(NamedTuple):
    """The tokens of one call of the paper's heads: where they stand and what the routers said of them.

    A token's `position` counts the real (not padding) tokens before it in its row, cached ones included, so it does
    not depend on padding. Rotary angles are separate: they come with `cos` and `sin`.
    """

    position: torch.Tensor  # [B, T] int64
    valid: torch.Tensor | None  # [B, T] bool, False on padding; None: no padding. Padding is on the left only.
    segment: torch.Tensor | None  # [B, T] int64, which packed sequence a token belongs to; None: one sequence a row
    cos: torch.Tensor  # [B, T, rotary_dim], rotary_dim <= d
    sin: torch.Tensor  # [B, T, rotary_dim]
    selected: torch.Tensor  # [B, T, G] bool, False on padding
    gate: torch.Tensor  # [B, T, G], factor on a selected token's output: sigmoid(z) in the paper
    score: torch.Tensor | None = None  # [B, T, G], what a cache budget compares: logits, inf if never to be evicted
    evicted_at: torch.Tensor | None = None  # [B, T, G] int64, see `KeyValues`
    num_selected: int | None = None  # of the row and group that has most; None: ask the device


class KeyValues(NamedTuple):
    """Keys (rotated) and values of some tokens, each group with its own tokens, in ascending position."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    position: torch.Tensor  # [B, G, S] int64
    valid: torch.Tensor | None  # [B, G, S] bool, False on empty slots; None: every slot is filled
    selected: torch.Tensor | None  # [B, G, S] bool; None: every filled slot holds a selected token
    # [B, G, S] int64: the first position whose query no longer reads this selected token, because a cache budget has
    # evicted it (its window still reads it); None: no budget
    evicted_at: torch.Tensor | None = None
    score: torch.Tensor | None = None  # [B, G, S], see `Tokens`; None: no budget
    # Selected tokens of these that are out of the last one's window, of the group that has most. None: ask the device
    num_far: int | None = None
    far_up_to: torch.Tensor | None = None  # [B, G, F] int64, the F tokens out of it: how many are selected up to each


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
        """
        The entries, with empty slots behind each range and position -1 for want of a position; None if there are
        no slots.
        """
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


def plain(key: torch.Tensor, value: torch.Tensor, *scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value `[..., d]` as attention reads them: decoded, if there are `scales` [...] of both."""
    return (decode(key, scales[0]), decode(value, scales[1])) if scales else (key, value)


# Takes in the selected tokens of a call of one token a row, and says what those read, themselves included.
Remember = Callable[[KeyValues], PackedKeyValues]


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


def join(*parts: KeyValues | None) -> KeyValues:
    """All of these keys in one, masks spelled out; `evicted_at` where any has it, and scores where all have them."""
    given = [part for part in parts if part is not None]
    true = [torch.ones_like(part.position, dtype=torch.bool) for part in given]
    scores = [part.score for part in given if part.score is not None]
    evicted_at = None
    if any(part.evicted_at is not None for part in given):
        never = [torch.full_like(part.position, NEVER) for part in given]
        evicted_at = _cat([part.evicted_at for part in given], never)
    return KeyValues(
        torch.cat([part.key for part in given], dim=2),
        torch.cat([part.value for part in given], dim=2),
        torch.cat([part.position for part in given], dim=2),
        _cat([part.valid for part in given], true),
        _cat([part.selected for part in given], true),
        evicted_at,
        torch.cat(scores, dim=2) if len(scores) == len(given) else None,
    )


def _cat(states: list[torch.Tensor | None], missing: list[torch.Tensor]) -> torch.Tensor:
    """`states` [B, G, S] in one, those that are None replaced."""
    return torch.cat([x if x is not None else other for x, other in zip(states, missing, strict=True)], dim=2)


def gather_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [B, G, S, ...] at slots `index` [B, G, K], or [B, 1, K] where it is the same for all groups."""
    channels = states.shape[3:]
    index = index.expand(-1, states.shape[1], -1)
    return states.gather(2, index.view(index.shape + (1,) * len(channels)).expand(index.shape + channels))


def of_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [B, T] or [B, T, G] of the tokens in slots `index` [B, G, K]: `[B, G, K]`."""
    states = states[:, None].expand(-1, index.shape[1], -1) if states.ndim == 2 else states.transpose(1, 2)
    return states.gather(2, index)


def of_step(key: torch.Tensor, value: torch.Tensor, filled: torch.Tensor, tokens: Tokens) -> KeyValues:
    """Key and value `[B, G, 1, d]` of one token a row, with what is said of it; `filled` where it is selected."""
    score = None if tokens.score is None else tokens.score.transpose(1, 2)
    return KeyValues(key, value, tokens.position[:, None].expand_as(filled), filled, None, None, score)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels of `states` [..., d]; the others pass through."""
    rotary_dim = cos.shape[-1]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated


def take(states: torch.Tensor, indices: tuple[int, ...], dim: int) -> torch.Tensor:
    """`states` at the ascending `indices` of one axis; a view where those are evenly spaced."""
    if len(indices) == states.shape[dim]:
        return states
    first, last = (indices[0], indices[-1]) if indices else (0, -1)
    step = max(1, (last - first) // max(1, len(indices) - 1))
    if indices == tuple(range(first, last + 1, step)):
        return states[(slice(None),) * dim + (slice(first, last + 1, step),)]
    return states.index_select(dim, constant(indices, states.device))


def constant(values: tuple[int | bool, ...], device: torch.device) -> torch.Tensor:
    """`values` on a device, which a GPU is given once: it would wait for every copy of them."""
    return torch.tensor(values, device=device) if device.type == "cpu" or is_captured() else _held(values, device)


@cache
def _held(values: tuple[int | bool, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd may save it
        return torch.tensor(values, device=device)
