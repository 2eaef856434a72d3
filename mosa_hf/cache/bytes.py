"""Bytes that a cache holds, read from its live tensors."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..arguments import checked
from .layer import SparseLayer


@checked()
def cache_bytes(past_key_values: Cache) -> dict[str, int]:
    """
    Bytes that a cache holds, summed over its live tensors.

    Returns:
        `{"dense": ..., "sparse": ...}`: the dense groups' keys and values; the keys, values, positions and counts of
        what sparse groups, or the paper's heads, hold, windows included.
    """
    held: dict[str, list[torch.Tensor]] = {"dense": [], "sparse": []}
    for layer in past_key_values.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            held["dense"] += _tensors_in(getattr(layer, name, None))
        if isinstance(layer, SparseLayer):
            held["sparse"] += [tensor for store in layer.stores for tensor in store.tensors()]
    return {kind: sum(_storage_bytes(tensor) for tensor in tensors) for kind, tensors in held.items()}


def _tensors_in(states: Any) -> list[torch.Tensor]:
    """The plain tensors that a cache layer's states are made of, quantised ones with their scales."""
    if isinstance(states, torch.Tensor):
        if not hasattr(states, "__tensor_flatten__"):
            return [states]
        states = [getattr(states, name) for name in states.__tensor_flatten__()[0]]
    if isinstance(states, dict):
        states = list(states.values())
    return [x for part in states for x in _tensors_in(part)] if isinstance(states, list | tuple) else []


def _storage_bytes(tensor: torch.Tensor) -> int:
    """Memory that a tensor keeps alive: of a view, the whole storage behind it."""
    return tensor.untyped_storage().nbytes()
