"""What a cache of a model with sparse groups holds, by its plan: before it has read anything."""

from collections.abc import Mapping

import torch
from transformers.configuration_utils import PreTrainedConfig

from .configuration import SparseGroupsConfig
from .group_plan import GroupPlan


def kv_share(config: SparseGroupsConfig, num_tokens: int, rates: Mapping[int, torch.Tensor] | None = None) -> float:
    """
    The share of the keys and values of `num_tokens` tokens that a cache keeps: the mean of `SparseGroup.kept_share`.

    Args:
        rates: layer → share of the tokens that each of its sparse groups selects, `[G]`; None: what the plan says.
    """
    kept = []
    for layer, groups in enumerate(GroupPlan.of_config(config).layers):
        selected = iter(() if rates is None else rates[layer].tolist() if layer in rates else ())
        kept += [
            _dense_share(config, layer, num_tokens)
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
    size = num_tokens * _bytes_of_a_token(config)
    layers = range(config.num_hidden_layers)
    dense = sum(_dense_share(config, layer, num_tokens) for layer in layers) / len(layers)
    return round(size * dense), round(size * kv_share(config, num_tokens))


def _dense_share(config: SparseGroupsConfig, layer: int, num_tokens: int) -> float:
    return min(config.sliding_window / num_tokens, 1.0) if config.is_sliding(layer) else 1.0


def _bytes_of_a_token(config: PreTrainedConfig) -> int:
    """In all layers and groups, if they keep it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")
    numbers = config.num_hidden_layers * config.num_groups * 2 * head_dim
    return numbers * dtype.itemsize
