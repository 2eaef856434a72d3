"""The sparse KV cache (DESIGN section 4): what MoSA heads keep, beside the dense heads' ordinary cache layer.

A layer of whatever dynamic cache the user brings is upgraded in place to hold both. Memory is really not held: tokens
that no group selected, and that have left the window, are in no tensor.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import BaseQuantizedLayer, Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from .kernels.layout import NEVER, FixedKeyValues, KeyValues, RaggedKeyValues, Tokens, gather_slots, join
from .routing import evicted_at, within_budget

RECENT = ("recent_key", "recent_value", "recent_selected", "recent_score")
# One free entry for so many held: a little memory against a copy of all entries for each new one.
ROOM = 32
DENSE_ROOM = 64
RECENT_ROOM = 8


class SelectedKeyValues:
    """
    Keys and values of the selected tokens of every row and group: a run of entries for each, in ascending position,
    and a little room behind it, so that most new entries need no copy of the old ones.
    """

    def __init__(self):
        self.key: torch.Tensor | None = None  # [N, d]
        self.value: torch.Tensor | None = None  # [N, d]
        self.position: torch.Tensor | None = None  # [N] int32
        self.score: torch.Tensor | None = None  # [N], only for a cache with a budget
        self.start: torch.Tensor | None = None  # [B, G] int64, first entry of each run
        self.count: torch.Tensor | None = None  # [B, G] int64, entries of each run
        self.capacity: torch.Tensor | None = None  # [B, G] int64, entries that each run has room for

    def append(self, new: KeyValues, groups: torch.Tensor | None = None) -> None:
        """Keep the filled slots of `new`; its G axis lists `groups` of this store (all of them by default)."""
        batch_size, num_groups = new.position.shape[:2]
        filled = torch.ones_like(new.position, dtype=torch.bool) if new.valid is None else new.valid
        if self.count is None:
            if groups is not None:
                raise ValueError("the first tokens must come for every group")
            self.key, self.value = (states.new_zeros(0, states.shape[-1]) for states in (new.key, new.value))
            self.position = new.position.new_zeros(0, dtype=torch.int32)
            self.score = None if new.score is None else new.score.new_zeros(0)
            self.start = self.count = self.capacity = new.position.new_zeros(batch_size, num_groups)
        where = filled.nonzero(as_tuple=True)  # row, group of `new`, slot
        if len(where[0]) == 0:
            return
        added = filled.sum(-1)
        count = self.count + added if groups is None else self.count.index_add(1, groups, added)
        if not _may_change(self.key) or bool((count > self.capacity).any()):
            self._lay_out(*self._entries().slots(), count)
        free = self.start + self.count
        free = free if groups is None else free[:, groups]
        entries = (free[..., None] + filled.cumsum(-1) - 1)[where]
        self.key[entries], self.value[entries] = new.key[where], new.value[where]
        self.position[entries] = new.position[where].to(torch.int32)
        if self.score is not None:
            self.score[entries] = new.score[where]
        self.count = count

    def read(self, groups: torch.Tensor | None = None) -> KeyValues | None:
        """The entries of `groups` (all by default) with empty slots at the end of each; None if there are none."""
        entries = self.entries()
        return None if entries is None else entries.pad(groups)

    def entries(self) -> RaggedKeyValues | None:
        """All entries, as they are held, until the next call that changes them; None before the first."""
        return None if self.count is None else self._entries()

    def _entries(self) -> RaggedKeyValues:
        return RaggedKeyValues(self.key, self.value, self.position, self.start, self.count, None, self.score)

    def _lay_out(self, entries: torch.Tensor, filled: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """Hold these entries [B, G, S] where filled [B, G, S], and no others, with room for `count` [B, G] in all."""
        self.count = filled.sum(-1)
        count = self.count if count is None else count
        self.capacity = count + count // ROOM + 1
        self.start = self.capacity.flatten().cumsum(0).view_as(count) - self.capacity
        size = int(self.capacity.sum())
        source = entries[filled]
        target = (self.start[..., None] + filled.cumsum(-1) - 1)[filled]
        for name in ("key", "value", "position", "score"):
            if (states := getattr(self, name)) is not None:
                setattr(self, name, states.new_zeros(size, *states.shape[1:]).index_copy(0, target, states[source]))

    def crop(self, num_tokens: torch.Tensor) -> None:
        """Drop the entries whose position is not below `num_tokens` [B]."""
        if self.count is None:
            return
        entries, filled = self._entries().slots()
        if filled.shape[-1]:
            self.count = (filled & (self.position[entries] < num_tokens[:, None, None])).sum(-1)

    def keep(self, kept: torch.Tensor) -> None:
        """Drop the entries where `kept` [B, G, S] is False, S the padded slots of `read`."""
        entries, filled = self._entries().slots()
        self._lay_out(entries, filled & kept)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.count is None:
            return
        entries, filled = self._entries().slots()
        self._lay_out(entries[rows], filled[rows])

    def tensors(self) -> list[torch.Tensor]:
        states = (self.key, self.value, self.position, self.score, self.start, self.count, self.capacity)
        return [x for x in states if x is not None]


class SparseKeyValues:
    """
    What one layer's MoSA heads remember: the selected tokens and, for form "all", the last `window - 1` tokens, which
    the next token's window covers. Tokens join the selected ones when they leave the window.

    Args:
        window: `mosa_window`; 0 where there is no window (form "selected").
        budget: `mosa_cache_budget`: how many selected tokens a row and group remembers, those in the window included;
            None: all of them.
    """

    def __init__(self, window: int = 0, budget: int | None = None):
        self.window = window
        self.budget = budget
        self.record_past = False  # keep what leaves the window, or the budget, until `crop` says that it is final
        self.reset()

    def reset(self) -> None:
        self.kept = SelectedKeyValues()
        # The recent tokens [B, G, S, ...] are right-aligned: a row's newest token is in the last slot.
        self.recent_key: torch.Tensor | None = None
        self.recent_value: torch.Tensor | None = None
        self.recent_selected: torch.Tensor | None = None
        self.recent_score: torch.Tensor | None = None  # only with a budget
        self.num_tokens: torch.Tensor | None = None  # [B] int64, real tokens seen
        self.num_final: torch.Tensor | None = None  # [B] int64, only with a budget: `crop` can't go back before these
        # Padding of the calls so far, [B, T] bool or None, and their lengths; only of use to `crop`.
        self.masks: list[torch.Tensor | None] = []
        self.lengths: list[int] = []

    def has_tokens(self) -> bool:
        return self.num_tokens is not None

    def advance(self, valid: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
        """Count the tokens of a call [B, T, D]; `valid` [B, T] is False on padding, None without."""
        batch_size, length = hidden_states.shape[:2]
        if self.num_tokens is None:
            self.num_tokens = torch.zeros(batch_size, dtype=torch.int64, device=hidden_states.device)
            self.num_final = torch.zeros_like(self.num_tokens)
        self.num_tokens = self.num_tokens + (length if valid is None else valid.sum(1))
        if valid is None and self.masks and self.masks[-1] is None:
            self.lengths[-1] += length
        else:
            self.masks.append(valid)
            self.lengths.append(length)

    def read_selected(self, tokens: Tokens, groups: torch.Tensor | None) -> tuple[KeyValues | None, Tokens]:
        """
        Form "selected": what `groups` (all by default) remember, and the call's `tokens`, which are of these groups,
        with `until` filled in where there is a budget.
        """
        past = self.kept.read(groups)
        return (past, tokens) if self.budget is None else _with_until(past, tokens, self.budget)

    def append_selected(self, new: KeyValues, groups: torch.Tensor | None) -> None:
        """Form "selected": keep the filled slots of `new`, whose G axis lists `groups` (all by default)."""
        self.kept.append(new, groups)
        if not self.record_past:
            self._evict()

    def update(
        self, key: torch.Tensor, value: torch.Tensor, tokens: Tokens
    ) -> tuple[KeyValues, RaggedKeyValues | None]:
        """
        Form "all": take in a call's tokens, which `advance` has counted.

        Args:
            key, value: `[B, G, T, d]`, padding on the left.
            tokens: of the call.

        Returns:
            (near, kept) as `all_attention` reads them.
        """
        num_new = key.shape[2]
        selected = tokens.selected.transpose(1, 2)  # [B, G, T]
        score = None if self.budget is None else tokens.score.transpose(1, 2)
        kept = self.kept.entries()
        if self.recent_key is not None:
            num_recent = self.recent_key.shape[2]
            room = self.window // RECENT_ROOM
            key, value = _append(self.recent_key, key, room), _append(self.recent_value, value, room)
            selected = torch.cat((self.recent_selected, selected), dim=2)
            score = None if score is None else torch.cat((self.recent_score, score), dim=2)
            if tokens.valid is not None:
                order = _across_padding(tokens.valid, num_recent)
                key, value, selected = (gather_slots(states, order) for states in (key, value, selected))
                score = None if score is None else gather_slots(score, order)
        self.recent_key, self.recent_value, self.recent_selected, self.recent_score = key, value, selected, score
        position = self._recent_positions()
        filled = None if all(mask is None for mask in self.masks) else position >= 0
        near = KeyValues(key, value, position, filled, selected, None, score)
        if self.budget is not None:
            near, kept = self._with_until(near, kept, num_new)
        if not self.record_past:
            self._evict()
            self._leave_window()
        return near, kept

    def _with_until(
        self, near: KeyValues, kept: RaggedKeyValues | None, num_new: int
    ) -> tuple[KeyValues, RaggedKeyValues | None]:
        """Say of each token when the budget evicts it."""
        until = _until(*self._held(), self.budget, num_new)
        if until is None:
            return near, kept
        num_past = until.shape[-1] - near.position.shape[-1]
        if num_past:
            entries, filled = kept.slots()
            flat = torch.full((len(kept.key),), NEVER, dtype=torch.int64, device=until.device)
            kept = kept._replace(until=flat.index_put((entries[filled],), until[..., :num_past][filled]))
        return near._replace(until=until[..., num_past:]), kept

    def _evict(self) -> None:
        """Forget the selected tokens beyond the budget: the lowest scores of kept and recent ones."""
        if self.budget is None or (self.kept.entries() is None and self.recent_key is None):
            return
        score, position, selected = self._held()
        if not bool((selected.sum(-1) > self.budget).any()):
            return
        alive = within_budget(score, position, selected, self.budget)
        evicts = (selected & ~alive).any(-1).any(-1)  # [B]
        self.num_final = torch.where(evicts, self.num_tokens, self.num_final)
        num_recent = 0 if self.recent_key is None else self.recent_key.shape[2]
        num_kept = alive.shape[-1] - num_recent
        if num_kept:
            self.kept.keep(alive[..., :num_kept])
        if num_recent:
            self.recent_selected = self.recent_selected & alive[..., num_kept:]

    def _held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score, position and "is a selected token" [B, G, S] of the kept entries, padded, then of the recent ones."""
        parts = []
        if (kept := self.kept.entries()) is not None:
            entries, filled = kept.slots()
            parts.append((kept.score[entries], kept.position[entries].long(), filled))
        if self.recent_key is not None:
            position = self._recent_positions()
            parts.append((self.recent_score, position, self.recent_selected & (position >= 0)))
        score, position, selected = (torch.cat(states, dim=-1) for states in zip(*parts, strict=True))
        return score, position, selected

    def _recent_positions(self) -> torch.Tensor:
        """`[B, G, S]`: positions of the recent slots, negative on empty ones."""
        length = self.recent_key.shape[2]
        position = self.num_tokens[:, None, None] - length + torch.arange(length, device=self.num_tokens.device)
        return position.expand(self.recent_selected.shape)

    def _leave_window(self) -> None:
        """Move what the next token's window no longer covers from the recent tokens to the kept ones, or forget it."""
        if self.recent_key is None:
            return
        num_left = max(self.recent_key.shape[2] - max(self.window - 1, 0), 0)
        position = self._recent_positions()[:, :, :num_left]
        leaving = self.recent_selected[:, :, :num_left] & (position >= 0)
        left = (states[:, :, :num_left] for states in (self.recent_key, self.recent_value))
        score = None if self.recent_score is None else self.recent_score[:, :, :num_left]
        self.kept.append(KeyValues(*left, position, leaving, None, None, score))
        for name in RECENT:
            if (states := getattr(self, name)) is not None:
                states = states[:, :, num_left:]
                # A view would hold the whole call's keys in memory; of a single token's call, that is only the room.
                largest = states[:, :, :1].numel() * (self.window + self.window // RECENT_ROOM)
                is_small = states.untyped_storage().nbytes() <= largest * states.element_size()
                setattr(self, name, states if is_small else states.clone())

    def crop(self, num_removed: int) -> None:
        """
        Forget the last `num_removed` tokens of the cache, padding among them included.

        Raises:
            RuntimeError: if that needs tokens that have left the window and were not recorded.
        """
        if self.num_tokens is None:
            return
        if num_removed:
            self.check_crop(num_removed)
            num_recent = None if self.recent_key is None else self.recent_key.shape[2]
            removed = self._removed(num_removed)  # [B]
            self._forget_masks(num_removed)
            self.num_tokens = self.num_tokens - removed
            self.kept.crop(self.num_tokens)
            if num_recent is not None:
                # Rows may lose different numbers of real tokens: shift each to the right again.
                num_empty = max(
                    int(removed.min()), num_recent - int(self.num_tokens.max())
                )  # on the left of every row
                source = torch.arange(num_recent, device=removed.device) - removed[:, None]
                source = source[:, None, num_empty:]  # [B, 1, S]
                for name in RECENT:
                    if (states := getattr(self, name)) is not None:
                        setattr(self, name, gather_slots(states, source.clamp(min=0)))
                self.recent_selected = self.recent_selected & (source >= 0)
        if self.record_past:
            self._evict()
            self._leave_window()

    def check_crop(self, num_removed: int) -> None:
        """Raise what `crop` would, changing nothing."""
        if self.num_tokens is None:
            return
        removed = self._removed(num_removed)
        if bool(((self.num_tokens - removed < self.num_final) & (removed > 0)).any()):
            raise RuntimeError(
                "`crop` cannot bring back tokens that `mosa_cache_budget` has evicted. Call "
                "`past_key_values.activate_past_recording()` before the tokens that may be cropped are added."
            )
        if self.recent_key is None:
            return
        remaining = (self.recent_key.shape[2] - removed).clamp(min=0)
        needed = (self.num_tokens - removed).clamp(max=max(self.window - 1, 0))
        if bool(((remaining < needed) & (removed > 0)).any()):
            raise RuntimeError(
                "`crop` cannot bring back tokens that have left `mosa_window`. Call "
                "`past_key_values.activate_past_recording()` before the tokens that may be cropped are added."
            )

    def _removed(self, num_removed: int) -> torch.Tensor:
        """How many real tokens [B] are among the last `num_removed`."""
        removed = torch.zeros_like(self.num_tokens)
        for mask, length in zip(reversed(self.masks), reversed(self.lengths), strict=True):
            cut = min(num_removed, length)
            removed = removed + (cut if mask is None else mask[:, length - cut :].sum(1))
            num_removed -= cut
        return removed

    def _forget_masks(self, num_removed: int) -> None:
        """Cut the log of calls by `num_removed` tokens."""
        while num_removed and self.lengths:
            cut = min(num_removed, self.lengths[-1])
            mask = self.masks[-1]
            self.lengths[-1] -= cut
            self.masks[-1] = None if mask is None else mask[:, : mask.shape[1] - cut]
            if self.lengths[-1] == 0:
                self.lengths.pop()
                self.masks.pop()
            num_removed -= cut

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was (beam search, batch repetition and selection)."""
        if self.num_tokens is None:
            return
        rows = rows.to(self.num_tokens.device)
        self.num_tokens, self.num_final = self.num_tokens[rows], self.num_final[rows]
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]
        self.kept.select_rows(rows)
        for name in RECENT:
            if (states := getattr(self, name)) is not None:
                setattr(self, name, states[rows])

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by kind."""
        recent = [states for name in RECENT if (states := getattr(self, name)) is not None]
        return {"selected": self.kept.tensors(), "window": recent}


class FixedSparseKeyValues:
    """
    The same in tensors of fixed size, changed in place, for static caches: what a compiled decoding step needs. More
    selected tokens than fit are given up lowest score first, as by a budget of `capacity`.

    Args:
        window: `mosa_window`.
        budget: `mosa_cache_budget`.
        capacity: selected tokens that a row and group has room for, see `static_capacity`.
        num_groups, head_dim: of the MoSA heads.
    """

    record_past = False

    def __init__(self, window: int, budget: int | None, capacity: int, num_groups: int, head_dim: int):
        self.window = window
        self.overflows = budget is None  # what does not fit was not meant to be given up
        self.capacity = capacity if budget is None else min(capacity, budget)
        self.budget = self.capacity if budget is None else budget
        self.num_groups, self.head_dim = num_groups, head_dim
        self.state: FixedKeyValues | None = None
        self.valid: torch.Tensor | None = None  # [B, T] bool, of the call that goes on

    @property
    def num_tokens(self) -> torch.Tensor | None:
        """`[B]` int64, real tokens seen; changes in place."""
        return None if self.state is None else self.state.num_tokens

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch_size, self.num_groups)
        kept, ring = (*shape, self.capacity), (*shape, self.window)
        self.state = FixedKeyValues(
            key=torch.zeros(*kept, self.head_dim, dtype=dtype, device=device),
            value=torch.zeros(*kept, self.head_dim, dtype=dtype, device=device),
            position=torch.zeros(kept, dtype=torch.int32, device=device),
            score=torch.zeros(kept, dtype=torch.float32, device=device),
            count=torch.zeros(shape, dtype=torch.int32, device=device),
            num_evicted=torch.zeros(shape, dtype=torch.int32, device=device),
            ring_key=torch.zeros(*ring, self.head_dim, dtype=dtype, device=device),
            ring_value=torch.zeros(*ring, self.head_dim, dtype=dtype, device=device),
            ring_score=torch.full(ring, -torch.inf, dtype=torch.float32, device=device),
            num_tokens=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )
        if not torch.compiler.is_compiling():
            for tensor in self.state:  # as upstream's static layers do: else no CUDA graphs
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        for name, tensor in ({} if self.state is None else self.state._asdict()).items():
            tensor.fill_(-torch.inf if name == "ring_score" else 0)

    def has_tokens(self) -> bool:
        return self.state is not None and bool(self.num_tokens.any())

    def advance(self, valid: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
        """Prepare for a call's tokens [B, T, D]; `valid` [B, T] is False on padding, None without."""
        if self.state is None:
            self.initialize(len(hidden_states), hidden_states.dtype, hidden_states.device)
        self.valid = valid

    # Several tokens, as in a prefill. For one token, the kernels change `state` themselves.

    def read_selected(self, tokens: Tokens) -> tuple[KeyValues | None, Tokens]:
        """Form "selected": as `SparseKeyValues.read_selected`, for all groups."""
        return _with_until(self._past(), tokens, self.budget)

    def append_selected(self, past: KeyValues | None, new: KeyValues, num_new: int) -> None:
        """Form "selected": keep the filled slots of `new`, of a call of `num_new` tokens; `past` is what was read."""
        entries = join(past, new)
        alive = within_budget(entries.score, entries.position, entries.valid, self.budget)
        self.state.num_evicted.add_((entries.valid & ~alive).sum(-1))
        self._hold(entries._replace(valid=alive))
        self._count(num_new)

    def update(self, key: torch.Tensor, value: torch.Tensor, tokens: Tokens) -> tuple[KeyValues, KeyValues | None]:
        """Form "all": as `SparseKeyValues.update`."""
        state, num_new, window = self.state, key.shape[2], self.window
        past = self._past()
        score = tokens.score.masked_fill(~tokens.selected, -torch.inf).transpose(1, 2)  # [B, G, T]
        if window:
            # The ring by position, oldest first.
            slots = (state.num_tokens[:, None, None] + torch.arange(window, device=key.device)) % window  # [B, 1, W]
            key = torch.cat((gather_slots(state.ring_key, slots), key), dim=2)
            value = torch.cat((gather_slots(state.ring_value, slots), value), dim=2)
            score = torch.cat((gather_slots(state.ring_score, slots), score), dim=2)
            if tokens.valid is not None:
                order = _across_padding(tokens.valid, window)
                key, value, score = (gather_slots(states, order) for states in (key, value, score))
        self._count(num_new)
        length = key.shape[2]
        position = state.num_tokens[:, None] - length + torch.arange(length, device=key.device)  # [B, S]
        position = position[:, None].expand_as(score)  # negative on empty slots
        selected = score > -torch.inf
        near = KeyValues(key, value, position, position >= 0, selected, None, score)
        held = near._replace(valid=selected)
        scores, positions, selected = _budgeted(past, held)
        num_past = scores.shape[-1] - length
        alive = within_budget(scores, positions, selected, self.budget)
        until = _until(scores, positions, selected, self.budget, num_new)
        if until is not None:
            near = near._replace(until=until[..., num_past:])
            past = None if past is None else past._replace(until=until[..., :num_past])

        state.num_evicted.add_((selected & ~alive).sum(-1))
        has_left = torch.arange(length, device=key.device) < length - window
        self._hold(join(past, held)._replace(valid=alive & F.pad(has_left, (num_past, 0), value=True)))
        if window:
            newest = state.num_tokens[:, None, None] - 1
            source = length - 1 - (newest - torch.arange(window, device=key.device)) % window  # [B, 1, W]
            state.ring_key.copy_(gather_slots(key, source))
            state.ring_value.copy_(gather_slots(value, source))
            score = score.masked_fill(~alive[..., num_past:], -torch.inf)
            state.ring_score.copy_(gather_slots(score, source))
        return near, past

    def _past(self) -> KeyValues | None:
        """A copy of the kept entries: attention reads them after they have changed."""
        state, num_slots = self.state, self.capacity
        if not torch.compiler.is_compiling():
            num_slots = int(state.count.max())
            if num_slots == 0:
                return None
        filled = torch.arange(num_slots, device=state.count.device) < state.count[..., None]
        key, value, position, score = (
            states[:, :, :num_slots].clone() for states in (state.key, state.value, state.position, state.score)
        )
        return KeyValues(key, value, position.long(), filled, None, None, score)

    def _hold(self, entries: KeyValues) -> None:
        """Hold the valid ones of `entries`, of which there are no more than fit, and no others."""
        order = (~entries.valid).to(torch.int8).argsort(dim=-1, stable=True)[..., : self.capacity]
        for name in ("key", "value", "position", "score"):
            held = gather_slots(getattr(entries, name), order)
            getattr(self.state, name)[:, :, : order.shape[-1]] = held.detach()
        self.state.count.copy_(entries.valid.sum(-1))

    def _count(self, num_new: int) -> None:
        self.state.num_tokens.add_(num_new if self.valid is None else self.valid.sum(1))

    def check_crop(self, num_removed: int) -> None:
        raise RuntimeError("A static cache cannot be cropped: use a `DynamicCache`.")

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.state is not None:
            self.state = FixedKeyValues(*(states[rows.to(states.device)] for states in self.state))

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by kind."""
        if self.state is None:
            return {"selected": [], "window": []}
        window = [self.state.ring_key, self.state.ring_value, self.state.ring_score]
        return {"selected": [x for x in self.state if all(x is not y for y in window)], "window": window}


def static_capacity(max_cache_len: int, sparsity: float) -> int:
    """
    Selected tokens that a static cache has room for in each row and group: twice the share that `mosa_sparsity` asks
    for and 64 more, since a threshold selects more of some texts than of others; at most all tokens.
    """
    return min(max_cache_len, math.ceil(2 * max_cache_len / sparsity) + 64)


def _across_padding(valid: torch.Tensor, num_cached: int) -> torch.Tensor:
    """
    Order [B, 1, num_cached + T] that brings the cached tokens of a row up to those of a call, over the padding between
    them. `valid` [B, T] is the call's.
    """
    real = F.pad(valid, (num_cached, 0), value=True).to(torch.int8)
    return real.argsort(dim=1, stable=True)[:, None]


def _budgeted(*parts: KeyValues | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, position and "is a selected token" of all slots [B, G, S]."""
    parts = [part for part in parts if part is not None]
    return (
        torch.cat([part.score for part in parts], dim=-1),
        torch.cat([part.position for part in parts], dim=-1),
        torch.cat([part.valid for part in parts], dim=-1),
    )


def _with_until(past: KeyValues | None, tokens: Tokens, budget: int) -> tuple[KeyValues | None, Tokens]:
    """Form "selected": say of past and new tokens when the budget evicts them."""
    selected, score = tokens.selected.transpose(1, 2), tokens.score.transpose(1, 2)  # [B, G, T]
    new = KeyValues(None, None, tokens.position[:, None].expand_as(selected), selected, None, None, score)
    until = _until(*_budgeted(past, new), budget, selected.shape[-1])
    if until is None:
        return past, tokens
    num_past = until.shape[-1] - selected.shape[-1]
    past = None if past is None else past._replace(until=until[..., :num_past])
    return past, tokens._replace(until=until[..., num_past:].transpose(1, 2))


def _until(
    score: torch.Tensor, position: torch.Tensor, selected: torch.Tensor, budget: int, num_new: int
) -> torch.Tensor | None:
    """`evicted_at` for a call whose last `num_new` tokens are new; the others were within the budget, or long out."""
    if num_new > 1:
        return evicted_at(score, position, selected, budget)
    if score.shape[-1] <= budget:
        return None
    if not torch.compiler.is_compiling() and not bool((selected.sum(-1) > budget).any()):
        return None
    return torch.where(within_budget(score, position, selected, budget), NEVER, position[..., -1:])


class PreallocatedDynamicLayer(DynamicLayer):
    """
    The dense heads' keys and values, with a little room behind them: upstream's layer copies all of them for every new
    token. What was cropped is overwritten, and so is what another cache shares of it: copy a cache by `copy.deepcopy`.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = self.get_seq_length() // DENSE_ROOM
        self.keys, self.values = _append(self.keys, key_states, room), _append(self.values, value_states, room)
        return self.keys, self.values


def _append(held: torch.Tensor, new: torch.Tensor, room: int) -> torch.Tensor:
    """
    `held` [B, H, S, d] (at first [0]) and then `new` [B, H, T, d]: in the memory of `held` if it has room behind its
    entries, else in new memory with `room` for more. Where nothing may change in place, a plain concatenation.
    """
    is_traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if is_traced or not held.numel() or held.shape[:2] != new.shape[:2] or held.dtype != new.dtype:
        return torch.cat((held, new), dim=-2)  # promotes types, and raises
    batch_size, num_heads, num_held, head_dim = held.shape
    length = num_held + new.shape[2]
    # Is `held` part of entries [B, H, capacity, d] that have memory of their own, and place for more behind it?
    capacity = held.stride(1) // head_dim
    layout = (num_heads * capacity * head_dim, capacity * head_dim, head_dim, 1)
    is_whole = held.untyped_storage().nbytes() == batch_size * layout[0] * held.element_size()
    fits = held.storage_offset() // head_dim + length <= capacity
    if is_whole and fits and held.stride() == layout and _may_change(held):
        grown = held.as_strided((batch_size, num_heads, length, head_dim), layout)
    else:
        grown = held.new_empty(batch_size, num_heads, length + room, head_dim)[:, :, :length]
        grown[:, :, :num_held] = held
    grown[:, :, num_held:] = new
    return grown


def _may_change(held: torch.Tensor) -> bool:
    """Whether a cache may write into its tensors: not if autograd may have saved them, or inference mode made them."""
    if torch.is_grad_enabled() or held.requires_grad:
        return False
    return torch.is_inference_mode_enabled() or not held.is_inference()


class SparseLayer(CacheLayerMixin):
    """Mixed into a cache layer's class by `upgrade_cache`: its own states are the dense heads', `sparse` is ours."""

    _layer_type = None  # not a layer type of its own: the class it is mixed with keeps its registration
    sparse: SparseKeyValues | FixedSparseKeyValues

    @property
    def record_past(self) -> bool:
        return self.sparse.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.sparse.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        # A layer without dense heads caches keys of shape [B, 0, T, d], which upstream takes for empty.
        if isinstance(self, DynamicLayer) and self.is_initialized and self.keys.ndim == 4 and self.keys.shape[1] == 0:
            length = max(length, self.keys.shape[-2])
        return length

    def reset(self) -> None:
        super().reset()
        self.sparse.reset()

    def __reduce__(self):
        # The class is made at run time, so pickle cannot find it by name.
        return _restore, (type(self).__bases__[1], self.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        self.sparse.check_crop(abs(tokens_to_remove))  # raises before anything has changed
        super().crop(tokens_to_remove)
        self.sparse.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.sparse.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.sparse.num_tokens is not None:
            rows = torch.arange(len(self.sparse.num_tokens), device=self.sparse.num_tokens.device)
            self.sparse.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.sparse.num_tokens is not None:
            rows = torch.arange(len(self.sparse.num_tokens), device=self.sparse.num_tokens.device)
            self.sparse.select_rows(rows[indices])


@lru_cache
def _sparse_class(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    return type(f"Sparse{layer_class.__name__}", (SparseLayer, layer_class), {})


def _restore(layer_class: type[CacheLayerMixin], state: dict) -> CacheLayerMixin:
    """A layer of a class that is not importable by name, unpickled."""
    layer = object.__new__(_sparse_class(layer_class))
    layer.__dict__.update(state)
    return layer


class SparseSpec(NamedTuple):
    """What a cache has to know of a layer's MoSA heads."""

    window: int
    budget: int | None
    sparsity: float
    num_groups: int
    head_dim: int
    has_dense_heads: bool = True


def upgrade_cache(cache: Cache, specs: dict[int, SparseSpec], max_cache_len: int | None = None) -> None:
    """
    Give the layers that have MoSA heads their sparse part. Layers that have it already are left alone.

    Args:
        cache: any cache of dynamic or static layers, as `generate` or the user made it.
        specs: layer index → its MoSA heads.
        max_cache_len: tokens that a static cache will see, which it does not know if all its layers have a window.

    Raises:
        ValueError: for a cache that holds tokens of another model, has too few layers, or layers of another kind.
    """
    for layer_idx, spec in specs.items():
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
        if layer_idx >= len(cache.layers):
            raise ValueError(
                f"`past_key_values` has {len(cache.layers)} layers, but layer {layer_idx} of this model needs one: "
                "make it with `DynamicCache(config=model.config)`."
            )
        layer = cache.layers[layer_idx]
        if isinstance(layer, SparseLayer):
            continue
        if not isinstance(layer, DynamicLayer | StaticLayer):
            raise ValueError(
                f"MoSA heads cannot extend a cache layer of class {type(layer).__name__}: use a `DynamicCache` or a "
                "`StaticCache`."
            )
        if layer.get_seq_length():
            raise ValueError(
                f"`past_key_values` holds {int(layer.get_seq_length())} tokens that this model's MoSA heads have not "
                "seen. Pass an empty cache, or one that this model filled."
            )
        if isinstance(layer, StaticLayer):
            length = max_cache_len if all(cache.is_sliding) else cache.get_max_length()
            if length is None:
                raise ValueError("`max_cache_len` is needed for a static cache whose layers all have a window.")
            capacity = static_capacity(length, spec.sparsity)
            sparse = FixedSparseKeyValues(spec.window, spec.budget, capacity, spec.num_groups, spec.head_dim)
            if layer.is_initialized:
                sparse.initialize(layer.batch_size, layer.dtype, layer.device)
        else:
            sparse = SparseKeyValues(spec.window, spec.budget)
            sparse.record_past = layer.__dict__.pop("record_past", False)
        layer.sparse = sparse
        layer_class = type(layer)
        if isinstance(layer, BaseQuantizedLayer) and not spec.has_dense_heads:
            layer_class = DynamicLayer  # it only counts tokens, and there is nothing to quantise
        if layer_class is DynamicLayer:
            layer_class = PreallocatedDynamicLayer
        layer.__class__ = _sparse_class(layer_class)


def is_upgraded(cache: Cache) -> bool:
    """Whether `upgrade_cache` has seen this cache."""
    return any(isinstance(layer, SparseLayer) for layer in cache.layers)


def num_cached_tokens(cache: Cache | None) -> torch.Tensor | None:
    """`[B]`: the real (not padding) tokens that an upgraded cache has seen; None if none."""
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, SparseLayer):
            return layer.sparse.num_tokens
    return None


def num_overflowed(cache: Cache) -> int:
    """How many selected tokens a static cache had no room for, over all layers, rows and groups."""
    stores = [layer.sparse for layer in cache.layers if isinstance(layer, SparseLayer)]
    return sum(
        int(store.state.num_evicted.sum())
        for store in stores
        if isinstance(store, FixedSparseKeyValues) and store.overflows and store.state is not None
    )


def cache_bytes(past_key_values: Cache) -> dict[str, int]:
    """
    Bytes that a cache holds, summed over its live tensors.

    Returns:
        `{"dense": ..., "selected": ..., "window": ...}`: the dense heads' keys and values; the selected tokens' keys,
        values, positions and counts; the window's keys, values and flags.
    """
    held = {"dense": [], "selected": [], "window": []}
    for layer in past_key_values.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            held["dense"] += _tensors_in(getattr(layer, name, None))
        if isinstance(layer, SparseLayer):
            for kind, tensors in layer.sparse.tensors().items():
                held[kind] += tensors
    return {kind: sum(_storage_bytes(tensor) for tensor in tensors) for kind, tensors in held.items()}


def _tensors_in(states) -> list[torch.Tensor]:
    """The plain tensors that a cache layer's states are made of, quantised ones with their scales."""
    if isinstance(states, torch.Tensor):
        if not hasattr(states, "__tensor_flatten__"):
            return [states]
        states = [getattr(states, name) for name in states.__tensor_flatten__()[0]]
    if isinstance(states, dict):
        states = list(states.values())
    return [x for part in states for x in _tensors_in(part)] if isinstance(states, list | tuple) else []


def _storage_bytes(tensor: torch.Tensor) -> int:
    """Memory that a tensor keeps alive: of a view, the whole storage behind it."""
    return tensor.untyped_storage().nbytes()
