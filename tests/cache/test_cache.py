"""
Caches of whole models: what they are built into, what they hold, what they refuse. `test_store.py` has their
operations.
"""

import copy
import gc
import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

from mosa_hf import cache_bytes, trace_routing
from mosa_hf.cache import GroupSet, SparseLayer, SparseSpec, num_overflowed, upgrade_cache
from mosa_hf.cache.dense import SLACK, PreallocatedDynamicLayer
from mosa_hf.cache.fixed_memory import static_capacity
from mosa_hf.cache.undo import MAX_UNDO

from ..conftest import FORMS, MIXED_LAYERS, PLAN, SHAPE, native_form, sparse_form, tiny_llama, tiny_model
from ..contract import random_ids

SPEC = SparseSpec(None, (GroupSet((0, 1), 0, 4),))
ONE_WINDOW = {"mosa_plan": None, "mosa_sparsity": 4}


@torch.no_grad()
def logits_after(model, cache, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, past_key_values=cache).logits


def check_continues(model, cache, input_ids: torch.Tensor) -> None:
    """The cache holds the beginning of `input_ids`, and the rest follows as if it had never held anything else."""
    held = int(cache.get_seq_length())
    expected = model(input_ids, use_cache=False).logits[:, held:]
    torch.testing.assert_close(logits_after(model, cache, input_ids[:, held:]), expected, rtol=1e-4, atol=1e-4)


# --- the dense part ---


@settings(max_examples=60)
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
    """Random operations, in any gradient mode; and no more than the promised slack is held after an append."""
    torch.manual_seed(0)
    ours, upstreams = PreallocatedDynamicLayer(), DynamicLayer()
    longest = 0  # so far: what was cropped stays allocated
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
                assert held <= longest + longest // SLACK + 1
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
        for _ in range(640 // SLACK):
            layer.update(*torch.randn(2, 1, 2, 1, 4))
            assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    with torch.no_grad():  # what inference mode made cannot be written to outside of it
        layer.update(*torch.randn(2, 1, 2, 1, 4))
    assert layer.keys.shape == (1, 2, 652, 4) and layer.keys.data_ptr() != where[0]


# --- whole models ---


@pytest.mark.parametrize("form", [FORMS["native"], sparse_form(**ONE_WINDOW, mosa_window=16)], ids=FORMS)
@torch.no_grad()
def test_most_new_tokens_copy_nothing(form):
    """They are written where memory is left over."""
    model, input_ids = form.model(), random_ids(2, 340)
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids[:, :300])
    (store,) = cache.layers[1].stores
    in_place = 0
    for token in input_ids[:, 300:].split(1, dim=1):
        before = store.memory.states["key"].data_ptr()
        logits_after(model, cache, token)
        in_place += store.memory.states["key"].data_ptr() == before
    assert in_place >= 20  # of 40


@pytest.mark.parametrize(
    "form", [*FORMS.values(), sparse_form(**ONE_WINDOW, mosa_window=0)], ids=[*FORMS, "no window"]
)
def test_gradients_survive_later_tokens(form):
    """What a training step has read of a cache does not change under it."""
    model, input_ids = form.model(), random_ids(1, 24)
    for name, parameter in model.named_parameters():  # keys and values need no gradient, queries do
        parameter.requires_grad = "q_proj" in name
    gradients = []
    for later in (0, 3):
        cache = DynamicCache(config=model.config)
        logits_after(model, cache, input_ids[:, :12])
        loss = model(input_ids[:, 12:16], past_key_values=cache).logits.square().mean()
        for t in range(16, 16 + later):
            logits_after(model, cache, input_ids[:, t : t + 1])
        gradients.append(torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad]))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


SLIDING = native_form(per_layer_config={2: {"sliding_window": 4}})
REFUSING = {
    # A dense layer comes first; behind it windows of 5 and 1, and a layer without any.
    "windows": (
        FORMS["sparse"],
        "can take back 1 tokens here, not 3: .*`mosa_window`.* Up to 32 tokens .*record_past",
    ),
    "budget": (native_form(**MIXED_LAYERS, mosa_cache_budget=2), "not 3: .*`mosa_cache_budget`.*record_past"),
    # A dense layer, the last of the cache.
    "sliding": (SLIDING, "can take back 0 tokens here, not 3: .*`sliding_window`.*record_past"),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_refused_crop_changes_no_layer(name):
    form, message = REFUSING[name]
    model, input_ids = form.model(), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids[:, :18])
    before = cache_bytes(cache)
    with pytest.raises(RuntimeError, match=message):
        cache.crop(-3)
    with pytest.raises(ValueError, match="positive value"):  # upstream's, which wants the number of tokens
        cache.crop(15)
    assert [layer.get_seq_length() for layer in cache.layers] == [18] * 3 and cache_bytes(cache) == before
    check_continues(model, cache, input_ids)


@pytest.mark.parametrize("num_recorded", [0, 1, 5])
def test_a_sliding_layer_takes_back_what_was_recorded(num_recorded):
    """And no more, since tokens before that have left it; upstream would go on with other tokens than there were."""
    model, input_ids = SLIDING.model(), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids[:, :10])
    model.record_past(cache)
    if num_recorded:
        logits_after(model, cache, input_ids[:, 10 : 10 + num_recorded])
    for removed in (num_recorded + 1, 9):
        with pytest.raises(RuntimeError, match=f"can take back {num_recorded} tokens here, not {removed}"):
            cache.crop(-removed)
    cache.crop(-num_recorded)
    check_continues(model, cache, input_ids)


@pytest.mark.parametrize("window, budget", [(5, None), (5, 3), (1, None), (0, 2)])
def test_single_tokens_are_taken_back_without_ceremony(window, budget):
    """The last 32 of them, in whatever portions; then no more than a cache without them could."""
    form = sparse_form(**ONE_WINDOW, mosa_window=window, mosa_cache_budget=budget)
    model, input_ids = form.model(), random_ids(2, 60)
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids[:, :12])
    for token in input_ids[:, 12:50].split(1, dim=1):
        logits_after(model, cache, token)
    for removed in (1, 20, 0, MAX_UNDO - 21):
        cache.crop(-removed)
        check_continues(model, copy.deepcopy(cache), input_ids)
    assert cache.get_seq_length() == 18
    with pytest.raises(RuntimeError, match="record_past"):
        cache.crop(-5)
    cache.activate_past_recording()
    logits_after(model, cache, input_ids[:, 18:])
    cache.crop(-41)
    check_continues(model, cache, input_ids)


def test_a_cache_dies_with_its_last_name():
    """Its layers know each other, but not in a circle: memory does not wait for the garbage collector."""
    model, cache = FORMS["sparse"].model(), DynamicCache()
    logits_after(model, cache, random_ids(1, 9))
    layers = [weakref.ref(layer) for layer in cache.layers]
    gc.disable()
    try:
        del cache
        assert [layer() for layer in layers] == [None] * 3
    finally:
        gc.enable()


def test_crop_needs_no_recording_without_a_window():
    model, input_ids = sparse_form(**ONE_WINDOW, mosa_window=0).model(), random_ids(2, 20)
    cache = DynamicCache()
    logits_after(model, cache, input_ids)
    cache.crop(-5)
    check_continues(model, cache, input_ids)


def test_a_cache_that_is_cropped_to_nothing_is_an_empty_one(form):
    model, input_ids = form.model(), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    model.record_past(cache)
    logits_after(model, cache, input_ids[:, :12])
    cache.crop(-12)
    assert cache.get_seq_length() == 0
    logits_after(model, cache, input_ids[:, :14])
    check_continues(model, cache, input_ids)


@pytest.mark.parametrize("removed", [20, 25])
@pytest.mark.parametrize("name", ["stock", "sparse", "native", "all sparse", "budget"])
def test_all_that_there_is_and_more_can_be_cropped_as_of_a_stock_cache(name, removed):
    """Whatever has left the windows: an empty cache needs none of it."""
    forms = {**FORMS, "all sparse": sparse_form(mosa_plan=ALL_SPARSE), "budget": sparse_form(mosa_cache_budget=3)}
    model, input_ids = tiny_llama() if name == "stock" else forms[name].model(), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    logits_after(model, cache, input_ids)
    cache.crop(-removed)
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 3
    assert torch.equal(logits_after(model, cache, input_ids), logits_after(model, DynamicCache(), input_ids))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("padding", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1]])
def test_crop_after_padding_anywhere_in_the_last_call(form, padding):
    model, input_ids = form.model(), random_ids(1, 12)
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


ALL_SPARSE = [[each or PLAN[1][0] for each in layer] for layer in PLAN]
NO_DENSE_HEADS = {"num_attention_heads": 0, "num_key_value_heads": 0}


@pytest.mark.parametrize(
    "form",
    [FORMS["native"], native_form(**NO_DENSE_HEADS), sparse_form(mosa_plan=ALL_SPARSE)],
    ids=["native", "none at all", "sparse"],
)
def test_layers_without_dense_heads_count_tokens(form):
    model, input_ids = form.model(), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    model.record_past(cache)
    for tokens, expected in ((input_ids[:, :9], 9), (input_ids[:, 9:10], 10), (input_ids[:, 10:12], 12)):
        logits_after(model, cache, tokens)
        assert [layer.get_seq_length() for layer in cache.layers] == [expected] * 3
    cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [10] * 3
    check_continues(model, cache, input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_bytes_held_are_those_of_the_formula(name, dtype):
    """
    2 · dtype · (T · dense groups · d + Σ over sparse groups (selected + window) · d), within 5 %; and the tokens that
    the last single ones (32 at most) pushed out of the window, which `crop` may bring back.
    """
    window = 64 if name == "sparse" else 0
    plan = [[None, *[{"window": window, "sparsity": 8}] * 2]] * 2
    fields = {"mosa_plan": plan} if window else {"mosa_sparsity": 8, "per_layer_config": None}
    model = FORMS[name].model(head_dim=64, num_hidden_layers=2, **fields).to(dtype)
    batch_size, num_tokens, num_dense = 2, 700, 1 if window else 2  # dense key and value heads of a layer
    input_ids, cache = random_ids(batch_size, num_tokens), DynamicCache(config=model.config)
    with trace_routing(model) as selected:
        logits_after(model, cache, input_ids[:, :-10])
        for token in input_ids[:, -10:].split(1, dim=1):
            logits_after(model, cache, token)

    dense, sparse = 2 * batch_size * num_tokens * num_dense, 0
    for calls in selected.values():
        chosen = torch.cat(calls, dim=1)[:, : num_tokens - window]  # which have left the window
        num_noted = 10 if window else 0  # without a window or a budget, nothing is lost
        sparse += int(chosen.sum()) + batch_size * chosen.shape[2] * (window + num_noted)
    per_token = 2 * dtype.itemsize * 64
    held = cache_bytes(cache)
    assert dense * per_token <= held["dense"] <= dense * (1 + 1 / SLACK) * per_token
    assert sparse * per_token <= held["sparse"] <= 1.05 * sparse * per_token + 2048  # and a few entries of slack
    assert sum(held.values()) == pytest.approx((dense + sparse) * per_token, rel=0.05)
    assert sparse < dense  # else the test would not tell a sparse cache from a dense one


# --- what a cache is built into ---


@pytest.mark.parametrize("with_config", [False, True])
def test_upgrade_extends_the_layers_a_cache_has(with_config):
    model = tiny_model(per_layer_config={0: MIXED_LAYERS["per_layer_config"][0], 2: {"sliding_window": 4}})
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    model.model.upgrade_cache(cache)
    kinds = [DynamicLayer, DynamicLayer, DynamicSlidingWindowLayer if with_config else DynamicLayer]
    assert [isinstance(layer, kind) for layer, kind in zip(cache.layers, kinds, strict=True)] == [True] * 3
    assert [isinstance(layer, SparseLayer) for layer in cache.layers] == [False, True, True]
    assert cache.is_sliding == [False, False, with_config]

    classes, stores = [type(layer) for layer in cache.layers], [layer.stores for layer in cache.layers[1:]]
    logits_after(model, cache, random_ids(2, 20))
    held = cache_bytes(cache)
    model.model.upgrade_cache(cache)
    assert [type(layer) for layer in cache.layers] == classes
    assert all(layer.stores is each for layer, each in zip(cache.layers[1:], stores, strict=True))
    assert cache_bytes(cache) == held


def test_past_recording_survives_the_upgrade():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2, sliding_window=3))
    cache.activate_past_recording()
    upgrade_cache(cache, {0: SPEC})
    assert all(layer.record_past for layer in cache.layers[:2])


def test_upstream_layer_types_stay_upstreams():
    before = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    for kind in (DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)):
        cache = DynamicCache()
        cache.layers.append(kind)
        upgrade_cache(cache, {0: SPEC})
        assert isinstance(cache.layers[0], SparseLayer)
    assert before == DYNAMIC_LAYER_TYPE_MAPPING
    assert not any(issubclass(layer_class, SparseLayer) for layer_class in DYNAMIC_LAYER_TYPE_MAPPING.values())


def test_caches_that_cannot_be_extended_are_refused(form):
    model, input_ids = form.model(), random_ids(2, 7)
    shallow = DynamicCache(config=LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"has 1 layers, but layer 1 .*DynamicCache\(config=model.config\)"):
        model(input_ids, past_key_values=shallow)
    cache = DynamicCache()
    logits_after(LlamaForCausalLM(LlamaConfig(**SHAPE)), cache, input_ids)
    with pytest.raises(ValueError, match="holds 7 tokens that this model's routers have not seen"):
        model(input_ids[:, :1], past_key_values=cache)
    assert not any(isinstance(layer, SparseLayer) for layer in cache.layers)
    cache = DynamicCache()
    cache.layers = [object()] * 3
    with pytest.raises(ValueError, match="cannot extend a cache layer of class object"):
        model.model.upgrade_cache(cache)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
@pytest.mark.parametrize("fields", [{"mosa_window": 9}, {"mosa_plan": PLAN}], ids=str)
def test_a_cache_is_used_again_by_a_model_of_the_same_groups_alone(make, fields):
    one = sparse_form(**ONE_WINDOW, mosa_window=5).model()
    cache, input_ids = make(config=one.config), random_ids(2, 20)
    expected = logits_after(one, cache, input_ids)
    cache.reset()
    other = sparse_form(**{**ONE_WINDOW, **fields}).model()
    with pytest.raises(ValueError, match="made for a model whose groups differ from this one's"):
        logits_after(other, cache, input_ids)
    assert torch.equal(logits_after(one, cache, input_ids), expected)


@torch.no_grad()
def test_a_call_that_failed_leaves_no_padding_behind():
    """What a mask said of its tokens is forgotten, be it the first call or a later one."""
    model, ids = sparse_form(**ONE_WINDOW, mosa_window=5).model(), random_ids(3, 20)
    wrong = torch.full_like(ids, SHAPE["vocab_size"])
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    cache = DynamicCache(config=model.config)
    with pytest.raises(IndexError):
        model(wrong, attention_mask=padding, past_key_values=cache)
    whole = model(ids, past_key_values=cache).logits
    assert torch.equal(whole, model(ids, use_cache=False).logits)

    cache = DynamicCache(config=model.config)
    model(ids[:, :12], attention_mask=padding[:, :12], past_key_values=cache)
    other = padding.clone()
    other[1, -2:] = 0
    with pytest.raises(IndexError):
        model(wrong[:, 12:], attention_mask=other, past_key_values=cache)
    rest = model(ids[:, 12:], attention_mask=padding, past_key_values=cache).logits
    expected = model(ids, attention_mask=padding, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(rest, expected)


@torch.no_grad()
def test_rows_are_chosen_after_a_mask_of_one_row():
    model, ids = sparse_form(**ONE_WINDOW, mosa_window=5).model(), random_ids(3, 20)
    visible = torch.ones(20, 20, dtype=torch.bool).tril()
    visible[:, :3] = False
    padding = torch.ones_like(ids)
    padding[:, :3] = 0
    order = torch.tensor([2, 0, 1, 1])
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=visible[None, None], past_key_values=cache)
    cache.reorder_cache(order)
    more = random_ids(4, 6)
    mask = torch.cat([padding[order], torch.ones_like(more)], dim=1)
    found = model(more, attention_mask=mask, past_key_values=cache).logits
    expected = model(torch.cat([ids[order], more], dim=1), attention_mask=mask, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(found, expected)


# --- static caches ---


def test_a_static_cache_forgets_a_call_that_failed(monkeypatch):
    model, input_ids = sparse_form().model(), random_ids(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=40)
    expected = logits_after(model, cache, input_ids)
    cache.reset()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr("mosa_hf.modeling.attention.sparse_attention", interrupted)
        logits_after(model, cache, input_ids)
    cache.reset()
    assert torch.equal(logits_after(model, cache, input_ids), expected)


def test_static_cache_that_is_too_short_is_refused(form):
    model = form.model()
    cache = StaticCache(config=model.config, max_cache_len=22)
    with pytest.raises(ValueError, match="capacity of 22 tokens.*`max_cache_len`"):
        model.generate(random_ids(2, 20), max_new_tokens=4, past_key_values=cache)
    with pytest.raises(ValueError, match="capacity of 22 tokens, not 25: raise `max_cache_len`"):
        model(random_ids(1, 25), past_key_values=cache)


def test_static_cache_of_dense_groups_that_is_too_short_is_refused():
    model = sparse_form(mosa_plan=[[None] * 3] * 3).model()
    cache = StaticCache(config=model.config, max_cache_len=22)
    logits_after(model, cache, random_ids(2, 20))
    with pytest.raises(ValueError, match="capacity of 22 tokens, not 24: raise `max_cache_len`"):
        model(random_ids(2, 4), past_key_values=cache)


@pytest.mark.slow
def test_a_compiled_step_beyond_capacity_fails():
    """Also where no layer has dense groups, in which upstream would write to what is not there."""
    torch._dynamo.reset()
    model, ids = sparse_form(mosa_plan=[[{"window": 64, "sparsity": 4}] * 3] * 3).model(), random_ids(2, 21)
    cache = StaticCache(config=model.config, max_cache_len=20)
    logits_after(model, cache, ids[:, :18])
    step = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(18, 20):
        expected = model(ids[:, : i + 1], use_cache=False).logits[:, -1:]
        torch.testing.assert_close(logits_after(step, cache, ids[:, i : i + 1]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="capacity of 20 tokens, not as many as .*`max_cache_len`"):
        logits_after(step, cache, ids[:, 20:])


@pytest.mark.parametrize("name", FORMS)
def test_overflow_is_a_budget_and_is_reported(name, caplog):
    """A selection far above its rate does not fit: lowest scores go, as with a budget, and a warning counts them."""
    length, sparsity = 300, 64
    form = {"native": native_form(), "sparse": sparse_form(mosa_plan=None, mosa_window=5)}[name]
    model, capacity = form.model(mosa_sparsity=sparsity), static_capacity(length, sparsity)
    assert capacity < length
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("threshold"):
            buffer.fill_(-torch.inf)  # everything is selected
    input_ids = random_ids(1, length - 8)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with caplog.at_level(logging.WARNING, logger="transformers"), propagating("transformers"):
        output = model.generate(input_ids, cache_implementation="static", **options)
    overflow = num_overflowed(output.past_key_values)
    assert overflow == 3 * 3 * (length - 1 - capacity)  # layers, groups; the last token is never fed
    assert f"lacked capacity for {overflow} selected tokens" in caplog.text

    budgeted = form.model(mosa_sparsity=sparsity, mosa_cache_budget=capacity)
    budgeted.load_state_dict(model.state_dict())
    assert torch.equal(output.sequences, budgeted.generate(input_ids, **options).sequences)
    assert num_overflowed(DynamicCache()) == 0


class propagating:
    """Lets a library's log records reach the root logger, where pytest listens."""

    def __init__(self, name: str):
        self.logger = logging.getLogger(name)

    def __enter__(self):
        self.before, self.logger.propagate = self.logger.propagate, True

    def __exit__(self, *error):
        self.logger.propagate = self.before


@pytest.mark.parametrize("window", [36, 40, 10**9])
@pytest.mark.parametrize("sparsity", [1.0, 4.0])
def test_a_static_cache_has_room_for_its_tokens_alone(window, sparsity):
    model = sparse_form(mosa_plan=[[None, *[{"window": window, "sparsity": sparsity}] * 2]]).model(num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=40)
    input_ids = random_ids(2, 40)
    for start, end in [(0, 7), (7, 8), (8, 37), (37, 38), (38, 39)]:
        logits_after(model, cache, input_ids[:, start:end])
    check_continues(model, cache, input_ids)
    (store,) = cache.layers[0].stores
    assert len(store.memory.states["key"]) == 2 * 2 * 40 + 1  # rows, groups; and one where nothing is put


@pytest.mark.parametrize("name, window", [("native", 0), ("sparse", 16)])
def test_static_bytes_are_fixed_and_bounded(name, window):
    form = {"native": native_form(), "sparse": sparse_form(mosa_plan=[[None, *[{"window": 16, "sparsity": 16}] * 2]])}
    model = form[name].model(num_hidden_layers=1, mosa_sparsity=16)
    cache = StaticCache(config=model.config, max_cache_len=512)
    logits_after(model, cache, random_ids(1, 4))
    before = cache_bytes(cache)
    logits_after(model, cache, random_ids(1, 400))
    assert cache_bytes(cache) == before
    num_dense, num_sparse = (2, 3) if name == "native" else (1, 2)
    # Key and value of 8 float32 channels, position, whether selected, score (of the model's dtype); and counts.
    entries = num_sparse * (window + static_capacity(512, 16) + 1)
    assert entries * 64 <= before["sparse"] <= entries * (64 + 9) + 512
    assert before["dense"] == 2 * num_dense * 512 * 8 * 4
