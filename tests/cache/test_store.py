"""
The sparse store, with growing and fixed memory and both ways of being filled, against a list of tuples: any calls, and
every operation that a cache knows, in any order.
"""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from transformers import DynamicCache, StaticCache
from transformers.models.llama import LlamaConfig

from mosa_hf.cache import (
    CacheInForward,
    GroupSet,
    Routed,
    SparseSpec,
    cache_bytes,
    calls,
    set_store_state,
    store_state,
    upgrade_cache,
)
from mosa_hf.cache import layer as cache_layer
from mosa_hf.cache.fixed_memory import static_capacity
from mosa_hf.cache.memory import AHEAD, SLACK
from mosa_hf.kernels.entries import PackedKeyValues, plain
from mosa_hf.kernels.tensors import KeyValues
from mosa_hf.routing import CallLayout, TokenMask

MAX_COLUMNS, MAX_LENGTH = 60, 90
SPARSITY = 8  # of a static cache's capacity, which overflows at times


class Row:
    """One row of the batch: for each real token (its number, [selected], [score]) by group, and what is final."""

    def __init__(self, num_groups: int):
        self.columns: list[int | None] = []  # as the caller passed them; None: padding
        self.tokens: list[tuple[int, list[bool], list[float]]] = []
        self.num_lost = [0] * num_groups  # of each group, tokens before these have left the window for good
        self.num_final = [0] * num_groups  # ... `crop` cannot go back before these
        self.steps: list[tuple[list[int], list[int]]] = []  # these two before each of the last calls of one token

    def alive(self, group: int, t: int, limit: int | None) -> set[int]:
        """Positions of the selected tokens up to t that the limit has left: streaming top-k, ties to the earlier."""
        chosen = [j for j in range(t + 1) if self.tokens[j][1][group]]
        return set(sorted(chosen, key=lambda j: (-self.tokens[j][2][group], j))[:limit])


MODES = st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad])
SEEDS = st.integers(0, 2**16)


def by_states(cache):
    """A copy whose stores were told what those of `cache` remember, as a file says it."""
    copied = copy.deepcopy(cache)
    for store, own in zip(copied.layers[0].stores, cache.layers[0].stores, strict=True):
        tensors, plain = store_state(own)
        store.reset()
        set_store_state(store, {name: x.clone() for name, x in tensors.items()}, json.loads(json.dumps(plain)))
    return copied


COPIES = {"copy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "states": by_states}


class Store(RuleBasedStateMachine):
    """A cache of one layer, and the rows that it should hold."""

    is_static = is_paper = is_coded = False

    @initialize(
        budget=st.sampled_from([None, None, 1, 3, 6]),
        windows=st.tuples(st.sampled_from([0, 1, 4, 7]), st.sampled_from([2, 5])),
        num_rows=st.integers(1, 3),
        max_undo=st.sampled_from([32, 4]),
        mode=MODES,
        length=st.sampled_from([1, 2, 9, 25]),
        seed=SEEDS,
    )
    def begin(self, budget, windows, num_rows, max_undo, mode, length, seed):
        self.saved, calls.MAX_UNDO, self.num_steps = calls.MAX_UNDO, max_undo, max_undo
        if self.is_coded:  # keys that codes stand for exactly are none any more, once they are turned
            self.turned, cache_layer.turned = cache_layer.turned, lambda key, center: key
        # Of a static cache, upstream's part stays in the mode that made it.
        self.mode = torch.no_grad if self.is_static and mode is torch.enable_grad else mode
        self.num_recorded = self.num_tokens_ever = 0
        self.budget = budget
        if self.is_paper:
            self.num_groups, dense, sets = 3, None, (GroupSet((0, 1, 2), 0, SPARSITY),)
        else:
            self.num_groups, dense = 5, (1,)
            sets = (GroupSet((0, 3, 4), windows[0], SPARSITY), GroupSet((2,), windows[1], SPARSITY))
        self.spec = SparseSpec(dense, sets, self.budget, dtype="int8" if self.is_coded else None)
        self.window = {group: each.window for each in sets for group in each.groups}
        self.limit = self.budget
        if self.is_static:
            config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=4)
            self.cache = StaticCache(config=config, max_cache_len=MAX_LENGTH)
            capacity = static_capacity(MAX_LENGTH, SPARSITY)
            self.limit = capacity if self.budget is None else min(capacity, self.budget)
        else:
            self.cache = DynamicCache()
        upgrade_cache(self.cache, {0: self.spec}, MAX_LENGTH)
        self.rows = [Row(self.num_groups) for _ in range(num_rows)]
        with self.mode():
            self.call(length, "left", seed)

    def teardown(self):
        if hasattr(self, "saved"):
            calls.MAX_UNDO = self.saved
        if hasattr(self, "turned"):
            cache_layer.turned = self.turned

    def within(self, mode):
        return (self.mode if self.is_static else mode)()

    def is_short(self):
        return self.num_columns <= MAX_COLUMNS

    @precondition(is_short)
    @rule(mode=MODES, number=st.integers(1, 5), padding=st.sampled_from([None, None, "left", "right"]), seed=SEEDS)
    def single_tokens(self, mode, number, padding, seed):
        with self.within(mode):
            for i in range(number):
                self.call(1, padding, seed + i)

    @precondition(is_short)
    @rule(mode=MODES, length=st.sampled_from([2, 3, 11]), padding=st.sampled_from([None, "left", "right"]), seed=SEEDS)
    def several_tokens(self, mode, length, padding, seed):
        with self.within(mode):
            self.call(length, padding, seed)

    @rule(mode=MODES, seed=SEEDS, how=st.sampled_from(["reorder", "repeat", "select"]))
    def select(self, mode, seed, how):
        """Reorder, repeat or select rows."""
        random = torch.Generator().manual_seed(seed)
        with self.within(mode):
            if how == "repeat" and len(self.rows) <= 3 and not self.is_static:
                self.cache.batch_repeat_interleave(2)
                rows = [i for i in range(len(self.rows)) for _ in range(2)]
            elif how == "select" and not self.is_static:
                rows = torch.randperm(len(self.rows), generator=random)[: max(1, len(self.rows) - 1)].tolist()
                self.cache.batch_select_indices(torch.tensor(rows))
            else:
                rows = torch.randint(len(self.rows), (len(self.rows),), generator=random).tolist()
                self.cache.reorder_cache(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[i]) for i in rows]

    @rule(mode=MODES, what=st.sampled_from(["copy", "pickle", "states", "record", "reset"]))
    def do_more(self, mode, what):
        """Rules are tried equally often, and these less than others."""
        with self.within(mode):
            if what == "record" and not self.is_static:
                self.cache.activate_past_recording()
            elif what == "reset":
                self.cache.reset()
                self.rows = [Row(self.num_groups) for _ in self.rows]
                self.num_recorded = 0
            elif what in COPIES:
                original, self.cache = self.cache, COPIES[what](self.cache)
                with torch.inference_mode():
                    for store in original.layers[0].stores:  # the two share nothing
                        for tensor in store.tensors():
                            tensor.zero_()

    @rule(
        mode=MODES, number=st.integers(0, MAX_LENGTH), most=st.sampled_from(["all", "one", "steps", "steps and one"])
    )
    def crop(self, mode, number, most):
        if self.is_static:
            with pytest.raises(RuntimeError, match="DynamicCache"):
                self.layer.crop(-1)
            return
        num_steps = len(self.rows[0].steps)
        bound = {"all": self.num_columns + 1, "one": 1, "steps": num_steps, "steps and one": num_steps + 1}[most]
        with self.within(mode):
            self.crop_columns(min(number, bound))

    @property
    def layer(self):
        return self.cache.layers[0]

    def states(self, tokens: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
        """`[B, G, T, 2]`: what a key or value says of its token and group."""
        group = torch.tensor(groups).view(1, -1, 1).expand(len(tokens), -1, tokens.shape[1])
        return torch.stack(self.said(tokens[:, None].expand_as(group), group), dim=-1).float()

    def said(self, token, group):
        """The same of one; as codes, numbers that nothing rounds."""
        return (127 * (token + 1), 20 * group * (token + 1)) if self.is_coded else (token, group)

    def call(self, length: int, padding: str | None, seed: int) -> None:
        """A model call of `length` tokens a row, some of them padding, on one side or the other."""
        batch_size, random = len(self.rows), torch.Generator().manual_seed(seed)
        valid = torch.ones(batch_size, length, dtype=torch.bool)
        if padding is not None:
            amount = torch.randint(length + 1, (batch_size, 1), generator=random)
            valid = torch.arange(length) >= amount if padding == "left" else torch.arange(length) < amount
        selected = (torch.rand(batch_size, self.num_groups, length, generator=random) < 0.4) & valid[:, None]
        score = torch.randint(-3, 4, selected.shape, generator=random).float()  # with ties
        tokens = self.num_tokens_ever + torch.arange(batch_size * length).view(batch_size, length)
        self.num_tokens_ever += batch_size * length
        num_cached = torch.tensor([len(row.tokens) for row in self.rows])
        mask = TokenMask(None if valid.all() else valid)
        counts = seed % 2 == 0  # else each store does
        layout = CallLayout.build(tokens, mask, torch.arange(length)[None], num_cached, False, counts=counts)
        for b, row in enumerate(self.rows):
            for t in range(length):
                row.columns.append(int(tokens[b, t]) if valid[b, t] else None)
                if valid[b, t]:
                    row.tokens.append((int(tokens[b, t]), selected[b, :, t].tolist(), score[b, :, t].tolist()))
        new = [int(n) for n in valid.sum(1)]
        routed = [
            Routed(selected[:, each.groups].transpose(1, 2), score[:, each.groups].transpose(1, 2))
            for each in self.spec.sets
        ]
        self.layer.begin(layout, routed)
        if self.is_paper:
            CacheInForward(self.cache).update(*2 * [tokens[:, None, :, None].float()], 0)
            self.append_selected(layout, tokens, selected, score, new)
        else:
            groups = tuple(range(self.num_groups))
            dense, _ = CacheInForward(self.cache).update(self.states(tokens, groups), -self.states(tokens, groups), 0)
            if dense.shape[1] > 1:  # of all groups, as plain attention of a first call within all windows takes them
                assert 1 < length == self.num_columns <= min(each.window for each in self.spec.sets)
                dense = dense[:, list(self.layer.dense_groups)]
            expected = 20 * dense[..., 0] / 127 if self.is_coded else torch.ones_like(dense[..., 0])
            assert dense.shape[1] == 1 and (dense[..., 1] == expected)[:, :, : self.num_columns].all()
            for each, read in zip(self.spec.sets, self.layer.readable(), strict=True):
                self.check_read(read, each, new)
                if not isinstance(read, PackedKeyValues) and read[0].num_far is not None:
                    far = read[0].selected[..., : max(read[0].selected.shape[-1] - each.window, 0)]
                    assert read[0].num_far == far.sum(-1).max() and torch.equal(read[0].far_up_to, far.cumsum(-1))
            self.layer.end_call()
        if self.layer.record_past:
            self.num_recorded += length
        else:
            for row in self.rows:
                step = row.num_lost[:], row.num_final[:]
                row.steps = [*row.steps, step][-self.num_steps :] if length == 1 else []
            self.settle()
        self.check_bytes()

    @property
    def num_columns(self) -> int:
        return len(self.rows[0].columns)

    def append_selected(self, layout, tokens, selected, score, new: list[int]) -> None:
        """As the paper's heads do, of the groups that select anything."""
        store = self.layer.stores[0]
        position, tokens = layout.pad_left(layout.position, 1), layout.pad_left(tokens, 1)
        selected, score = layout.pad_left(selected, 2), layout.pad_left(score, 2)
        cached, evicted = store.read(position)
        key = self.states(tokens, (0, 1, 2))
        recent = KeyValues(key, -key, position[:, None].expand_as(selected), selected, selected, evicted, score)
        self.check_read((recent, cached), self.spec.sets[0], new)
        groups = selected.any(2).any(0).nonzero()[:, 0]
        if len(groups) == 0:
            store.append(None)
        elif len(groups) < self.num_groups:
            store.append(KeyValues(*(None if x is None else x[:, groups] for x in recent)), groups)
        else:
            store.append(recent)

    def check_read(self, read, each: GroupSet, new: list[int]) -> None:
        """Query t reads { j <= t : j selected and within the limit, or t - j < window }, each key once."""
        for b, row in enumerate(self.rows):
            for i, group in enumerate(each.groups):
                for t in range(len(row.tokens) - new[b], len(row.tokens)):
                    window = set(range(max(0, t - each.window + 1), t + 1)) if each.window else set()
                    expected = row.alive(group, t, self.limit) | window
                    expected = sorted(tuple(map(float, self.said(row.tokens[j][0], group))) for j in expected)
                    actual = self.read_by(read, b, i, t, each.window)
                    assert sorted(key for key, _ in actual) == expected
                    assert all(value == (-key[0], -key[1]) for key, value in actual)

    @staticmethod
    def read_by(read, row: int, group: int, t: int, window: int) -> list[tuple]:
        """(key, value) of what the query at position t reads."""
        if isinstance(read, PackedKeyValues):
            padded = read.pad()
            states = [x[row, group][padded.valid[row, group]] for x in (padded.key, padded.value)]
            # Which the store may have kept from earlier steps.
            split = plain(*read.split()[row * read.length.shape[1] + group])
            assert all(torch.equal(one, own) for one, own in zip(split, states, strict=True))
            key, value = (own.tolist() for own in states)
            return [(tuple(k), tuple(v)) for k, v in zip(key, value, strict=True)]
        recent, cached = read
        slots = []
        for part in (cached and cached.pad(), recent):
            for s in range(0 if part is None else part.key.shape[2]):
                if part.valid is not None and not part.valid[row, group, s]:
                    continue
                position = int(part.position[row, group, s])
                is_selected = part.selected is None or bool(part.selected[row, group, s])
                is_alive = part.evicted_at is None or t < int(part.evicted_at[row, group, s])
                if position <= t and (is_selected and is_alive or (part is recent and t - position < window)):
                    slots.append((tuple(part.key[row, group, s].tolist()), tuple(part.value[row, group, s].tolist())))
        return slots

    def settle(self) -> None:
        """What nobody can ask for any more: tokens that have left the window, or that the limit evicted."""
        for row in self.rows:
            for group, window in self.window.items():
                count = len(row.tokens)
                row.num_lost[group] = max(row.num_lost[group], count - window)
                chosen = sum(token[1][group] for token in row.tokens)
                if self.limit is not None and chosen > self.limit:
                    dead = {j for j in range(count) if row.tokens[j][1][group]} - row.alive(
                        group, count - 1, self.limit
                    )
                    died = max((self.death(row, group, j) for j in dead), default=0)
                    row.num_final[group] = max(row.num_final[group], died + 1)

    def death(self, row: Row, group: int, j: int) -> int:
        """The position at which the limit evicts token j."""
        return next(t for t in range(j, len(row.tokens)) if j not in row.alive(group, t, self.limit))

    def crop_columns(self, num_removed: int) -> None:
        """Crop some columns, or be refused where what would be needed is gone, and nothing else; never of all."""
        if num_removed >= self.num_columns:
            if self.num_columns:  # upstream's layers without tokens could not be cropped until 5.20
                self.cache.crop(-num_removed)
            self.rows = [Row(self.num_groups) for _ in self.rows]
            self.num_recorded = 0
            return
        num_steps = len(self.rows[0].steps)
        num_free = self.num_recorded + num_steps  # so many columns can be taken back in any case
        undone = min(max(num_removed - self.num_recorded, 0), num_steps)
        lossy, final = False, False
        for row in self.rows:
            real = [token is not None for token in row.columns]
            remaining = sum(real[: self.num_columns - num_removed])
            if num_removed <= num_free or remaining == sum(real[: self.num_columns - num_free]):
                continue
            num_lost, num_final = row.steps[0] if row.steps else (row.num_lost, row.num_final)
            for group, window in self.window.items():
                lossy |= bool(window and max(0, remaining - window + 1) < num_lost[group])
                final |= remaining < num_final[group]
        before = [tensor.clone() for store in self.layer.stores for tensor in store.tensors()]
        try:
            self.cache.crop(-num_removed)
        except RuntimeError as error:
            # Evictions are remembered by call, so a call that evicted at all may not be cut into.
            assert lossy or "budget" in str(error) and self.limit is not None
            assert num_removed > num_steps or self.layer.record_past
            after = [tensor for store in self.layer.stores for tensor in store.tensors()]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            return
        assert not lossy and not final
        for row in self.rows:
            if undone:
                row.num_lost, row.num_final = row.steps[-undone]
                row.steps = row.steps[:-undone]
            elif self.num_recorded:
                row.steps = []
            cut = row.columns[self.num_columns - num_removed :] if num_removed else []
            row.tokens = row.tokens[: len(row.tokens) - sum(token is not None for token in cut)]
        for row in self.rows:
            row.columns = row.columns[: len(row.columns) - num_removed]
        self.num_recorded = 0
        self.settle()

    def check_bytes(self) -> None:
        """No store holds more entries than it must and a little slack."""
        if self.is_static or self.layer.record_past:
            return
        for store, each in zip(self.layer.stores, self.spec.sets, strict=True):
            count = 0
            for row in self.rows:
                for group in each.groups:
                    last, window = len(row.tokens) - 1, min(each.window, len(row.tokens))
                    alive = row.alive(group, last, self.limit)
                    count += window + sum(j <= last - window for j in alive)
            runs = len(self.rows) * len(each.groups)
            held = 0 if store.memory is None else store.memory.null
            # A ring that is not full gets room for tokens to come, of which none will be without an entry.
            ahead = sum(min(max(each.window - len(row.tokens), 0), AHEAD) for row in self.rows) * len(each.groups)
            assert held <= count + ahead + 3 * runs + (count + ahead + runs) / SLACK * 2
            noted = [states for step in (store.calls.records) for states in (step.overwritten, step.evicted) if states]
            noted = sum(len(states["key"]) for states in noted)
            assert noted <= len(self.rows[0].steps) * runs * (1 if self.limit is None else 2)
            assert self.num_columns > each.window or all(step.overwritten is None for step in (store.calls.records))
        assert cache_bytes(self.cache)["sparse"] == sum(
            tensor.untyped_storage().nbytes() for store in self.layer.stores for tensor in store.tensors()
        )


class FixedStore(Store):
    is_static = True


class CodedStore(Store):
    is_coded = True


class FixedCodedStore(FixedStore, CodedStore):
    pass


class PaperStore(Store):
    is_paper = True


class FixedPaperStore(FixedStore, PaperStore):
    pass


SETTINGS = settings(
    max_examples=20,
    stateful_step_count=40,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestGrowing, TestFixed = Store.TestCase, FixedStore.TestCase
TestPaper, TestFixedPaper = PaperStore.TestCase, FixedPaperStore.TestCase
TestCoded, TestFixedCoded = CodedStore.TestCase, FixedCodedStore.TestCase
for case in (TestGrowing, TestFixed, TestPaper, TestFixedPaper, TestCoded, TestFixedCoded):
    case.settings = SETTINGS
for case in (TestFixed, TestFixedPaper, TestCoded, TestFixedCoded):
    case.pytestmark = [pytest.mark.slow]
del case  # else it is a test, too


@pytest.mark.parametrize("record_past", [False, True])
def test_what_is_kept_survives_a_crop_to_the_window(record_past):
    """Two tokens, one taken back: with a window of one the other is read if it was selected, though none are far."""
    store = Store()
    store.begin(
        budget=None, windows=(1, 2), num_rows=1, max_undo=32, mode=torch.no_grad, length=2, seed=19987
    )  # selects the first token in one of the groups
    if record_past:
        store.layer.activate_past_recording()
    store.crop(mode=torch.no_grad, most="all", number=1)
    assert [token[1] for token in store.rows[0].tokens] == [[False, False, False, False, True]]
    for _ in range(2):  # each asks what queries read
        store.several_tokens(length=2, mode=torch.no_grad, padding=None, seed=0)
    store.teardown()


def test_a_call_behind_padding_that_a_crop_has_left_is_not_the_first():
    store = Store()
    store.begin(
        budget=None, windows=(4, 2), num_rows=1, max_undo=32, mode=torch.no_grad, length=2, seed=0
    )  # one column of padding, and a token
    store.crop(mode=torch.no_grad, most="all", number=1)
    assert store.rows[0].columns == [None]
    store.several_tokens(length=2, mode=torch.no_grad, padding=None, seed=0)  # dense groups have three columns
    store.teardown()
