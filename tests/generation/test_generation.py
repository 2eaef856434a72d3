"""Every decoding mode of `generate` on sparse caches, growing or static, gives what it gives without any cache."""

import copy
from functools import lru_cache

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed

from mosa_hf import ConversionConfig, convert_model, trace_routing
from testing.tiny import random_tokens, tiny_base, with_random_routers

from ..conftest import FORMS, slow_but, sparse_form, tiny_model
from ..contract import random_ids

FORMS = FORMS | {"int8": sparse_form(mosa_cache_dtype="int8")}
NEW_TOKENS = 12
LENGTH = {"max_new_tokens": NEW_TOKENS}
SEEDS = range(2)  # the second one with a cache budget
DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
}
STATIC = {"cache_implementation": "static"}
# How the same is generated: the decoding, and what must not change its tokens.
MODES = {
    "greedy": ("greedy", {}),
    "sampling": ("sampling", {}),
    "beams": ("beams", {}),
    "beam_sampling": ("beam_sampling", {}),
    "chunked_prefill": ("greedy", {"prefill_chunk_size": 3}),
    "static": ("greedy", STATIC),
    "static_sampling": ("sampling", STATIC),
    "static_beams": ("beams", STATIC),
    "static_chunked_prefill": ("greedy", {"prefill_chunk_size": 3, **STATIC}),
    "training": ("greedy", {}),
}


def model_of(name: str, seed: int, **fields):
    return FORMS[name].model(seed, mosa_cache_budget=3 if seed % 2 else None, **fields)


def prompts(seed: int) -> dict[str, torch.Tensor]:
    """Rows of which two have padding on the left."""
    mask = (torch.arange(11) >= torch.tensor([[0], [4], [10]])).long()
    return {"input_ids": random_ids(3, 11, seed=seed), "attention_mask": mask}


@lru_cache
def uncached(name: str, seed: int, decoding: str) -> torch.Tensor:
    """What to compare with; the modes share it."""
    model, options = model_of(name, seed), DECODING[decoding] | LENGTH | {"use_cache": False}
    set_seed(seed)
    return model.generate(**prompts(seed), **options)


@pytest.mark.parametrize("mode", slow_but(["greedy", "beams", "chunked_prefill", "static", "training"], MODES))
@pytest.mark.parametrize("name", FORMS)
def test_cached_generation_equals_uncached(name, mode):
    decoding, options = MODES[mode]
    for seed in SEEDS:
        model = model_of(name, seed, mosa_routing="threshold").train(mode == "training")
        thresholds = [x.clone() for x in model.buffers()]
        set_seed(seed)
        tokens = model.generate(**prompts(seed), **DECODING[decoding], **options, **LENGTH)
        assert torch.equal(tokens, uncached(name, seed, decoding)), seed
        assert all(map(torch.equal, thresholds, model.buffers()))


@pytest.mark.parametrize(
    "mode", ["greedy", "sampling", "beams", "static", "static_beams", "chunked_prefill", "uncached"]
)
def test_generating_while_a_converted_model_trains(mode):
    """With frozen routers, as conversion leaves them, and trained ones: evaluation's tokens, and nothing moves."""
    decoding, options = MODES.get(mode, ("greedy", {"use_cache": False}))
    options = {**DECODING[decoding], **options, **LENGTH}
    model = convert_model(tiny_base(), ConversionConfig(sparsity=3, window=4), random_tokens(3, 32))
    batch = {"input_ids": random_tokens(2, 20, seed=1), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    set_seed(0)
    expected = model.generate(**batch, **options)
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    for trained in (False, True):
        for router in model.mosa_routers().values():
            assert not router.weight.requires_grad or trained
            router.requires_grad_(trained)
        set_seed(0)
        assert torch.equal(model.train().generate(**batch, **options), expected)
        assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))
        assert all(module.training for module in model.modules())
    model(**batch, use_cache=False)  # nor in a forward that trains, before its optimiser steps
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))


@pytest.mark.parametrize("name", FORMS)
def test_uncached_generation_equals_a_plain_loop(name):
    model, batch = model_of(name, 0), prompts(0)
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW_TOKENS):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    assert torch.equal(input_ids, uncached(name, 0, "greedy"))


@pytest.mark.parametrize("assistant", ["prompt_lookup", "model"])
@pytest.mark.parametrize("name", FORMS)
def test_assisted_generation_equals_uncached(name, assistant):
    """Upstream's is for one row: drafts are rejected, and cropped from the cache."""
    for seed in SEEDS:
        model, options = model_of(name, seed), {"prompt_lookup_num_tokens": 3}
        if assistant == "model":
            options = {"assistant_model": model_of(name, seed + 100)}
        tokens = model.generate(prompts(seed)["input_ids"][1:2, 4:], **DECODING["greedy"], **options, **LENGTH)
        assert torch.equal(tokens[0], uncached(name, seed, "greedy")[1, 4:]), seed


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("name", FORMS)
def test_continuing_from_a_returned_cache(name, cache_implementation):
    """Several turns on one cache equal one long prompt."""
    options = {"max_new_tokens": 5, "do_sample": False}
    for seed in SEEDS:
        model = model_of(name, seed)
        first, later = random_ids(3, 16, seed=seed).split((9, 7), dim=1)
        cache = {"cache_implementation": cache_implementation, "max_cache_len": 32}
        turn = model.generate(first, **options, **cache, return_dict_in_generate=True)
        second = torch.cat((turn.sequences, later), dim=1)
        mask = {"attention_mask": torch.ones_like(second)}  # or a generated pad token would be taken for padding
        continued = model.generate(second, past_key_values=turn.past_key_values, **options, **mask)
        assert torch.equal(continued, model.generate(second, use_cache=False, **options, **mask)), seed


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_step_reads_the_weights_of_active_groups_only(cache_class):
    """The paper's heads: what inactive groups' weights are makes no difference, were they not even numbers."""
    model, input_ids = tiny_model(mosa_sparsity=3), random_ids(1, 30)
    cache = cache_class(config=model.config, **({} if cache_class is DynamicCache else {"max_cache_len": 32}))
    model(input_ids[:, :-1], past_key_values=cache)
    with trace_routing(model) as selected:
        expected = model(input_ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits
    num_inactive = 0
    for layer, (selection,) in zip(model.model.layers, selected.values(), strict=True):
        for group in (~selection[0, 0]).nonzero()[:, 0].tolist():
            num_inactive += 1
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn.mosa, name)[group] = torch.nan
    assert 0 < num_inactive < 9
    assert torch.equal(model(input_ids[:, -1:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("fields", [{}, {"mosa_cache_dtype": "int8"}, {"mosa_cache_budget": 5}], ids=str)
def test_a_first_chunk_of_nothing_but_padding(fields):
    """What was in memory before nobody may read: PyTorch fills it with NaN here."""
    model = with_random_routers(tiny_base("llama"), mosa_window=3, mosa_sparsity=2, **fields)
    ids, mask = random_tokens(1, 20), (torch.arange(20) >= 9).long()[None]
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **arguments)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        assert torch.equal(model.generate(ids, prefill_chunk_size=8, **arguments), expected)
    finally:
        torch.use_deterministic_algorithms(False)
