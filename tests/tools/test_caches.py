"""Quantised and offloaded caches, on a tiny dense model and on the same one converted."""

import pytest
import torch
from transformers import DynamicCache

from mosa_hf import ConversionConfig, GroupPlan, cache_bytes, convert_model
from testing.tiny import random_tokens, tiny_base

IDS = random_tokens(2, 40)
GROUP = {"window": 8, "sparsity": 4}


@pytest.fixture(scope="module")
def models() -> dict:
    original = tiny_base("llama")
    plans = {"every group sparse": [[GROUP, GROUP]] * 3, "every other group sparse": [[None, GROUP]] * 3}
    converted = {
        name: convert_model(original, ConversionConfig(plan=GroupPlan.from_list(plan)), random_tokens(4, 64))
        for name, plan in plans.items()
    }
    return {"original": original, **converted}


def generate(model, **fields):
    return model.generate(
        IDS, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, **fields
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_bits", [2, 4])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_quanto(num_bits, num_beams, models):
    """Dense groups are quantised; what sparse groups hold is exact, and a model that has no others loses nothing."""
    pytest.importorskip("optimum.quanto")
    settings = {"backend": "quanto", "nbits": num_bits, "q_group_size": 8, "residual_length": 4}
    for name, model in models.items():
        exact = generate(model, num_beams=num_beams)
        quantised = generate(model, num_beams=num_beams, cache_implementation="quantized", cache_config=settings)
        held, expected = cache_bytes(quantised.past_key_values), cache_bytes(exact.past_key_values)
        if name == "every group sparse":
            assert torch.equal(quantised.sequences, exact.sequences)
            assert held["dense"] == 0
        else:
            assert quantised.sequences.shape == exact.sequences.shape
            assert all(logits.isfinite().all() for logits in quantised.logits)
            assert not torch.equal(quantised.logits[-1], exact.logits[-1])  # it does round
            assert 0 < held["dense"] < 0.75 * expected["dense"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch's builds for GPUs fail as the cache is made")
def test_offloaded_caches_need_a_gpu(models):
    """The original fails within PyTorch, the converted model says why."""
    for name, model in models.items():
        expected = (AssertionError, "CUDA|cuda") if name == "original" else (ValueError, "this model is on the CPU")
        for implementation in ("offloaded", "offloaded_static"):
            with pytest.raises(expected[0], match=expected[1]):
                generate(model, cache_implementation=implementation)
        with pytest.raises(expected[0], match=expected[1]):
            model(IDS, past_key_values=DynamicCache(config=model.config, offloading=True))
