"""
What a worker knows of the requests' arenas: which slot of which group has the last tokens, how many entries there
are, and in which blocks (docs/serving.md). Slots of a group are dense: 0 up to its count, without holes.

A token takes the slot of the one that leaves the window, unless that is selected, and the next free slot then. So
what is selected stays where it is, and what is read is all slots up to the count: plain paged attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..modeling.group_plan import SparseGroup
from .pages import CpuPages
from .spec import BLOCK_SIZE, ArenaSpec, GroupShape, Report, Update, blocks_of

ARENA = "model.layers.0.mosa_arena"  # by which vLLM knows it: it wants an integer in the names of layers
MANY = 2**40  # more entries than any group has


@dataclass(frozen=True)
class Group:
    """One group of one layer."""

    window: int  # tokens that a query reads whether selected or not
    rate: float  # 1: dense; 0: of a layer with a sliding window
    budget: int | None = None  # of selected tokens

    @classmethod
    def of_plan(cls, group: SparseGroup | None, sliding_window: int | None, budget: int | None) -> "Group":
        if group is not None:
            return cls(group.window, 1 / group.sparsity, budget)
        return cls(1, 1.0) if sliding_window is None else cls(sliding_window, 0.0)

    @property
    def is_dense(self) -> bool:
        return self.rate == 1 and self.budget is None

    @property
    def is_sliding(self) -> bool:
        return self.rate == 0

    @property
    def ring(self) -> int:
        """Tokens that are stored whether selected or not: the last one needs a place where the window is 0, too."""
        return 1 if self.is_dense else max(self.window, 1)

    @property
    def most(self) -> int | None:
        """Entries at most; None: one a token."""
        if self.is_sliding:
            return self.ring
        return None if self.budget is None else self.ring + self.budget

    def shape(self) -> GroupShape:
        return GroupShape(self.ring, 1.0 if self.is_dense else min(self.rate, 0.999), self.most)


@dataclass(frozen=True)
class AlikeGroups:
    """Groups of one layer that are alike but for what they select."""

    like: Group
    groups: tuple[int, ...]


class TokenStates(NamedTuple):
    """What a layer computes of T tokens before they read anything."""

    query: torch.Tensor  # [T, G * R, d]
    key: torch.Tensor  # [T, G, d]
    value: torch.Tensor  # [T, G, d]
    selected: torch.Tensor  # [T, G] bool
    score: torch.Tensor | None  # [T, G], what a budget compares, and what is dropped by; None: of tokens read alone

    def of(self, tokens: slice | torch.Tensor) -> "TokenStates":
        """Those of some of the tokens."""
        query, key, value, selected = (states[tokens] for states in self[:4])
        return TokenStates(query, key, value, selected, None if self.score is None else self.score[tokens])


@dataclass
class DecodeStep:
    """The requests of a step that read a single token, and where all layers put it."""

    token: torch.Tensor | None  # [B], of the batch; None: all of them
    at: torch.Tensor  # [L, B * G], in all layers' rings as one
    entry: torch.Tensor  # [L, B * G], block · BLOCK_SIZE + slot
    length: torch.Tensor  # [L, B, G] int32
    table: torch.Tensor  # [L, B, G, N] int32, blocks


@dataclass
class Chunk:
    """A request that reads several tokens in this step."""

    row: int
    start: int  # its first token in the batch
    past: int  # tokens before
    length: int
    may_overflow: bool = False  # whether it may find no blocks

    @property
    def end(self) -> int:
        return self.past + self.length

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)


class Arena:
    """
    Of one worker.

    Args:
        layers: its groups, of every layer.
        head_dim: d.
        max_len: tokens of a request at most.
        max_chunk: tokens that one step reads at most.
        spec: of the blocks that requests hold, and how many may hold some at once.
        device: of the state.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Group]],
        head_dim: int,
        max_len: int,
        max_chunk: int,
        spec: ArenaSpec,
        device: torch.device,
    ):
        self.layers, self.head_dim, self.max_len, self.spec, self.device = layers, head_dim, max_len, spec, device
        self.sets = [self._sets_of(groups) for groups in layers]
        num_layers, num_groups, num_rows = len(layers), len(layers[0]), spec.num_rows
        self.shape = num_layers, num_groups
        self.has_budget = any(each.budget is not None for groups in layers for each in groups)
        self.reads_itself = [all(each.window > 0 for each in groups) for groups in layers]  # by layer

        def of_groups(value, dtype=torch.int64):
            return torch.tensor([[value(each) for each in groups] for groups in layers], dtype=dtype, device=device)

        self.ring = of_groups(lambda each: min(each.ring, max_len))  # [L, G]
        self.is_dense = of_groups(lambda each: each.is_dense, torch.bool)
        self.is_sliding = of_groups(lambda each: each.is_sliding, torch.bool)
        self.window_is_0 = of_groups(lambda each: each.window == 0, torch.bool)
        self.most = of_groups(lambda each: MANY if each.most is None else each.most)
        state = num_layers, num_rows, num_groups
        ring = int(self.ring.max())
        self.ring_slot = torch.zeros(*state, ring, dtype=torch.int32, device=device)
        self.ring_selected = torch.zeros(*state, ring, dtype=torch.bool, device=device)
        self.count = torch.zeros(state, dtype=torch.int64, device=device)
        self.have = torch.zeros(state, dtype=torch.int64, device=device)  # blocks of each group
        self.table = torch.zeros(*state, blocks_of(max_len), dtype=torch.int32, device=device)
        self.used = torch.zeros(num_rows, dtype=torch.int64, device=device)  # of the blocks below
        self.owned = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.is_last = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.blocks = torch.zeros(num_rows, spec.worst_blocks(max_len) + 1, dtype=torch.int32, device=device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.serials = [0] * num_rows
        self.ahead = [0, 1, 2]
        while self.ahead[-1] < max_chunk:
            self.ahead.append(min(2 * self.ahead[-1], max_chunk))
        self.seen: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []  # of this step: rows, tokens, tokens ahead
        self.pages: CpuPages | None = None

    @staticmethod
    def _sets_of(groups: Sequence[Group]) -> list[AlikeGroups]:
        alike: dict[tuple, list[int]] = {}
        for index, each in enumerate(groups):
            alike.setdefault((each.window, each.is_dense, each.is_sliding, each.budget), []).append(index)
        return [AlikeGroups(groups[members[0]], tuple(members)) for members in alike.values()]

    def bind(self, cache: torch.Tensor) -> None:
        """`cache`: `[N, 1, BLOCK_SIZE, 2 d]`, vLLM's memory."""
        self.pages = CpuPages(cache)
        num_blocks = len(cache)
        self.row_of_block = torch.zeros(num_blocks, dtype=torch.int64, device=self.device)
        if self.has_budget:  # what a budget compares, of each entry
            size = num_blocks * BLOCK_SIZE
            self.entry_position = torch.zeros(size, dtype=torch.int64, device=self.device)
            self.entry_selected = torch.zeros(size, dtype=torch.bool, device=self.device)
            self.entry_score = torch.zeros(size, dtype=torch.float32, device=self.device)

    def apply(self, updates: Sequence[Update]) -> None:
        """What the scheduler has decided for the next step."""
        for each in updates:
            row = each.row
            if self.serials[row] != each.serial:  # the row changes hands
                self.serials[row] = each.serial
                self.count[:, row], self.have[:, row], self.used[row] = 0, 0, 0
                self.row_of_block[each.first] = row
            ids = torch.tensor(each.blocks, dtype=torch.int32).to(self.device, non_blocking=True)
            self.blocks[row, each.start : each.start + len(ids)] = ids
            self.owned[row], self.is_last[row] = each.owned, each.is_last

    # Blocks

    def needed(self, count: torch.Tensor, past: torch.Tensor, horizon: torch.Tensor) -> torch.Tensor:
        """
        Blocks `[L, B, G]` that groups with `count` [L, B, G] entries after `past` [B] tokens take until `horizon` [B]
        tokens whatever they select: for windows that fill, and for what is dense.
        """
        past, horizon, ring = past[None, :, None], horizon[None, :, None], self.ring[:, None]
        grown = torch.where(self.is_dense[:, None], horizon - past, (horizon.minimum(ring) - past).clamp(min=0))
        return blocks_of(count + grown) - blocks_of(count)

    def horizon(self, row: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """`[B]`, up to how many tokens requests must keep blocks for what cannot be dropped."""
        return torch.where(self.is_last[row], self.max_len, end)

    def plan_decode(
        self, row: torch.Tensor, past: torch.Tensor, token: torch.Tensor | None, longest: int
    ) -> DecodeStep:
        """
        Where all layers put one more token of requests in rows `row` [B] with `past` [B] tokens: what leaves a window
        is known before anything is computed. Asks the device nothing.

        Args:
            row: `[B]`, of requests.
            past: `[B]`, tokens that they have.
            token: `[B]`, their places in the batch; None: they are all of it.
            longest: no request has more tokens.
        """
        num_layers, num_groups = self.shape
        index = torch.arange(num_layers, device=row.device)[:, None, None], row[None, :, None]
        groups = torch.arange(num_groups, device=row.device)[None, None]
        ring = self.ring[:, None]
        at = past[None, :, None] % ring  # [L, B, G]
        place = *index, groups, at
        leaving = self.ring_slot[place].long()
        count = self.count[:, row]
        added = (past[None, :, None] < ring) | self.ring_selected[place]
        opens = added & (count % BLOCK_SIZE == 0)
        # Blocks go to what cannot do without first, then to layers and groups in order.
        must = opens & (self.is_dense[:, None] | (past[None, :, None] < ring))
        may = opens & ~must
        number = torch.where(must, _order(must), must.sum((0, 2))[None, :, None] + _order(may))
        later = self.needed(count, past, self.horizon(row, past + 1)).sum((0, 2)) - must.sum((0, 2))
        limit = (self.owned[row] - later.clamp(min=0))[None, :, None]
        nth = self.used[row][None, :, None] + number
        denied = may & (nth >= limit)
        self.dropped += denied.sum()
        added, opens = added & ~denied, opens & ~denied
        slot = torch.where(added, count, leaving)
        block = slot // BLOCK_SIZE
        known = self.table[(*index, groups, block)]
        dealt = self.blocks[row[None, :, None], nth.clamp(max=self.blocks.shape[1] - 1)]
        known = torch.where(opens, dealt, known)
        self.table[(*index, groups, block)] = known
        self.used[row] += opens.sum((0, 2))
        self.have[:, row] += opens
        count = count + added
        self.count[:, row] = count
        self.ring_slot[place] = slot.int()
        entry = known.long() * BLOCK_SIZE + slot % BLOCK_SIZE
        self.seen.append((row, past + 1, self.ahead[:3]))
        width = self.ring_selected.shape[-1]
        at = at + width * (groups + num_groups * (row[None, :, None] + len(self.serials) * index[0]))
        table = self.table[..., : blocks_of(longest)].index_select(1, row)
        return DecodeStep(token, at.flatten(1), entry.flatten(1), count.int(), table)

    def begin_chunk(self, chunk: Chunk) -> None:
        """Before the layers read a chunk."""
        row = torch.tensor([chunk.row], device=self.device)
        past = torch.tensor([chunk.past], device=self.device)
        most = self.growth(row, past, [chunk.length])[0, 0]
        spare = self.owned[chunk.row] - self.used[chunk.row]
        if bool(self.is_last[chunk.row]):
            count = self.count[:, row]
            spare = spare - self.needed(count, past, torch.full_like(past, self.max_len)).sum()
        chunk.may_overflow = bool(most > spare)
        self.seen.append((row, past + chunk.length, self.ahead))

    def growth(self, row: torch.Tensor, past: torch.Tensor, ahead: Sequence[int]) -> torch.Tensor:
        """Blocks `[B, len(ahead)]` that requests take at most for so many more tokens, whatever those select."""
        num_layers, num_groups = self.shape
        ring, past = self.ring[:, None], past[None, :, None]  # [L, 1, G], [1, B, 1]
        count, have = self.count[:, row], self.have[:, row]
        width = max(min(max(ahead), self.ring_slot.shape[-1]), 1)
        # How many of the first tokens that leave are selected: they stand in the ring, the oldest first.
        old = past.minimum(ring)  # [L, B, G], tokens in the ring
        step = torch.arange(width, device=row.device)
        at = ((past - old)[..., None] + step) % ring[..., None]
        index = (
            torch.arange(num_layers, device=row.device)[:, None, None, None],
            row[None, :, None, None],
            torch.arange(num_groups, device=row.device)[None, None, :, None],
        )
        selected = (self.ring_selected[(*index, at)] & (step < old[..., None])).cumsum(-1)
        selected = torch.nn.functional.pad(selected, (1, 0))
        k = torch.tensor(ahead, device=row.device)  # [K]; from here on [L, B, G, K]
        fills = (ring - past).clamp(min=0)[..., None].minimum(k).expand(*old.shape, -1)
        leave = k - fills  # tokens that leave a full window
        known = leave.minimum(old[..., None])
        unknown = (leave - known).masked_fill(self.is_sliding[:, None, :, None], 0)
        entries = fills + selected.gather(-1, known.clamp(max=width)) + unknown
        is_counted = (self.is_dense | (self.most < MANY))[:, None, :, None]  # whatever is selected
        total = count[..., None] + torch.where(is_counted, k, entries)
        total = total.minimum(self.most[:, None, :, None]).maximum(count[..., None])
        return (blocks_of(total) - have[..., None]).clamp(min=0).sum((0, 2))

    def reports(self) -> dict[int, Report]:
        """What the requests of the last step hold, by row."""
        found = {}
        for row, tokens, ahead in self.seen:
            upto = self.used[row][:, None] + self.growth(row, tokens, ahead)
            for one, seen, blocks in zip(row.tolist(), tokens.tolist(), upto.tolist(), strict=True):
                found[one] = Report(self.serials[one], seen, ahead, blocks)
        self.seen = []
        return found

    def take_dropped(self) -> int:
        """Selected tokens that have found no block since this was last asked."""
        if not (dropped := int(self.dropped)):
            return 0
        self.dropped.zero_()
        return dropped


def _order(chosen: torch.Tensor) -> torch.Tensor:
    """Of `[L, B, G]` bool: how many of a row's were chosen before, by layer and then by group."""
    num_layers, num_rows, num_groups = chosen.shape
    flat = chosen.transpose(0, 1).reshape(num_rows, -1)
    return (flat.cumsum(1) - 1).view(num_rows, num_layers, num_groups).transpose(0, 1)
