"""Greedy tokens are those of `generate`, whatever vLLM does with the requests."""

import pytest

from .serving import PLAN, check_nothing_held, count_preemptions, engine, generated, random_prompts, save_tiny, served

BLOCK_BYTES = 32 * 2 * 32 * 4  # 32 entries of a key and a value of 32 numbers
PROMPTS = random_prompts(1, 5, 40, 70, 150, 333, 600)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model with every kind of group, and what it writes."""
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path, "llama", PLAN)
    return path, generated(path, PROMPTS)


@pytest.mark.parametrize("chunk", [64, 256, 4096])
def test_chunks(llama, chunk):
    path, expected = llama
    with engine(path, max_num_batched_tokens=chunk) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)


@pytest.mark.parametrize("num_blocks", [110, 140])
def test_preemption(llama, num_blocks):
    path, expected = llama
    with engine(path, kv_cache_memory_bytes=num_blocks * BLOCK_BYTES, max_model_len=640) as llm:
        counts = count_preemptions(llm)
        assert served(llm, PROMPTS[3:] * 4) == expected[3:] * 4
        assert sum(counts) > 0
        check_nothing_held(llm)


# What vLLM's model cannot have that the tiny one has.
YARN = {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
FAMILIES = {
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**YARN, "original_max_position_embeddings": 512},
    },
    "granite": {},
    "mistral": {},
    "mixtral": {},
    "olmoe": {"hidden_size": 128, "clip_qkv": None},
    "qwen2": {"hidden_size": 128, "use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    plan = [PLAN[0], [None, None], PLAN[2]]  # the middle layer has a sliding window, where there is one
    if family == "gpt_oss":  # which has it in every other layer
        plan = [[None, None], PLAN[1], [None, None]]
    save_tiny(tmp_path, family, plan, **FAMILIES[family])
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)


def test_router_biases_and_hidden_layers(tmp_path):
    save_tiny(tmp_path, "llama", PLAN, mosa_router_bias=True, mosa_router_hidden_size=16, mosa_include_first=False)
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path) as llm:
        assert served(llm, PROMPTS) == expected


@pytest.mark.parametrize("chunk", [64, 256])
def test_budgets(tmp_path, chunk):
    save_tiny(tmp_path, "llama", PLAN, mosa_cache_budget=20)
    expected = generated(tmp_path, PROMPTS)
    with engine(tmp_path, max_num_batched_tokens=chunk) as llm:
        assert served(llm, PROMPTS) == expected
        check_nothing_held(llm)
