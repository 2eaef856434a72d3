"""The specification of prefix attention: every pair is scored, then masked by the queries' ranges."""

from typing import NamedTuple

import torch

from ..attend import attend


class FarKeys(NamedTuple):
    """Selected tokens in ascending position; query i reads the slots start[i] <= s < end[i]."""

    key: torch.Tensor  # [B, G, S, d]
    value: torch.Tensor  # [B, G, S, d]
    start: torch.Tensor | None  # int, expands to [B, G, T]; None: 0. For packed sequences, or empty slots in front
    end: torch.Tensor  # int, expands to [B, G, T], at most S; a query with end <= start reads nothing
    bias: torch.Tensor | None = None  # [B, G, S], added to the scores of a slot
    evicted_at: torch.Tensor | None = None  # [B, G, S] int: the slot is read by queries of lower `position` only


class WindowKeys(NamedTuple):
    """The last tokens, selected or not; query i, at slot N - T + i, reads its own slot and `size` - 1 before it."""

    key: torch.Tensor  # [B, G, N, d]
    value: torch.Tensor  # [B, G, N, d]
    start: torch.Tensor | None  # int, expands to [B, G, T], before which nothing is read; None: 0
    size: int


def prefix_attention(
    query: torch.Tensor,
    far: FarKeys,
    window: WindowKeys | None = None,
    position: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One softmax over what each query reads of `far` and of `window`.

    Args:
        query: `[B, G, R, T, d]`.
        far: the selected keys. The paper's heads: `FarKeys(key, value, None, i + 1)` and nothing else.
        window: the window, or other keys.
        position: of the queries, int, expands to `[B, G, T]`; needed with `far.evicted_at`.
        scale: factor on the scores; None: d ** -0.5.
        softcap: c of c · tanh(score / c); None: none. The bias is added after it.
        sinks: `[G, R]`, the score of one more key in every softmax, whose value is 0.

    Returns:
        `[B, G, R, T, d]`; zero where a query reads nothing.
    """
    size = (*query.shape[:2], query.shape[3], -1)

    def reads(keys: FarKeys | WindowKeys) -> torch.Tensor:  # [B, G, T, S]
        slot = torch.arange(keys.key.shape[2], device=query.device)
        if isinstance(keys, FarKeys):
            mask = slot < keys.end[..., None]
        else:
            distance = slot[len(slot) - query.shape[3] :, None] - slot
            mask = (distance >= 0) & (distance < keys.size)
        if keys.start is not None:
            mask = mask & (slot >= keys.start[..., None])
        return mask.expand(size)

    key, value, mask, bias = far.key, far.value, reads(far), far.bias
    if far.evicted_at is not None:
        assert position is not None
        mask = mask & (position[..., None] < far.evicted_at[:, :, None])
    if window is not None:
        key, value = torch.cat((key, window.key), dim=2), torch.cat((value, window.value), dim=2)
        mask = torch.cat((mask, reads(window)), dim=-1)
        bias = None if bias is None else torch.cat((bias, bias.new_zeros(window.key.shape[:3])), dim=2)
    return attend(query, key, value, mask, None if bias is None else bias[:, :, None], scale, softcap, sinks)
