"""How far apart two models' outputs are."""

import torch


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, of any number."""
    return (a - b).abs().max().item()


def max_difference(a: torch.Tensor, b: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    """The largest, of `[B, T, ...]` at the tokens of a batch that its `attention_mask` does not hide."""
    real = batch["attention_mask"].bool()
    return difference(a[real], b[real])
