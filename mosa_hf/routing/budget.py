"""What a cache budget evicts, and when: streaming top-k, the one definition of it (docs/design.md, section 3)."""

import torch

from ..kernels.capture import is_captured, is_exported
from ..kernels.tensors import NEVER

EVICTION_BLOCK = 128  # tokens compared with all others at once


def within_budget(score: torch.Tensor, position: torch.Tensor, selected: torch.Tensor, budget: int) -> torch.Tensor:
    """
    Streaming top-k: which of the selected tokens are among the `budget` highest scores, ties to the earlier token.

    Args:
        score: `[B, G, S]`.
        position: `[B, G, S]` int64, in any order.
        selected: `[B, G, S]` bool.
        budget: `mosa_cache_budget`.

    Returns:
        `[B, G, S]` bool.
    """
    if is_exported():  # every pair, because not all targets have a stable sort
        own, other = score[..., None], score[..., None, :]
        higher = (other > own) | ((other == own) & (position[..., None, :] < position[..., None]))
        return selected & ((higher & selected[..., None, :]).sum(-1) < budget)
    if score.shape[-1] <= budget:
        return selected
    order = position.argsort(dim=-1, stable=True)
    ranked = score.masked_fill(~selected, -torch.inf).gather(-1, order)
    order = order.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(selected).scatter(-1, order[..., :budget], True) & selected


def evicted_at(
    score: torch.Tensor,
    position: torch.Tensor,
    selected: torch.Tensor,
    budget: int,
    segment: torch.Tensor | None = None,
    most: int | None = None,
) -> torch.Tensor | None:
    """
    When a cache budget evicts each token: the first position t at which `budget` of the selected
    tokens up to t score higher, ties to the earlier token. So token j is read by the queries `j <= t < evicted_at[j]`.

    Args:
        score, position, selected, budget: as in `within_budget`.
        segment: `[B, 1, S]` int64, packed sequences, each with a budget of its own.
        most: selected tokens of the row and group that has most; None: the device is asked.

    Returns:
        `[B, G, S]` int64, `NEVER` where a token stays; None if nothing can be evicted.
    """
    num_slots = score.shape[-1]
    if not is_exported() and (num_slots <= budget or not score.numel()):
        return None
    if not is_captured():
        num_slots = int(selected.sum(-1).max()) if most is None else most
        if num_slots <= budget:
            return None
    # The selected tokens alone, in ascending position.
    order = position.masked_fill(~selected, NEVER).argsort(dim=-1)[..., :num_slots]  # [B, G, K]
    score, position, is_selected = (states.gather(-1, order) for states in (score, position, selected))
    if segment is not None:
        segment = segment.expand_as(selected).gather(-1, order)
    slot = torch.arange(num_slots, device=score.device)
    until = []
    # An exported program takes any length: the number of blocks cannot be part of it.
    for start in (0,) if is_exported() else range(0, num_slots, EVICTION_BLOCK):
        block = slice(start, None if is_exported() else start + EVICTION_BLOCK)
        own, other = score[..., block, None], score[..., None, :]  # [B, G, J, 1], [B, G, 1, K]
        higher = (other > own) | ((other == own) & (slot < slot[block, None]))
        higher = higher & is_selected[..., None, :]
        if segment is not None:
            higher = higher & (segment[..., None, :] == segment[..., block, None])
        num_before = (higher.cumsum(-1, dtype=torch.int32) < budget).sum(-1)  # [B, G, J]
        first = position.gather(-1, num_before.clamp(max=num_slots - 1))
        until.append(torch.where(num_before < num_slots, first.maximum(position[..., block]), NEVER))
    return order.new_full(selected.shape, NEVER).scatter(-1, order, torch.cat(until, dim=-1))
