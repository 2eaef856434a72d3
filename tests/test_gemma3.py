"""gemma-3-270m converted: a family with sliding layers, q/k norms, two rotary embeddings and a scale of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure, sources
from mosa_hf import ConversionConfig, cache_bytes, convert_model

pytestmark = pytest.mark.real


@torch.no_grad()
def test_conversion_generation_and_bytes():
    try:
        directory = sources.gemma3_directory()
    except sources.SourceUnavailable as error:
        pytest.skip(str(error))
    tokenizer, original = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    lossless = convert_model(original, ConversionConfig(sparsity=1, window=16))
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    tokens = original.generate(prompt, max_new_tokens=16, do_sample=False)
    assert torch.equal(lossless.generate(prompt, max_new_tokens=16, do_sample=False), tokens)
    assert (lossless(tokens).logits - original(tokens).logits).abs().max() < 1e-4 * original(tokens).logits.abs().max()

    topics = tokenizer(sources.text("python_topics")[:40_000], return_tensors="pt")["input_ids"]
    windows = topics[:, : 4 * 512].view(4, 512)
    model = convert_model(original, ConversionConfig(sparsity=8, window=64), windows)
    assert model.mosa_routers().keys() == {5, 11, 17}  # the layers with global attention
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)

    text = topics[:, 4 * 512 : 6 * 512]
    original_cache, cache = measure.filled_cache(original, text), measure.filled_cache(model, text)
    dense, sparse = cache_bytes(original_cache)["dense"], cache_bytes(cache)
    print(f"KV bytes after {text.shape[1]} tokens: {dense} -> {sparse}")
    assert abs(sum(sparse.values()) / measure.formula_bytes(model, text) - 1) < 0.05
    assert sparse["sparse"] < 0.35 * 3 * text.shape[1] * 2 * 256 * 4  # of what three dense groups would hold
    assert sum(sparse.values()) < 0.8 * dense
