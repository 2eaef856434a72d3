"""Every decoding mode of `generate` on sparse caches, growing or static, gives what it gives without any cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed

from mosa_hf import trace_routing

from .conftest import tiny_model

NEW_TOKENS = 12
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 3},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "assisted": {"do_sample": False, "assistant_model": None},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static_sampling": {"do_sample": True, "num_return_sequences": 2, "cache_implementation": "static"},
    "static_beams": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "static_chunked_prefill": {"do_sample": False, "prefill_chunk_size": 3, "cache_implementation": "static"},
}
# How, not what, is generated.
CACHE_ONLY = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "cache_implementation")


@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_equals_uncached(form, mode):
    for seed in range(10):
        budget = {"mosa_cache_budget": 3 if seed % 2 else None}
        model = tiny_model(seed, **form, **budget)
        input_ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        if mode in ("assisted", "prompt_lookup"):  # upstream's are for one row
            input_ids, mask = input_ids[1:], mask[1:]
        options = dict(MODES[mode])
        if "assistant_model" in options:
            options["assistant_model"] = tiny_model(seed + 100, **form, **budget)
        plain = {name: value for name, value in options.items() if name not in CACHE_ONLY}
        set_seed(seed)
        cached = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)
        set_seed(seed)
        uncached = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, use_cache=False, **plain)
        assert torch.equal(cached, uncached), seed


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_continuing_from_a_returned_cache(form, cache_implementation):
    """Several turns on one cache equal one long prompt."""
    for seed in range(10):
        options = {"max_new_tokens": 5, "do_sample": False}
        model = tiny_model(seed, **form, mosa_cache_budget=3 if seed % 2 else None)
        first, later = torch.randint(1, 97, (2, 16)).split((9, 7), dim=1)
        cache = {"cache_implementation": cache_implementation, "max_cache_len": 32}
        turn = model.generate(first, **options, **cache, return_dict_in_generate=True)
        second = torch.cat((turn.sequences, later), dim=1)
        options["attention_mask"] = torch.ones_like(second)  # or a generated pad token would be taken for padding
        continued = model.generate(second, past_key_values=turn.past_key_values, **options)
        assert torch.equal(continued, model.generate(second, use_cache=False, **options)), seed


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_step_reads_the_weights_of_active_groups_only(cache_class):
    """Form "selected": what inactive groups' weights are makes no difference, were they not even numbers."""
    model = tiny_model(mosa_query_tokens="selected", mosa_sparsity=3)
    input_ids = torch.randint(1, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = cache_class(config=model.config, **({} if cache_class is DynamicCache else {"max_cache_len": 32}))
    model(input_ids[:, :-1], past_key_values=cache)
    with trace_routing(model) as selected:
        expected = model(input_ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits
    num_inactive = 0
    for layer, (selection,) in zip(model.model.layers, selected.values(), strict=True):
        for group in (~selection[0, 0]).nonzero()[:, 0].tolist():
            num_inactive += 1
            for weight in (layer.self_attn.mosa.q_proj, layer.self_attn.mosa.k_proj, layer.self_attn.mosa.v_proj):
                weight[group] = torch.nan
            layer.self_attn.mosa.o_proj[group] = torch.nan
    assert 0 < num_inactive < 9
    assert torch.equal(model(input_ids[:, -1:], past_key_values=cache).logits, expected)
