"""
What the scheduler knows of a request's cache: one *arena* of blocks a request, of a single head each, which the worker
deals out to the (layer, group) pairs as these fill up (docs/serving.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal, overload

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec

if TYPE_CHECKING:
    import torch

# Entries of one block: what CPU kernels take as a unit, and little enough for a group that keeps little.
BLOCK_SIZE = 32
RATE_MARGIN = 0.01  # share of the tokens that a group may select above its slack
Reserve = Literal["feedback", "rate", "budget"]


@dataclass(frozen=True)
class GroupShape:
    """What is known beforehand of how the cache of one group of one layer grows."""

    window: int  # entries that stay whatever is selected
    rate: float  # share of the tokens that is selected; 1: dense, 0: of a layer with a sliding window
    most: int | None  # entries at most; None: one a token

    def most_of(self, num_tokens: int) -> int:
        """Entries of a request of `num_tokens` tokens, if it selects all of them."""
        return num_tokens if self.most is None else min(num_tokens, self.most)

    def least_of(self, num_tokens: int) -> int:
        """Entries of a request of `num_tokens` tokens that cannot be dropped."""
        return num_tokens if self.rate == 1 else min(num_tokens, self.window)

    def expected(self, num_tokens: int, slack: float) -> float:
        """Blocks of a request of `num_tokens` tokens, if it selects `slack` times as many as it should."""
        if self.rate == 1 or self.most is not None:  # nothing of these may be dropped
            return blocks_of(self.most_of(num_tokens))
        near = blocks_of(min(self.window, num_tokens))
        if num_tokens <= self.window:
            return near
        far = min(1.0, slack * self.rate + RATE_MARGIN) * (num_tokens - self.window) / BLOCK_SIZE + 1
        return min(near + far, blocks_of(self.most_of(num_tokens)))


@overload
def blocks_of(num_entries: int) -> int: ...


@overload
def blocks_of(num_entries: "torch.Tensor") -> "torch.Tensor": ...


def blocks_of(num_entries):
    """Blocks that so many entries of one group take; of each of a tensor of numbers, too."""
    return (num_entries + BLOCK_SIZE - 1) // BLOCK_SIZE


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(AttentionSpec):
    """
    Of the one cache layer that a converted model shows to vLLM. The same on every worker, so that vLLM can compare.

    Args:
        ranks: of each tensor-parallel worker, the groups of all its layers.
        num_rows: requests that may hold blocks at once.
        max_len: tokens of a request at most.
        reserve: how much the scheduler sets aside, see `ArenaManager`.
        slack: how many times the planned rate a group may select, for "rate" and for what vLLM reports.
    """

    ranks: tuple[tuple[GroupShape, ...], ...]
    num_rows: int
    max_len: int
    reserve: Reserve = "feedback"
    slack: float = 1.1

    @property
    def prefix_cacheable(self) -> bool:
        return False  # slots are used again

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def num_groups(self) -> int:
        """Groups of all layers, on the worker that has most."""
        return max(map(len, self.ranks))

    def worst_blocks(self, num_tokens: int) -> int:
        """Blocks of a request of `num_tokens` tokens that selects every token."""
        return _worst_blocks(self.ranks, num_tokens)

    def later_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` tokens will still take up to `max_len`, if it selects no more."""
        return _later_blocks(self.ranks, self.max_len, num_tokens)

    def expected_blocks(self, num_tokens: int) -> int:
        """Blocks of a request of `num_tokens` tokens that selects as planned, with slack."""
        return _expected_blocks(self.ranks, self.slack, num_tokens)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return 1  # of vLLM's own table, which says which request a row of the batch is; the rest goes by `feedback`

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.expected_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes


@cache
def _worst_blocks(ranks: tuple[tuple[GroupShape, ...], ...], num_tokens: int) -> int:
    return max(sum(blocks_of(each.most_of(num_tokens)) for each in groups) for groups in ranks)


@cache
def _later_blocks(ranks: tuple[tuple[GroupShape, ...], ...], max_len: int, num_tokens: int) -> int:
    return max(
        sum(blocks_of(each.least_of(max_len)) - blocks_of(each.least_of(num_tokens)) for each in groups)
        for groups in ranks
    )


@cache
def _expected_blocks(ranks: tuple[tuple[GroupShape, ...], ...], slack: float, num_tokens: int) -> int:
    return min(
        _worst_blocks(ranks, num_tokens),
        max(int(sum(each.expected(num_tokens, slack) for each in groups)) for groups in ranks),
    )


@dataclass
class Report:
    """What a worker says of a request after a step: `upto[i]` blocks do for `ahead[i]` more tokens in any case."""

    serial: int
    num_tokens: int  # of the request, that the worker has seen
    ahead: Sequence[int]  # ascending, from 0 on
    upto: Sequence[int]

    def blocks(self, num_tokens: int, num_groups: int) -> int:
        """Blocks that do for a request of `num_tokens` tokens in all."""
        ahead = num_tokens - self.num_tokens
        for known, blocks in zip(self.ahead, self.upto, strict=True):
            if known >= ahead:
                return blocks
        return self.upto[-1] + num_groups * blocks_of(ahead - self.ahead[-1])

    def aggregate(self, other: "Report") -> "Report":
        """Of two workers, which own the same blocks."""
        if (self.serial, self.num_tokens) != (other.serial, other.num_tokens):
            return max(self, other, key=lambda each: (each.serial, each.num_tokens))
        return Report(
            self.serial, self.num_tokens, self.ahead, [max(x) for x in zip(self.upto, other.upto, strict=True)]
        )


@dataclass
class Update:
    """What a worker has to know of a request that is new, or whose blocks have changed."""

    row: int  # of the worker's state
    serial: int  # of the request in that row: another one means that the row changes hands
    first: int  # the request's first block, by which the batch names it
    start: int  # the first of its blocks that the worker does not know
    blocks: list[int]  # from there on
    owned: int  # how many it has in all
    is_last: bool  # whether there will be no more: the worker has to keep some for what cannot be dropped


@dataclass
class Holding:
    """What a request has."""

    row: int
    serial: int
    blocks: list[KVCacheBlock] = field(default_factory=list)
    num_known: int = 0  # of the blocks, that the worker knows of
    num_tokens: int = 0  # that the worker has been told to compute, or will be
    is_last: bool = False
    report: Report | None = None


class ArenaManager(SingleTypeKVCacheManager):
    """
    Sets blocks aside for requests:

    - "feedback": what the worker has said that a request holds, and what the tokens scheduled since can take at most.
      What a chunk then did not take goes back as soon as the worker says so.
    - "rate": what a plan's rates, times `slack`, make of so many tokens. Beyond it a worker drops what scores lowest.
    - "budget": all that windows and `mosa_cache_budget` allow.

    No request asks for more than all blocks; one that has them all and needs more loses its lowest scores, too. Both
    are counted. vLLM's own table holds a request's first block and no other.
    """

    kv_cache_spec: ArenaSpec

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.holdings: dict[str, Holding] = {}
        self.rows = list(range(self.kv_cache_spec.num_rows))
        self.num_serials = 0
        self.updates: dict[int, Holding] = {}  # by row, for the next step
        # Since a request was preempted, and until one ends: whoever was let in would be the next to be preempted, and
        # all that it has read in vain.
        self.is_full = False

    def target(self, holding: Holding | None, num_tokens: int) -> int:
        """Blocks that a request should have before it comes to `num_tokens` tokens."""
        spec = self.kv_cache_spec
        if spec.reserve == "rate":
            blocks = spec.expected_blocks(num_tokens)
        elif spec.reserve == "budget" or holding is None or holding.report is None:
            blocks = spec.worst_blocks(num_tokens)
        else:
            blocks = min(holding.report.blocks(num_tokens, spec.num_groups()), spec.worst_blocks(num_tokens))
        return max(blocks, 1)

    def allotted(self, holding: Holding | None, num_tokens: int) -> tuple[int, bool]:
        """`target`, at most all blocks there are; and whether these might not do, so that there will be no more."""
        spec, target = self.kv_cache_spec, self.target(holding, num_tokens)
        # All of them in time: what cannot be dropped has to find a place up to the last token.
        if spec.reserve != "rate" and target + spec.later_blocks(num_tokens) > self.num_blocks:
            return self.num_blocks, True
        return min(target, self.num_blocks), False

    @property
    def num_blocks(self) -> int:
        """That there are for requests: vLLM keeps one for itself."""
        return self.block_pool.num_gpu_blocks - 1

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args, apply_admission_cap: bool = False, **kwargs
    ) -> int:
        holding = self.holdings.get(request_id)
        if holding is None and self.is_full and self.holdings:
            return self.num_blocks + 1  # than there are: it waits
        held = 0 if holding is None else len(holding.blocks)
        if apply_admission_cap:  # whether the whole prompt will fit, which nobody knows yet
            return max(min(self.kv_cache_spec.expected_blocks(num_tokens), self.num_blocks) - held, 0)
        return max(self.allotted(holding, num_tokens)[0] - held, 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args, **kwargs) -> list[KVCacheBlock]:
        holding = self.holdings.get(request_id)
        is_new = holding is None
        if holding is None:
            self.num_serials += 1
            holding = self.holdings[request_id] = Holding(self.rows.pop(), self.num_serials)
        target, is_last = self.allotted(holding, num_tokens)
        missing = target - len(holding.blocks)
        if missing > 0:
            holding.blocks += self.block_pool.get_new_blocks(missing)
        if holding.num_known < len(holding.blocks) or is_last != holding.is_last:
            holding.is_last = is_last
            self.updates[holding.row] = holding
        holding.num_tokens = num_tokens
        if not is_new:
            return []
        self.req_to_blocks[request_id] = holding.blocks[:1]
        return holding.blocks[:1]

    def _give_back(self, holding: Holding) -> None:
        """
        What a request has not taken of its chunk's worst case: at once, since the requests that are scheduled before
        it would have it preempted for want of blocks otherwise. A worker takes blocks in order: where it computes the
        next tokens already (asynchronous scheduling), it needs none beyond what the report says of these.
        """
        report, spec = holding.report, self.kv_cache_spec
        if spec.reserve != "feedback" or holding.is_last or report is None:
            return
        num_tokens = max(holding.num_tokens, report.num_tokens + 1)
        target = max(report.blocks(num_tokens, spec.num_groups()), 1)
        if len(holding.blocks) - target > spec.num_groups():
            self.block_pool.free_blocks(reversed(holding.blocks[target:]))
            del holding.blocks[target:]
            holding.num_known = min(holding.num_known, target)
            self.updates[holding.row] = holding

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        super().pop_blocks_for_free(request_id)
        holding = self.holdings.pop(request_id, None)
        if holding is None:
            return []
        self.rows.append(holding.row)
        self.updates.pop(holding.row, None)
        return holding.blocks

    def take_updates(self) -> list[Update]:
        """What the worker has to know before the next step."""
        updates = []
        for holding in self.updates.values():
            ids = [block.block_id for block in holding.blocks]
            start = holding.num_known
            updates.append(Update(holding.row, holding.serial, ids[0], start, ids[start:], len(ids), holding.is_last))
            holding.num_known = len(ids)
        self.updates.clear()
        return updates

    def observe(self, reports: dict[int, Report]) -> None:
        """Take in what a worker says, by row."""
        holdings = {holding.row: holding for holding in self.holdings.values()}
        for row, report in reports.items():
            holding = holdings.get(row)
            if holding is not None and holding.serial == report.serial:
                holding.report = report
                self._give_back(holding)

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length, kv_cache_group_ids, *args, **kwargs):
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0
