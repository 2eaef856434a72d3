"""What others wrap and prepare: attention functions, forwards, and static caches that are initialised early."""

import copy
import functools
import pickle
import types

import pytest
import torch
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mosa_hf import GroupPlan, calibrate_thresholds, convert_model, load_routers, save_routers, to_dense
from mosa_hf.conversion import ConversionConfig
from mosa_hf.modeling.group_plan import SparseGroup
from testing.tiny import random_tokens, tiny_base

from ..conftest import native_form

SMALL = {"num_hidden_layers": 2}
PLANS = {
    "all sparse": GroupPlan(((SparseGroup(3, 1),) * 2,) * 2),
    "partly dense": GroupPlan(((SparseGroup(3, 1), None), (None, None))),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])  # softcaps and sinks are keywords
@torch.no_grad()
def test_a_wrapper_of_all_attention_functions_passes_dropout_by_place(family, monkeypatch):
    base, ids = tiny_base(family), random_tokens(1, 20)
    model = convert_model(base, ConversionConfig(window=3, sparsity=1))
    expected = base(ids).logits

    def wrapped(function):
        @functools.wraps(function)
        def wrapper(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
            return function(module, query, key, value, attention_mask, dropout, **kwargs)

        return wrapper

    for name in ("mosa", "sdpa"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, wrapped(ALL_ATTENTION_FUNCTIONS[name]))
    assert (model(ids).logits - expected).abs().max() < 1e-4


def models(name: str):
    if name == "native":
        model = native_form(num_hidden_layers=2).model()
        return model, model
    base = tiny_base("llama", **SMALL)
    return base, convert_model(base, ConversionConfig(plan=PLANS[name]))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["native", *PLANS])
@torch.no_grad()
def test_a_static_cache_may_be_initialised_early(name, when):
    """By the base's number of heads, before or after the model has seen the cache; the stock model takes it too."""
    base, model = models(name)
    ids, config = random_tokens(2, 12) % 97, base.config
    cache = StaticCache(config=config, max_cache_len=16)
    if when == "after":
        model.model.upgrade_cache(cache)
    cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
    expected = base(ids, use_cache=False).logits
    first = model(ids[:, :11], past_key_values=cache).logits
    last = model(ids[:, 11:], past_key_values=cache).logits
    assert (torch.cat((first, last), dim=1) - expected).abs().max() < 1e-4
    cache.reset()
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    assert torch.equal(model.generate(ids, past_key_values=cache, **greedy), base.generate(ids, **greedy))


@torch.no_grad()
def test_early_initialisation_knows_sliding_layers_and_another_batch():
    base = tiny_base("gemma2")
    model, config = convert_model(base, ConversionConfig(window=3, sparsity=1)), base.config
    cache = StaticCache(config=config, max_cache_len=32)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
    ids = random_tokens(1, 24)
    expected = base(ids, use_cache=False).logits
    actual = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(8, dim=1)], dim=1)
    assert (actual - expected).abs().max() < 1e-4


PARTS = {"model": lambda x: x, "decoder": lambda x: x.model, "attention": lambda x: x.model.layers[1].self_attn}


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_copies_of_what_is_compiled_in_place_run_weights_of_their_own(part):
    base, ids = tiny_base("llama", **SMALL), random_tokens(1, 20)
    plain = convert_model(base, ConversionConfig(sparsity=3, window=3), random_tokens(3, 24))
    expected = plain(ids, use_cache=False).logits
    model = copy.deepcopy(plain)
    PARTS[part](model).compile(backend="eager")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (again(ids, use_cache=False).logits - expected).abs().max() < 1e-6
        for weight in model.parameters():
            weight.mul_(2)
        assert (again(ids, use_cache=False).logits - expected).abs().max() < 1e-6
        for weight in model.parameters():
            weight.div_(2)
    assert torch.equal(to_dense(model)(ids).logits, base(ids).logits)


def replace_forward(module: torch.nn.Module, how: str) -> None:
    inner = module.forward
    if how == "closure":
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    else:
        module.forward = types.MethodType(inner.__func__, module)


@pytest.mark.parametrize("how", ["closure", "method"])
@pytest.mark.parametrize("part", PARTS)
def test_what_has_another_forward_is_not_made_another_class(part, how, tmp_path):
    """It would go on computing what it was."""
    base, text = tiny_base("llama", **SMALL), random_tokens(3, 24)
    model = convert_model(base, ConversionConfig(sparsity=3, window=3), text)
    save_routers(model, tmp_path / "routers")
    for each in (base, model):
        replace_forward(PARTS[part](each), how)
    for convert in (
        lambda: convert_model(base, ConversionConfig(sparsity=3, window=3), text),
        lambda: load_routers(base, tmp_path / "routers"),
        lambda: to_dense(model),
    ):
        with pytest.raises(ValueError, match=r"`(model\.\S*forward)` is not that of .*`del \1` first"):
            convert()
    for each in (base, model):
        del PARTS[part](each).forward
    assert torch.equal(to_dense(model)(text).logits, base(text).logits)


@torch.no_grad()
def test_a_method_of_a_module_that_stays_is_kept():
    """As kernels are put in the place of norms."""
    base, ids = tiny_base("llama", **SMALL), random_tokens(1, 20)
    base.model.norm.forward = types.MethodType(lambda self, states: 2 * self.weight * states, base.model.norm)
    model = convert_model(base, ConversionConfig(sparsity=1, window=3))
    assert (model(ids).logits - base(ids).logits).abs().max() < 1e-4
    base.model.norm.weight = torch.nn.Parameter(base.model.norm.weight + 1)
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-2


def test_what_is_compiled_is_neither_converted_nor_calibrated():
    base, text = tiny_base("llama", **SMALL), random_tokens(3, 24)
    model = convert_model(base, ConversionConfig(sparsity=3, window=3), text)
    for each in (base, model):
        each.model.compile(backend="eager")
    with pytest.raises(ValueError, match="`model` is compiled.*convert it uncompiled, and compile the result"):
        convert_model(base, ConversionConfig(sparsity=3, window=3), text)
    with pytest.raises(ValueError, match="`model` is compiled.*set thresholds before"):
        calibrate_thresholds(model, [text])
