"""Whole models on the Triton backend: the same logits, gradients and tokens as on the portable one."""

import pytest
import torch

from mosa_hf import use_backend

from .conftest import MIXED_LAYERS, tiny_model
from .test_static_cache import batch_of

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("budget", [None, 3])
def test_logits_and_gradients(form, budget):
    model = tiny_model(**form, **MIXED_LAYERS, head_dim=16, mosa_cache_budget=budget).to(DEVICE)
    batch = {name: states.to(DEVICE) for name, states in batch_of().items()}
    results = []
    for name in ("torch", "triton"):
        model.zero_grad()
        with use_backend(name):
            logits = model(**batch, use_cache=False).logits
            logits[batch["attention_mask"].bool()].square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([logits[batch["attention_mask"].bool()], *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generate(form, cache_implementation):
    model = tiny_model(**form, head_dim=16, num_hidden_layers=2, mosa_cache_budget=4).to(DEVICE)
    batch = {name: states.to(DEVICE) for name, states in batch_of().items()}
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache_implementation}
    with use_backend("torch"):
        expected = model.generate(**batch, **options)
    with use_backend("triton"):
        assert torch.equal(model.generate(**batch, **options), expected)
