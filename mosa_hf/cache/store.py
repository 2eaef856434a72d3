"""What one set of a layer's groups remembers: the last tokens, and selected ones before them (DESIGN section 4)."""

from bisect import bisect_left
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.tensors import NEVER, KeyValues, Runs, gather_slots
from ..routing.budget import evicted_at, lowest_score, within_budget
from ..routing.layout import padding_first
from .growth import Fixed, Growing, Memory
from .steps import NUM_STEPS, Step, of_todays_rows

# What a store remembers between two calls, beside `memory`, `pending`, `steps` and `masks`: see `state`.
TENSORS = (
    *("key", "value", "position", "selected", "score", "count", "num_selected", "num_evicted"),
    *("num_stored", "num_pending", "num_final", "num_lost"),
)
PLAIN = ("record_past", "num_recorded", "free", "max_count", "max_tokens", "lengths")


class SparseStore:
    """
    A run of entries for each row and group, in one flat memory. Its first `window` entries are a ring, token p in
    entry p % window; while there are fewer tokens, as many entries. Behind it come the *kept* entries, selected tokens
    that have left the window, in no particular order. So the whole of a run is what the next token reads.

    Of a model call: `begin` (what the routers said), `extend` (what its queries may read), `evict` when they have.

    Args:
        window: tokens that a query reads whether selected or not; 0: none.
        budget: `mosa_cache_budget`: how many selected tokens a row and group remembers, those in the window included;
            None: all of them.
        growth: how memory grows.
    """

    def __init__(self, window: int, budget: int | None = None, growth: Growing | Fixed | None = None):
        self.window = window
        self.growth = Growing() if growth is None else growth
        self.budget = budget if self.growth.limit is None else self.growth.limit
        self.record_past = False  # nothing is evicted until `crop` says that it is final
        self.memory: Memory | None = None
        self._forget()

    def _forget(self) -> None:
        self.memory = None
        self.key: torch.Tensor | None = None  # [N + 1, d]; the last entry is scrap, for writes that count for nothing
        self.value: torch.Tensor | None = None  # [N + 1, d]
        self.position: torch.Tensor | None = None  # [N + 1] int32, of kept entries; only with a budget or no window
        self.selected: torch.Tensor | None = None  # [N + 1] bool; of kept entries True
        self.score: torch.Tensor | None = None  # [N + 1] of bfloat16's precision, only with a budget
        self.count: torch.Tensor | None = None  # [B, G] int64, entries of each run
        self.num_selected: torch.Tensor | None = None  # [B, G] int64, selected entries, only with a budget
        self.num_evicted: torch.Tensor | None = None  # [B, G] int64, by the budget
        self.num_stored: torch.Tensor | None = None  # [B] int64, real tokens seen that the memory knows of
        self.num_pending: torch.Tensor | int = 0  # [B] int64, real tokens seen that it does not know of yet
        self.num_recorded = 0  # of the caller's tokens, padding included, those that it does not know of yet
        self.num_final: torch.Tensor | None = None  # [B] int64: `crop` cannot go back before these
        self.num_lost: torch.Tensor | None = None  # [B] int64: of tokens before these the ring held none any more
        # Tokens of the last calls in sequence order that are not in the memory yet, the ring's included.
        self.pending: KeyValues | None = None
        self.steps: list[Step] = []  # the last calls that the memory knows of, as long as each was of one token
        # Bounds that are known without asking the device; of a fixed memory they never change.
        self.free = 0  # at least so many more tokens fit into every run
        self.max_count = 0  # at most so many entries has a run
        self.max_tokens = 0  # at most so many real tokens has a row
        # Padding of the calls so far, [B, T] bool or None, and their lengths; only of use to `crop`.
        self.masks: list[torch.Tensor | None] = []
        self.lengths: list[int] = []
        self.call: tuple | None = None
        self.last_read: Runs | None = None  # what a single token has read on a CPU, until a run gets longer, or moves

    def __getstate__(self) -> dict:
        # Views of the memory would be pickled as memory of their own, into which nobody writes.
        return self.__dict__ | {"last_read": None}

    def reset(self) -> None:
        """Forget all tokens. Fixed memory stays where it is."""
        if not self.growth.is_fixed or self.key is None:
            self._forget()
            return
        for states in self._states().values():
            states.zero_()
        self.pending, self.num_pending, self.call = None, 0, None  # of a call that failed half-way
        self.last_read = None

    @property
    def num_tokens(self) -> torch.Tensor | None:
        """`[B]` int64, real tokens seen; None before the first call. May change in place."""
        return self.num_stored if isinstance(self.num_pending, int) else self.num_stored + self.num_pending

    @property
    def needs_score(self) -> bool:
        """Whether `begin` needs scores."""
        return self.budget is not None

    def has_tokens(self) -> bool:
        """Whether any call has added tokens; asks the device where the memory is fixed."""
        return self.num_stored is not None and (not self.growth.is_fixed or bool(self.num_stored.any()))

    def begin(
        self,
        selected: torch.Tensor,
        score: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """
        A call of T tokens begins.

        Args:
            selected: `[B, G, T]` bool, False on padding.
            score: `[B, G, T]`, what a budget compares, inf for tokens that are never evicted.
            valid: `[B, T]` bool, False on padding, which is on the left; None without padding.
            mask: `valid` as the caller of the model passed it, with padding anywhere.
        """
        batch_size, num_tokens = selected.shape[0], selected.shape[2]
        if self.num_stored is None:
            self.num_stored = torch.zeros(batch_size, dtype=torch.int64, device=selected.device)
            self.num_final, self.num_lost = torch.zeros_like(self.num_stored), torch.zeros_like(self.num_stored)
        if not self.growth.is_fixed:
            if mask is None and self.masks and self.masks[-1] is None:
                self.lengths[-1] += num_tokens
            else:
                self.masks.append(mask)
                self.lengths.append(num_tokens)
        self.call = selected, score, valid

    def _common_length(self) -> int | None:
        """How many tokens the memory knows of in every row; None if rows differ, or only the device can tell."""
        if not self.growth.is_fixed and all(mask is None for mask in self.masks):
            return self.max_tokens
        if torch.compiler.is_compiling() or self.num_stored.device.type != "cpu":
            return None
        lengths = set(self.num_stored.tolist())
        return lengths.pop() if len(lengths) == 1 else None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> Runs | tuple[KeyValues, Runs | None]:
        """
        Take in the call's tokens.

        Args:
            key, value: `[B, G, T, d]`, padding on the left.

        Returns:
            What its queries may read: for a single token a row, runs, all of which it reads; else (near, kept) as
            `sparse_attention` reads them.
        """
        if self.key is None:
            self._allocate(key, value, key.shape[1])
        is_single = key.shape[2] == 1 and self.pending is None and not self.record_past
        # Several tokens may have been written in place in inference mode, which makes counts that may not change.
        if is_single and (self.growth.is_fixed or (may_change(self.key) and may_change(self.count))):
            if torch.is_grad_enabled():  # else nothing reaches a graph
                key, value = key.detach(), value.detach()
            self._append_token(key.flatten(0, 2), value.flatten(0, 2))
            return self._readable_runs()
        return self._extend_sequence(key, value)

    def evict(self) -> None:
        """The call's queries have read: what they alone had to read goes, unless `record_past` is set."""
        self.call = None
        if self.pending is not None and not (self.record_past and self.window):
            self._commit(self._new_step())

    # The paper's heads, which project selected tokens only, and have no window.

    def read(self, position: torch.Tensor) -> tuple[Runs | None, torch.Tensor | None]:
        """
        What the selected tokens of the call read of earlier calls, and when the budget evicts the call's own.

        Args:
            position: `[B, T]` int64, of the call's tokens.

        Returns:
            kept, and `until` `[B, G, T]` int64 of the call's tokens (None: no budget, or nothing to evict).
        """
        selected, score, _ = self.call
        kept = None if self.key is None else self._kept()
        near = KeyValues(None, None, position[:, None].expand_as(selected), selected, selected, None, score)
        near, kept = self._with_until(near, kept)
        return kept, near.until

    def append(self, new: KeyValues | None, groups: torch.Tensor | None = None) -> None:
        """
        Append the filled slots of `new`, selected tokens of the call, and evict what the budget does not allow.

        Args:
            new: `[B, G, K, ...]`, or `[B, A, K, ...]` of some groups; None if nothing is selected.
            groups: `[A]` int64, the groups that `new` lists; None: all.
        """
        selected, _, valid = self.call
        if new is not None and self.key is None:
            self._allocate(new.key, new.value, selected.shape[1])
        self._count_tokens(selected.shape[2], valid)
        if new is None:
            step = self._new_step()
            self.num_stored, self.num_pending, self.call = self._replaced(self.num_stored, self.num_tokens), 0, None
            self._note(step)
            return
        filled = torch.ones_like(new.position, dtype=torch.bool) if new.valid is None else new.valid
        new = new._replace(valid=filled, selected=filled)
        if groups is not None:
            size = (len(filled), selected.shape[1])
            new = KeyValues(
                *(
                    None
                    if states is None
                    else states.new_zeros(*size, *states.shape[2:]).index_copy(1, groups, states)
                    for states in new
                )
            )
        self.pending = new
        self.evict()

    # One token

    def _append_token(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add a token `[B * G, d]` to every row but those in which it is padding."""
        selected, score, valid = (None if x is None else x[..., 0] for x in self.call)
        if self.free <= 0 and not self.growth.is_fixed:
            self._grow(self.count + 1)
        step = Step() if self._can_note else None
        entry = self._entry_of_token(selected, valid, step).flatten()
        self.key.index_copy_(0, entry, key.to(self.key.dtype))
        self.value.index_copy_(0, entry, value.to(self.value.dtype))
        self.selected.index_copy_(0, entry, selected.flatten())
        is_selected = self.position is None or _may_be_any(selected)  # of others, neither of these is ever looked at
        if self.position is not None and is_selected:
            position = self.num_stored[:, None].expand_as(selected).flatten()
            self.position.index_copy_(0, entry, position.to(self.position.dtype))
        if self.budget is not None and is_selected:
            self.score.index_copy_(0, entry, score.flatten().to(self.score.dtype))
        self.num_stored.add_(1 if valid is None else valid)
        if not self.growth.is_fixed:
            self.max_tokens += 1
        if self.budget is not None and is_selected:
            self.num_selected.add_(selected)
            self._evict_lowest(step)
        self._note(step)

    def _entry_of_token(self, selected: torch.Tensor, valid: torch.Tensor | None, step: Step | None) -> torch.Tensor:
        """The entry `[B, G]` for a new token. The token that leaves the window for it is kept if it is selected."""
        start, scrap = self.memory.start, self.key.shape[0] - 1
        if not self.window:
            entry = torch.where(selected, start + self.count, scrap)
            self._add_to_count(selected)
            return entry
        length = self._common_length() if valid is None else None
        if length is not None:  # the same entry of every run
            entry = start + length % self.window
            if length < self.window:
                self._add_to_count(1)
                return entry
            is_full = None
        else:
            entry = start + (self.num_stored % self.window)[:, None]
            is_full = (self.num_stored >= self.window)[:, None]
        overwritten = None
        if step is not None and self.max_tokens >= self.window:
            step.overwritten = overwritten = self._at(entry)
        leaving = self.selected.index_select(0, entry.flatten()) if overwritten is None else overwritten["selected"]
        leaving = leaving.view_as(entry)
        added = leaving
        if is_full is not None:
            leaving, added = leaving & is_full, leaving | ~is_full
            if valid is not None:
                leaving, added = leaving & valid[:, None], added & valid[:, None]
                entry = torch.where(valid[:, None], entry, scrap)
        keeps = _may_be_any(leaving)
        if keeps:
            overwritten = self._at(entry) if overwritten is None else overwritten
            self._put(overwritten, torch.where(leaving, start + self.count, scrap))
        if keeps or is_full is not None:
            self._add_to_count(added)
        return entry

    def _add_to_count(self, new: torch.Tensor | int) -> None:
        """`new` [B, G] entries more, one of each run at most."""
        self.count.add_(new)
        self.last_read = None
        if not self.growth.is_fixed:
            self.free, self.max_count = self.free - 1, self.max_count + 1

    def _evict_lowest(self, step: Step | None) -> None:
        """Where a run has one selected token more than the budget allows: evict the lowest score."""
        over = self.num_selected > self.budget  # [B, G]
        if not _may_be_any(over):
            return
        scrap = self.key.shape[0] - 1
        entries, filled = self._runs().slots()
        selected = self.selected[entries] & filled
        slot = lowest_score(self.score[entries], self.position[entries], selected)  # [B, G]
        entry = torch.where(over, self.memory.start + slot, scrap)
        if step is not None:
            step.evicted, step.is_evicted, step.num_final = self._at(entry), over, self.num_final
        is_kept = over & (slot >= self.window)
        # In the window it stays, no longer selected; a kept entry's place is taken by the last of its run.
        self.selected.index_fill_(0, entry.flatten(), False)
        last = torch.where(is_kept, self.memory.start + self.count - 1, scrap)
        self._put(self._at(last), torch.where(is_kept, entry, scrap))
        self.count.sub_(is_kept.long())
        self.last_read = None
        self.num_selected.sub_(over.long())
        self.num_evicted = self._replaced(self.num_evicted, self.num_evicted + over)
        if not self.growth.is_fixed:
            self.num_final = torch.where(over.any(-1), self.num_stored, self.num_final)

    def _at(self, entries: torch.Tensor) -> dict[str, torch.Tensor]:
        """A copy of what `entries` [B, G] hold, `[B * G, ...]` by name."""
        entries = entries.flatten()
        return {name: states.index_select(0, entries) for name, states in self._entries().items()}

    def _put(self, rows: dict[str, torch.Tensor], entries: torch.Tensor) -> None:
        """Let `entries` [B, G] hold `rows`, as `_at` gave them."""
        entries = entries.flatten()
        for name, states in self._entries().items():
            states.index_copy_(0, entries, rows[name])

    # What `crop` can undo

    @property
    def _can_note(self) -> bool:
        """Whether single tokens are noted. Without a window or a budget nothing is lost that `crop` could need."""
        is_plain = not self.growth.is_fixed and not torch.compiler.is_compiling()
        return is_plain and (self.window > 0 or self.budget is not None)

    def _new_step(self) -> Step | None:
        """Of what is pending, if that is a single token and no more; before the memory takes it in."""
        if not self._can_note or self.num_recorded != 1 or self.record_past or self.key is None:
            return None
        if not self.window or self.max_tokens <= self.window:
            return Step()
        return Step(self._at(self.memory.start + (self.num_stored % self.window)[:, None]))

    def _note(self, step: Step | None) -> None:
        """The memory has taken a call in; None: not a step, so that nothing can be undone to before it."""
        if self.growth.is_fixed:
            return
        self.num_recorded = 0
        if step is None:
            self.steps = []
        else:
            self.steps.append(step)
            del self.steps[:-NUM_STEPS]

    def _readable_runs(self) -> Runs:
        """What a single token reads, all entries."""
        # Exporters that take a cache apart build views of the memory as memory of their own.
        if self.last_read is not None and self.last_read.key is self.key:
            return self.last_read
        runs = Runs(self.key, self.value, self.memory.start, self.count, self.max_count, self.memory.stride)
        if torch.compiler.is_compiling() or self.key.device.type != "cpu":
            return runs
        self.last_read = runs._replace(parts=runs.split())
        return self.last_read

    # Several tokens

    def _extend_sequence(self, key: torch.Tensor, value: torch.Tensor) -> tuple[KeyValues, Runs | None]:
        selected, score, valid = self.call
        kept = self._kept()
        recent = self._recent() if self.pending is None else self.pending
        self._count_tokens(key.shape[2], valid)
        if recent is not None:
            num_recent = recent.key.shape[2]
            key, value = torch.cat((recent.key, key), dim=2), torch.cat((recent.value, value), dim=2)
            selected = torch.cat((recent.selected, selected), dim=2)
            score = None if self.budget is None else torch.cat((recent.score.to(score.dtype), score), dim=2)
            if valid is not None:
                order = _across_padding(valid, num_recent)
                key, value, selected = (gather_slots(states, order) for states in (key, value, selected))
                score = None if score is None else gather_slots(score, order)
        length = key.shape[2]
        position = self.num_tokens[:, None] - length + torch.arange(length, device=key.device)  # [B, S]
        position = position[:, None].expand_as(selected)  # negative on empty slots
        filled = None if all(mask is None for mask in self.masks) and not self.growth.is_fixed else position >= 0
        selected = selected if filled is None else selected & filled
        self.pending = KeyValues(key, value, position, filled, selected, None, score)
        return self._with_until(self.pending, kept)

    def _with_until(self, near: KeyValues, kept: Runs | None) -> tuple[KeyValues, Runs | None]:
        """Say of each selected token when the budget evicts it."""
        if self.budget is None:
            return near, kept
        score, position, selected, entries = self._held(near, kept)
        num_kept = score.shape[-1] - near.position.shape[-1]
        until = evicted_at(score, position, selected, self.budget)
        if until is None:
            return near, kept
        if num_kept:
            flat = torch.full((len(self.key),), NEVER, dtype=torch.int64, device=until.device)
            flat = flat.index_put((entries,), until[..., :num_kept].masked_fill(~selected[..., :num_kept], NEVER))
            kept = kept._replace(until=flat)
        return near._replace(until=until[..., num_kept:]), kept

    def _held(self, near: KeyValues, kept: Runs | None) -> tuple[torch.Tensor, ...]:
        """
        Score, position and "is a selected token" `[B, G, S]` of the kept entries, padded, then of `near`; and the kept
        entries.
        """
        score, position, selected, entries = near.score, near.position, near.selected, None
        if kept is not None:
            entries, filled = kept.slots()
            entries = torch.where(filled, entries, len(self.key) - 1)
            score = torch.cat((self.score[entries].to(score.dtype), score), dim=-1)
            position = torch.cat((self.position[entries].long(), position), dim=-1)
            selected = torch.cat((filled, selected), dim=-1)
        return score, position, selected, entries

    def _commit(self, step: Step | None = None) -> None:
        """Bring the pending tokens into the memory, and evict what is no longer read; `step`: see `_note`."""
        near, self.pending, num_tokens = self.pending, None, self.num_tokens
        kept, selected, kept_stays = self._kept(), near.selected, None
        if self.budget is not None and not self.record_past:
            score, position, is_selected, entries = self._held(near, kept)
            if torch.compiler.is_compiling() or bool((is_selected.sum(-1) > self.budget).any()):
                alive = within_budget(score, position, is_selected, self.budget)
                evicted = is_selected & ~alive
                if step is not None:
                    self._note_evicted(step, evicted, position, entries)
                self.num_evicted = self._replaced(self.num_evicted, self.num_evicted + evicted.sum(-1))
                self.num_final = torch.where(evicted.any(-1).any(-1), num_tokens, self.num_final)
                num_kept = alive.shape[-1] - selected.shape[-1]
                kept_stays, selected = alive[..., :num_kept] if num_kept else None, alive[..., num_kept:]
        num_ring = num_tokens.clamp(max=self.window)[:, None]  # [B, 1]
        in_ring = torch.zeros_like(selected)
        if self.window:
            in_ring = (near.position >= (num_tokens - num_ring[:, 0])[:, None, None]) & (near.position >= 0)
        joins = selected & ~in_ring  # what the kept entries get
        num_kept = torch.zeros_like(self.count) if kept is None else kept.count
        num_kept = num_kept if kept_stays is None else kept_stays.sum(-1)
        count = num_ring + num_kept + joins.sum(-1)
        in_place = self.growth.is_fixed or may_change(self.key)
        if kept_stays is not None or not in_place or bool((count > self.memory.capacity).any()):
            self._lay_out_kept(kept, kept_stays, count)
        start = self.memory.start[..., None]
        target = start + (num_ring + num_kept)[..., None] + joins.cumsum(-1) - 1
        if self.window:
            target = torch.where(in_ring, start + near.position % self.window, target)
        self._write(target, joins | in_ring, near._replace(selected=selected))
        self.num_selected = self._replaced(self.num_selected, num_kept + selected.sum(-1))
        self.num_stored, self.num_pending = self._replaced(self.num_stored, num_tokens), 0
        self._set_count(count)
        self._note(step)

    def _note_evicted(
        self, step: Step, evicted: torch.Tensor, position: torch.Tensor, entries: torch.Tensor | None
    ) -> None:
        """
        Of each row and group, the one token that is evicted by a step, of those in `position` [B, G, S]: the kept
        `entries` and then pending ones, of which the ring still has all but the new one, which will be undone anyway.
        """
        slot, is_evicted = evicted.int().argmax(-1, keepdim=True), evicted.any(-1)
        position = position.gather(-1, slot)[..., 0]
        entry = scrap = torch.full_like(position, len(self.key) - 1)
        if self.window:
            entry = torch.where(position < self.num_stored[:, None], self.memory.start + position % self.window, entry)
        if entries is not None:
            num_kept = entries.shape[-1]
            of_kept = entries.gather(-1, slot.clamp(max=num_kept - 1))[..., 0]
            entry = torch.where(slot[..., 0] < num_kept, of_kept, entry)
        rows = self._at(torch.where(is_evicted, entry, scrap))
        rows["position"] = position.flatten().to(rows["position"].dtype)
        rows["selected"] = torch.ones_like(rows["selected"])
        step.evicted, step.is_evicted, step.num_final = rows, is_evicted, self.num_final

    def _write(self, target: torch.Tensor, writes: torch.Tensor, states: KeyValues) -> None:
        """Write the slots `[B, G, S]` of `states` to the entries `target`, where `writes` is True."""
        for name, own in self._entries().items():
            if torch.compiler.is_compiling():  # no shape may depend on data: the rest goes to the scrap entry
                index, rows = torch.where(writes, target, len(own) - 1), getattr(states, name)
            else:
                index, rows = target[writes], getattr(states, name)[writes]
            rows = rows.to(own.dtype)
            if self.growth.is_fixed or may_change(own):
                own.index_put_((index,), rows.detach())
            else:
                setattr(self, name, own.index_put((index,), rows))

    def _lay_out_kept(self, kept: Runs | None, stays: torch.Tensor | None, count: torch.Tensor) -> None:
        """
        Hold the kept entries where `stays` [B, G, K] (None: all), in memory for runs of `count` [B, G] entries; what
        is in the ring is left to the caller.
        """
        old = self._entries()
        if not self.growth.is_fixed:
            self._allocate_for(count)
        if kept is None:
            return
        entries, filled = kept.slots()
        filled = filled if stays is None else filled & stays
        target = self.memory.start[..., None] + self.window + filled.cumsum(-1) - 1
        target = torch.where(filled, target, len(self.key) - 1)
        for name, states in old.items():
            rows = states.index_select(0, entries.flatten()).unflatten(0, entries.shape)
            put = getattr(self, name).index_put_ if self.growth.is_fixed else getattr(self, name).index_put
            setattr(self, name, put((target,), rows))

    # Memory

    def _allocate(self, key: torch.Tensor, value: torch.Tensor, num_groups: int) -> None:
        """Memory for entries like `key`, `value` [B, ., ., d]."""
        self.count = torch.zeros(len(key), num_groups, dtype=torch.int64, device=key.device)
        self.num_evicted = torch.zeros_like(self.count)
        self.num_selected = torch.zeros_like(self.count)
        self.key, self.value = key.new_zeros(0, key.shape[-1]), value.new_zeros(0, value.shape[-1])
        if self.budget is not None or not self.window:
            self.position = self.count.new_zeros(0, dtype=torch.int32)
        self.selected = self.count.new_zeros(0, dtype=torch.bool)
        if self.budget is not None:
            # Scores have bfloat16's precision. In the model's dtype, because exporters turn a cache into that.
            self.score = key.new_zeros(0, dtype=torch.promote_types(key.dtype, torch.bfloat16))
        self._allocate_for(self.count)
        if self.growth.is_fixed:
            self.max_count, self.max_tokens = self.growth.stride, NEVER
            self._mark_static()

    def _mark_static(self) -> None:
        if not torch.compiler.is_compiling():  # as upstream's static layers do: else no CUDA graphs
            for states in (*self._states().values(), self.memory.start):
                torch._dynamo.mark_static_address(states)

    def _allocate_for(self, count: torch.Tensor) -> None:
        """Empty memory for runs of `count` [B, G] entries."""
        self.memory = self.growth.memory(count)
        for name, states in self._entries().items():
            setattr(self, name, states.new_zeros(self.memory.size + 1, *states.shape[1:]))
        self.free = 0
        self.last_read = None

    def _grow(self, count: torch.Tensor) -> None:
        """Room for `count` [B, G] entries at least, where there is less."""
        free = int((self.memory.capacity - count).min())
        if free < 0:
            self._move(count)
            free = int((self.memory.capacity - count).min())
        self.free = free + 1
        self.max_count = int(self.count.max())

    def _move(self, count: torch.Tensor) -> None:
        """The runs as they are, in new memory for `count` [B, G] entries."""
        if self.key.device.type != "cpu":
            self._lay_out(*self._runs().slots(), count)
            return
        old, old_start = self._entries(), self.memory.start
        self._allocate_for(count)
        runs = [x.flatten().tolist() for x in (old_start, self.memory.start, self.count)]
        for source, target, length in zip(*runs, strict=True):  # in a third of the time that indices take
            for name, states in old.items():
                getattr(self, name)[target : target + length] = states[source : source + length]

    def _lay_out(self, entries: torch.Tensor, stays: torch.Tensor, count: torch.Tensor) -> None:
        """Hold those of `entries` [B, G, S] that stay, in their order, in new memory for `count` [B, G] entries."""
        old = self._entries()
        self._allocate_for(count)
        target = (self.memory.start[..., None] + stays.cumsum(-1) - 1)[stays]
        source = entries[stays]
        for name, states in old.items():
            setattr(self, name, getattr(self, name).index_copy_(0, target, states.index_select(0, source)))

    def _runs(self) -> Runs:
        """All entries."""
        max_count = self.max_count
        if not torch.compiler.is_compiling() and self.count.device.type == "cpu":
            max_count = int(self.count.max()) if self.count.numel() else 0
        return Runs(self.key, self.value, self.memory.start, self.count, max_count, self.memory.stride)

    def _kept(self) -> Runs | None:
        """The kept entries; None if there are none, as far as that is known without asking the device."""
        if self.max_tokens < self.window and not torch.compiler.is_compiling():
            return None
        num_kept = self.count - self.num_stored.clamp(max=self.window)[:, None]
        max_count = self.max_count - self.window
        if torch.compiler.is_compiling():
            max_count = self.growth.limit
        elif num_kept.device.type == "cpu":
            max_count = int(num_kept.max()) if num_kept.numel() else 0
        if max_count <= 0:
            return None
        start = self.memory.start + self.window
        return Runs(self.key, self.value, start, num_kept, max_count, self.memory.stride, self.window)

    def _recent(self) -> KeyValues | None:
        """The ring in sequence order, as many tokens as a row may have in it, empty slots on the left."""
        length = self.window if torch.compiler.is_compiling() else min(self.window, self.max_tokens)
        if length == 0:
            return None
        position = self.num_stored[:, None] - length + torch.arange(length, device=self.count.device)  # [B, S]
        entries = self.memory.start[..., None] + (position % self.window)[:, None]  # [B, G, S]
        entries = torch.where(position[:, None] >= 0, entries, len(self.key) - 1)
        key, value = (
            states.index_select(0, entries.flatten()).unflatten(0, entries.shape) for states in (self.key, self.value)
        )
        selected = self.selected[entries] & (position >= 0)[:, None]
        score = None if self.score is None else self.score[entries]
        return KeyValues(key, value, position[:, None].expand_as(selected), None, selected, None, score)

    def _count_tokens(self, num_new: int, valid: torch.Tensor | None) -> None:
        new = torch.full_like(self.num_stored, num_new) if valid is None else valid.sum(1)
        self.num_pending = self.num_pending + new
        if not self.growth.is_fixed:
            self.num_recorded += num_new
            self.max_tokens += num_new

    def _set_count(self, count: torch.Tensor) -> None:
        self.count = self._replaced(self.count, count)
        self.last_read = None
        if not self.growth.is_fixed and count.numel():
            self.max_count = int(count.max())
            self.free = int((self.memory.capacity - count).min())

    def _replaced(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`new`, in the memory of `states` where that is fixed."""
        return states.copy_(new) if self.growth.is_fixed else new

    def _entries(self) -> dict[str, torch.Tensor]:
        """What is held of every entry."""
        names = ("key", "value", "position", "selected", "score")
        return {name: states for name in names if (states := getattr(self, name)) is not None}

    def _states(self) -> dict[str, torch.Tensor]:
        names = ("count", "num_selected", "num_evicted", "num_stored")
        return self._entries() | {name: getattr(self, name) for name in names}

    # Going back, and other rows

    def crop(self, num_removed: int) -> None:
        """
        Forget the last `num_removed` tokens of the cache, padding among them included, as many as `num_croppable`
        allows. What `record_past` has kept for this goes.
        """
        if self.num_stored is None:
            return
        num_removed = self._undo(num_removed)
        if num_removed:
            removed = self._removed(num_removed)  # [B]
            self._forget_masks(num_removed)
            num_tokens = self.num_tokens - removed
            self.max_tokens, self.num_lost = int(num_tokens.max()), self._lost()
            if self.key is None:  # nothing was ever selected
                self.num_stored = num_tokens
            elif self.pending is None:
                self._crop_runs(num_tokens)
            else:
                self.pending = _cropped(self.pending, num_tokens, removed)
                self.num_pending = num_tokens - self.num_stored
                # The ring may be left with a place for which there is no token any more.
                entries, filled = self._runs().slots()
                self._deselect(entries[..., : self.window][filled[..., : self.window]])
        may_exceed = self.record_past and self.budget is not None and not self.steps  # the kept entries the budget
        if self.key is not None and self.pending is None and may_exceed:
            self.pending = self._recent_or_none()
        if self.pending is not None:
            recording, self.record_past = self.record_past, False
            self._commit()
            self.record_past = recording

    def _undo(self, num_removed: int) -> int:
        """Undo steps, if `num_removed` tokens go beyond what is pending; returns how many of them remain."""
        if not self.steps or num_removed <= self.num_recorded:
            return num_removed
        num_removed -= self.num_recorded
        self._forget_masks(self.num_recorded)
        self.pending, self.num_pending, self.num_recorded = None, 0, 0
        num_steps = min(num_removed, len(self.steps))
        # Memory of its own, with room for all that may come back.
        self._lay_out(*self._runs().slots(), self.count + num_steps)
        self.max_count += num_steps
        steps = self._steps_of_todays_rows()
        self.steps = steps[: len(steps) - num_steps]
        for step in reversed(steps[len(steps) - num_steps :]):
            self._undo_step(step)
        entries, filled = self._runs().slots()
        self._lay_out(entries, filled, self.count)
        self._set_count(self.count)
        self.max_tokens = int(self.num_stored.max())
        if self.budget is not None:
            entries, filled = self._runs().slots()
            self.num_selected = (self.selected[entries] & filled).sum(-1)
        return num_removed - num_steps

    def _undo_step(self, step: Step) -> None:
        """All of it but what `_undo` does at the end."""
        start, scrap = self.memory.start, len(self.key) - 1
        if step.evicted is not None:
            position = step.evicted["position"].view_as(start)
            is_kept = step.is_evicted & (position < (self.num_stored - self.window)[:, None])
            target = torch.where(is_kept, start + self.count, scrap)
            if self.window:  # it stayed there, no longer selected
                target = torch.where(step.is_evicted & ~is_kept, start + position % self.window, target)
            self._put(step.evicted, target)
            self.count = self.count + is_kept
            self.num_evicted, self.num_final = self.num_evicted - step.is_evicted.long(), step.num_final
        removed = self._removed(1)  # [B], 0 where it was padding
        self._forget_masks(1)
        self.num_stored = self.num_stored - removed
        is_real = (removed > 0)[:, None]
        is_full = is_real & (self.num_stored >= self.window)[:, None]
        # From the kept entries goes what the step has added to them: the token that left the window for the new one;
        # where there is no window, the new one.
        goes = is_full.expand_as(start)
        if self.window:
            goes = goes & (False if step.overwritten is None else step.overwritten["selected"].view_as(start))
        if self.position is not None:  # else nothing is ever evicted, and it is the last of its run
            entries, filled = self._runs().slots()
            is_kept = filled & (torch.arange(entries.shape[-1], device=entries.device) >= self.window)
            added = (self.num_stored - self.window)[:, None, None]
            found = goes[..., None] & is_kept & (self.position[entries] == added)
            goes, entry = found.any(-1), (entries * found).sum(-1)  # of one at most
            self._put(self._at(start + self.count - goes.long()), torch.where(goes, entry, scrap))
        self.count = self.count - goes.long()
        if self.window:
            if step.overwritten is not None:
                entry = start + (self.num_stored % self.window)[:, None]
                self._put(step.overwritten, torch.where(is_full, entry, scrap))
            self.count = self.count - (is_real & ~is_full).long()

    def _crop_runs(self, num_tokens: torch.Tensor) -> None:
        """Forget the tokens at or behind positions `num_tokens` [B], of runs with nothing pending."""
        entries, filled = self._runs().slots()
        if self.window:
            # The place of a token that goes from a full ring stays, holding no selected token, for the next one.
            slot = torch.arange(entries.shape[-1], device=entries.device)
            newest = self.num_stored[:, None, None] - 1
            gone = (
                filled & (slot < self.window) & (newest - (newest - slot) % self.window >= num_tokens[:, None, None])
            )
            self._deselect(entries[gone])
            stays = filled & (~gone | (self.num_stored > self.window)[:, None, None])
        else:
            stays = filled & (self.position[entries] < num_tokens[:, None, None])
        count = stays.sum(-1)
        self._lay_out(entries, stays, count)
        self._set_count(count)
        self.num_stored = num_tokens
        if self.budget is not None:
            entries, filled = self._runs().slots()
            self.num_selected = (self.selected[entries] & filled).sum(-1)

    def _deselect(self, entries: torch.Tensor) -> None:
        self.selected = self.selected.index_fill(0, entries, False)

    def _recent_or_none(self) -> KeyValues:
        """The ring in sequence order, or no tokens at all."""
        if (recent := self._recent()) is not None:
            return recent
        shape = (*self.count.shape, 0)
        empty = self.count.new_zeros(shape)
        key, value = (states.new_zeros(*shape, states.shape[-1]) for states in (self.key, self.value))
        return KeyValues(key, value, empty, empty.bool(), empty.bool(), None, self.score.new_zeros(shape))

    def num_croppable(self, num_removed: int) -> int:
        """How many of the last `num_removed` tokens, padding included, `crop` can forget; not of fixed memory."""
        if self.num_stored is None or not self._is_lost(num_removed):
            return num_removed
        return bisect_left(range(num_removed), True, key=self._is_lost) - 1

    def _is_lost(self, num_removed: int) -> bool:
        """Whether `crop` lacks what it needs to forget so many tokens."""
        num_free = self.num_recorded + len(self.steps)
        if num_removed <= num_free:
            return False
        # The rest has to be found in what the store held before them.
        base, num_final = self.num_tokens - self._removed(num_free), self._num_final()
        removed = self._removed(num_removed)
        num_tokens, is_cut = self.num_tokens - removed, removed > self._removed(num_free)
        needed = (num_tokens - self.window + 1).clamp(min=0)  # the first token that the next query's window covers
        is_lost = num_tokens < num_final
        if self.window:
            is_lost = is_lost | (needed < self.num_lost.maximum(base - self.window))
        return bool((is_lost & is_cut).any())

    def _num_final(self) -> torch.Tensor:
        """`num_final` as it was before all that is in `steps`."""
        steps = self._steps_of_todays_rows()
        return next((step.num_final for step in steps if step.num_final is not None), self.num_final)

    def _steps_of_todays_rows(self) -> list[Step]:
        return of_todays_rows(self.steps, self.count.shape[1]) if self.steps else []

    def _lost(self) -> torch.Tensor:
        """`[B]`: tokens before these are held only if they were selected."""
        return self.num_lost.maximum(self.num_stored - self.window)

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
        if self.num_stored is None:
            return
        rows = rows.to(self.num_stored.device)
        if self.steps:
            self.steps[-1].note_rows(rows)
            if len(rows) < len(self.num_stored):  # memory goes with rows
                self.steps = self._steps_of_todays_rows()
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]
        if self.pending is not None:
            self.pending = KeyValues(*(None if states is None else states[rows] for states in self.pending))
        if self.key is not None:
            (entries, filled), count = self._runs().slots(), self.count[rows]
            self._lay_out(entries[rows], filled[rows], count)
            self.num_selected, self.num_evicted = self.num_selected[rows], self.num_evicted[rows]
            self.count = count
            if not self.growth.is_fixed:
                self._set_count(count)
        for name in ("num_stored", "num_final", "num_lost"):
            setattr(self, name, getattr(self, name)[rows])
        if not isinstance(self.num_pending, int):
            self.num_pending = self.num_pending[rows]

    def tensors(self) -> list[torch.Tensor]:
        """All that is held in memory."""
        pending = [] if self.pending is None else [states for states in self.pending if states is not None]
        held = [] if self.key is None else [*self._states().values(), self.memory.start, self.memory.capacity]
        return held + pending + [states for step in self.steps for states in step.tensors()]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """
        All that is remembered between two calls, for `set_state` of a store of the same window, budget and growth:
        tensors by name, and what JSON can hold.
        """
        tensors = {name: x for name in TENSORS if isinstance(x := getattr(self, name), torch.Tensor)}
        parts = {} if self.pending is None else {"pending": self.pending._asdict()}
        if self.memory is not None:
            parts["memory"] = {"start": self.memory.start, "capacity": self.memory.capacity}
        parts |= {f"steps.{i}": step.state() for i, step in enumerate(self.steps)}
        parts["masks"] = {str(i): mask for i, mask in enumerate(self.masks)}
        for part, states in parts.items():
            tensors |= {f"{part}.{name}": x for name, x in states.items() if x is not None}
        plain = {name: getattr(self, name) for name in PLAIN}
        return tensors, plain | {"num_entries": self.memory and self.memory.size, "num_steps": len(self.steps)}

    def set_state(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """
        Remember what another store did, see `state`.

        Raises:
            ValueError: for states that are missing, unknown, or that no store can have had.
        """
        left = dict(tensors)

        def part(prefix: str) -> dict[str, torch.Tensor]:
            names = [name for name in left if name.startswith(prefix + ".")]
            return {name.removeprefix(prefix + "."): left.pop(name) for name in names}

        self._forget()
        try:
            for name in PLAIN:
                setattr(self, name, plain[name])
            masks = part("masks")
            self.masks = [masks.pop(str(i), None) for i in range(len(self.lengths))]
            self.steps = [Step.of_state(part(f"steps.{i}")) for i in range(plain["num_steps"])]
            if pending := part("pending"):
                optional = dict.fromkeys(("valid", "selected"))
                self.pending = KeyValues(**optional | pending)
            if memory := part("memory"):
                stride = self.growth.stride if self.growth.is_fixed else None
                self.memory = Memory(**memory, size=plain["num_entries"], stride=stride)
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not the states of a cache: {error}") from error
        for name in TENSORS:
            if name in left:
                setattr(self, name, left.pop(name))
        if left or masks:
            raise ValueError(f"there are states that no cache has: {sorted([*left, *masks])}")
        self._check_state()
        if self.growth.is_fixed and self.memory is not None:
            self._mark_static()

    def _check_state(self) -> None:
        """
        Raises:
            ValueError: if what is remembered cannot be read, or only beyond its memory.
        """
        counts = {"num_stored": self.num_stored, "num_final": self.num_final, "num_lost": self.num_lost}
        runs = {name: getattr(self, name) for name in ("key", "value", "selected", "count", "memory")}
        runs |= {name: getattr(self, name) for name in ("num_selected", "num_evicted")}
        if self.budget is not None or not self.window:
            runs["position"] = self.position
        if self.budget is not None:
            runs["score"] = self.score
        for states in (counts, runs):  # there are none before the first call, and before anything is selected
            missing = [name for name, x in states.items() if x is None]
            if 0 < len(missing) < len(states):
                raise ValueError(f"states are missing: {missing}")
        if self.key is None:
            return
        if self.num_stored is None:
            raise ValueError(f"states are missing: {list(counts)}")
        if any(len(states) != self.memory.size + 1 for states in self._entries().values()):
            raise ValueError(f"there are not {self.memory.size} entries and one more of each state")
        start, capacity, count = self.memory.start, self.memory.capacity, self.count
        if not (start.shape == capacity.shape == count.shape) or len(count) != len(self.num_stored):
            raise ValueError("runs and rows differ in number")
        is_within = (start >= 0) & (count >= 0) & (count <= capacity) & (start + capacity <= self.memory.size)
        if not bool(is_within.all()):
            raise ValueError("a run goes beyond its memory")


def _cropped(pending: KeyValues, num_tokens: torch.Tensor, removed: torch.Tensor) -> KeyValues:
    """`pending` without the last `removed` [B] real tokens of each row, of which `num_tokens` [B] remain."""
    length = pending.key.shape[2]
    # Rows may lose different numbers of real tokens: shift each to the right again.
    num_empty = max(int(removed.min()), length - int(num_tokens.max()))  # on the left of every row
    source = (torch.arange(length, device=removed.device) - removed[:, None])[:, None, num_empty:]  # [B, 1, S]
    key, value, selected = (
        gather_slots(states, source.clamp(min=0)) for states in (pending.key, pending.value, pending.selected)
    )
    score = None if pending.score is None else gather_slots(pending.score, source.clamp(min=0))
    position = num_tokens[:, None] - source.shape[-1] + torch.arange(source.shape[-1], device=removed.device)
    filled = (source >= 0) & (position >= 0)[:, None]
    position = position.masked_fill(~filled[:, 0], -1)[:, None].expand_as(selected)
    return KeyValues(key, value, position, filled.expand_as(selected), selected & filled, None, score)


def _across_padding(valid: torch.Tensor, num_cached: int) -> torch.Tensor:
    """
    Order [B, 1, num_cached + T] that brings the cached tokens of a row up to those of a call, over the padding between
    them. `valid` [B, T] is the call's.
    """
    return padding_first(F.pad(valid, (num_cached, 0), value=True))[0][:, None]


def _may_be_any(mask: torch.Tensor) -> bool:
    """Whether any of `mask` is True, as far as the host can tell without waiting for a device."""
    return torch.compiler.is_compiling() or mask.device.type != "cpu" or bool(mask.any())


def may_change(states: torch.Tensor) -> bool:
    """Whether a cache may write into its tensors: not if autograd may have saved them, or inference mode made them."""
    if torch.is_grad_enabled() or states.requires_grad:
        return False
    return torch.is_inference_mode_enabled() or not states.is_inference()
