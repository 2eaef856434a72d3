"""The converted SmolLM2-135M: every way to compute the next token is the same function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, TextIteratorStreamer, set_seed
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mosa_hf import ConversionConfig, convert_model, trace_routing
from mosa_hf.conversion import calibration_windows, convert_to_native
from testing import corpora
from testing.difference import max_difference

pytestmark = pytest.mark.real
NEW_TOKENS = 12
PROMPTS = ["The capital of France is", "def fibonacci(n):", "A file system keeps track of the blocks that"]


@torch.no_grad()
def test_lossless_without_sparsity(original, tokenizer):
    """Of both, with and without a second set of weights: sparse groups, and the native model's heads."""
    models = [
        convert_model(original, ConversionConfig(sparsity=1, window=64)),
        convert_to_native(original, ConversionConfig(sparsity=1, window=0)),
    ]
    for prompt in PROMPTS[:2]:
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = original.generate(input_ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        for model in models:
            assert torch.equal(model.generate(input_ids, max_new_tokens=NEW_TOKENS, do_sample=False), tokens)
            assert (model(tokens).logits - original(tokens).logits).abs().max() < 1e-4


def in_chunks(model, batch: dict[str, torch.Tensor], sizes: list[int], cache=None) -> torch.Tensor:
    """Logits of a batch that is read in calls of these sizes; the last size is repeated."""
    cache, logits, start = DynamicCache(config=model.config) if cache is None else cache, [], 0
    total = batch["input_ids"].shape[1]
    while start < total:
        end = min(start + (sizes[len(logits)] if len(logits) < len(sizes) else sizes[-1]), total)
        logits.append(
            model(
                batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, start:end],
                past_key_values=cache,
            ).logits
        )
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"])
@torch.no_grad()
def test_decode_parity(dtype, bound, converted, original, tokenizer, monkeypatch):
    """
    Full forward == prefill and single tokens == chunks, rows of a left-padded batch == the rows alone.

    In float32 the dense original's own chunks differ from its own full forward by 5e-5 to 8e-5 here, so the bound
    leaves room for a machine that rounds worse; float64 shows that nothing but rounding differs.
    """
    if dtype == torch.float64:  # upstream's norm rounds to float32 whatever the model's dtype
        monkeypatch.setattr(
            LlamaRMSNorm,
            "forward",
            lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
        )
    model, dense = (copy.deepcopy(each).to(dtype) for each in (converted, original))
    text = calibration_windows(tokenizer, corpora.text("python_topics"), 2, 110)
    mask = torch.ones_like(text)
    mask[1, :30] = 0
    batch = {"input_ids": text, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    full, dense_full = (each(**batch, use_cache=False).logits for each in (model, dense))
    with trace_routing(model) as selected:
        for sizes in ([100, 1], [48]) if dtype == torch.float64 else ([100, 1], [48], [7, 100, 1]):
            rounding = max_difference(dense_full, in_chunks(dense, batch, sizes), batch)
            for cache in (None, StaticCache(config=model.config, max_cache_len=text.shape[1])):
                difference = max_difference(full, in_chunks(model, batch, sizes, cache), batch)
                assert difference <= max(bound, 1.5 * rounding), (sizes, cache)
        model(**batch, use_cache=False)
    assert 0.03 < torch.stack([calls[-1].float().mean() for calls in selected.values()]).mean() < 0.2
    for row, real in enumerate(mask.bool()):
        alone = model(text[row : row + 1, real], use_cache=False).logits[0]
        assert (full[row, real] - alone).abs().max() <= max(bound, 1.5 * rounding)


@pytest.fixture(scope="module")
def native(original, tokenizer):
    """The paper's heads in a third of the groups: hardly a language model, but its decoding has to be exact."""
    calibration = calibration_windows(tokenizer, corpora.text("python_topics"), 4, 256)
    return convert_to_native(original, ConversionConfig(groups=30, window=0), calibration)


MODES = {
    "static": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "static_beams": {"num_beams": 2, "cache_implementation": "static"},
    "chunked_prefill": {"prefill_chunk_size": 4},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


@pytest.mark.parametrize("form", ["sparse", "native"])
def test_every_mode_gives_the_tokens_of_a_plain_loop(form, converted, native, tokenizer):
    """Greedy modes equal a loop that feeds everything anew; the others equal themselves without a cache."""
    model, assistant = (converted, native) if form == "sparse" else (native, converted)
    loop = input_ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(loop, use_cache=False, logits_to_keep=1).logits[:, -1]
            logits[:, tokenizer.eos_token_id] = -torch.inf  # as `min_new_tokens` has it
            loop = torch.cat((loop, logits.argmax(-1, keepdim=True)), dim=1)
    uncached = {}
    for mode, options in {"greedy": {}, **MODES}.items():
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **options}
        if "assistant_model" in options:
            options["assistant_model"] = assistant
        expected = loop
        if options["do_sample"] or "num_beams" in options:
            decoding = options["do_sample"], options.get("num_beams")
            if decoding not in uncached:
                set_seed(0)
                uncached[decoding] = model.generate(
                    input_ids, **{**options, "cache_implementation": None}, use_cache=False
                )
            expected = uncached[decoding]
        set_seed(0)
        assert torch.equal(model.generate(input_ids, **options), expected), mode


def test_a_conversation_goes_on_from_its_cache(converted, tokenizer):
    """Three turns on one cache, streamed, equal each turn read anew without a cache."""
    caches = DynamicCache(config=converted.config), StaticCache(config=converted.config, max_cache_len=128)
    conversation = torch.empty(1, 0, dtype=torch.long)
    for prompt in PROMPTS:
        turn = tokenizer(prompt, return_tensors="pt")["input_ids"]
        conversation = torch.cat((conversation, turn), dim=1)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        options["attention_mask"] = torch.ones_like(conversation)
        expected = converted.generate(conversation, use_cache=False, **options)
        for cache in caches:
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
            tokens = converted.generate(conversation, past_key_values=cache, streamer=streamer, **options)
            assert torch.equal(tokens, expected)
            assert "".join(streamer) == tokenizer.decode(tokens[0, conversation.shape[1] :])
        conversation = expected


@torch.no_grad()
def test_no_leak(converted, tokenizer):
    """Under threshold routing no later token moves an earlier logit; expert choice, for contrast, lets them."""
    text = calibration_windows(tokenizer, corpora.text("python_topics"), 1, 130)
    other = torch.cat((text[:, :100], text[:, :30]), dim=1)
    model = AutoModelForCausalLM.from_pretrained(converted.name_or_path).double()
    leaks = {}
    for routing in ("threshold", "expert_choice"):
        for module in model.modules():
            if hasattr(module, "inference_routing"):
                module.inference_routing = routing
        logits = [model(ids, use_cache=False).logits[:, :100] for ids in (text, other)]
        leaks[routing] = (logits[0] - logits[1]).abs().max().item()
    assert leaks["threshold"] <= 1e-6
    assert leaks["expert_choice"] > 1e-2
