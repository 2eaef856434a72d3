"""A model's own cache after a context, as what it remembers of it."""

import copy

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..arguments import checked
from ..cache import cache_bytes
from ..compat import CACHE
from ..modeling.devices import input_device
from ..modeling.modes import evaluating
from ..modeling.token_ids import check_token_ids


@checked()
@torch.inference_mode()
def filled_cache(
    model: PreTrainedModel, input_ids: torch.Tensor, chunk: int = 1024, cache: Cache | None = None
) -> Cache:
    """
    The cache after reading a text.

    Args:
        model: a causal language model.
        input_ids: `[1, T]`.
        chunk: tokens that are read at once.
        cache: to fill; None: a dynamic one.

    Raises:
        ValueError: for what is no token id of the model, and a `chunk` below 1.
    """
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"`input_ids` must be token ids [1, T], at least one, got shape {list(input_ids.shape)}.")
    check_token_ids(input_ids, model.config.get_text_config(decoder=True).vocab_size, "input_ids")
    cache = DynamicCache(config=model.config) if cache is None else cache
    with evaluating(model):
        for part in input_ids.to(input_device(model)).split(chunk, dim=1):
            model(part, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


@checked()
def decoding_bytes(cache: Cache) -> int:
    """
    Bytes that a cache holds while it decodes. After a call of many tokens, upstream's layers with a sliding window
    hold all of them until the next call: here they let go of what they will not read.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return sum(cache_bytes(cache).values())


class CacheMemory:
    """
    `scoring.Memory` of a model's own cache.

    Args:
        model: a causal language model.
        context: token ids that it has read.
    """

    @checked()
    def __init__(self, model: PreTrainedModel, context: list[int]):
        self.model = model
        self.cache = filled_cache(model, torch.tensor([context]))

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        cache = copy.deepcopy(self.cache)
        with evaluating(self.model):
            logits = self.model(ids.to(input_device(self.model)), use_cache=True, **{CACHE: cache}).logits[0]
        return logits, decoding_bytes(cache)
