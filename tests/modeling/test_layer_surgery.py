"""Layers taken out, repeated, moved and added, as people do with stock models: whatever is of a layer goes with it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mosa_hf import GroupPlan, calibrate_thresholds, load_routers, save_routers, to_dense, trace_routing
from mosa_hf.modeling.router import routers_of
from testing.tiny import tiny_base, with_random_routers

from ..conftest import native_form

# No two layers with sparse groups are alike.
PLAN = [[None, {"window": 3, "sparsity": 4}], [None] * 2, [{"window": 5, "sparsity": 3}, None], [None] * 2]
NATIVE = {1: {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0}, 2: {"mosa_sparsity": 2}}
WINDOWED = {2: {"sliding_window": 5}}
TOKENS = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def stock():
    return tiny_base(num_hidden_layers=4)


def sparse(family: str = "llama", plan=PLAN, **fields):
    return with_random_routers(tiny_base(family, **{"num_hidden_layers": 4, **fields}), seed=1, mosa_plan=plan)


def native(layers=NATIVE):
    return native_form(num_hidden_layers=4, per_layer_config=layers, mosa_routing="threshold").model()


MODELS = {"stock": stock, "sparse": sparse, "native": native, "uniform": lambda: sparse(plan=None, mosa_window=4)}


def put(model, order, renumber: bool = True):
    """The model with these of its layers, copies of those that come again."""
    layers = list(model.model.layers)
    chosen = [copy.deepcopy(layers[i]) if i in order[:place] else layers[i] for place, i in enumerate(order)]
    model.model.layers = nn.ModuleList(chosen)
    model.config.num_hidden_layers = len(chosen)
    for place, layer in enumerate(chosen if renumber else ()):
        layer.self_attn.layer_idx = place
    return model


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def greedy(model, **options):
    return model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


def reload(model, path, **options):
    model.save_pretrained(path)
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "order, renumber",
    [((0, 2, 3), True), ((0, 1, 1, 2, 2, 3), True), ((2, 1, 0, 3), True), ((2, 1, 0, 3), False)],
    ids=["pruned", "repeated", "moved", "moved, numbers as they were"],
)
def test_layers_are_taken_out_repeated_and_moved(name, order, renumber, tmp_path):
    """Generates with a cache what it does without one, and is the same once loaded, as stock is."""
    model = put(MODELS[name](), order, renumber)
    tokens = greedy(model, use_cache=False)
    assert torch.equal(greedy(model), tokens)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    if name == "sparse":
        assert loaded.config.mosa_plan == [PLAN[i] for i in order]
    if name == "uniform":
        assert loaded.config.mosa_plan is None
    if name == "native":
        own = {int(i): fields for i, fields in loaded.config.to_dict()["per_layer_config"].items()}
        assert own == {place: NATIVE[i] for place, i in enumerate(order) if i in NATIVE}


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_static_cache_of_a_pruned_model(name):
    model = put(MODELS[name](), (2, 0, 3))
    static = greedy(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy(model, use_cache=False))


def test_windows_go_with_the_layers(tmp_path):
    """Caches are made of the config: with that of other layers, one would forget what it should keep."""
    model = put(native(WINDOWED), (0, 2, 3))
    assert torch.equal(greedy(model), greedy(model, use_cache=False))
    assert model.config.to_dict()["per_layer_config"] == {"1": WINDOWED[2]}
    model = put(native(WINDOWED), (2, 1, 0, 3), renumber=False)
    with pytest.raises(ValueError, match="`layer_idx` 0 of an attention module without a sliding window"):
        greedy(model)
    stale = DynamicCache(config=native(WINDOWED).config)
    with pytest.raises(ValueError, match="`layer_idx` 2 of an attention module without"):
        put(native(WINDOWED), (0, 2, 1, 3))(TOKENS, past_key_values=stale)


def test_what_is_asked_of_a_pruned_model(tmp_path):
    """Routing, thresholds, routers alone, the base, the plan: by the place that a layer has now."""
    model, base = put(sparse(), (2, 0, 3)), put(stock(), (2, 0, 3))
    plan = GroupPlan.from_list([PLAN[2], PLAN[0], PLAN[3]])
    with trace_routing(model) as selected:
        logits = logits_of(model)
    assert selected.keys() == {0, 1} == model.mosa_routers().keys()
    with pytest.raises(ValueError, match=r"names the groups of 4 layers, but `num_hidden_layers` is 3.*update_config"):
        GroupPlan.of_config(model.config)
    model.base_model.update_config()
    assert GroupPlan.of_config(model.config) == plan
    save_routers(model, tmp_path / "routers")
    assert torch.equal(logits_of(load_routers(base, tmp_path / "routers")), logits)
    assert torch.equal(logits_of(to_dense(model)), logits_of(base))
    calibrate_thresholds(model, [TOKENS])
    with trace_routing(model) as selected:
        logits_of(model)
    rates = [float(each[0][:, 1:].float().mean()) for each in selected.values()]
    assert rates == pytest.approx([1 / 3, 1 / 4], abs=0.05)


def test_routers_are_saved_of_a_model_that_was_only_moved(tmp_path):
    """As many layers as before: nothing but the modules tells."""
    model = put(sparse(), (2, 1, 0, 3))
    save_routers(model, tmp_path / "routers")
    assert torch.equal(logits_of(load_routers(put(stock(), (2, 1, 0, 3)), tmp_path / "routers")), logits_of(model))


def test_a_pruned_base_is_converted(tmp_path):
    """By places too: which layer of a cache a module has is its own affair."""
    converted = with_random_routers(put(stock(), (2, 1, 0, 3), renumber=False), mosa_plan=PLAN)
    assert [hasattr(layer.self_attn, "mosa_router") for layer in converted.model.layers] == [True, False, True, False]
    assert torch.equal(greedy(converted), greedy(converted, use_cache=False))
    assert torch.equal(logits_of(reload(converted, tmp_path)), logits_of(converted))


def test_a_dense_layer_is_added(tmp_path):
    """A layer of the family's own, and one of another model."""
    model, other = sparse(), sparse()
    model.model.layers.append(LlamaDecoderLayer(model.config, 4))
    model.model.layers.append(other.model.layers[0])
    model.model.layers[5].self_attn.layer_idx = 5
    model.config.num_hidden_layers = 6
    model.eval()
    assert torch.equal(greedy(model), greedy(model, use_cache=False))
    loaded = reload(model, tmp_path)
    assert loaded.config.mosa_plan == [*PLAN, [None] * 2, PLAN[0]]
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_layers_with_one_number(name):
    """Two layers would write into one layer of a cache."""
    model = put(MODELS[name](), (0, 0, 2, 3), renumber=False)
    logits_of(model)
    with pytest.raises(ValueError, match=r"`layer_idx` \[0, 0, 2, 3\].* set `layer_idx` of each attention module"):
        greedy(model)
    with pytest.raises(ValueError, match=r"`layer_idx` \[0, 2, 3\]"):  # of three layers
        model = put(MODELS[name](), (0, 2, 3), renumber=False)
        model(TOKENS, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("name", MODELS)
def test_fewer_layers_are_loaded(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "all")
    config = AutoConfig.from_pretrained(tmp_path / "all")
    config.num_hidden_layers = 3
    for options in ({"num_hidden_layers": 3}, {"config": config}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all", **options)
        assert torch.equal(greedy(loaded), greedy(loaded, use_cache=False))
        assert torch.equal(logits_of(reload(loaded, tmp_path / "three")), logits_of(loaded))
    model.config.num_hidden_layers = 3
    assert torch.equal(logits_of(model), logits_of(loaded))
    model.save_pretrained(tmp_path / "lowered")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "lowered")), logits_of(loaded))
    model.config.num_hidden_layers = 4
    assert torch.equal(logits_of(reload(model, tmp_path / "again")), logits_of(model))


def test_more_layers_are_loaded_than_the_plan_has(tmp_path):
    model = sparse()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_hidden_layers` is 5, but `mosa_plan` names the groups of 4 layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=5)
    with pytest.raises(ValueError, match="`mosa_plan` names the groups of 4 layers"):
        AutoConfig.from_pretrained(tmp_path, num_hidden_layers=5)
    with pytest.raises(ValueError, match="lacks model.layers.4.self_attn.mosa_router"):  # it would select at random
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=5, mosa_plan=[*PLAN, PLAN[0]])
    longer = [*PLAN, [None] * len(PLAN[0])]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=5, mosa_plan=longer)
    assert loaded.config.mosa_plan == longer and loaded.mosa_routers().keys() == model.mosa_routers().keys()


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_fewer_layers_than_the_config_says(name, tmp_path):
    """It would be loaded with layers of random weights."""
    model = MODELS[name]()
    del model.model.layers[2:]
    with pytest.raises(ValueError, match="has 2 layers, but `config.num_hidden_layers` is 4.*num_hidden_layers = 2"):
        model.save_pretrained(tmp_path)


LOCAL = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 16}


def test_layer_types_go_with_the_layers(tmp_path):
    """As upstream asks for them, and refuses to save without."""
    model = put(sparse("gemma2", **LOCAL), (0, 2, 3))
    with pytest.raises(ValueError, match="`layer_types` names 4 layers, but the model has 3"):
        greedy(model)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer 1 sparse, but its attention has a sliding window"):
        model.save_pretrained(tmp_path / "wrong")
    model.config.layer_types = ["full_attention", "full_attention", "sliding_attention"]
    assert torch.equal(greedy(model), greedy(model, use_cache=False))
    loaded = reload(model, tmp_path / "pruned")
    assert loaded.config.mosa_plan == [PLAN[0], PLAN[2], PLAN[3]]
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_a_pruned_model_drafts_with_its_first_layers(name):
    """Which lowers `num_hidden_layers` for a while: the plan stays whole."""
    model = put(MODELS[name](), (0, 2, 3))
    one = TOKENS[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(one, assistant_early_exit=1, **options), model.generate(one, **options))
    assert model.config.num_hidden_layers == 3
    if name == "sparse":
        assert model.config.mosa_plan == [PLAN[0], PLAN[2], PLAN[3]]


def test_fields_that_someone_set_are_saved_as_they_are(tmp_path):
    """A plan that is edited to be loaded is not what layers were moved for."""
    model = sparse()
    wide = copy.deepcopy(PLAN)
    wide[0][1]["window"] = 7
    model.config.mosa_plan = wide
    assert reload(model, tmp_path / "sparse").config.mosa_plan == wide
    model = put(native(), (0, 2, 3))
    model.config.mosa_cache_budget = 4
    loaded = reload(model, tmp_path / "native")
    assert [layer.self_attn.mosa.budget for layer in loaded.model.layers] == [4, 4, 4]


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_thresholds_follow_in_each_layer_of_its_own(name):
    """A copy of a layer that learns has a threshold of its own."""
    model = put(MODELS[name](), (0, 0, 2, 3)).train()
    routers = routers_of(model)
    before = [router.threshold.clone() for router in routers]
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert all(not torch.equal(x, router.threshold) for x, router in zip(before, routers, strict=True))
    assert not torch.equal(routers[0].threshold, routers[1].threshold)
