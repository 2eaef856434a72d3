"""Every decoding mode of `generate` on the sparse cache gives what it gives without any cache."""

import pytest
import torch
from transformers import set_seed

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
}
CACHE_ONLY = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")  # how, not what, is generated


@pytest.mark.parametrize("mode", MODES)
def test_cached_generation_equals_uncached(form, mode):
    for seed in range(4):
        model = tiny_model(seed, **form)
        input_ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        if mode in ("assisted", "prompt_lookup"):  # upstream's are for one row
            input_ids, mask = input_ids[1:], mask[1:]
        options = dict(MODES[mode])
        if "assistant_model" in options:
            options["assistant_model"] = tiny_model(seed + 100, **form)
        plain = {name: value for name, value in options.items() if name not in CACHE_ONLY}
        set_seed(seed)
        cached = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)
        set_seed(seed)
        uncached = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, use_cache=False, **plain)
        assert torch.equal(cached, uncached), seed


def test_continuing_from_a_returned_cache(form):
    """Several turns on one cache equal one long prompt."""
    model = tiny_model(**form)
    first = torch.randint(1, 97, (2, 9))
    turn = model.generate(first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    second = torch.cat((turn.sequences, torch.randint(1, 97, (2, 7))), dim=1)
    continued = model.generate(second, past_key_values=turn.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(continued, model.generate(second, max_new_tokens=5, do_sample=False, use_cache=False))
