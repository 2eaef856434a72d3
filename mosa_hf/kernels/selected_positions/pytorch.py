"""Turns what is selected into slots, on any device."""

import torch


def selected_positions(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selected tokens of each group in ascending order.

    Args:
        selected: `[B, T, G]` bool.

    Returns:
        index `[B, G, K]` int64, K the largest count, and filled `[B, G, K]` bool; empty slots come last and hold 0.
    """
    num_tokens = selected.shape[1]
    selected = selected.transpose(1, 2)  # [B, G, T]
    count = selected.sum(-1)  # [B, G]
    filled = torch.arange(int(count.max()), device=selected.device) < count[..., None]
    # Row by row, group by group, ascending, as filled slots lie.
    index = selected.flatten().nonzero()[:, 0] % num_tokens
    if index.numel() < filled.numel():
        index = torch.zeros(filled.shape, dtype=index.dtype, device=index.device).masked_scatter(filled, index)
    return index.view(filled.shape), filled
