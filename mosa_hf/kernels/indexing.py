"""Parts of tensors by index."""

from functools import cache

import torch

from .capture import is_captured


def gather_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [B, G, S, ...] at slots `index` [B, G, K], or [B, 1, K] where it is the same for all groups."""
    channels = states.shape[3:]
    index = index.expand(-1, states.shape[1], -1)
    return states.gather(2, index.view(index.shape + (1,) * len(channels)).expand(index.shape + channels))


def of_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [B, T] or [B, T, G] of the tokens in slots `index` [B, G, K]: `[B, G, K]`."""
    states = states[:, None].expand(-1, index.shape[1], -1) if states.ndim == 2 else states.transpose(1, 2)
    return states.gather(2, index)


def take(states: torch.Tensor, indices: tuple[int, ...], dim: int) -> torch.Tensor:
    """`states` at the ascending `indices` of one axis; a view where those are evenly spaced."""
    if len(indices) == states.shape[dim]:
        return states
    first, last = (indices[0], indices[-1]) if indices else (0, -1)
    step = max(1, (last - first) // max(1, len(indices) - 1))
    if indices == tuple(range(first, last + 1, step)):
        return states[(slice(None),) * dim + (slice(first, last + 1, step),)]
    return states.index_select(dim, constant(indices, states.device))


def constant(values: tuple[int | bool, ...], device: torch.device) -> torch.Tensor:
    """`values` on a device, which a GPU is given once: it would wait for every copy of them."""
    return torch.tensor(values, device=device) if device.type == "cpu" or is_captured() else _held(values, device)


@cache
def _held(values: tuple[int | bool, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd may save it
        return torch.tensor(values, device=device)
