"""Which tokens each group selects: the two rules of DESIGN section 3, on tensors.

Everything is decided on the float32 router logits z, never on sigmoid(z): the sigmoid saturates and makes ties.
"""

import torch


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
        selected `[B, T, G]` bool, and `[G]` float32: the logit that as many tokens of the batch reach as were
        selected, which for one sequence is its K-th highest (NaN if only forced tokens were selected).
    """
    batch_size, num_tokens, _ = logits.shape
    sequence = torch.zeros(batch_size, num_tokens, dtype=torch.int64, device=logits.device)
    if segment is not None:
        sequence = sequence + segment
    score = logits if first is None else logits.masked_fill(first[..., None], torch.inf)
    if valid is not None:
        sequence = sequence.masked_fill(~valid, num_tokens)  # padding forms a last sequence, which selects nothing
        score = score.masked_fill(~valid[..., None], -torch.inf)

    # Two stable sorts order the tokens by sequence, then by falling score, then by position.
    score, order = score.sort(dim=1, descending=True, stable=True)
    if segment is not None:
        by_sequence = sequence[..., None].expand_as(order).gather(1, order).argsort(dim=1, stable=True)
        score, order = score.gather(1, by_sequence), order.gather(1, by_sequence)
    sequence = sequence.sort(dim=1).values  # [B, T]
    start = torch.searchsorted(sequence, sequence)
    length = torch.searchsorted(sequence, sequence, right=True) - start
    quota = (length / sparsity).floor().long().clamp(min=min_tokens).minimum(length)
    quota = quota.masked_fill(sequence == num_tokens, 0)
    rank = torch.arange(num_tokens, device=logits.device) - start

    chosen = (rank < quota)[..., None].expand_as(order)
    selected = torch.zeros_like(chosen).scatter(1, order, chosen)

    # Pooled over the batch rather than averaged over sequences, whose own K-th logits differ: a threshold has to give
    # the rate over all of them. A forced token has no logit to learn from.
    free = score.flatten(0, 1).masked_fill((score == torch.inf).flatten(0, 1), -torch.inf)
    num_free = chosen[..., 0].sum() - (0 if first is None else first.sum())
    last = free.sort(dim=0, descending=True).values.index_select(0, (num_free - 1).clamp(min=0).view(1))[0]
    return selected, torch.where(num_free > 0, last, torch.nan)
