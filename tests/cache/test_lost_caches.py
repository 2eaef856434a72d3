"""
Caches that are not what a model left of them: that have lost what was selected, whose layers were exchanged, that are
another model's or of other rows, or half of whose layers hold a call. All are refused before anything changes; what
works with the stock model, copies above all, works.
"""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.exporters.exporter_dynamo import _pytree_flatten, _pytree_unflatten

from mosa_hf import to_dense
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.sparse_models import with_sparse_groups

from ..conftest import FORMS, PLAN, SHAPE, native_form, sparse_form
from ..contract import random_ids

ONE_WINDOW = {"mosa_plan": None, "mosa_sparsity": 4, "mosa_window": 5}
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
NO_DENSE_HEADS = {"num_attention_heads": 0, "num_key_value_heads": 0}
LOST = {  # forms, and a layer of each that has sparse groups or MoSA heads
    "all sparse": (sparse_form(**ONE_WINDOW), 0),
    "partly dense": (FORMS["sparse"], 1),
    "sliding": (sparse_form("gemma2", **ONE_WINDOW, **SLIDING), 2),
    "native": (FORMS["native"], 1),
    "native, no dense heads": (native_form(**NO_DENSE_HEADS), 0),
}
IDS = random_ids(2, 30)
READ, LENGTHS = 20, (3, 1)  # tokens that a cache is filled with, and of the calls that follow


@torch.no_grad()
def fed(model, cache, start: int, end: int, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    return model(ids[:, start:end], past_key_values=cache, **options).logits


def filled(model, make=DynamicCache, **options):
    cache = make(config=model.config)
    fed(model, cache, 0, READ, **options)
    return cache


def static(config):
    return StaticCache(config=config, max_cache_len=40)


def check_unharmed(model, cache, twin) -> None:
    """`cache` goes on as its copy `twin`, which was made before someone misused it."""
    for length in LENGTHS:
        assert torch.equal(*(fed(model, each, READ, READ + length) for each in (cache, twin)))


@pytest.fixture(params=LOST)
def case(request):
    form, layer_idx = LOST[request.param]
    return form.model(), layer_idx


# --- selections that are lost ---


def of_pairs(cache, model):
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def of_itself(cache, model):  # as `DataParallel` gathers it
    return DynamicCache(cache)


def refilled(cache, model):
    new = DynamicCache(config=model.config)
    for layer_idx, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, layer_idx)
    return new


def refilled_static(cache, model):
    new = static(model.config)
    for layer_idx, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, layer_idx)
    return new


REMAKES = [of_pairs, of_itself, refilled, refilled_static]


@pytest.mark.parametrize("remake", REMAKES)
def test_keys_and_values_alone_make_no_cache(case, remake):
    """Of groups that are all sparse they are of no heads, `[B, 0, T, d]`, which upstream takes for empty."""
    model, _ = case
    cache = filled(model)
    twin = copy.deepcopy(cache)
    for length in LENGTHS:
        with pytest.raises(ValueError, match=f"holds {READ} tokens .* lost what they selected.*copy.deepcopy"):
            fed(model, remake(cache, model), READ, READ + length)
    with pytest.raises(ValueError, match="lost what they selected.*copy.deepcopy"):
        model.generate(IDS, past_key_values=remake(cache, model), max_new_tokens=2)
    check_unharmed(model, cache, twin)


@pytest.mark.parametrize("remake", REMAKES)
def test_keys_and_values_alone_make_a_stock_cache(remake):
    """That is why users do it."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    cache = filled(model)
    torch.testing.assert_close(fed(model, remake(cache, model), READ, 23), fed(model, cache, READ, 23))


def test_one_layer_that_lost_its_selections_is_enough(case):
    model, layer_idx = case
    for length in LENGTHS:
        cache = filled(model)
        cache.layers[layer_idx] = of_pairs(cache, model).layers[layer_idx]
        with pytest.raises(ValueError, match=rf"lost what they selected of them \(layer {layer_idx}\)"):
            fed(model, cache, READ, READ + length)


def emptied(cache, layer_idx):
    cache.layers[layer_idx] = DynamicLayer()


def reset_one(cache, layer_idx):
    cache.layers[layer_idx].reset()


def assigned(cache, layer_idx):
    keys, values = (getattr(cache.layers[layer_idx], name) for name in ("keys", "values"))
    cache.reset()
    for layer in cache.layers:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


@pytest.mark.parametrize("damage", [emptied, reset_one, assigned])
@pytest.mark.parametrize("name", ["all sparse", "partly dense", "native"])
def test_layers_that_hold_other_tokens_are_refused(name, damage):
    form, layer_idx = LOST[name]
    model = form.model()
    cache = filled(model)
    damage(cache, layer_idx)
    with pytest.raises(ValueError, match="hold different numbers of tokens.*`reset\\(\\)`"):
        fed(model, cache, READ, READ + 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_layers_out_of_order_or_missing_are_refused(length):
    model = LOST["all sparse"][0].model()
    cache = filled(model)
    cache.layers = cache.layers[::-1]
    with pytest.raises(ValueError, match="Layer 0 of `past_key_values` was filled as layer 2"):
        fed(model, cache, READ, READ + length)
    cache.layers = cache.layers[::-1]
    check_unharmed(model, copy.deepcopy(cache), copy.deepcopy(cache))
    cache.layers = cache.layers[:2]
    with pytest.raises(ValueError, match="has 2 layers, but layer 2 of this model needs one"):
        fed(model, cache, READ, READ + length)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_no_list_of_layers_is_refused(length):
    model = LOST["all sparse"][0].model()
    cache = filled(model)
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    for other in (EncoderDecoderCache(cache, DynamicCache()), pairs):
        with pytest.raises(ValueError, match=f"not an object of class {type(other).__name__}.*self_attention_cache"):
            fed(model, other, READ, READ + length)


# --- copies, which keep them ---


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_copied_layers(cache):
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def as_exporters_do(cache):
    leaves, context = _pytree_flatten(cache)
    return _pytree_unflatten([leaf.clone() for leaf in leaves], context)


COPIES = [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), saved, of_copied_layers, as_exporters_do]


@pytest.mark.parametrize("make", COPIES, ids=["deepcopy", "pickle", "torch.save", "copy.copy of layers", "pytree"])
def test_copies_go_their_own_way(case, make):
    """One document, two questions, one after the other and each other's tokens; the stock model beside it."""
    stock = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    others = IDS.flip(1)
    for model in (case[0], stock):
        cache = filled(model)
        fed(model, cache, READ, 21)
        fork = make(cache)
        for start, end in ((21, 22), (22, 25), (25, 26)):
            fed(model, cache, start, end)
            fed(model, fork, start, end, others)
        for each, ids in ((cache, IDS), (fork, torch.cat((IDS[:, :21], others[:, 21:]), dim=1))):
            with torch.no_grad():
                expected = model(ids[:, :29], use_cache=False).logits[:, 26:]
            torch.testing.assert_close(fed(model, each, 26, 29, ids), expected, rtol=1e-4, atol=1e-4)
            if any(each.is_sliding):  # which upstream's layers cannot
                continue
            each.crop(-1)
            torch.testing.assert_close(fed(model, each, 28, 29, ids), expected[:, 2:], rtol=1e-4, atol=1e-4)


# --- other rows, other models ---


@pytest.mark.parametrize("make", [DynamicCache, static])
def test_another_batch_is_refused(case, make):
    """Before anything changes; the stock model's error, of two tensors, comes after some layers have changed."""
    model, _ = case
    cache = filled(model, make)
    twin = copy.deepcopy(cache)
    for length in LENGTHS:
        for rows in ([0], [0, 1, 1], [0, 1, 0, 1]):
            with pytest.raises(ValueError, match=f"batch of {len(rows)}, but .* one of 2.*repeat_interleave"):
                fed(model, cache, READ, READ + length, IDS[rows])
    check_unharmed(model, cache, twin)
    if make is DynamicCache:
        cache.batch_repeat_interleave(2)
        assert fed(model, cache, 23, 25, IDS.repeat_interleave(2, 0)).shape[0] == 4


OTHERS = {
    "window": sparse_form(**{**ONE_WINDOW, "mosa_window": 9}),
    "budget": sparse_form(**ONE_WINDOW, mosa_cache_budget=4),
    "plan": sparse_form(mosa_plan=[PLAN[1], PLAN[0], PLAN[2]]),
    "dense layer": sparse_form(mosa_plan=[*[[{"window": 5, "sparsity": 4}] * 3] * 2, [None] * 3]),
    "native": native_form(**NO_DENSE_HEADS),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [DynamicCache, static])
def test_a_model_of_other_groups_is_refused(name, make):
    """A single token too, which goes on where others were looked at; and the other way round."""
    models = LOST["all sparse"][0].model(), OTHERS[name].model()
    for model, other in (models, models[::-1]):
        cache = filled(model, make)
        twin = copy.deepcopy(cache)
        fed(other, filled(other, make), READ, 21)
        for length in LENGTHS:
            with pytest.raises(ValueError, match="groups differ|have not seen"):
                fed(other, cache, READ, READ + length)
        check_unharmed(model, cache, twin)


def test_a_model_converted_again_does_not_take_the_first_ones_cache():
    """With other groups, and the modules of the first: what that one has looked at is not known to this one."""
    model = LOST["all sparse"][0].model()
    cache = filled(model)
    config = family_of("llama").config_class.from_base(to_dense(model).config, mosa_window=9, mosa_sparsity=4)
    other = with_sparse_groups(to_dense(model), config)
    with pytest.raises(ValueError, match="made for a model whose groups differ .*MosaLlamaModel"):
        fed(other, cache, READ, 21)


@pytest.mark.parametrize("make", [DynamicCache, static])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_stock_model_is_refused(make, length):
    model = LOST["all sparse"][0].model()
    cache = filled(model, make)
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="MosaLlamaModel's.*only that model.*of its own.*copy.deepcopy"):
        fed(to_dense(model), cache, READ, READ + length)
    check_unharmed(model, cache, twin)


def test_the_stock_model_is_refused_by_a_native_models_cache():
    """Whose dense heads' keys a stock model of as many heads could read, and lack the rest."""
    model = native_form().model()
    shape = {name: getattr(model.config, name) for name in SHAPE}
    stock = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    for length in LENGTHS:
        cache = filled(model)
        twin = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="This cache is MosaModel's"):
            fed(stock, cache, READ, READ + length)
        check_unharmed(model, cache, twin)


def test_what_a_stock_model_added_to_dense_layers_is_noticed():
    """It is refused at the first layer that has sparse groups, not the first one here."""
    model = FORMS["sparse"].model()
    for length in LENGTHS:
        cache = filled(model)
        with pytest.raises(ValueError, match="This cache is MosaLlamaModel's"):
            fed(to_dense(model), cache, READ, 21)
        with pytest.raises(ValueError, match="different numbers of tokens.*another model has added to them"):
            fed(model, cache, READ, READ + length)


# --- calls that failed ---

PLACES = {"projections": "q_proj", "output": "o_proj", "feed-forward": "mlp"}  # before, after `update`; after all


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["all sparse", "partly dense", "native"])
def test_half_a_call_is_refused(name, place, monkeypatch):
    """By the stock model's calls as if nothing had happened, and by the model's own."""
    form, layer_idx = LOST[name]
    if name == "native":  # of as many dense heads in every layer as a stock model
        form, layer_idx = native_form(), 0
    model = form.model()
    stock = LlamaForCausalLM(LlamaConfig(**{n: getattr(model.config, n) for n in SHAPE})).eval()
    failing = next(
        module
        for module_name, module in model.named_modules()
        if f"layers.{layer_idx}." in module_name and module_name.endswith(PLACES[place])
    )

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for length in LENGTHS:
        cache = filled(model)
        expected = fed(model, copy.deepcopy(cache), READ, READ + 3)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(failing, "forward", interrupted)
            fed(model, cache, READ, READ + length)
        with pytest.raises(ValueError, match="This cache is Mosa"):
            fed(stock, copy.deepcopy(cache), READ, READ + length)
        if place == "projections" and name == "native":  # nothing had begun
            assert torch.equal(fed(model, cache, READ, READ + 3), expected)
            continue
        for later in LENGTHS:
            with pytest.raises(ValueError, match="failed half-way"):
                fed(model, copy.deepcopy(cache), READ, READ + later)
        cache.reset()
        fed(model, cache, 0, READ)
        torch.testing.assert_close(fed(model, cache, READ, READ + 3), expected)
