"""The dense heads' part of a growing cache, appended to in place."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .memory import MIN_FREE, SLACK, may_change


class PreallocatedDynamicLayer(DynamicLayer):
    """
    Keys and values with a little slack behind them, on a GPU with some for short ones, too: upstream's layer copies
    all of them for every new token. What was cropped is overwritten, and so is what another cache shares of it: copy a
    cache by `copy.deepcopy`.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None  # once it is initialised
        if key_states.shape[1] == 0:  # no dense groups: the layer only counts tokens
            num_held = self.keys.shape[-2] if self.keys.ndim == 4 else 0
            batch_size, _, num_new, head_dim = key_states.shape
            self.keys = self.values = key_states.new_empty(batch_size, 0, num_held + num_new, head_dim)
            return self.keys, self.values
        self.keys, self.values = _append(self.keys, key_states), _append(self.values, value_states)
        return self.keys, self.values


def _append(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """
    `held` [B, H, S, d] (at first [0]) and then `new` [B, H, T, d]: in the memory of `held` if it has capacity behind
    its entries, else in new memory. Where nothing may change in place, a plain concatenation.
    """
    if held.shape[-2:-1] == (0,):  # cropped to nothing: upstream does not reorder its rows
        held = held.flatten()
    is_traced, is_cpu = torch.compiler.is_compiling() or torch.is_grad_enabled(), new.device.type == "cpu"
    if not held.numel() and held.dtype == new.dtype and not is_cpu:
        held = new.new_empty(*new.shape[:2], 0, new.shape[3])  # with slack from the first call on
    if is_traced or held.ndim == 1 or held.shape[:2] != new.shape[:2] or held.dtype != new.dtype:
        return torch.cat((held, new), dim=-2)  # promotes types, and raises
    batch_size, num_heads, num_held, head_dim = held.shape
    length = num_held + new.shape[2]
    # Is `held` part of entries [B, H, capacity, d] that have memory of their own, with capacity for more?
    capacity = held.stride(1) // head_dim
    layout = (num_heads * capacity * head_dim, capacity * head_dim, head_dim, 1)
    is_whole = held.untyped_storage().nbytes() == batch_size * layout[0] * held.element_size()
    fits = held.storage_offset() // head_dim + length <= capacity
    if is_whole and fits and held.stride() == layout and may_change(held):
        grown = held.as_strided((batch_size, num_heads, length, head_dim), layout)
    else:
        slack = num_held // SLACK if is_cpu else length // SLACK + MIN_FREE
        grown = held.new_empty(batch_size, num_heads, length + slack, head_dim)[:, :, :length]
        if num_held:
            grown[:, :, :num_held] = held
    grown[:, :, num_held:] = new
    return grown
