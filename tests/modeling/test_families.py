"""
The contract of every family, one body for all rows of `families.py`: a new row is tested without a line here.

The models of `testing/tiny.py`, with routers of random weights that select about one token in three, and layers that
hold several sets of groups and dense ones.
"""

import copy
import re
from functools import lru_cache

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, set_seed
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from mosa_hf import calibrate_thresholds, convert_checkpoint, trace_routing
from mosa_hf.modeling.attention import eager_attention_of
from mosa_hf.modeling.families import HEADS
from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.router_files import save_routers
from mosa_hf.modeling.sparse_groups import SparseGroupsMixin
from mosa_hf.modeling.sparse_models import with_sparse_groups, without_sparse_groups
from testing.difference import difference
from testing.tiny import EVERY_FAMILY, random_tokens, tiny_base, with_random_routers

from ..contract import check_parity, check_training, padded_batch

NEAR, FAR = {"window": 5, "sparsity": 3}, {"window": 0, "sparsity": 2.5}
KINDS = ((NEAR, FAR), (None, NEAR), (FAR, None))  # of the groups of a layer, over and over
IDS = random_tokens(2, 24)
ATTENTION = (None, "mosa", "sdpa", "eager")
pytestmark = EVERY_FAMILY


@lru_cache
def shared_base(family: str):
    """For all tests; they save a copy, since saving notes dtype and class in the configuration."""
    return tiny_base(family)


def graded_plan(config) -> list:
    """Layers with sets of groups of several windows and with dense groups, but for those with a sliding window."""
    layers, kinds = [], list(KINDS)
    for layer_idx in range(config.num_hidden_layers):
        if config.stays_dense(layer_idx):
            layers.append([None] * config.num_groups)
        else:
            kind = kinds.pop(0)
            layers.append([kind[group % 2] for group in range(config.num_groups)])
    return layers


@lru_cache
def sparse_model(family: str, budget: int | None = None, router_size: int | None = None):
    """A model with sparse groups that shares the weights of `shared_base`."""
    row, base = family_of(family), shared_base(family)
    plan = graded_plan(row.config_class.from_base(base.config))
    fields = {"mosa_plan": plan, "mosa_cache_budget": budget, "mosa_router_hidden_size": router_size}
    model = with_random_routers(base, seed=1, **fields)
    calibrate_thresholds(model, [random_tokens(4, 32, seed=2)])
    for router in model.mosa_routers().values():
        router.threshold -= 1e-3  # or rounding decides what becomes of a token at the threshold
    return model


@torch.no_grad()
def logits_of(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def test_selecting_everything_is_the_original(family):
    """ρ = 1, for the base model and every head that the family has, with a cache and without; hidden states too."""
    row = family_of(family)
    for head in (None, *row.base_head_classes):
        base = shared_base(family) if head == "ForCausalLM" else tiny_base(family, head)
        model = with_random_routers(base, mosa_sparsity=1, mosa_window=3)
        assert type(model) is (row.head_classes[head] if head else row.model_class)
        batch = padded_batch()
        tokens = batch["attention_mask"].bool()
        for options in ({"use_cache": False}, {}):
            ours, theirs = (each(**batch, **options, output_hidden_states=True) for each in (model, base))
            output, expected = ours[0], theirs[0]
            real = tokens if output.ndim > 1 and output.shape[:2] == (3, 25) else ...
            assert difference(output[real], expected[real]) < 1e-4, head
            assert len(ours.hidden_states) == len(theirs.hidden_states) == model.config.num_hidden_layers + 1, head
            for state, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                assert difference(state[tokens], expected[tokens]) < 1e-4, head


@torch.no_grad()
def test_every_head_runs(family):
    """Built from a configuration, those too that the family itself lacks."""
    row = family_of(family)
    assert {"ForCausalLM", "ForSequenceClassification"} <= set(row.head_classes) <= set(HEADS)
    sparse = sparse_model(family)
    for name, head_class in {None: row.model_class, **row.head_classes}.items():
        model = head_class(sparse.config).eval()
        assert model.mosa_routers().keys() == sparse.mosa_routers().keys()
        output = model(IDS)
        assert output[0].isfinite().all() and len(output[0]) == 2, name


def test_sliding_layers_stay_dense(family):
    base, row = shared_base(family), family_of(family)
    config = row.config_class.from_base(base.config, mosa_sparsity=4)
    sliding = [layer for layer in range(3) if config.stays_dense(layer)]
    assert sliding == [
        layer for layer, kind in enumerate(getattr(base.config, "layer_types", None) or []) if "sliding" in kind
    ]
    routers = with_sparse_groups(base, config).mosa_routers()
    assert routers.keys() == set(range(3)) - set(sliding)
    if sliding:
        with pytest.raises(
            StrictDataclassClassValidationError,
            match=f"layer {sliding[0]} sparse, but its attention has a sliding window",
        ):
            row.config_class.from_base(base.config, mosa_plan=[[NEAR] * config.num_groups] * 3)


@pytest.mark.parametrize(("padding", "budget"), [("left", None), ("anywhere", 3)])
def test_calls_in_chunks_equal_one(family, padding, budget):
    model = sparse_model(family, budget)
    with trace_routing(model) as selected:
        logits = logits_of(model)
    rates = torch.cat([calls[0].float().mean((0, 1)) for calls in selected.values()])
    assert (rates < 1).all() and 0.2 < rates.mean() < 0.6
    assert difference(logits, logits_of(shared_base(family))) > 1e-2
    # Upstream's sliding windows count padding in the midst of a row.
    has_sliding = any(map(model.config.stays_dense, range(3)))
    check_parity(model, "left" if has_sliding else padding)


@torch.no_grad()
def test_padding_on_the_right(family):
    model, batch = sparse_model(family), {name: states.flip(1) for name, states in padded_batch().items()}
    batch["position_ids"] = torch.arange(25).expand(3, 25)
    for cache in (None, DynamicCache(config=model.config)):
        logits = model(**batch, past_key_values=cache, use_cache=cache is not None).logits
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            alone = logits_of(model, batch["input_ids"][row : row + 1, :length])
            assert difference(logits[row, :length], alone[0]) < 1e-4


@pytest.mark.parametrize("budget", [None, 3])
def test_generation_equals_that_without_cache(family, budget):
    model, batch = sparse_model(family, budget), {"input_ids": IDS[:, :12], "attention_mask": torch.ones(2, 12).long()}
    batch["attention_mask"][0, :4] = 0
    one = {name: states[1:] for name, states in batch.items()}
    greedy = {"max_new_tokens": 8, "do_sample": False}

    def generate(inputs, **options):
        set_seed(0)
        return model.generate(**inputs, **{**greedy, **options})

    expected = generate(batch, use_cache=False)
    assert torch.equal(generate(batch), expected)
    assert torch.equal(generate(batch, cache_implementation="static"), expected)
    if budget is not None:
        return  # other modes with a budget: `generation/test_generation.py`
    assert torch.equal(generate(one, prompt_lookup_num_tokens=3), expected[1:])
    for options in ({"do_sample": True}, {"num_beams": 2}):
        assert torch.equal(generate(batch, **options), generate(batch, **options, use_cache=False)), options


def test_saved_and_loaded_with_every_attention(family, tmp_path):
    """Dense groups go where the user wants; sparse groups are computed in any case."""
    model = sparse_model(family)
    copy.deepcopy(model).save_pretrained(tmp_path)
    expected = logits_of(model)
    reloaded = {}
    for name in ATTENTION:
        if name == "sdpa" and not model._supports_sdpa:
            continue
        options = {} if name is None else {"attn_implementation": name}
        reloaded[name], info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(reloaded[name]) is type(model)
        assert difference(logits_of(reloaded[name]), expected) < 1e-5, name
    for name, states in model.state_dict().items():
        assert torch.equal(reloaded[None].state_dict()[name], states), name
    for name in reloaded.keys() - {None}:
        reloaded[None].set_attn_implementation(name)
        assert difference(logits_of(reloaded[None]), expected) < 1e-5, name


def test_converted_on_disk(family, tmp_path):
    """The family's own files, whatever layout and names they have there, and routers."""
    copy.deepcopy(shared_base(family)).save_pretrained(tmp_path / "base")
    save_routers(sparse_model(family), tmp_path / "routers")
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", routers=tmp_path / "routers")
    converted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(converted), logits_of(sparse_model(family)))


def test_dense_groups_use_the_attention_that_was_asked_for(family):
    model = copy.deepcopy(sparse_model(family))
    calls = []

    def probe(module, query, *args, **kwargs):
        calls.append((module.layer_idx, query.shape[1]))
        return eager_attention_of(getattr(module, "module", module))(module, query, *args, **kwargs)

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", eager_mask)
    model.set_attn_implementation("probe")
    assert difference(logits_of(model), logits_of(sparse_model(family))) < 1e-5
    num_heads = model.config.num_attention_heads // model.config.num_groups
    dense = [groups.count(None) * num_heads for groups in graded_plan(model.config)]
    assert calls == [(layer, heads) for layer, heads in enumerate(dense) if heads]


@pytest.mark.parametrize("budget", [None, 3])
def test_training_step(family, budget):
    check_training(sparse_model(family, budget), "left")


@pytest.mark.parametrize("explicit", [False, True])
def test_lora_step_and_merge(family, explicit):
    model = copy.deepcopy(sparse_model(family))
    targets = None
    if explicit:
        attention = next(module for module in model.modules() if isinstance(module, SparseGroupsMixin))
        targets = [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
    before = logits_of(model)
    # A rank of 4, so that one step shows.
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted = get_peft_model(model, copy.deepcopy(config))
    except ValueError as error:  # PEFT's defaults fail where experts are one tensor
        assert not explicit
        with pytest.raises(ValueError, match=re.escape(str(error))):
            get_peft_model(copy.deepcopy(shared_base(family)), config)
        return
    assert difference(logits_of(adapted), before) < 1e-5
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=0.05)
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert not any("router" in name for name, each in adapted.named_parameters() if each.grad is not None)
    optimizer.step()
    after = logits_of(adapted.eval())
    assert difference(after, before) > 1e-2
    merged = adapted.merge_and_unload()
    assert type(merged) is family_of(family).head_classes["ForCausalLM"]
    assert difference(logits_of(merged), after) < 1e-4


def test_leaving_the_routers_out_gives_the_base_back(family):
    base = shared_base(family)
    back = without_sparse_groups(sparse_model(family))
    assert type(back) is type(base) and [type(each) for each in back.modules()] == [
        type(each) for each in base.modules()
    ]
    states, expected = back.state_dict(), base.state_dict()
    assert states.keys() == expected.keys() and all(torch.equal(states[name], expected[name]) for name in states)
    assert torch.equal(logits_of(back), logits_of(base))
    assert back.config.to_dict() == base.config.to_dict()
