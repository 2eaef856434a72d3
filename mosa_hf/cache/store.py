"""What a set of groups of a layer remembers: the last tokens, and selected ones before (docs/design.md, section 4)."""

from collections.abc import Callable

import torch

from ..kernels import backend
from ..kernels.append_token.reference import Token
from ..kernels.capture import is_captured
from ..kernels.entries import PackedKeyValues, Readable
from ..kernels.entry_codes import Rows, rounded
from ..kernels.tensors import NEVER, KeyValues
from ..routing.budget import evicted_at, within_budget
from .calls import CallLog, Counts, PendingCounts, fetch_counts
from .fixed_memory import FixedMemory, FixedSize
from .memory import EntryMemory
from .recent import after_kept, cropped, extended, of_ring, of_selected, places_of
from .undo import UndoRecord

# What the routers said of a call: selected, score and valid, as `SparseStore.begin` takes them.
Routing = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
MaybeTensor = torch.Tensor | None
# What the queries of a call may read, of what the device said.
Read = Callable[[Counts | None], Readable]


class SparseStore:
    """
    A range of entries for each row and group. Its first `window` entries are a ring, token p in entry p % window;
    while there are fewer tokens, as many entries. Behind it come the *kept* entries, selected tokens that have left
    the window, in no particular order. So the whole of a range is what the next token reads.

    Of a model call: `begin` (what the routers said), `extend` (what its queries may read), `end_call` when they have.

    `is_over`: whether selected tokens are more than the budget allows; None: only the device knows.

    Args:
        window: tokens that a query reads whether selected or not; 0: none.
        budget: `mosa_cache_budget`: how many selected tokens a row and group remembers, those in the window included;
            None: all of them.
        size: of fixed memory; more selected tokens than that are evicted as by a budget. None: memory grows.
        is_coded: whether keys and values are stored as codes, so that they are rounded for all who read them.
    """

    is_over: bool | None = None

    def __init__(self, window: int, budget: int | None = None, size: FixedSize | None = None, is_coded: bool = False):
        self.window, self.is_coded, self.is_fixed = window, is_coded, size is not None
        limit, self.max_cache_len = size or (None, NEVER)
        self.budget = min((each for each in (budget, limit) if each is not None), default=None)
        self.needs_score = self.budget is not None  # by `begin`
        self.overflows = self.is_fixed and self.budget != budget  # whether evictions were not asked for by a budget
        self.record_past = False  # nothing is evicted until `crop` says that it is final
        self._forget()

    def _forget(self) -> None:
        self.calls: CallLog | None = None  # None: there was none yet
        self.memory: EntryMemory | None = None  # None: nothing was selected yet
        self.routed: Routing | None = None  # the one that goes on
        self.recent: Rows | None = None  # of the ring, and tokens that the memory does not know of yet; None: none
        self.kept: PackedKeyValues | None = None  # what the call that goes on found of these; None: none
        self.counts: Counts | None = None  # of the call that goes on; None: not asked

    def reset(self) -> None:
        """Forget all tokens. Fixed memory stays where it is."""
        calls, memory = self.calls, self.memory
        self._forget()
        if self.is_fixed and calls is not None and memory is not None:
            for counts in (calls.num_stored, memory.length, memory.num_selected, memory.num_evicted):
                counts.zero_()
            for states in memory.states.values():
                states.zero_()
            # Of a call that failed half-way nothing is left, and the next one is a first one.
            calls.num_seen, calls.pending_columns, calls.max_tokens, calls.masks, calls.lengths = None, 0, 0, [], []
            self.calls, self.memory, memory.last_read = calls, memory, None

    @property
    def num_tokens(self) -> torch.Tensor | None:
        """`[B]` int64, real tokens seen; None before the first call. May change in place."""
        return None if self.calls is None else self.calls.num_tokens

    def has_tokens(self) -> bool:
        """Whether any call has added tokens; asks the device where the memory is fixed."""
        return self.calls is not None and (not self.is_fixed or bool(self.calls.num_stored.any()))

    def num_overflowed(self) -> int:
        """Selected tokens that were evicted for want of capacity."""
        return int(self.memory.num_evicted.sum()) if self.overflows and self.memory is not None else 0

    def begin(
        self,
        selected: torch.Tensor,
        score: MaybeTensor = None,
        valid: MaybeTensor = None,
        mask: MaybeTensor = None,
        num_tokens: MaybeTensor = None,
    ) -> None:
        """
        A call of T tokens begins.

        Args:
            selected: `[B, G, T]` bool, False on padding.
            score: `[B, G, T]`, what a budget compares, inf for tokens that are never evicted.
            valid: `[B, T]` bool, False on padding, which is on the left; None without padding.
            mask: `valid` as the caller of the model passed it, with padding anywhere.
            num_tokens: `[B]` int64, real tokens seen once it has ended; None: the store counts.
        """
        if self.calls is None:
            self.calls = CallLog(selected, self.is_fixed)
        self.calls.begin(mask, selected.shape[2], num_tokens)
        self.routed = selected, score if self.needs_score else None, valid

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[PendingCounts | None, Read]:
        """
        Take in the call's tokens.

        Args:
            key, value: `[B, G, T, d]`, padding on the left.

        Returns:
            What the device has to be asked, and, of its answer, what the queries may read: for a single token a row,
            packed entries, all of which it reads; else (recent, cached) as `sparse_attention` reads them.
        """
        calls, routing = self._begun()
        memory = self._allocate(key, value, key.shape[1]) if self.memory is None else self.memory
        if self.takes_one_token():
            if torch.is_grad_enabled():  # else nothing reaches a graph
                key, value = key.detach(), value.detach()
            self._append_token(memory, calls, routing, key[:, :, 0], value[:, :, 0])
            return None, lambda counts: memory.read()
        if self.is_coded:
            key, value = rounded(key), rounded(value)
        selected, score, valid = routing
        new = {"key": key, "value": value, "selected": selected} | ({} if score is None else {"score": score})
        kept = self.kept = self._kept(memory, calls)
        recent = self._ring(memory, calls) if self.recent is None else self.recent
        calls.expect(key.shape[2], valid)
        recent = extended(recent, new, valid, calls.num_tokens)
        filled = None if calls.common_length is not None else recent["position"] >= 0
        if filled is not None:
            recent["selected"] = recent["selected"] & filled
        self.recent = recent
        num_far = max(recent["selected"].shape[-1] - self.window, 0)
        pending, ranked = self._pending_counts(recent, kept, num_far)

        # As strings: torch 2.9 cannot capture a function whose annotations it has to evaluate.
        def read(counts: "Counts | None") -> "tuple[KeyValues, PackedKeyValues | None]":
            self.counts = counts
            evicted, cached = self._evictions(kept, *ranked)
            key, value, position, selected = (recent[name] for name in ("key", "value", "position", "selected"))
            far = (None, None) if counts is None else (counts.num_far, counts.up_to)
            return KeyValues(key, value, position, filled, selected, evicted, recent.get("score"), *far), cached

        return pending, read

    def takes_one_token(self) -> bool:
        """Whether the call's only token can be added to memory as it is."""
        _, (selected, _, _) = self._begun()
        memory, is_single = self.memory, selected.shape[2] == 1 and self.recent is None and not self.record_past
        return is_single and (memory is None or memory.may_change(memory.length, *memory.states.values()))

    def holds_only(self, num_columns: int) -> bool:
        """Whether the call of so many tokens is the first, and its queries read all, as they are; asks no device."""
        return not self.is_coded and self.calls is not None and sum(self.calls.lengths) == num_columns <= self.window

    def _begun(self) -> tuple[CallLog, Routing]:
        if self.calls is None or self.routed is None:
            raise RuntimeError("`begin` tells a store of a call before it takes in the call's tokens.")
        return self.calls, self.routed

    def _allocate(self, key: torch.Tensor, value: torch.Tensor, num_groups: int) -> EntryMemory:
        """Memory for entries like `key`, `value` [B, ., ., d]."""
        like = key, value, num_groups, self.needs_score or not self.window, self.needs_score, self.is_coded
        if self.is_fixed and self.budget is not None:
            self.memory = FixedMemory(self.window, self.budget, self.max_cache_len, *like)
        else:
            self.memory = EntryMemory(*like)
        return self.memory

    def end_call(self) -> None:
        """The call's queries have read: what they alone had to read goes, unless `record_past` is set."""
        self.routed = None
        if self.recent is not None and not (self.record_past and self.window):
            self._commit(self.kept, is_final=not self.record_past, counts=self.counts)
        self.counts = None

    # The paper's heads, which project selected tokens only, and have no window.

    def read(self, position: torch.Tensor) -> tuple[PackedKeyValues | None, MaybeTensor]:
        """
        What the selected tokens of the call read of earlier calls, and when the budget evicts the call's own.

        Args:
            position: `[B, T]` int64, of the call's tokens.

        Returns:
            cached, and `evicted_at` `[B, G, T]` int64 of the call's tokens (None: no budget, or nothing to evict).
        """
        calls, (selected, score, _) = self._begun()
        kept = self.kept = None if self.memory is None else self._kept(self.memory, calls)
        recent = {"position": position[:, None].expand_as(selected), "selected": selected}
        recent |= {} if score is None else {"score": score}
        pending, ranked = self._pending_counts(recent, kept, selected.shape[2] if selected.shape[2] > 1 else None)
        (self.counts,) = fetch_counts([pending])
        evicted, kept = self._evictions(kept, *ranked)
        return kept, evicted

    def remember(self, new: KeyValues) -> PackedKeyValues:
        """Append a call's only token, where `takes_one_token`; all that it reads, itself included."""
        calls, routing = self._begun()
        memory = self._allocate(new.key, new.value, routing[0].shape[1]) if self.memory is None else self.memory
        self._append_token(memory, calls, routing, new.key[:, :, 0], new.value[:, :, 0])
        self.routed = None
        return memory.read()

    def append(self, new: KeyValues | None, groups: torch.Tensor | None = None) -> None:
        """
        Append the filled slots of `new`, selected tokens of the call, and evict what the budget does not allow.

        Args:
            new: `[B, G, K, ...]`, or `[B, A, K, ...]` of some groups; None if nothing is selected.
            groups: `[A]` int64, the groups that `new` lists; None: all.
        """
        calls, (selected, _, valid) = self._begun()
        num_groups, num_columns = selected.shape[1:]
        calls.expect(num_columns, valid)
        if new is not None:
            if self.memory is None:
                self._allocate(new.key, new.value, num_groups)
            self.recent = of_selected(new, groups, num_groups)
            self.counts = self.counts and self.counts._replace(up_to=None)  # which is of columns, not of slots
            self.end_call()
            return
        record = self._new_record(calls)
        calls.settle()
        calls.note(record)
        self.routed = self.counts = None

    # One token

    def _append_token(
        self, memory: EntryMemory, calls: CallLog, routing: Routing, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Add a token `[B, G, d]` to every row but those in which it is padding."""
        (selected, *others), most = routing, calls.max_tokens
        score, valid = (None if each is None else each[..., 0] for each in others)
        token = Token(key, value, selected[..., 0], score, valid)
        memory.reserve_one(self.window - most)  # a ring that is not full takes every token
        if self.budget is not None and not memory.may_change(memory.num_evicted):
            memory.num_evicted = memory.num_evicted.clone()
        notes, common = self._can_note(), calls.common_length if valid is None else None
        taken = backend(key).append_token(memory, token, calls.num_stored, self.window, self.budget, notes, common)
        if taken.overwritten is not None and most < self.window:  # no ring is full
            taken = taken._replace(overwritten=None)
        calls.add_one(valid)
        record = UndoRecord(selected.shape[1], *taken) if notes else None
        if record is not None and record.is_evicted is not None:
            record.num_final = calls.num_final
            calls.num_final = torch.where(record.is_evicted.any(-1), calls.num_stored, calls.num_final)
        calls.note(record)

    # What `crop` can undo

    def _can_note(self) -> bool:
        """Whether single tokens are noted. Without a window or a budget nothing is lost that `crop` could need."""
        is_lossy = self.window > 0 or self.needs_score
        return is_lossy and not self.is_fixed and not torch.compiler.is_compiling()

    def _new_record(self, calls: CallLog) -> UndoRecord | None:
        """Of what is pending, if that is a single column and no more; before the memory takes it in."""
        memory = self.memory
        if memory is None or not self._can_note() or calls.pending_columns != 1 or self.record_past:
            return None
        record = UndoRecord(memory.length.shape[1])
        if self.window and calls.max_tokens > self.window:
            record.overwritten = memory.gather(memory.start + (calls.num_stored % self.window)[:, None])
        return record

    # Several tokens

    def _kept(self, memory: EntryMemory, calls: CallLog) -> PackedKeyValues | None:
        """The kept entries; None if there are none, as far as that is known without asking the device."""
        # Of so few tokens memory that grows may have kept some, if there were more until `crop`; but it knows.
        most = min(calls.max_tokens, self.max_cache_len) if self.is_fixed else memory.max_length
        if most <= self.window:
            return None
        return memory.behind(self.window, calls.num_stored.clamp(max=self.window)[:, None])

    def _ring(self, memory: EntryMemory, calls: CallLog) -> Rows | None:
        """The ring in sequence order, as many tokens as a row may have in it."""
        length = min(self.window, calls.max_tokens, self.max_cache_len)
        return of_ring(memory, calls.num_stored, length, self.window) if length else None

    def _pending_counts(
        self, recent: Rows, kept: PackedKeyValues | None, num_far: int | None
    ) -> tuple[PendingCounts | None, tuple[Rows, MaybeTensor]]:
        """
        What to ask if the first `num_far` of the recent tokens `[B, G, S]` will leave the window, and maybe join the
        kept entries; and what a budget compares, as `after_kept` gives it.
        """
        ranked, entries = ({}, None) if self.budget is None else after_kept(self.memory, kept, recent)
        may_evict = self.budget is not None and ranked["score"].shape[-1] > self.budget
        if num_far is None or not (num_far or may_evict) or is_captured():
            return None, (ranked, entries)
        compared, length = ranked["selected"] if may_evict else None, None if kept is None else kept.length
        pending = self._begun()[0].pending_counts(recent["selected"][..., :num_far], length, compared, self.window)
        return pending, (ranked, entries)

    def _evictions(
        self, kept: PackedKeyValues | None, ranked: Rows, entries: MaybeTensor
    ) -> tuple[MaybeTensor, PackedKeyValues | None]:
        """When the budget evicts each of the recent tokens `[B, G, S]`, if it evicts any; and `kept` that say so."""
        if self.budget is None:
            return None, kept
        evicted = evicted_at(**ranked, budget=self.budget, most=self.counts and self.counts.num_selected)
        self.is_over = None if torch.compiler.is_compiling() else evicted is not None
        if evicted is None:
            return None, kept
        if kept is None or entries is None:
            return evicted, kept
        num_kept = entries.shape[-1]
        of_kept = evicted[..., :num_kept].masked_fill(~ranked["selected"][..., :num_kept], NEVER)
        flat = torch.full((len(kept.key),), NEVER, dtype=torch.int64, device=evicted.device)
        return evicted[..., num_kept:], kept._replace(evicted_at=flat.index_put((entries,), of_kept))

    def _commit(self, kept: PackedKeyValues | None, is_final: bool, counts: Counts | None = None) -> None:
        """
        Bring the recent tokens into the memory, where `kept` are, and forget what is no longer read; what the budget
        evicts, only if that `is_final`. `counts`, if they were asked.
        """
        memory, calls, recent = self.memory, self.calls, self.recent
        if memory is None or calls is None or recent is None:
            return
        record, common = self._new_record(calls), calls.common_length
        stays, selected, position = None, recent["selected"], recent["position"]
        if self.budget is not None and is_final:
            stays, selected = self._evict_many(memory, calls, recent, kept, record)
        # The ring gets the last tokens, the kept entries what is selected of those before them.
        num_far = max(position.shape[2] - self.window, 0)
        num_kept = stays.sum(-1) if stays is not None else None if kept is None else kept.length
        before = calls.num_before(num_kept, self.window)
        if not num_far and isinstance(before, int) and not is_captured():  # the ring has all
            counts = Counts(torch.full_like(memory.length, before), [before] * memory.length.numel())
        elif counts is None or selected is not recent["selected"]:  # nobody has asked, or some are evicted
            counts = Counts(length=selected[..., :num_far].sum(-1) + before)
        memory.make_room(kept, stays, self.window, counts.length, counts.lengths)
        rows = recent | {"selected": selected}
        if not num_far and memory.may_write_first() and common == position.shape[2]:
            memory.write_first(rows)
        elif position.shape[2]:
            places = places_of(rows, memory, self.window, before, counts.up_to, common is None)
            memory.write(places, rows, has_null=num_far > 0 or common is None)
        if "score" in memory.states:
            num_selected = selected.sum(-1) if num_kept is None else selected.sum(-1) + num_kept
            memory.num_selected = memory.replaced(memory.num_selected, num_selected)
        calls.settle()
        calls.note(record)
        self.recent = self.kept = self.is_over = None

    def _evict_many(
        self,
        memory: EntryMemory,
        calls: CallLog,
        recent: Rows,
        kept: PackedKeyValues | None,
        record: UndoRecord | None,
    ) -> tuple[MaybeTensor, torch.Tensor]:
        """Which of the kept entries the budget leaves (None: all), and which of the recent tokens stay selected."""
        if self.budget is None or self.is_over is False:
            return None, recent["selected"]
        ranked, entries = after_kept(memory, kept, recent)
        selected = ranked["selected"]
        if self.is_over is None and not torch.compiler.is_compiling():
            if not bool((selected.sum(-1) > self.budget).any()):
                return None, recent["selected"]
        alive = within_budget(**ranked, budget=self.budget)
        evicted = selected & ~alive
        if record is not None:  # of each range, the one token that a single token evicts
            slot, record.is_evicted, record.num_final = evicted.int().argmax(-1), evicted.any(-1), calls.num_final
            own = torch.full_like(recent["position"], memory.null)
            if self.window:  # the ring has them still, all but the new one, which goes anyway
                in_ring = recent["position"] < calls.num_stored[:, None, None]
                own = torch.where(in_ring, memory.start[..., None] + recent["position"] % self.window, own)
            own = own if entries is None else torch.cat((entries, own), dim=-1)
            entry, position = (x.gather(-1, slot[..., None])[..., 0] for x in (own, ranked["position"]))
            record.evicted = memory.gather(torch.where(record.is_evicted, entry, memory.null))
            record.evicted["position"] = position.flatten().to(torch.int32)
            record.evicted["selected"] = torch.ones_like(record.evicted["selected"])
        memory.num_evicted = memory.replaced(memory.num_evicted, memory.num_evicted + evicted.sum(-1))
        if not self.is_fixed:
            calls.num_final = torch.where(evicted.any(-1).any(-1), calls.num_tokens, calls.num_final)
        num_kept = alive.shape[-1] - recent["selected"].shape[-1]
        return alive[..., :num_kept] if num_kept else None, alive[..., num_kept:]

    # Going back, and other rows

    def num_croppable(self, num_columns: int) -> int:
        """How many of the last columns, padding included, `crop` can forget; not of fixed memory."""
        return num_columns if self.calls is None else self.calls.num_croppable(num_columns, self.window)

    def crop(self, num_columns: int) -> None:
        """
        Forget the last columns of the cache, padding among them included, as many as `num_croppable` allows, or all
        that there are. What `record_past` has kept for this goes.
        """
        memory, calls = self.memory, self.calls
        if calls is None:
            return
        if num_columns >= calls.num_columns:
            self._forget()
            return
        if memory is not None:
            num_columns = self._undo(memory, calls, num_columns)
        if num_columns:
            removed = calls.num_removed(num_columns)  # [B]
            calls.forget(num_columns)
            num_tokens = calls.num_tokens - removed
            calls.max_tokens = int(num_tokens.max())
            calls.num_lost = calls.num_lost.maximum(calls.num_stored - self.window)
            if self.recent is not None and memory is not None:
                self.recent = cropped(self.recent, num_tokens, removed)
                calls.num_seen = num_tokens
                # The ring may be left with a place for which there is no token any more.
                entries, filled = memory.slots()
                memory.deselect(entries[..., : self.window][filled[..., : self.window]])
            else:
                if memory is not None:
                    self._crop_memory(memory, calls.num_stored, num_tokens)
                calls.num_stored = num_tokens
        may_exceed = self.record_past and self.budget is not None and not calls.records  # the kept entries the budget
        if self.recent is None and memory is not None and may_exceed:
            self.recent = of_ring(memory, calls.num_stored, min(self.window, calls.max_tokens), self.window)
        calls.pending_columns, self.is_over, self.counts = 0, None, None
        self._commit(None if memory is None else self._kept(memory, calls), is_final=True)

    def _undo(self, memory: EntryMemory, calls: CallLog, num_columns: int) -> int:
        """Undo single tokens, if that many columns go beyond what is pending; returns how many of them remain."""
        if not calls.records or num_columns <= calls.pending_columns:
            return num_columns
        num_columns -= calls.pending_columns
        calls.forget(calls.pending_columns)
        self.recent, calls.num_seen, calls.pending_columns = None, None, 0
        num_undone = min(num_columns, len(calls.records))
        memory.reserve(num_undone)  # as much as may come back
        for record in calls.pop_records(num_undone):
            removed = calls.num_removed(1)  # [B], 0 where it was padding
            calls.forget(1)
            record.undo(memory, calls.num_stored, removed, self.window)
            calls.num_stored = calls.num_stored - removed
            if record.is_evicted is not None and record.num_final is not None:
                memory.num_evicted = memory.num_evicted - record.is_evicted.long()
                calls.num_final = record.num_final
        memory.repack(*memory.slots())
        calls.max_tokens = int(calls.num_stored.max())
        return num_columns - num_undone

    def _crop_memory(self, memory: EntryMemory, num_stored: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Forget the tokens at or behind positions `num_tokens` [B], of `num_stored` [B] that the memory knows of."""
        entries, filled = memory.slots()
        if self.window:
            # The place of a token that goes from a full ring stays, holding no selected token, for the next one.
            slot = torch.arange(entries.shape[-1], device=entries.device)
            newest = num_stored[:, None, None] - 1
            gone = newest - (newest - slot) % self.window >= num_tokens[:, None, None]
            gone = gone & filled & (slot < self.window)
            memory.deselect(entries[gone])
            stays = filled & (~gone | (num_stored > self.window)[:, None, None])
        else:
            stays = filled & (memory.states["position"][entries] < num_tokens[:, None, None])
        memory.repack(entries, stays)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was (beam search, batch repetition and selection)."""
        if self.calls is None:
            return
        rows = rows.to(self.calls.num_stored.device)
        self.calls.select_rows(rows)
        if self.recent is not None:
            self.recent = {name: own[rows] for name, own in self.recent.items()}
        if self.memory is not None:
            self.memory.select_rows(rows)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held in memory."""
        held = []
        if self.memory is not None and self.calls is not None:
            held = [*self.memory.tensors(), self.calls.num_stored]
            held += [states for record in self.calls.records for states in record.state().values()]
        return held + list((self.recent or {}).values())
