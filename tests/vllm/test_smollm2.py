"""A real model, converted as by default, and with a short window."""

import json

import pytest
from transformers import AutoTokenizer

from mosa_hf import convert_checkpoint
from testing import corpora, pretrained

from .serving import check_nothing_held, count_preemptions, engine, generated, served

pytestmark = pytest.mark.real
LENGTHS = (5, 70, 333, 900, 1700, 3000)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def base():
    return pretrained.smollm2_directory()


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "converted"
    convert_checkpoint(base, path, num_windows=1)
    return path


@pytest.fixture(scope="module")
def prompts(base):
    tokens = AutoTokenizer.from_pretrained(base)(corpora.text("python_topics")[:60_000])["input_ids"]
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def with_window(path, window: int, target):
    """The same routers with another window in every group."""
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).symlink_to(file.resolve())
    config = json.loads((path / "config.json").read_text())
    config["mosa_plan"] = [[group and {**group, "window": window} for group in layer] for layer in config["mosa_plan"]]
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


# By window. Two tensor-parallel workers cannot share this model's 9 heads: that is tested on tiny ones.
ENGINES = {
    512: [
        {"max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 300 << 20},
        # Too little for all, which are let in nevertheless, so that some are preempted.
        {
            "max_num_batched_tokens": 64,
            "kv_cache_memory_bytes": 80 << 20,
            "scheduler_reserve_full_isl": False,
        },
    ],
    64: [{"max_num_batched_tokens": 512, "kv_cache_memory_bytes": 300 << 20, "enforce_eager": False}],
}


@pytest.mark.parametrize("window", ENGINES)
def test_tokens(converted, prompts, tmp_path, window):
    path = converted if window == 512 else with_window(converted, window, tmp_path / "window")
    expected = generated(path, prompts, NEW_TOKENS)
    for options in ENGINES[window]:
        with engine(path, max_model_len=4096, **options) as llm:
            counts = count_preemptions(llm)
            assert served(llm, prompts, NEW_TOKENS) == expected, options
            assert (sum(counts) > 0) == (options["kv_cache_memory_bytes"] < 100 << 20)
            check_nothing_held(llm)
