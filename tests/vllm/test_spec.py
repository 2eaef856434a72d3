"""What the scheduler sets aside, without a worker."""

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from mosa_hf.vllm.spec import BLOCK_SIZE, ArenaManager, ArenaSpec, GroupShape, Report, blocks_of

SPEC_OF_VLLM = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 8}
GROUPS = (GroupShape(32, 0.1, None),) * 4


@pytest.fixture
def manager() -> ArenaManager:
    spec = ArenaSpec(**SPEC_OF_VLLM, dtype=torch.float32, ranks=(GROUPS,), num_rows=4, max_len=4096)
    pool = BlockPool(400, enable_caching=False, hash_block_size=BLOCK_SIZE)
    return ArenaManager(spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=BLOCK_SIZE)


@pytest.mark.parametrize("num_scheduled", [0, 1, 33])
def test_a_chunk_gives_back_also_while_the_next_tokens_are_computed(manager, num_scheduled):
    """With asynchronous scheduling a report comes when more tokens than it knows of have been scheduled."""
    free = manager.block_pool.get_num_free_blocks
    before = free()
    manager.allocate_new_blocks("a", 1024)
    assert before - free() == len(GROUPS) * blocks_of(1024)
    manager.take_updates()
    if num_scheduled:
        manager.allocate_new_blocks("a", 1024 + num_scheduled)
        manager.take_updates()
    # 10 blocks are taken; 4 do for up to 32 tokens more.
    manager.observe({manager.holdings["a"].row: Report(1, 1024, [0, 1, 32], [10, 14, 14])})
    kept = {0: 14, 1: 14, 33: 14 + len(GROUPS)}[num_scheduled]
    assert before - free() == len(manager.holdings["a"].blocks) == kept
    (update,) = manager.take_updates()
    assert (update.owned, update.blocks) == (kept, [])  # nothing new to know but that there are fewer
    for block in manager.pop_blocks_for_free("a"):
        manager.block_pool.free_blocks([block])
    assert free() == before
