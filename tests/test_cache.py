"""The sparse KV cache against a plain list of tokens, and its manners towards the caches it is built into."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

from mosa_hf import cache_bytes
from mosa_hf.cache import DENSE_ROOM, RECENT_ROOM, PreallocatedDynamicLayer, SparseLayer, SparseSpec, upgrade_cache
from mosa_hf.kernels.layout import NEVER, KeyValues, Tokens
from mosa_hf.modeling.tracing import trace_routing

from .conftest import FORMS, MIXED_LAYERS, TINY, tiny_config, tiny_model

NUM_GROUPS = 2
CHUNKS = st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 2**16))
OTHERS = st.tuples(
    st.sampled_from(["crop", "crop", "record", "reorder", "repeat", "select"]),
    st.integers(0, 5),
    st.integers(0, 2**16),
)
OPERATIONS = st.lists(CHUNKS | OTHERS, min_size=1, max_size=14)


# --- random operations against a plain list ---


@dataclass
class Row:
    """What one row of the batch should remember. A token is a unique number and the groups that selected it."""

    columns: list[int | None] = field(default_factory=list)  # a token, or None for padding
    selected: dict[int, list[bool]] = field(default_factory=dict)  # token → for each group
    score: dict[int, list[float]] = field(default_factory=dict)  # token → for each group
    num_left: int = 0  # real tokens that have left the window
    forgotten: set[tuple[int, int]] = field(default_factory=set)  # (token, group) beyond the budget
    num_final: int = 0  # real tokens that `crop` cannot go back before, because something was forgotten after them

    @property
    def tokens(self) -> list[int]:
        return [token for token in self.columns if token is not None]

    def is_alive(self, token: int, group: int, time: int, budget: int | None) -> bool:
        """DESIGN section 3: fewer than `budget` selected tokens up to `time` score higher, ties to the earlier."""
        if not self.selected[token][group]:
            return False
        rank = [(-self.score[other][group], other) for other in self.tokens[: time + 1] if self.selected[other][group]]
        return budget is None or sum(other < (-self.score[token][group], token) for other in rank) < budget


def states_of(tokens: torch.Tensor, factor: int) -> torch.Tensor:
    """`[B, G, T, 2]`: keys (factor 1) or values (factor -1) that tell token and group; NaN on padding (token -1)."""
    groups = torch.arange(NUM_GROUPS)[:, None].expand(len(tokens), -1, tokens.shape[1])
    states = torch.stack((tokens[:, None].expand_as(groups), groups), dim=-1) * float(factor)
    return states.masked_fill((tokens < 0)[:, None, :, None], torch.nan)


def exposed(entries: KeyValues | None, row: int, group: int) -> list[tuple]:
    """The filled slots in order: (position, key, value, selected, until)."""
    if entries is None:
        return []
    position, key, value = (x[row, group].tolist() for x in (entries.position, entries.key, entries.value))
    filled, selected, until = (
        [default] * len(position) if x is None else x[row, group].tolist()
        for x, default in ((entries.valid, True), (entries.selected, True), (entries.until, NEVER))
    )
    return [slot[:5] for slot in zip(position, key, value, selected, until, filled, strict=True) if slot[5]]


def spec(window: int, budget: int | None = None) -> SparseSpec:
    return SparseSpec(window, budget, sparsity=4, num_groups=NUM_GROUPS, head_dim=2)


class Pair:
    """A cache of one layer, and the rows that it should hold."""

    def __init__(self, batch_size: int, window: int, form: str, budget: int | None):
        self.window, self.form, self.budget = window, form, budget
        self.cache = DynamicCache()
        upgrade_cache(self.cache, {0: spec(window, budget)})
        self.rows = [Row() for _ in range(batch_size)]
        self.record_past = False
        self.num_tokens_ever = 0

    @property
    def sparse(self):
        return self.cache.layers[0].sparse

    def append(self, length: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        batch_size = len(self.rows)
        num_padding = torch.zeros(batch_size, 1, dtype=torch.long)
        if seed % 2:
            num_padding = torch.randint(length + 1, (batch_size, 1), generator=random)
        is_real = torch.arange(length) >= num_padding
        valid = None if is_real.all() else is_real
        tokens = self.num_tokens_ever + torch.arange(batch_size * length).view(batch_size, length)
        tokens = tokens.masked_fill(~is_real, -1)
        self.num_tokens_ever += batch_size * length
        selected = (torch.rand(batch_size, NUM_GROUPS, length, generator=random) < 0.4) & is_real[:, None]
        position = torch.tensor([len(row.tokens) for row in self.rows])[:, None] + (is_real.cumsum(1) - 1).clamp(min=0)

        score = torch.randint(-3, 4, selected.shape, generator=random).float()  # with ties

        dense = tokens[:, None, :, None].float()
        self.cache.update(dense, dense, 0)
        self.sparse.advance(valid, torch.empty(batch_size, length, 0))
        for i, (row, row_tokens) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            row.columns += [None if token < 0 else token for token in row_tokens]
            row.selected |= {token: selected[i, :, t].tolist() for t, token in enumerate(row_tokens)}
            row.score |= {token: score[i, :, t].tolist() for t, token in enumerate(row_tokens)}
        key, value = states_of(tokens, 1), states_of(tokens, -1)
        call = Tokens(
            position,
            valid,
            None,
            None,
            None,
            selected.transpose(1, 2),
            None,
            None if self.budget is None else score.transpose(1, 2),
        )
        if self.form == "all":
            near, kept = self.sparse.update(key, value, call)
            self.check_readable(near, None if kept is None else kept.pad(), is_real)
        else:
            groups = None if self.sparse.kept.count is None else selected.any(2).any(0).nonzero()[:, 0]
            chosen = slice(None) if groups is None else groups
            call = call._replace(
                selected=call.selected[..., chosen], score=None if call.score is None else call.score[..., chosen]
            )
            past, call = self.sparse.read_selected(call, groups)
            new = KeyValues(
                key[:, chosen],
                value[:, chosen],
                position[:, None].expand_as(selected)[:, chosen],
                selected[:, chosen],
                None,
                *(None if x is None else x.transpose(1, 2) for x in (call.until, call.score)),
            )
            if groups is None:
                self.check_readable(new._replace(selected=new.valid), past, is_real)
            self.sparse.append_selected(new, groups)
        if not self.record_past:
            self.forget()

    def forget(self) -> None:
        """What nobody can ask for any more: tokens that have left the window, or the budget."""
        for row in self.rows:
            row.num_left = max(row.num_left, len(row.tokens) - max(self.window - 1, 0))
            for group in range(NUM_GROUPS):
                dead = {
                    (token, group)
                    for token in row.tokens
                    if row.selected[token][group] and not row.is_alive(token, group, len(row.tokens) - 1, self.budget)
                }
                if dead - row.forgotten:
                    row.num_final = len(row.tokens)
                row.forgotten |= dead

    def check_readable(self, near: KeyValues, kept: KeyValues | None, is_real: torch.Tensor) -> None:
        """Query t reads { j <= t : j selected and within the budget, or t - j < window }, each key once."""
        for b, row in enumerate(self.rows):
            num_new = int(is_real[b].sum())
            for group in range(NUM_GROUPS):
                past, recent = exposed(kept, b, group), exposed(near, b, group)
                for t in range(len(row.tokens) - num_new, len(row.tokens)):
                    read = [
                        slot[:3]
                        for slot in past + recent
                        if slot[0] <= t and (slot[3] and t < slot[4] or t - slot[0] < self.window)
                    ]
                    expected = [
                        (j, [token, group], [-token, -group])
                        for j, token in enumerate(row.tokens[: t + 1])
                        if row.is_alive(token, group, t, self.budget) or t - j < self.window
                    ]
                    assert read == expected

    def crop(self, num_removed: int, seed: int) -> None:
        num_columns = len(self.rows[0].columns)
        num_removed = min(num_removed, num_columns)
        cropped = copy.deepcopy(self.rows)
        for row in cropped:
            num_before = len(row.tokens)
            row.columns = row.columns[: num_columns - num_removed]
            num_tokens = len(row.tokens)
            row.num_left = min(row.num_left, num_tokens)
            too_far = self.form == "all" and max(num_tokens - max(self.window - 1, 0), 0) < row.num_left
            if too_far or num_tokens < min(row.num_final, num_before):
                with pytest.raises(RuntimeError, match="activate_past_recording"):
                    self.cache.crop(-num_removed)
                return  # and nothing has changed
        self.cache.crop(-num_removed)
        self.rows = cropped
        if self.record_past:
            self.forget()

    def record(self, _: int, seed: int) -> None:
        self.cache.activate_past_recording()
        self.record_past = True
        assert self.cache.is_recording_past(0)

    def take(self, rows: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    def reorder(self, _: int, seed: int) -> None:
        rows = torch.randint(len(self.rows), (len(self.rows),), generator=torch.Generator().manual_seed(seed))
        self.cache.reorder_cache(rows)
        self.take(rows.tolist())

    def repeat(self, repeats: int, seed: int) -> None:
        repeats = 2 if len(self.rows) * 2 <= 6 else 1
        self.cache.batch_repeat_interleave(repeats)
        self.take([row for row in range(len(self.rows)) for _ in range(repeats)])

    def select(self, num_rows: int, seed: int) -> None:
        num_rows = max(min(num_rows, len(self.rows)), 1)
        rows = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:num_rows]
        self.cache.batch_select_indices(rows)
        self.take(rows.tolist())

    def check(self) -> None:
        if self.sparse.num_tokens is None:
            assert not self.rows[0].columns
            return
        dense = [[-1 if token is None else token for token in row.columns] for row in self.rows]
        assert self.cache.layers[0].keys[:, 0, :, 0].tolist() == dense
        assert self.sparse.num_tokens.tolist() == [len(row.tokens) for row in self.rows]
        for groups in (None, torch.tensor([1])):
            kept = self.sparse.kept.read(groups)
            for b, row in enumerate(self.rows):
                for slot, group in enumerate(range(NUM_GROUPS) if groups is None else groups.tolist()):
                    num_left = row.num_left if self.form == "all" else len(row.tokens)
                    expected = [
                        (position, [token, group], [-token, -group], True, NEVER)
                        for position, token in enumerate(row.tokens[:num_left])
                        if row.selected[token][group] and (token, group) not in row.forgotten
                    ]
                    assert exposed(kept, b, slot) == expected
                    if self.sparse.kept.count is not None:
                        assert self.sparse.kept.count[b, group] == len(expected)
        if self.form == "all" and not self.record_past:  # the window is all that is held of tokens not selected
            assert all(states.shape[2] <= max(self.window - 1, 0) for states in self.sparse.tensors()["window"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    form=st.sampled_from(["all", "all", "selected"]),
    window=st.integers(0, 6) | st.sampled_from([9, 17]),
    budget=st.sampled_from([None, None, 1, 2, 4]),
    batch_size=st.integers(1, 3),
    operations=OPERATIONS,
    mode=st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
)
def test_random_operations_equal_a_plain_list(form, window, budget, batch_size, operations, mode):
    pair = Pair(batch_size, window if form == "all" else 0, form, budget)
    for name, size, seed in operations:
        if pair.rows[0].columns or name in ("append", "record"):
            with mode():  # without gradients, a cache writes into memory that it has
                getattr(pair, name)(size, seed)
                pair.check()


# --- whole models ---


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "append", "crop", "reorder", "repeat", "select", "copy", "reset"]),
            st.integers(1, 70),
            st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]),
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([1, 3]),
)
def test_the_dense_part_equals_upstreams_layer(operations, num_heads):
    """Random operations, in any gradient mode; and no more than the promised room is held after an append."""
    torch.manual_seed(0)
    ours, upstreams = PreallocatedDynamicLayer(), DynamicLayer()
    longest = 0  # so far: what was cropped stays room
    for name, number, mode in operations:
        length = upstreams.get_seq_length()
        batch_size = len(upstreams.keys) if upstreams.is_initialized else 2
        with mode():
            if name == "append":
                key, value = torch.randn(2, batch_size, num_heads, number, 4)
                returned = [layer.update(key, value) for layer in (ours, upstreams)]
                assert all(torch.equal(x, y) for x, y in zip(*returned, strict=True))
                longest = max(longest, length + number)
                held = ours.keys.untyped_storage().nbytes() // (16 * batch_size * num_heads)
                assert held <= longest + longest // DENSE_ROOM + 1
            for layer in (ours, upstreams):
                if name == "crop" and layer.is_initialized:
                    layer.crop(-min(number, length - 1))
                elif name == "reorder" and layer.is_initialized:
                    layer.reorder_cache(torch.arange(batch_size).flip(0))
                elif name == "repeat" and batch_size < 8:
                    layer.batch_repeat_interleave(2)
                elif name == "select" and layer.is_initialized:
                    layer.batch_select_indices(torch.arange(max(batch_size // 2, 1)))
                elif name == "reset":
                    layer.reset()
        if name == "copy":
            ours = copy.deepcopy(ours)
        if upstreams.is_initialized:
            assert torch.equal(ours.keys, upstreams.keys) and torch.equal(ours.values, upstreams.values)
        assert ours.get_seq_length() == upstreams.get_seq_length()


def test_a_new_token_of_the_dense_part_copies_nothing():
    layer = PreallocatedDynamicLayer()
    with torch.inference_mode():
        layer.update(*torch.randn(2, 1, 2, 640, 4))
        layer.update(*torch.randn(2, 1, 2, 1, 4))
        where = layer.keys.data_ptr(), layer.values.data_ptr()
        for _ in range(640 // DENSE_ROOM):
            layer.update(*torch.randn(2, 1, 2, 1, 4))
            assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    with torch.no_grad():  # what inference mode made cannot be written to outside of it
        layer.update(*torch.randn(2, 1, 2, 1, 4))
    assert layer.keys.shape == (1, 2, 652, 4) and layer.keys.data_ptr() != where[0]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("num_groups", [1, 3])
@torch.no_grad()
def test_the_window_moves_through_its_memory(num_groups, batch_size):
    """A new token is written behind the window, without a copy of the window for each."""
    heads = {"num_mosa_heads": 2 * num_groups, "num_mosa_key_value_heads": num_groups}
    model = tiny_model(mosa_query_tokens="all", mosa_window=16, **heads)
    input_ids, cache = tokens_of(batch_size, 60), DynamicCache(config=model.config)
    full = model(input_ids, use_cache=False).logits
    logits, in_place = [model(input_ids[:, :20], past_key_values=cache).logits], 0
    for token in input_ids[:, 20:].split(1, dim=1):
        before = cache.layers[0].sparse.recent_key
        logits.append(model(token, past_key_values=cache).logits)
        after = cache.layers[0].sparse.recent_key
        in_place += before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    assert (torch.cat(logits, dim=1) - full).abs().max() < 1e-4
    assert in_place >= 20  # of 40


@pytest.mark.parametrize("window", [0, 4])
def test_gradients_survive_later_tokens(window):
    """What a training step has read of a cache does not change under it."""
    model = tiny_model(**FORMS["all"] | {"mosa_window": window}) if window else tiny_model(**FORMS["selected"])
    for name, parameter in model.named_parameters():  # keys and values need no gradient, queries do
        parameter.requires_grad = "q_proj" in name
    input_ids = tokens_of(1, 24)
    gradients = []
    for later in (0, 3):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids[:, :12], past_key_values=cache)
        loss = model(input_ids[:, 12:16], past_key_values=cache).logits.square().mean()
        with torch.no_grad():
            for t in range(16, 16 + later):
                model(input_ids[:, t : t + 1], past_key_values=cache)
        gradients.append(torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad]))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def tokens_of(batch_size: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_after(model, cache: DynamicCache, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, past_key_values=cache).logits


def test_crop_beyond_the_window_needs_recording():
    model, input_ids = tiny_model(mosa_query_tokens="all", mosa_window=5), tokens_of()
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids[:, :18])
    before = cache_bytes(cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    assert cache.get_seq_length() == 18 and cache_bytes(cache) == before
    expected = model(input_ids, use_cache=False).logits[:, 18:]
    torch.testing.assert_close(logits_after(model, cache, input_ids[:, 18:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 1])
def test_crop_needs_no_recording_where_the_window_holds_no_past(window):
    model, input_ids = tiny_model(mosa_query_tokens="all", mosa_window=window), tokens_of()
    cache = DynamicCache()
    logits_after(model, cache, input_ids)
    cache.crop(-5)
    expected = model(input_ids, use_cache=False).logits[:, 15:]
    torch.testing.assert_close(logits_after(model, cache, input_ids[:, 15:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1]])
def test_crop_after_padding_anywhere_in_the_last_call(form, padding):
    model, input_ids = tiny_model(**form, mosa_sparsity=1), tokens_of(batch_size=1, length=12)
    attention_mask = torch.ones(1, 12, dtype=torch.long)
    attention_mask[:, 6:10] = torch.tensor(padding)
    cache = DynamicCache()
    logits_after(model, cache, input_ids[:, :6])
    cache.activate_past_recording()
    with torch.no_grad():
        model(input_ids[:, 6:10], attention_mask=attention_mask[:, :10], past_key_values=cache)
        cache.crop(-2)
        rest = torch.cat((attention_mask[:, :8], attention_mask[:, 10:]), dim=1)
        actual = model(input_ids[:, 10:], attention_mask=rest, past_key_values=cache).logits
        ids = torch.cat((input_ids[:, :8], input_ids[:, 10:]), dim=1)
        expected = model(ids, attention_mask=rest, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_config", [False, True])
def test_upgrade_extends_the_layers_a_cache_has(with_config):
    model = tiny_model(per_layer_config={0: MIXED_LAYERS["per_layer_config"][0], 2: {"sliding_window": 4}})
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    model.model.upgrade_cache(cache)
    kinds = [DynamicLayer, DynamicLayer, DynamicSlidingWindowLayer if with_config else DynamicLayer]
    assert [isinstance(layer, kind) for layer, kind in zip(cache.layers, kinds, strict=True)] == [True] * 3
    assert [isinstance(layer, SparseLayer) for layer in cache.layers] == [False, True, True]
    assert cache.is_sliding == [False, False, with_config]

    classes, stores = [type(layer) for layer in cache.layers], [layer.sparse for layer in cache.layers[1:]]
    logits_after(model, cache, tokens_of())
    held = cache_bytes(cache)
    model.model.upgrade_cache(cache)
    assert [type(layer) for layer in cache.layers] == classes
    assert all(layer.sparse is store for layer, store in zip(cache.layers[1:], stores, strict=True))
    assert cache_bytes(cache) == held


def test_past_recording_survives_the_upgrade():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2, sliding_window=3))
    cache.activate_past_recording()
    upgrade_cache(cache, {0: spec(4)})
    assert cache.is_recording_past(0) and cache.is_recording_past(1)


def test_a_cache_with_too_few_layers_is_refused():
    shallow = DynamicCache(config=tiny_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"has 1 layers, but layer 1 .*DynamicCache\(config=model.config\)"):
        tiny_model()(torch.ones(1, 4, dtype=torch.long), past_key_values=shallow)


def test_the_cache_of_another_model_is_refused():
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    llama = LlamaForCausalLM(LlamaConfig(**{name: TINY[name] for name in names}))
    cache = DynamicCache()
    logits_after(llama, cache, tokens_of(length=7))
    with pytest.raises(ValueError, match="holds 7 tokens that this model's MoSA heads have not seen"):
        tiny_model()(tokens_of(length=1), past_key_values=cache)
    assert not any(isinstance(layer, SparseLayer) for layer in cache.layers)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_filled_cache_can_be_copied(form, duplicate):
    model, input_ids = tiny_model(**form, **MIXED_LAYERS), tokens_of()
    cache = DynamicCache()
    logits_after(model, cache, input_ids[:, :12])
    twin = duplicate(cache)
    expected = logits_after(model, cache, input_ids[:, 12:])  # would reach the twin too, if anything were shared
    assert twin.get_seq_length() == 12
    assert torch.equal(logits_after(model, twin, input_ids[:, 12:]), expected)
    assert cache_bytes(twin) == cache_bytes(cache)


def test_reset_forgets_everything(form):
    model, input_ids = tiny_model(**form, **MIXED_LAYERS), tokens_of()
    cache = DynamicCache(config=model.config)
    expected = logits_after(model, cache, input_ids)
    cache.reset()
    assert cache_bytes(cache) == {"dense": 0, "selected": 0, "window": 0}
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
    other = logits_after(model, cache, input_ids[:1])  # a batch of another size
    torch.testing.assert_close(other, expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [FORMS["selected"], {"mosa_query_tokens": "all", "mosa_window": 64}])
def test_bytes_held_are_those_of_the_formula(form, dtype):
    batch_size, num_tokens, head_dim = 2, 700, 64
    model = tiny_model(**form, head_dim=head_dim, num_hidden_layers=2, mosa_sparsity=8).to(dtype)
    input_ids, cache = tokens_of(batch_size, num_tokens), DynamicCache(config=model.config)
    with trace_routing(model) as selected:
        logits_after(model, cache, input_ids[:, :-10])
        for token in range(num_tokens - 10, num_tokens):
            logits_after(model, cache, input_ids[:, token : token + 1])

    dense = batch_size * num_tokens * TINY["num_key_value_heads"] * 2  # tokens · heads, over the layers
    room = batch_size * (num_tokens // DENSE_ROOM + 1) * TINY["num_key_value_heads"] * 2
    sparse = sum(call.sum().item() for calls in selected.values() for call in calls)
    window = 2 * batch_size * TINY["num_mosa_key_value_heads"] * form.get("mosa_window", 0)
    per_head = 2 * dtype.itemsize * head_dim
    held = cache_bytes(cache)
    assert dense * per_head <= held["dense"] <= (dense + room) * per_head
    assert sum(held.values()) == pytest.approx((dense + sparse + window) * per_head, rel=0.05)
    assert sparse < dense / 2  # else the test would not tell a sparse cache from a dense one

    for layer in cache.layers:
        tensors = layer.sparse.tensors()
        assert all(states.untyped_storage().nbytes() == states.nbytes for states in tensors["selected"])
        for states in tensors["window"]:
            room = (states.shape[2] + 1) // RECENT_ROOM + 1
            assert states.untyped_storage().nbytes() * states.shape[2] <= states.nbytes * (states.shape[2] + room)


@pytest.mark.parametrize("layers", [MIXED_LAYERS, {"num_attention_heads": 0, "num_key_value_heads": 0}])
def test_layers_without_dense_heads_count_tokens(form, layers):
    model, input_ids = tiny_model(**form, **layers), tokens_of()
    cache = DynamicCache(config=model.config)
    model.model.upgrade_cache(cache)
    cache.activate_past_recording()
    for tokens, expected in ((input_ids[:, :9], 9), (input_ids[:, 9:10], 10), (input_ids[:, 10:12], 12)):
        logits_after(model, cache, tokens)
        assert [layer.get_seq_length() for layer in cache.layers] == [expected] * 3
    cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [10] * 3
    expected = model(input_ids, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(logits_after(model, cache, input_ids[:, 10:]), expected, rtol=1e-4, atol=1e-4)


def test_upstream_layer_types_stay_upstreams():
    before = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    for kind in (DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)):
        cache = DynamicCache()
        cache.layers.append(kind)
        upgrade_cache(cache, {0: spec(3)})
        assert isinstance(cache.layers[0], SparseLayer)
    assert before == DYNAMIC_LAYER_TYPE_MAPPING
    assert not any(issubclass(layer_class, SparseLayer) for layer_class in DYNAMIC_LAYER_TYPE_MAPPING.values())
