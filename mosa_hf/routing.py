"""Which tokens each group selects: the two rules of DESIGN section 3, on tensors.

Everything is decided on the float32 router logits z, never on sigmoid(z): the sigmoid saturates and makes ties.
"""

from dataclasses import dataclass, field

import torch
from transformers.masking_utils import find_packed_sequence_indices

from .kernels.layout import NEVER

EVICTION_BLOCK = 128  # tokens compared with all others at once


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


def within_budget(score: torch.Tensor, position: torch.Tensor, selected: torch.Tensor, budget: int) -> torch.Tensor:
    """
    Streaming top-k (DESIGN section 3): which of the selected tokens are among the `budget` highest scores, ties to the
    earlier token.

    Args:
        score: `[B, G, S]`.
        position: `[B, G, S]` int64, in any order.
        selected: `[B, G, S]` bool.
        budget: `mosa_cache_budget`.

    Returns:
        `[B, G, S]` bool.
    """
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
) -> torch.Tensor | None:
    """
    When a cache budget evicts each token (DESIGN section 3): the first position t at which `budget` of the selected
    tokens up to t score higher, ties to the earlier token. So token j is read by the queries `j <= t < evicted_at[j]`.

    Args:
        score, position, selected, budget: as in `within_budget`.
        segment: `[B, 1, S]` int64, packed sequences, each with a budget of its own.

    Returns:
        `[B, G, S]` int64, `NEVER` where a token stays; None if nothing can be evicted.
    """
    num_slots = score.shape[-1]
    if num_slots <= budget or not score.numel():
        return None
    if not torch.compiler.is_compiling():
        num_slots = int(selected.sum(-1).max())
        if num_slots <= budget:
            return None
    # The selected tokens alone, in ascending position.
    order = position.masked_fill(~selected, NEVER).argsort(dim=-1, stable=True)[..., :num_slots]  # [B, G, K]
    score, position, is_selected = (states.gather(-1, order) for states in (score, position, selected))
    if segment is not None:
        segment = segment.expand_as(selected).gather(-1, order)
    slot = torch.arange(num_slots, device=score.device)
    until = []
    for start in range(0, num_slots, EVICTION_BLOCK):
        block = slice(start, start + EVICTION_BLOCK)
        own, other = score[..., block, None], score[..., None, :]  # [B, G, J, 1], [B, G, 1, K]
        higher = (other > own) | ((other == own) & (slot < slot[block, None]))
        higher = higher & is_selected[..., None, :]
        if segment is not None:
            higher = higher & (segment[..., None, :] == segment[..., block, None])
        num_before = (higher.cumsum(-1, dtype=torch.int32) < budget).sum(-1)  # [B, G, J]
        first = position.gather(-1, num_before.clamp(max=num_slots - 1))
        until.append(torch.where(num_before < num_slots, first.maximum(position[..., block]), NEVER))
    return order.new_full(selected.shape, NEVER).scatter(-1, order, torch.cat(until, dim=-1))


@dataclass
class RoutingState:
    """
    What the layers of one model call share: how the call's tokens stand in their sequences, in a form that does not
    depend on padding, and the thresholds the call started with.

    Attributes:
        position: `[B, T]` int64, the number of real tokens before a token in its row, cached ones included.
        valid: `[B, T]` bool, False on padding; None without padding.
        segment: `[B, T]` int64, packed sequences; None for one sequence a row.
        first: `[B, T]` bool, the first token of each sequence.
        order, inverse: `[B, T]` int64, the permutation that moves a row's padding to its left, and back. None where
            padding already is on the left.
        thresholds: layer index → the threshold `[G]` that this call routes with in training, so that gradient
            checkpointing recomputes the same selection after the moving average went on.
    """

    position: torch.Tensor
    valid: torch.Tensor | None
    segment: torch.Tensor | None
    first: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    thresholds: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        num_cached_tokens: torch.Tensor | None,
        may_be_packed: bool,
        past_length: torch.Tensor | int | None = None,
    ) -> "RoutingState":
        """
        Args:
            inputs_embeds: `[B, T, D]`, for its shape and device.
            attention_mask: as the user gave it: None, 2-D `[B, cached + T]`, or 4-D (bool, or float with 0 = keep).
            position_ids: `[B or 1, T]`; a restart marks a packed sequence if `may_be_packed`.
            num_cached_tokens: `[B]` int64, real tokens that the cache has seen; None for no cache or an empty one.
            may_be_packed: Transformers' rule: neither a mask nor a cache was given.
            past_length: where this call's tokens begin in a mask over a static cache; None: they are its last ones.
        """
        batch_size, num_tokens = inputs_embeds.shape[:2]
        is_static = past_length is not None or torch.compiler.is_compiling()  # nothing may depend on data
        valid = valid_tokens(attention_mask, num_tokens, past_length)
        if valid is not None:
            valid = valid.to(inputs_embeds.device).expand(batch_size, -1)  # a 4-D mask may have one row for all
        order = inverse = None
        if valid is not None and not is_static and bool(valid.all()):
            valid = None
        if valid is None:
            position = torch.arange(num_tokens, device=inputs_embeds.device).expand(batch_size, -1)
        else:
            position = (valid.cumsum(1) - 1).clamp(min=0)
            if num_tokens > 1 and (is_static or bool((valid[:, :-1] & ~valid[:, 1:]).any())):
                order = valid.to(torch.int8).argsort(dim=1, stable=True)
                inverse = order.argsort(dim=1)

        segment = find_packed_sequence_indices(position_ids.expand(batch_size, -1)) if may_be_packed else None
        if segment is None:
            first = position == 0
        else:
            first = torch.ones_like(segment, dtype=torch.bool)
            first[:, 1:] = segment[:, 1:] != segment[:, :-1]
        if num_cached_tokens is not None:
            num_cached_tokens = num_cached_tokens.to(inputs_embeds.device, copy=True)[:, None]  # a cache counts on
            position = position + num_cached_tokens
            first = first & (num_cached_tokens == 0)
        if valid is not None:
            first = first & valid
        return cls(position, valid, segment, first, order, inverse)


def valid_tokens(
    attention_mask: torch.Tensor | None, num_tokens: int, past_length: torch.Tensor | int | None = None
) -> torch.Tensor | None:
    """
    `[B, num_tokens]` bool: which of a call's tokens are not padding; None if the mask cannot tell.

    Args:
        attention_mask: 2-D or 4-D, as the user gave it.
        past_length: where the call's tokens begin in the mask; None: they are its last ones.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        # The last query sees every real token of its row.
        attention_mask = attention_mask[:, 0, -1]
        if attention_mask.dtype.is_floating_point:
            attention_mask = attention_mask == 0
    if attention_mask.ndim != 2:
        raise ValueError(
            "`attention_mask` must be 2-D [batch, length] or 4-D [batch, 1, queries, keys], "
            f"got {tuple(attention_mask.shape)}."
        )
    if attention_mask.shape[1] < num_tokens:
        raise ValueError(
            f"`attention_mask` covers {attention_mask.shape[1]} tokens, fewer than the {num_tokens} that are passed."
        )
    if past_length is None:
        return attention_mask[:, -num_tokens:].bool()
    columns = past_length + torch.arange(num_tokens, device=attention_mask.device)
    return attention_mask.index_select(1, columns).bool()
