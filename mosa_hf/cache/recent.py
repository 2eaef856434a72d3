"""The last tokens in sequence order: what several queries stand among, and what the memory does not know of yet."""

import torch
import torch.nn.functional as F

from ..kernels.entries import PackedKeyValues
from ..kernels.entry_codes import Rows, decoded
from ..kernels.indexing import gather_slots
from ..kernels.tensors import KeyValues
from ..routing.layout import padding_first
from .memory import EntryMemory

# `Rows` here are [B, G, S, ...] by name, of tokens selected or not. Empty slots are on the left; position < 0 there.


def of_ring(memory: EntryMemory, num_stored: torch.Tensor, length: int, window: int) -> Rows:
    """The last `length` tokens of a ring of `window` entries, of rows that have `num_stored` [B] tokens."""
    position = _last(length, num_stored)
    entries = memory.start[..., None] + (position % max(window, 1))[:, None]  # [B, G, S]
    entries = torch.where(position[:, None] >= 0, entries, memory.null)
    rows = {name: states.unflatten(0, entries.shape) for name, states in decoded(memory.gather(entries)).items()}
    selected = rows["selected"] & (position >= 0)[:, None]
    return rows | {"selected": selected, "position": position[:, None].expand_as(selected)}


def of_selected(new: KeyValues, groups: torch.Tensor | None, num_groups: int) -> Rows:
    """Selected tokens alone: the filled slots of `new` [B, A, K, ...], which lists `groups` [A] (None: all)."""
    filled = torch.ones_like(new.position, dtype=torch.bool) if new.valid is None else new.valid
    rows = {"key": new.key, "value": new.value, "position": new.position, "selected": filled}
    rows |= {} if new.score is None else {"score": new.score}
    if groups is None:
        return rows
    size = (len(filled), num_groups)
    return {name: own.new_zeros(*size, *own.shape[2:]).index_copy_(1, groups, own) for name, own in rows.items()}


def extended(recent: Rows | None, new: Rows, valid: torch.Tensor | None, num_tokens: torch.Tensor) -> Rows:
    """`recent`, and then a call's `new` ones, real where `valid` [B, T], with which there are `num_tokens` [B]."""
    if recent is not None:
        num_recent = recent["key"].shape[2]
        new = {name: torch.cat((recent[name].to(own.dtype), own), dim=2) for name, own in new.items()}
        if valid is not None:  # the padding between the two goes to the left
            order = padding_first(F.pad(valid, (num_recent, 0), value=True))[0][:, None]
            new = {name: gather_slots(own, order) for name, own in new.items()}
    position = _last(new["key"].shape[2], num_tokens)
    return new | {"position": position[:, None].expand_as(new["selected"])}


def places_of(
    rows: Rows, memory: EntryMemory, window: int, before: torch.Tensor | int, up_to: torch.Tensor | None, padded: bool
) -> torch.Tensor:
    """
    Entries `[B, G, S]` of `rows`: the last `window` go to the ring, of those before them the selected ones join what
    a range has `before`. `up_to`: see `Counts`. Slots that are not filled, if they are `padded`, have the null entry.
    """
    num_far = max(rows["position"].shape[2] - window, 0)
    start, position, found = memory.start[..., None], rows["position"][..., num_far:], []
    if num_far:
        joins = rows["selected"][..., :num_far]
        up_to = joins.cumsum(-1) if up_to is None else up_to
        place = start + up_to + (before - 1 if isinstance(before, int) else before[..., None] - 1)
        found.append(torch.where(joins, place, memory.null))
    if window:
        place = start + position % window
        found.append(torch.where(position >= 0, place, memory.null) if padded else place)
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _last(length: int, num_tokens: torch.Tensor) -> torch.Tensor:
    """Positions `[B, length]` of the last of `num_tokens` [B] tokens, negative before the first."""
    return torch.arange(-length, 0, device=num_tokens.device) + num_tokens[:, None]


def cropped(recent: Rows, num_tokens: torch.Tensor, removed: torch.Tensor) -> Rows:
    """`recent` without the last `removed` [B] tokens of each row, of which `num_tokens` [B] remain."""
    length = recent["key"].shape[2]
    # Rows may lose different numbers of tokens: shift each to the right again.
    num_empty = max(int(removed.min()), length - int(num_tokens.max()))  # on the left of every row
    source = (torch.arange(length, device=removed.device) - removed[:, None])[:, num_empty:]  # [B, S]
    rows = {name: gather_slots(own, source[:, None].clamp(min=0)) for name, own in recent.items()}
    position = num_tokens[:, None] - source.shape[1] + torch.arange(source.shape[1], device=removed.device)
    position = position.masked_fill((source < 0) | (position < 0), -1)[:, None].expand_as(rows["selected"])
    return rows | {"position": position, "selected": rows["selected"] & (position >= 0)}


def after_kept(
    memory: EntryMemory | None, kept: PackedKeyValues | None, recent: Rows
) -> tuple[Rows, torch.Tensor | None]:
    """What a budget compares [B, G, S], by name: of the kept entries, padded, and then `recent`; and those entries."""
    recent = {name: recent[name] for name in ("score", "position", "selected")}
    if memory is None or kept is None:
        return recent, None
    entries, filled = kept.slots()
    entries = torch.where(filled, entries, memory.null)
    of_kept = {name: memory.states[name][entries] for name in ("score", "position")} | {"selected": filled}
    return {name: torch.cat((of_kept[name].to(own.dtype), own), dim=-1) for name, own in recent.items()}, entries
