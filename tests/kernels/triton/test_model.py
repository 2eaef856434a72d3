"""Whole models on the Triton backend: the same logits, gradients and decoded tokens as on the portable one."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mosa_hf import use_backend
from testing.difference import max_difference

from ...conftest import Form, native_form, slow_but, sparse_form
from ...contract import in_chunks

pytest.importorskip("triton")

from .common import DEVICE  # noqa: E402

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SPARSE = {
    **SHAPE,
    "mosa_plan": [
        [{"window": 5, "sparsity": 3}, None],
        [{"window": 0, "sparsity": 3}, {"window": 0, "sparsity": 3}],
    ],
    "layer_types": ["full_attention"] * 2,
}
MODELS = {
    "native": native_form(
        **{**SHAPE, "num_hidden_layers": 1}, num_mosa_heads=4, num_mosa_key_value_heads=2, mosa_cache_budget=3
    ),
    "llama": sparse_form("llama", **SPARSE),
    "gemma2": sparse_form("gemma2", **SPARSE, attn_logit_softcapping=2.0, mosa_cache_budget=3),
    "gpt_oss": sparse_form("gpt_oss", **SPARSE, num_local_experts=4, num_experts_per_tok=2),
}
NUM_TOKENS, PROMPT = 16, 14


@pytest.fixture(params=slow_but(["native", "gpt_oss"], MODELS))
def form(request) -> Form:
    return MODELS[request.param]


def padded_batch() -> dict[str, torch.Tensor]:
    mask = (torch.arange(NUM_TOKENS) >= torch.tensor([[0], [6]])).long()
    return {
        "input_ids": torch.randint(2, 97, mask.shape) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def test_training_step(form):
    model, batch, results = form.model().to(DEVICE).train(), padded_batch(), []
    for name in ("torch", "triton"):
        own = copy.deepcopy(model)  # thresholds move
        with use_backend(name):
            logits = own(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
            logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in own.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


@torch.no_grad()
def test_prompt_and_single_tokens(form):
    model, batch = form.model().to(DEVICE), padded_batch()
    sizes = [PROMPT] + [1] * (NUM_TOKENS - PROMPT)
    for build_cache in (DynamicCache, lambda: StaticCache(model.config, NUM_TOKENS)):
        logits = []
        for name in ("torch", "triton"):
            with use_backend(name):
                logits.append(in_chunks(model, batch, sizes, build_cache()))
        assert max_difference(*logits, batch) < 1e-4
