"""
The sparse store, under both growth policies and both ways of being filled, against a list of tuples: random calls, and
every operation that a cache knows.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.llama import LlamaConfig

from mosa_hf.cache import GroupSet, Routed, SparseSpec, cache_bytes, upgrade_cache
from mosa_hf.cache import store as store_module
from mosa_hf.cache.growth import SLACK, static_capacity
from mosa_hf.kernels.tensors import KeyValues, Runs
from mosa_hf.routing import CallLayout, TokenMask

NUM_CASES = 80
MAX_LENGTH = 90
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


class Case:
    """A cache of one layer, and the rows that it should hold."""

    def __init__(self, seed: int, is_static: bool, is_paper: bool, num_steps: int = store_module.NUM_STEPS):
        self.num_steps, self.num_recorded = num_steps, 0
        self.random = torch.Generator().manual_seed(seed)
        self.is_static, self.is_paper = is_static, is_paper
        self.budget = self.pick([None, None, 1, 3, 6])
        if is_paper:
            self.num_groups, dense, sets = 3, None, (GroupSet((0, 1, 2), 0, SPARSITY),)
        else:
            self.num_groups, dense = 5, (1,)
            windows = (self.pick([0, 1, 4, 7]), self.pick([2, 5]))
            sets = (GroupSet((0, 3, 4), windows[0], SPARSITY), GroupSet((2,), windows[1], SPARSITY))
        self.spec = SparseSpec(dense, sets, self.budget)
        self.window = {group: each.window for each in sets for group in each.groups}
        self.limit = self.budget
        if is_static:
            config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=4)
            self.cache = StaticCache(config=config, max_cache_len=MAX_LENGTH)
            capacity = self.capacity = static_capacity(MAX_LENGTH, SPARSITY)
            self.limit = capacity if self.budget is None else min(capacity, self.budget)
        else:
            self.cache = DynamicCache()
        upgrade_cache(self.cache, {0: self.spec}, MAX_LENGTH)
        self.rows = [Row(self.num_groups) for _ in range(self.pick([1, 2, 3]))]
        self.num_tokens_ever = 0

    def pick(self, choices: list):
        return choices[int(torch.randint(len(choices), (1,), generator=self.random))]

    @property
    def layer(self):
        return self.cache.layers[0]

    def states(self, tokens: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
        """`[B, G, T, 2]`: what a key or value says of its token and group."""
        group = torch.tensor(groups).view(1, -1, 1).expand(len(tokens), -1, tokens.shape[1])
        return torch.stack((tokens[:, None].expand_as(group), group), dim=-1).float()

    def call(self, length: int) -> None:
        """A model call of `length` tokens a row, some of them padding, on either side."""
        batch_size = len(self.rows)
        valid = torch.ones(batch_size, length, dtype=torch.bool)
        if self.pick([False, True]):
            amount = torch.randint(length + 1, (batch_size, 1), generator=self.random)
            valid = torch.arange(length) >= amount if self.pick([False, True]) else torch.arange(length) < amount
        selected = (torch.rand(batch_size, self.num_groups, length, generator=self.random) < 0.4) & valid[:, None]
        score = torch.randint(-3, 4, selected.shape, generator=self.random).float()  # with ties
        tokens = self.num_tokens_ever + torch.arange(batch_size * length).view(batch_size, length)
        self.num_tokens_ever += batch_size * length
        num_cached = torch.tensor([len(row.tokens) for row in self.rows])
        mask = TokenMask(None if valid.all() else valid)
        layout = CallLayout.build(tokens, mask, torch.arange(length)[None], num_cached, False)
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
            self.cache.update(*2 * [tokens[:, None, :, None].float()], 0)
            self.append_selected(layout, tokens, selected, score, new)
        else:
            groups = tuple(range(self.num_groups))
            dense, _ = self.cache.update(self.states(tokens, groups), -self.states(tokens, groups), 0)
            assert dense.shape[1] == 1 and (dense[..., 1] == 1)[:, :, : self.num_columns].all()
            for each, read in zip(self.spec.sets, self.layer.readable(), strict=True):
                self.check_read(read, each, new)
            self.layer.evict()
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
        kept, until = store.read(position)
        key = self.states(tokens, (0, 1, 2))
        near = KeyValues(key, -key, position[:, None].expand_as(selected), selected, selected, until, score)
        self.check_read((near, kept), self.spec.sets[0], new)
        groups = selected.any(2).any(0).nonzero()[:, 0]
        if len(groups) == 0:
            store.append(None)
        elif len(groups) < self.num_groups:
            store.append(KeyValues(*(None if x is None else x[:, groups] for x in near)), groups)
        else:
            store.append(near)

    def check_read(self, read, each: GroupSet, new: list[int]) -> None:
        """Query t reads { j <= t : j selected and within the limit, or t - j < window }, each key once."""
        for b, row in enumerate(self.rows):
            for i, group in enumerate(each.groups):
                for t in range(len(row.tokens) - new[b], len(row.tokens)):
                    window = set(range(max(0, t - each.window + 1), t + 1)) if each.window else set()
                    expected = row.alive(group, t, self.limit) | window
                    expected = sorted((float(row.tokens[j][0]), float(group)) for j in expected)
                    actual = self.read_by(read, b, i, t, each.window)
                    assert sorted(key for key, _ in actual) == expected
                    assert all(value == (-key[0], -key[1]) for key, value in actual)

    @staticmethod
    def read_by(read, row: int, group: int, t: int, window: int) -> list[tuple]:
        """(key, value) of what the query at position t reads."""
        if isinstance(read, Runs):
            padded = read.pad()
            states = [x[row, group][padded.valid[row, group]] for x in (padded.key, padded.value)]
            split = read.split()[row * read.count.shape[1] + group]  # which the store may have kept from earlier steps
            assert all(torch.equal(one, own) for one, own in zip(split, states, strict=True))
            key, value = (own.tolist() for own in states)
            return [(tuple(k), tuple(v)) for k, v in zip(key, value, strict=True)]
        near, kept = read
        slots = []
        for part in (kept and kept.pad(), near):
            for s in range(0 if part is None else part.key.shape[2]):
                if part.valid is not None and not part.valid[row, group, s]:
                    continue
                position = int(part.position[row, group, s])
                is_selected = part.selected is None or bool(part.selected[row, group, s])
                is_alive = part.until is None or t < int(part.until[row, group, s])
                if position <= t and (is_selected and is_alive or (part is near and t - position < window)):
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

    def crop(self) -> None:
        """Crop some columns, or be refused where what would be needed is gone, and nothing else."""
        num_removed = int(torch.randint(0, self.num_columns + 1, (1,), generator=self.random))
        num_steps = len(self.rows[0].steps)
        num_removed = min(num_removed, self.pick([self.num_columns, 1, num_steps, num_steps + 1]))
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

    def select(self) -> None:
        """Reorder, repeat or select rows."""
        how = self.pick(["reorder", "repeat", "select"])
        if how == "repeat" and len(self.rows) <= 3 and not self.is_static:
            self.cache.batch_repeat_interleave(2)
            rows = [i for i in range(len(self.rows)) for _ in range(2)]
        elif how == "select" and not self.is_static:
            rows = torch.randperm(len(self.rows), generator=self.random)[: max(1, len(self.rows) - 1)].tolist()
            self.cache.batch_select_indices(torch.tensor(rows))
        else:
            rows = torch.randint(len(self.rows), (len(self.rows),), generator=self.random).tolist()
            self.cache.reorder_cache(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[i]) for i in rows]

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
            held = 0 if store.key is None else len(store.key) - 1
            assert held <= count + 3 * runs + (count + runs) / SLACK * 2
            noted = [states for step in store.steps for states in (step.overwritten, step.evicted) if states]
            noted = sum(len(states["key"]) for states in noted)
            assert noted <= len(self.rows[0].steps) * runs * (1 if self.limit is None else 2)
            assert self.num_columns > each.window or all(step.overwritten is None for step in store.steps)
        assert cache_bytes(self.cache)["sparse"] == sum(
            tensor.untyped_storage().nbytes() for store in self.layer.stores for tensor in store.tensors()
        )


@pytest.mark.parametrize("is_paper", [False, True], ids=["sparse groups", "paper's heads"])
@pytest.mark.parametrize("is_static", [False, True], ids=["growing", "fixed"])
def test_against_a_list_of_tuples(is_static, is_paper, monkeypatch):
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad]
    for seed in range(NUM_CASES):
        num_steps = [32, 4][seed % 2]
        monkeypatch.setattr(store_module, "NUM_STEPS", num_steps)
        case = Case(seed, is_static, is_paper, num_steps)
        if is_static:  # upstream's part of it stays in the mode that made it
            modes = [case.pick([torch.no_grad, torch.inference_mode])]
        with modes[0]():
            case.call(case.pick([1, 2, 9, 25]))
        for _ in range(12):
            if case.num_columns > 60:
                break
            step = case.pick(["one", "one", "ones", "ones", "some", "crop", "crop", "select", "record", "copy"])
            with case.pick(modes)():
                if step == "one":
                    case.call(1)
                elif step == "ones":
                    for _ in range(case.pick([2, 3, 5])):
                        case.call(1)
                elif step == "some":
                    case.call(case.pick([2, 3, 11]))
                elif step == "select":
                    case.select()
                elif step == "copy":
                    original, case.cache = (
                        case.cache,
                        case.pick([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])(case.cache),
                    )
                    with torch.inference_mode():
                        for store in original.layers[0].stores:  # the two share nothing
                            for tensor in store.tensors():
                                tensor.zero_()
                elif is_static:
                    with pytest.raises(RuntimeError, match="DynamicCache"):
                        case.layer.crop(-1)
                elif step == "record":
                    case.cache.activate_past_recording()
                else:
                    case.crop()


@pytest.mark.parametrize("is_static", [False, True], ids=["growing", "fixed"])
def test_reset(is_static):
    case = Case(3, is_static, False)
    with torch.no_grad():
        case.call(9)
        case.call(1)
        case.cache.reset()
        case.rows = [Row(case.num_groups) for _ in case.rows]
        case.call(5)
        case.call(1)
