"""One more token wherever PyTorch runs: on a CPU, which can be asked, what no range needs is left out."""

import torch

from ..entries import Entries
from .reference import Taken, Token, behind, evict_lowest, rows_of, to_ring


def append_token(
    entries: Entries,
    token: Token,
    num_stored: torch.Tensor,
    window: int,
    budget: int | None = None,
    notes: bool = False,
    common: int | None = None,
) -> Taken:
    """Same function as `reference.append_token`."""
    selected, may_ask = token.selected, num_stored.device.type == "cpu" and not torch.compiler.is_compiling()
    if common is None and token.valid is None and may_ask:
        lengths = set(num_stored.tolist())
        common = lengths.pop() if len(lengths) == 1 else None
    held = None
    if not window:
        entry = behind(entries, selected)
        entries.lengthen(selected)
    elif common is not None and common < window:  # nothing leaves a ring
        entry = entries.start + common
        entries.lengthen(1)
    else:
        if common is None:
            entry, leaving, added = to_ring(entries, token.valid, num_stored, window)
        else:  # the same entry of every range, all of which are full
            entry = entries.start + common % window
            leaving = added = entries.states["selected"].index_select(0, entry.flatten()).view_as(entry)
        keeps = not may_ask or bool(leaving.any())
        if notes or keeps:
            held = entries.gather(entry)
        if held is not None and keeps:
            entries.put(behind(entries, leaving), **held)
        if keeps or common is None:
            entries.lengthen(added)
    # Of tokens that are not selected, neither position nor score is ever looked at.
    is_ranked = "position" in entries.states and not (may_ask and not selected.any())
    entries.put(entry, **rows_of(entries, token, num_stored, is_ranked))
    overwritten = held if notes else None
    if budget is None or token.score is None or not is_ranked:
        return Taken(overwritten)
    entries.num_selected.add_(selected)
    over = entries.num_selected > budget  # [B, G]
    if may_ask and not over.any():
        return Taken(overwritten)
    return Taken(overwritten, *evict_lowest(entries, over, window, notes))
