"""What a cache of a model with sparse groups holds, by its plan: before it has read anything."""

from collections.abc import Mapping

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from .configuration import GLOBAL, SparseGroupsConfig
from .group_plan import GroupPlan


def kv_share(config: SparseGroupsConfig, num_tokens: int, rates: Mapping[int, torch.Tensor] | None = None) -> float:
    """
    The share of the keys and values of `num_tokens` tokens that a cache keeps: the mean of `SparseGroup.kept_share`,
    over the layers that have keys and values of their own.

    Args:
        config: of the model, or of the language model in it.
        num_tokens: of one sequence.
        rates: layer → share of the tokens that each of its sparse groups selects, `[G]`; None: what the plan says.
    """
    kept = []
    plan = GroupPlan.of_config(config).layers
    for layer, kind in _caching_layers(config).items():
        groups = plan[layer]
        dense = _dense_share(config, layer, kind, num_tokens)
        selected = iter(() if rates is None else rates[layer].tolist() if layer in rates else ())
        kept += [
            dense
            if group is None
            else group.kept_share(num_tokens, None if rates is None else next(selected), config.mosa_cache_budget)
            for group in groups
        ]
    return sum(kept) / len(kept)


def planned_bytes(config: SparseGroupsConfig, num_tokens: int) -> tuple[int, int]:
    """
    Bytes of the keys and values of one sequence of `num_tokens` tokens, in the config's dtype: of the original, whose
    layers with a sliding window keep that alone, and of the model with sparse groups, if it selects what its plan
    says.
    """
    before, after = 0.0, 0.0
    plan = GroupPlan.of_config(config).layers
    for layer, kind in _caching_layers(config).items():
        size = num_tokens * _bytes_of_a_token(config, layer)
        stored = num_tokens * _bytes_of_a_token(config, layer, config.mosa_cache_dtype is not None)
        dense = _dense_share(config, layer, kind, num_tokens)
        kept = [
            size * dense if group is None else stored * group.kept_share(num_tokens, None, config.mosa_cache_budget)
            for group in plan[layer]
        ]
        before += size * dense
        after += sum(kept) / len(kept)
    return round(before), round(after)


def _caching_layers(config: SparseGroupsConfig) -> dict[int, str]:
    """
    Layer → its type, of those that have keys and values of their own: no recurrent ones, nor those that read another
    layer's.
    """
    kinds = enumerate(get_layer_types_and_kwargs(config)[0])
    return {layer: kind for layer, kind in kinds if kind in GLOBAL or "sliding" in kind or "chunked" in kind}


def _dense_share(config: SparseGroupsConfig, layer: int, kind: str, num_tokens: int) -> float:
    if kind in GLOBAL:
        return 1.0
    own = config.per_layer_config[layer] if config.is_heterogeneous else config
    return min((own.attention_chunk_size if "chunked" in kind else own.sliding_window) / num_tokens, 1.0)


def _bytes_of_a_token(config: SparseGroupsConfig, layer: int, is_coded: bool = False) -> int:
    """In all groups of a layer, if they keep it; as codes with two scales, if it `is_coded`."""
    own = config.per_layer_config[layer] if config.is_heterogeneous else config
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")
    if getattr(own, "kv_lora_rank", None):  # of latent attention, whose heads share what is cached
        return (own.kv_lora_rank + own.qk_rope_head_dim) * dtype.itemsize
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    value_dim = getattr(own, "v_head_dim", None) or head_dim
    channels = head_dim + value_dim
    return config.num_groups_of(layer) * (channels + 2 * dtype.itemsize if is_coded else channels * dtype.itemsize)
