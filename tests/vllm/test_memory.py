"""Memory that runs out: answers stay right, or what was dropped is counted; nothing crashes, nothing is left."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from .serving import (
    check_nothing_held,
    count_preemptions,
    engine,
    generated,
    llama_and_answers,
    random_prompts,
    scheduler_of,
    served,
)

PROMPTS = random_prompts(33, 150, 300, 280, 20, 260)
BLOCK_BYTES = 32 * 2 * 32 * 4  # 32 entries of a key and a value of 32 numbers
NUM_BLOCKS = 160


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_and_answers(tmp_path_factory.mktemp("llama"), PROMPTS)


def with_blocks(llm, num_blocks: int):
    """Take all blocks but some out of an engine's memory; what gives them back."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    total = pool.num_gpu_blocks
    taken = pool.get_new_blocks(total - 1 - num_blocks)
    pool.num_gpu_blocks = num_blocks + 1

    def give_back() -> None:
        pool.free_blocks(taken)
        pool.num_gpu_blocks = total

    return give_back


def test_answers_are_right_wherever_memory_ends(llama):
    path, expected = llama
    options = {"kv_cache_memory_bytes": NUM_BLOCKS * BLOCK_BYTES, "max_model_len": 400, "max_num_batched_tokens": 128}
    # Let requests in as long as their first chunk fits, so that memory ends while they are read.
    with engine(path, **options, scheduler_reserve_full_isl=False) as llm:
        counts, ran_out = count_preemptions(llm), []
        for num_blocks in [*range(50, 74), 100, 150]:  # one request alone takes up to 48
            counts.clear()
            give_back = with_blocks(llm, num_blocks)
            assert served(llm, PROMPTS) == expected, num_blocks
            give_back()
            check_nothing_held(llm)
            ran_out.append(sum(counts) > 0)
        assert sum(ran_out) >= 20
        assert scheduler_of(llm).connector.num_dropped == 0


def test_what_a_chunk_did_not_take_goes_back_at_once(llama):
    """After each step, before the next one is scheduled: others may need it then."""
    path, expected = llama
    with engine(path, max_num_batched_tokens=128) as llm:
        scheduler = scheduler_of(llm)
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        update, surplus, returned = scheduler.update_from_output, [], []

        def updated(*args, **kwargs):
            before = {request: len(each.blocks) for request, each in manager.holdings.items()}
            output = update(*args, **kwargs)
            for request, each in manager.holdings.items():
                returned.append(before[request] - len(each.blocks))
                surplus.append(len(each.blocks) - each.report.upto[1])
            return output

        scheduler.update_from_output = updated
        assert served(llm, PROMPTS) == expected
        assert max(returned) > manager.kv_cache_spec.num_groups()
        assert max(surplus) <= manager.kv_cache_spec.num_groups()


def selects_all(path, target):
    """A model whose groups select every token, in spite of its plan."""
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("mosa_router.threshold"):
            weight.fill_(-torch.inf)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("reserve", ["feedback", "rate"])
def test_what_finds_no_room_is_dropped_and_counted(llama, tmp_path, reserve):
    """A model that selects far more than planned: everything with room enough, the window and the best without."""
    path = selects_all(llama[0], tmp_path / "all")
    expected = generated(path, PROMPTS)
    options = {"max_model_len": 340, "max_num_batched_tokens": 128, "additional_config": {"mosa_reserve": reserve}}
    with engine(path, **options, kv_cache_memory_bytes=50 * BLOCK_BYTES) as llm:
        answers = served(llm, PROMPTS)
        assert scheduler_of(llm).connector.num_dropped > 0
        assert answers != expected
        assert answers[0] == expected[0] and answers[4] == expected[4]  # which had room
        check_nothing_held(llm)
        assert served(llm, PROMPTS[:1]) == expected[:1]
    if reserve == "feedback":
        with engine(path, **options) as llm:
            assert served(llm, PROMPTS) == expected
            assert scheduler_of(llm).connector.num_dropped == 0
