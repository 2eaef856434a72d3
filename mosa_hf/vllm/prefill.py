"""
Requests that read several tokens in a step, each for itself: what its queries read, by the kernels of
`sparse_attention` (no mask of tokens times tokens), and what its arena keeps of it.
"""

from dataclasses import dataclass

import torch

from ..kernels import backend
from ..kernels.entries import PackedKeyValues
from ..kernels.tensors import NEVER, KeyValues
from ..routing import evicted_at, within_budget
from .arena import MANY, Arena, Chunk, Group, TokenStates
from .spec import BLOCK_SIZE, blocks_of


@dataclass
class Options:
    """How a layer scores."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # [G, R]


@dataclass
class Stored:
    """What an arena holds of a request, for one set of g groups."""

    key: torch.Tensor  # [g, S, d], slot by slot
    value: torch.Tensor
    recent: torch.Tensor | None  # [g, m], slots of the last tokens in sequence order; None: the first m slots
    recent_selected: torch.Tensor | None  # [g, m]; None: all
    num_recent: int
    kept: torch.Tensor | None  # [g, S] bool, slots of the others; None: there are none
    # Under a budget, of each slot:
    filled: torch.Tensor | None = None  # [g, S] bool
    position: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    score: torch.Tensor | None = None

    def of_recent(self, states: torch.Tensor) -> torch.Tensor:
        """`states` [g, S, ...] of the last tokens, `[g, m, ...]`."""
        if self.recent is None:
            return states[:, : self.num_recent]
        index = self.recent.view(*self.recent.shape, *[1] * (states.ndim - 2))
        return states.gather(1, index.expand(*self.recent.shape, *states.shape[2:]))


def read_chunk(arena: Arena, layer: int, chunk: Chunk, tokens: TokenStates, options: Options) -> torch.Tensor:
    """One layer reads a chunk of C tokens, and keeps what is to be kept. Returns `[C, G * R, d]`."""
    query, key, value, selected, score = tokens
    assert score is not None
    num_tokens, num_groups = selected.shape
    query = query.view(num_tokens, num_groups, -1, query.shape[-1])
    output = torch.empty_like(query)
    if chunk.may_overflow:
        selected = _fitting(arena, layer, chunk, selected, score)
    for each in arena.sets[layer]:
        groups = torch.tensor(each.groups, device=query.device)

        def of_set(states, groups=groups):
            return states.index_select(1, groups).transpose(0, 1).contiguous()  # [g, C, ...]

        own = TokenStates(*(of_set(states) for states in (query, key, value, selected, score)))
        heads = _read_set(arena, layer, chunk, each.like, groups, own, options)
        output[:, groups] = heads.transpose(0, 1)
    return output.flatten(1, 2)


def _read_set(
    arena: Arena, layer: int, chunk: Chunk, like: Group, groups: torch.Tensor, tokens: TokenStates, options: Options
) -> torch.Tensor:
    """`read_chunk` of g groups that are alike: `tokens` [g, C, ...]; queries, and what it returns, [g, C, R, d]."""
    query, key, value, selected, score = tokens
    assert score is not None
    stored = _stored(arena, layer, chunk, like, groups) if chunk.past else None
    position = torch.arange(chunk.past, chunk.end, device=key.device)
    recent_key, recent_value, recent_selected, num_recent = key, value, selected, 0
    kept = None
    if stored is not None:
        num_recent = stored.num_recent
        recent_key, recent_value = (
            torch.cat((stored.of_recent(old), new), dim=1) for old, new in ((stored.key, key), (stored.value, value))
        )
        old = stored.recent_selected
        old = selected.new_ones(len(selected), num_recent) if old is None else old
        recent_selected = torch.cat((old, selected), dim=1)
        kept = _packed(stored)
    until = None
    if like.budget is not None:
        until, kept = _evictions(stored, kept, position, selected, score, like.budget)
    recent = KeyValues(
        recent_key[None],
        recent_value[None],
        torch.arange(chunk.past - num_recent, chunk.end, device=key.device).expand_as(recent_selected)[None],
        None,
        recent_selected[None],
        until,
    )
    heads = backend(query, query.shape[-1], value.shape[-1]).sparse_attention(
        query.transpose(1, 2)[None],
        recent,
        kept,
        position[None],
        None,
        chunk.end if like.is_dense else like.window,
        None,
        options.scale,
        options.softcap,
        None if options.sinks is None else options.sinks[groups],
    )
    if like.budget is None:
        _keep(arena, layer, chunk, like, groups, key, value, selected)
    else:
        _keep_best(arena, layer, chunk, like, groups, stored, key, value, selected, score)
    return heads[0].transpose(1, 2)


def _stored(arena: Arena, layer: int, chunk: Chunk, like: Group, groups: torch.Tensor) -> Stored:
    """What is there before a chunk that is not a request's first one."""
    assert arena.pages is not None
    row, past = chunk.row, chunk.past
    count = arena.count[layer, row, groups]
    most = int(count.max())
    table = arena.table[layer, row, groups, : blocks_of(most)]
    key, value = arena.pages.read(table)
    if like.is_dense:
        return Stored(key, value, None, None, past, None)
    slot = torch.arange(key.shape[1], device=key.device)
    filled = slot < count[:, None]
    num_recent = min(past, like.ring)
    if like.budget is not None:
        entry = _entries(table, slot.expand(len(groups), -1))
        position = arena.entry_position[entry].masked_fill(~filled, NEVER)
        order = position.argsort(dim=1)
        last = count[:, None] - num_recent + torch.arange(num_recent, device=key.device)
        recent = order.gather(1, last)
        selected = arena.entry_selected[entry] & filled
        kept = filled & (position < past - num_recent) if most > num_recent else None
        score = arena.entry_score[entry]
        return Stored(
            key, value, recent, selected.gather(1, recent), num_recent, kept, filled, position, selected, score
        )
    at = torch.arange(past - num_recent, past, device=key.device) % like.ring
    recent = arena.ring_slot[layer, row, groups][:, at].long()
    recent_selected = arena.ring_selected[layer, row, groups][:, at]
    kept = filled.scatter(1, recent, False) if most > num_recent else None
    return Stored(key, value, recent, recent_selected, num_recent, kept)


def _packed(stored: Stored) -> PackedKeyValues | None:
    """The entries that are kept, group by group."""
    if stored.kept is None:
        return None
    length = stored.kept.sum(1)
    start = length.cumsum(0) - length
    key, value = stored.key[stored.kept], stored.value[stored.kept]
    return PackedKeyValues(key, value, start[None], length[None], int(length.max()))


def _evictions(
    stored: Stored | None,
    kept: PackedKeyValues | None,
    position: torch.Tensor,
    selected: torch.Tensor,
    score: torch.Tensor,
    budget: int,
) -> tuple[torch.Tensor | None, PackedKeyValues | None]:
    """When the budget evicts what is recent, `[1, g, m + C]`, and `kept` that says so of the others."""
    positions = position.expand_as(selected)
    if stored is None:
        return evicted_at(score[None], positions[None], selected[None], budget), kept
    assert stored.position is not None and stored.selected is not None and stored.score is not None
    until = evicted_at(
        torch.cat((stored.score, score), dim=1)[None],
        torch.cat((stored.position, positions), dim=1)[None],
        torch.cat((stored.selected, selected), dim=1)[None],
        budget,
    )
    if until is None:
        return None, kept
    num_slots = stored.key.shape[1]
    old, new = until[0, :, :num_slots], until[0, :, num_slots:]
    if kept is not None:
        kept = kept._replace(evicted_at=old[stored.kept])
    return torch.cat((stored.of_recent(old), new), dim=1)[None], kept


def _entries(table: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """`[g, S]` int64, block · BLOCK_SIZE + slot in it, of slots `[g, S]` in blocks `table` [g, N]."""
    return table.long().gather(1, slot // BLOCK_SIZE) * BLOCK_SIZE + slot % BLOCK_SIZE


def _deal(arena: Arena, layer: int, chunk: Chunk, groups: torch.Tensor, count: torch.Tensor) -> None:
    """Blocks to groups, for `count` [g] entries of each."""
    row = chunk.row
    have, want = arena.have[layer, row, groups], blocks_of(count)
    used = int(arena.used[row])
    for group, old, new in zip(groups.tolist(), have.tolist(), want.tolist(), strict=True):
        if new > old:
            arena.table[layer, row, group, old:new] = arena.blocks[row, used : used + new - old]
            used += new - old
    if used > (owned := int(arena.owned[row])):
        raise RuntimeError(f"A request has taken {used} blocks of the {owned} that are its own: this is a bug.")
    arena.used[row] = used
    arena.have[layer, row, groups] = have.maximum(want)
    arena.count[layer, row, groups] = count


def _keep(
    arena: Arena,
    layer: int,
    chunk: Chunk,
    like: Group,
    groups: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
) -> None:
    """Write a chunk's `key`, `value` [g, C, d] where one token after the other would have been written."""
    assert arena.pages is not None
    row, num_tokens, ring = chunk.row, chunk.length, like.ring
    count = arena.count[layer, row, groups]
    index = torch.arange(num_tokens, device=key.device)
    if like.is_dense:
        slot, stays = (chunk.past + index).expand(len(groups), -1), None
        count = count + num_tokens
    else:
        slot, count = _slots(arena, layer, chunk, like, groups, selected)
        stays = selected | (index >= num_tokens - ring)
    _deal(arena, layer, chunk, groups, count)
    entry = _entries(arena.table[layer, row, groups], slot)
    if stays is not None:
        key, value, entry = key[stays], value[stays], entry[stays]
    shape = (-1, 1, key.shape[-1])
    arena.pages.write(key.reshape(shape).contiguous(), value.reshape(shape).contiguous(), entry.flatten())
    num_last = min(num_tokens, ring)
    at = torch.arange(chunk.end - num_last, chunk.end, device=key.device) % ring
    place = layer, row, groups[:, None], at[None]
    arena.ring_slot[place] = slot[:, num_tokens - num_last :].int()
    arena.ring_selected[place] = selected[:, num_tokens - num_last :]


def _slots(
    arena: Arena, layer: int, chunk: Chunk, like: Group, groups: torch.Tensor, selected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot `[g, C]` of each token of a chunk, and how many entries there are `[g]` after it."""
    row, past, num_tokens, ring = chunk.row, chunk.past, chunk.length, like.ring
    # Token t follows token t - ring: a line of such tokens is a column here.
    num_lines = -(-num_tokens // ring)
    width = min(ring, num_tokens)
    at = (past + torch.arange(width, device=selected.device)) % ring
    leaving = torch.cat((arena.ring_selected[layer, row, groups][:, at], selected), dim=1)[:, :num_tokens]
    position = torch.arange(past, chunk.end, device=selected.device)
    added = (position < ring) | leaving  # [g, C], tokens that take a new slot
    new = arena.count[layer, row, groups][:, None] + added.cumsum(1) - 1
    count = new[:, -1] + 1
    old = arena.ring_slot[layer, row, groups][:, at].long()
    if num_lines == 1:
        return torch.where(added, new, old), count
    # The slot of the last token of its line that took a new one.
    padded = num_lines * ring - num_tokens
    added, new = (torch.nn.functional.pad(each, (0, padded)).unflatten(1, (num_lines, ring)) for each in (added, new))
    line = torch.arange(num_lines, device=selected.device)[:, None]
    last = torch.where(added, line, -1).cummax(dim=1).values
    slot = torch.where(last >= 0, new.gather(1, last.clamp(min=0)), old[:, None])
    return slot.flatten(1)[:, :num_tokens], count


def _fitting(arena: Arena, layer: int, chunk: Chunk, selected: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """
    What of `selected` [C, G] there are blocks for, where a request may take no more: what leaves the window in this
    chunk and scores lowest is dropped.
    """
    row = torch.tensor([chunk.row], device=selected.device)
    past = torch.tensor([chunk.past], device=selected.device)
    horizon = arena.horizon(row, past + chunk.length)
    count, end, ring = arena.count[:, row], past + chunk.length, arena.ring[:, None]
    # What is dense goes on beyond this chunk, and windows may. Layers before this one have read it, others have not.
    after = count + torch.where(arena.is_dense[:, None], chunk.length, (end.minimum(ring) - past).clamp(min=0))
    later = int(arena.needed(count, end, horizon)[:layer].sum())
    later += int(arena.needed(after, end, horizon)[layer].sum())
    later += int(arena.needed(count, past, horizon)[layer + 1 :].sum())
    free = int(arena.owned[chunk.row]) - int(arena.used[chunk.row]) - later
    count, have, ring = arena.count[layer, chunk.row], arena.have[layer, chunk.row], arena.ring[layer]
    position = torch.arange(chunk.past, chunk.end, device=selected.device)[:, None]
    can_drop = ~arena.is_dense[layer] & (arena.most[layer] == MANY)  # not what a budget bounds, which has its blocks
    old = chunk.past - ring.clamp(max=chunk.past)
    leaves = selected & (position < chunk.end - ring) & can_drop  # [C, G]
    in_ring = torch.zeros_like(have)
    places = []
    for group in torch.nonzero(can_drop).flatten().tolist():
        last = min(chunk.past, chunk.end - int(ring[group]))
        at = torch.arange(int(old[group]), max(last, int(old[group])), device=selected.device) % ring[group]
        found = at[arena.ring_selected[layer, chunk.row, group, at]]
        in_ring[group] = len(found)
        places += [(group, each) for each in found.tolist()]
    fills = (ring - chunk.past).clamp(min=0, max=chunk.length)
    grown = torch.where(can_drop, fills + in_ring + leaves.sum(0), chunk.length)
    grown = (count + grown).minimum(arena.most[layer]) - count

    def taken(dropped: torch.Tensor) -> torch.Tensor:
        """Blocks, `[...]`, if `dropped` [..., G] tokens go."""
        return (blocks_of(count + grown - dropped) - have).clamp(min=0).sum(-1)

    none = torch.zeros_like(count)
    if int(taken(none)) <= free:
        return selected
    token, group = leaves.nonzero(as_tuple=True)
    order = score[token, group].argsort()
    token, group = token[order], group[order]
    # What is in the ring has no score any more: it goes after the chunk's own, the oldest first.
    groups = torch.cat((group, torch.tensor([g for g, _ in places], dtype=torch.int64, device=group.device)))
    dropped = torch.nn.functional.one_hot(groups, len(count)).cumsum(0)  # [D, G]
    fits = taken(dropped) <= free
    if not bool(fits.any()):
        raise RuntimeError("A request has no blocks for its windows: this is a bug.")
    num_dropped = int(fits.int().argmax()) + 1
    selected = selected.clone()
    selected[token[:num_dropped], group[:num_dropped]] = False
    for group_index, at_index in places[: max(num_dropped - len(token), 0)]:
        arena.ring_selected[layer, chunk.row, group_index, at_index] = False
    arena.dropped += num_dropped
    return selected


def _keep_best(
    arena: Arena,
    layer: int,
    chunk: Chunk,
    like: Group,
    groups: torch.Tensor,
    stored: Stored | None,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    score: torch.Tensor,
) -> None:
    """
    `_keep` under a budget: what it evicts leaves holes, which others move into. `key`, `value` [g, C, d], `selected`,
    `score` [g, C].
    """
    assert arena.pages is not None and like.budget is not None
    row = chunk.row
    position = torch.arange(chunk.past, chunk.end, device=key.device).expand_as(selected)
    filled = torch.ones_like(selected)
    num_slots = 0
    if stored is not None:
        assert stored.filled is not None and stored.position is not None
        assert stored.selected is not None and stored.score is not None
        num_slots = stored.key.shape[1]
        key, value = torch.cat((stored.key, key), dim=1), torch.cat((stored.value, value), dim=1)
        filled = torch.cat((stored.filled, filled), dim=1)
        position = torch.cat((stored.position, position), dim=1)
        selected = torch.cat((stored.selected, selected), dim=1)
        score = torch.cat((stored.score, score), dim=1)
    selected = within_budget(score[None], position[None], (selected & filled)[None], like.budget)[0]
    stays = filled & (selected | (position >= chunk.end - like.ring))  # [g, S]
    count = stays.sum(1)
    own = torch.arange(stays.shape[1], device=key.device)
    is_fixed = stays & (own < num_slots) & (own < count[:, None])  # what is where it may stay
    moves = stays & ~is_fixed
    # The n-th that moves goes to the n-th slot that is free.
    taken = torch.zeros_like(stays)
    taken[:, :num_slots] = is_fixed[:, :num_slots]
    free = taken.int().argsort(dim=1, stable=True)
    slot = torch.where(is_fixed, own, free.gather(1, (moves.cumsum(1) - 1).clamp(min=0)))
    _deal(arena, layer, chunk, groups, count)
    table = arena.table[layer, row, groups]
    entry = _entries(table, slot.clamp(max=table.shape[1] * BLOCK_SIZE - 1))
    shape = (-1, 1, key.shape[-1])
    arena.pages.write(key[moves].reshape(shape), value[moves].reshape(shape), entry[moves])
    place = entry[stays]
    arena.entry_position[place] = position[stays]
    arena.entry_selected[place] = selected[stays]
    arena.entry_score[place] = score[stays]
