"""Which tokens each group selects: the two rules of docs/design.md, section 3, on tensors.

Everything is decided on the float32 router logits z, never on sigmoid(z): the sigmoid saturates and makes ties.
"""

import torch

from ..kernels.capture import is_captured


def select_by_threshold(
    logits: torch.Tensor, threshold: torch.Tensor, valid: torch.Tensor | None = None, first: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Causal selection: token t is selected iff `logits[t] >= threshold`, whatever its neighbours are.

    Args:
        logits: `[B, T, G]` float32.
        threshold: `[G]` float32.
        valid: `[B, T]` bool, False on padding, which is never selected.
        first: `[B, T]` bool, tokens to select in any case (the first of each sequence).

    Returns:
        `[B, T, G]` bool.
    """
    selected = logits >= threshold
    if first is not None:
        selected = selected | first[..., None]
    if valid is not None:
        selected = selected & valid[..., None]
    return selected


def select_by_expert_choice(
    logits: torch.Tensor,
    sparsity: float,
    min_tokens: int,
    valid: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Expert choice (paper, section 2): each group takes the K highest logits of each sequence, ties to the earlier
    token, with K = max(floor(valid tokens / sparsity), min_tokens), at most the valid tokens there are. Not causal.

    Args:
        logits: `[B, T, G]` float32.
        sparsity: ρ.
        min_tokens: least K.
        valid: `[B, T]` bool, False on padding.
        first: `[B, T]` bool, tokens that take a place in any case.
        segment: `[B, T]` int64, ascending: which packed sequence of its row a token belongs to.

    Returns:
        selected `[B, T, G]` bool, and `[G]` float32: the highest logit that as many tokens of the batch reach as were
        selected, which for one sequence is its K-th highest. Forced tokens count on neither side; NaN if there are no
        others.
    """
    score = logits if first is None else logits.masked_fill(first[..., None], torch.inf)
    if valid is not None:
        score = score.masked_fill(~valid[..., None], -torch.inf)
    if segment is not None:
        selected, last = _highest_of_sequences(score, segment, sparsity, min_tokens, valid)
    else:
        selected, last = _highest_of_rows(score, sparsity, min_tokens, valid)
    return selected, last.masked_fill(last.isinf(), torch.nan)  # a forced token has no logit to learn from


def num_selected(length: int, sparsity: float, min_tokens: int) -> int:
    """K of a sequence of `length` tokens."""
    return min(max(int(length / sparsity), min_tokens), length)


def _quota(length: torch.Tensor, sparsity: float, min_tokens: int) -> torch.Tensor:
    """`num_selected` of sequences of `length` int64 tokens each."""
    # In float64 where there is one, as Python divides.
    length_as_float = length.to(torch.float32 if length.device.type == "mps" else torch.float64)
    return (length_as_float / sparsity).floor().long().clamp(min=min_tokens).minimum(length)


def _highest_of_rows(
    score: torch.Tensor, sparsity: float, min_tokens: int, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K highest of each row of `score` [B, T, G], and the score `[G]` that B · K tokens of the batch reach."""
    batch_size, num_tokens, num_groups = score.shape
    most = num_selected(num_tokens, sparsity, min_tokens)
    if valid is None:
        quota = torch.full((batch_size,), most, device=score.device)
    else:
        quota = _quota(valid.sum(1), sparsity, min_tokens)
    # To look at values would cost a synchronisation elsewhere than on a CPU.
    may_look = score.device.type == "cpu" and not is_captured()
    num_best = min(2 * most, num_tokens) if may_look and batch_size > 1 else most
    best = score.topk(num_best, dim=1).values  # [B, most, G], and more for the pool below
    lowest = best.gather(1, (quota - 1).clamp(min=0)[:, None, None].expand(-1, 1, num_groups))  # [B, 1, G]
    selected = score >= lowest
    # Exact unless tokens tie for the last places.
    if not (may_look and bool((selected.sum(1) == quota[:, None]).all())):
        above = score > lowest
        tie = selected & ~above
        places = quota[:, None, None] - above.sum(1, keepdim=True)
        selected = above | (tie & (tie.cumsum(1, dtype=torch.int32) <= places))

    # Pooled over the batch rather than averaged over sequences, whose own K-th logits differ: a threshold has to give
    # the rate over all of them.
    pooled = best
    if batch_size > 1:
        # The best of the rows are all, unless what a row has left might be higher than the lowest of them.
        if may_look:
            pooled = best.flatten(0, 1).topk(batch_size * most, dim=0).values
        if not (may_look and bool((best[:, -1] <= pooled[-1]).all())):
            pooled = score.flatten(0, 1).topk(batch_size * most, dim=0).values
    return selected, pooled.view(-1, num_groups).index_select(0, (quota.sum() - 1).clamp(min=0).view(1))[0]


def _highest_of_sequences(
    score: torch.Tensor, segment: torch.Tensor, sparsity: float, min_tokens: int, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for packed sequences, each with a K of its own: two stable sorts, and a third for the score."""
    num_tokens = score.shape[1]
    # Padding forms a last sequence, which selects nothing.
    sequence = segment if valid is None else segment.masked_fill(~valid, num_tokens)
    order = score.argsort(dim=1, descending=True, stable=True)
    by_sequence = sequence[..., None].expand_as(order).gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_sequence)  # by sequence, then by falling score, then by position
    sequence = sequence.sort(dim=1).values  # [B, T]
    start = torch.searchsorted(sequence, sequence)
    length = torch.searchsorted(sequence, sequence, right=True) - start
    quota = _quota(length, sparsity, min_tokens).masked_fill(sequence == num_tokens, 0)
    chosen = torch.arange(num_tokens, device=score.device) - start < quota  # [B, T]
    selected = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, chosen[..., None].expand_as(order))
    pooled = score.flatten(0, 1).sort(dim=0, descending=True).values
    return selected, pooled.index_select(0, (chosen.sum() - 1).clamp(min=0).view(1))[0]
