"""gemma-3-270m converted: a family with sliding layers, q/k norms, two rotary embeddings and a scale of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import metrics
from mosa_hf import ConversionConfig, cache_bytes, convert_model
from testing import corpora, pretrained
from testing.packages import SourceUnavailable

pytestmark = pytest.mark.real


@torch.no_grad()
def test_conversion_generation_and_bytes():
    try:
        directory = pretrained.gemma3_directory()
    except SourceUnavailable as error:
        pytest.skip(str(error))
    tokenizer, original = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    lossless = convert_model(original, ConversionConfig(sparsity=1, window=16))
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    tokens = original.generate(prompt, max_new_tokens=16, do_sample=False)
    assert torch.equal(lossless.generate(prompt, max_new_tokens=16, do_sample=False), tokens)
    assert (lossless(tokens).logits - original(tokens).logits).abs().max() < 1e-4 * original(tokens).logits.abs().max()

    topics = tokenizer(corpora.text("python_topics")[:40_000], return_tensors="pt")["input_ids"]
    windows = topics[:, : 2 * 320].view(2, 320)
    model = convert_model(original, ConversionConfig(sparsity=8, window=64), windows)
    assert model.mosa_routers().keys() == {5, 11, 17}  # the layers with global attention
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)

    text = topics[:, 2048 : 2048 + 768]
    dense, held = (cache_bytes(metrics.filled_cache(each, text)) for each in (original, model))
    print(f"KV bytes after {text.shape[1]} tokens: {dense} -> {held}")
    entry = 2 * 256 * 4  # bytes of a key and a value
    assert held["dense"] == dense["dense"] - 3 * text.shape[1] * entry  # what the layers with global attention held
    assert 1 <= held["sparse"] / (metrics.entries(model, text).sparse * entry) < 1.05
    assert held["sparse"] < 0.35 * 3 * text.shape[1] * entry
