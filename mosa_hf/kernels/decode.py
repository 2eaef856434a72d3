"""One token a row on a cache of fixed size, updated in place: static shapes and no host synchronisation when compiled.

A token that is selected joins the cache; when a row and group would then hold more than `budget` selected tokens, the
lowest score is given up, ties to the later token (streaming top-k, DESIGN section 3).
"""

import torch

from .layout import FixedKeyValues, HeadWeights, rotate


def decode_selected(
    hidden_states: torch.Tensor,
    weights: HeadWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    score: torch.Tensor,
    gate: torch.Tensor,
    valid: torch.Tensor | None,
    state: FixedKeyValues,
    budget: int,
) -> torch.Tensor:
    """
    Form "selected".

    Args:
        hidden_states: `[B, D]`.
        weights: the groups' projections. Outside the compiler, those of groups that nothing selects are not read.
        cos, sin: `[B, rotary_dim]`.
        score: `[B, G]` float32: -inf where the token is not selected, inf where it must never be evicted.
        gate: `[B, G]`.
        valid: `[B]` bool, False on padding, whose row stays as it is; None: no padding.
        state: the cache, changed in place.
        budget: at most C.

    Returns:
        `[B, D]`; zero where nothing is selected.
    """
    batch_size, num_groups = score.shape
    device = score.device
    selected = score > -torch.inf
    if valid is not None:
        selected = selected & valid[:, None]
    groups = torch.arange(num_groups, device=device)
    if not torch.compiler.is_compiling() and device.type == "cpu":
        groups = selected.any(0).nonzero()[:, 0]
        if len(groups) == 0:
            _count(state, valid)
            return torch.zeros_like(hidden_states)
        if len(groups) < num_groups:
            weights = HeadWeights(*(None if weight is None else weight[groups] for weight in weights))
            selected, score, gate = (states[:, groups] for states in (selected, score, gate))

    head_dim = weights.key.shape[1]
    query, key, value = (
        torch.einsum("bn,gon->bgo", hidden_states, weight) + (0.0 if bias is None else bias)
        for weight, bias in (
            (weights.query, weights.query_bias),
            (weights.key, weights.key_bias),
            (weights.value, weights.value_bias),
        )
    )
    query = rotate(query.unflatten(-1, (-1, head_dim)), cos[:, None, None], sin[:, None, None])  # [B, A, R, d]
    key = rotate(key, cos[:, None], sin[:, None])  # [B, A, d]

    _insert(state, groups, key, value, score, selected, budget)
    _count(state, valid)

    num_slots = _num_readable(state)
    filled = torch.arange(num_slots, device=device) < state.count[:, groups, None]  # [B, A, C]
    keys, values = state.key[:, groups, :num_slots], state.value[:, groups, :num_slots]
    heads = _attend(query, [(keys, values, filled)])  # [B, A, R, d]
    heads = heads * (gate * selected)[..., None, None].to(heads.dtype)
    return torch.einsum("bgo,gno->bn", heads.flatten(2), weights.output)


def decode_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    valid: torch.Tensor | None,
    state: FixedKeyValues,
    budget: int,
) -> torch.Tensor:
    """
    Form "all": the token joins the ring, and the token that it displaces there joins the kept ones if it is still
    selected. The budget counts both.

    Args:
        query: `[B, G, R, d]`, rotated.
        key, value: `[B, G, d]`, keys rotated.
        score, valid, state, budget: as in `decode_selected`.

    Returns:
        `[B, G, R, d]`; zero where there is nothing to read.
    """
    window = state.ring_key.shape[2]
    num_groups = score.shape[1]
    if window:
        _push(state, key, value, score, valid)
        _evict(state, valid, budget)
    else:
        selected = score > -torch.inf
        if valid is not None:
            selected = selected & valid[:, None]
        groups = torch.arange(num_groups, device=score.device)
        _insert(state, groups, key, value, score, selected, budget)
    _count(state, valid)

    num_slots = _num_readable(state)
    filled = torch.arange(num_slots, device=score.device) < state.count[..., None]  # [B, G, C]
    parts = [(state.key[:, :, :num_slots], state.value[:, :, :num_slots], filled)]
    if window:
        filled = torch.arange(window, device=score.device) < state.num_tokens[:, None, None]
        parts.append((state.ring_key, state.ring_value, filled.expand(-1, num_groups, -1)))
    return _attend(query, parts)


def _insert(
    state: FixedKeyValues,
    groups: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    selected: torch.Tensor,
    budget: int,
) -> None:
    """Keep the tokens [B, A] that these `groups` [A] have `selected`: in a free slot, or instead of a lower score."""
    count = state.count[:, groups]
    filled = torch.arange(state.key.shape[2], device=count.device) < count[..., None]  # [B, A, C]
    lowest, lowest_slot = _lowest(state.score[:, groups].masked_fill(~filled, torch.inf), state.position[:, groups])
    full = count >= budget
    slot = torch.where(full, lowest_slot, count.long())
    row = torch.arange(len(count), device=count.device)[:, None]
    position = state.num_tokens[:, None].expand_as(slot)
    _write(state, (row, groups[None], slot), key, value, position, score, selected & (~full | (score > lowest)))
    state.count[:, groups] = count + (selected & ~full).int()
    state.num_evicted[:, groups] += (selected & full).int()


def _push(
    state: FixedKeyValues, key: torch.Tensor, value: torch.Tensor, score: torch.Tensor, valid: torch.Tensor | None
) -> None:
    """Put a token into the ring; the one that was there joins the kept entries if it is selected, else is gone."""
    batch_size, num_groups, window = state.ring_score.shape
    row, group = (torch.arange(n, device=score.device) for n in (batch_size, num_groups))
    real = torch.ones_like(state.num_tokens, dtype=torch.bool) if valid is None else valid  # [B]
    ring_slot = (row[:, None], group[None], (state.num_tokens % window)[:, None].expand(-1, num_groups))
    leaving_score = state.ring_score[ring_slot]
    leaving = (leaving_score > -torch.inf) & real[:, None]  # [B, G]; there is room: the budget counts the ring too
    slot = (row[:, None], group[None], state.count.long().clamp(max=state.key.shape[2] - 1))
    position = (state.num_tokens - window)[:, None].expand_as(leaving)
    _write(state, slot, state.ring_key[ring_slot], state.ring_value[ring_slot], position, leaving_score, leaving)
    state.count.add_(leaving.int())
    state.ring_key[ring_slot] = torch.where(real[:, None, None], key, state.ring_key[ring_slot])
    state.ring_value[ring_slot] = torch.where(real[:, None, None], value, state.ring_value[ring_slot])
    state.ring_score[ring_slot] = torch.where(real[:, None], score, leaving_score)


def _evict(state: FixedKeyValues, valid: torch.Tensor | None, budget: int) -> None:
    """Give up the lowest score among kept entries and ring where they are more than `budget`."""
    batch_size, num_groups, capacity = state.score.shape
    window, position, device = state.ring_score.shape[2], state.num_tokens, state.score.device
    in_ring = state.ring_score > -torch.inf  # [B, G, W]
    over = state.count + in_ring.sum(-1) > budget  # [B, G]
    if valid is not None:
        over = over & valid[:, None]
    if not torch.compiler.is_compiling() and device.type == "cpu" and not bool(over.any()):
        return
    filled = torch.arange(capacity, device=device) < state.count[..., None]
    ring_slot = torch.arange(window, device=device)
    ring_position = position[:, None] - (position[:, None] - ring_slot) % window  # [B, W]
    scores = torch.cat(
        (
            state.score.masked_fill(~filled, torch.inf),
            state.ring_score.masked_fill(~in_ring, torch.inf),
        ),
        dim=-1,
    )
    positions = torch.cat((state.position, ring_position[:, None].expand_as(in_ring).int()), dim=-1)
    _, lowest = _lowest(scores, positions)  # [B, G]

    from_ring, from_kept = over & (lowest >= capacity), over & (lowest < capacity)
    cleared = (lowest - capacity).clamp(min=0)[..., None]
    ring_score = state.ring_score.gather(2, cleared).masked_fill(from_ring[..., None], -torch.inf)
    state.ring_score.scatter_(2, cleared, ring_score)
    # The last entry takes the place of the one that goes.
    row, group = torch.arange(batch_size, device=device)[:, None], torch.arange(num_groups, device=device)[None]
    last = (row, group, (state.count.long() - 1).clamp(min=0))
    moved = (state.key[last], state.value[last], state.position[last], state.score[last])
    _write(state, (row, group, lowest.clamp(max=capacity - 1)), *moved, from_kept)
    state.count.sub_(from_kept.int())
    state.num_evicted.add_(over.int())


def _lowest(score: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest `score` [..., S] and the slot of the latest `position` that has it."""
    lowest = score.amin(-1)
    slot = position.masked_fill(score != lowest[..., None], -1).argmax(-1)
    return lowest, slot


def _write(
    state: FixedKeyValues,
    slots: tuple[torch.Tensor, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    score: torch.Tensor,
    write: torch.Tensor,
) -> None:
    """Put an entry into each of the kept `slots` (indices [B, G]) where `write` [B, G]."""
    state.key[slots] = torch.where(write[..., None], key, state.key[slots])
    state.value[slots] = torch.where(write[..., None], value, state.value[slots])
    state.position[slots] = torch.where(write, position.to(state.position.dtype), state.position[slots])
    state.score[slots] = torch.where(write, score.to(state.score.dtype), state.score[slots])


def _count(state: FixedKeyValues, valid: torch.Tensor | None) -> None:
    state.num_tokens.add_(1 if valid is None else valid.to(state.num_tokens.dtype))


def _num_readable(state: FixedKeyValues) -> int:
    """Slots that a reader has to look at: all of them, unless looking at the counts costs nothing."""
    if torch.compiler.is_compiling() or state.count.device.type != "cpu":
        return state.key.shape[2]
    return int(state.count.max())


def _attend(query: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """
    One softmax of `query` [B, G, R, d] over several sets of keys and values [B, G, S, d], filled [B, G, S]. The sets
    are not joined: that would copy the cache.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query * query.shape[-1] ** -0.5
    scores = [
        (query @ key.transpose(-1, -2)).to(dtype).masked_fill(~filled[:, :, None], -torch.inf)
        for key, _, filled in parts
    ]
    scores = torch.cat(scores, dim=-1)  # [B, G, R, S]
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    weights = weights.to(query.dtype).split([key.shape[2] for key, _, _ in parts], dim=-1)
    return sum(weight @ value for weight, (_, value, _) in zip(weights, parts, strict=True))
