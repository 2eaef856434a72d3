"""Public functions that are called with something else: the error names the argument, before anything is done."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    SparseGroup,
    cache_bytes,
    calibrate_thresholds,
    calibration_windows,
    convert_checkpoint,
    convert_model,
    load_cache,
    load_routers,
    save_cache,
    save_routers,
    to_dense,
    trace_routing,
)
from mosa_hf.conversion import (
    HealingTrainer,
    Text,
    TokenWindows,
    convert_to_native,
    find_source,
    load_kvzap,
    read_text,
    teacher_of,
)
from mosa_hf.evaluation import (
    CacheMemory,
    Continuation,
    Sample,
    Score,
    Subject,
    decoding_bytes,
    evaluate,
    fact_samples,
    filled_cache,
    following,
    score,
    summary,
    table,
    text_samples,
    trace_text,
)
from testing.tiny import SENTENCES, random_tokens, text_tokenizer, tiny_base

GROUP = SparseGroup(8, 4.0)
PLAN = GroupPlan.uniform(3, 2, GROUP)
IDS = random_tokens(2, 64)
TOKENIZER = text_tokenizer()
SAMPLE = following(IDS[0], 40, "perplexity, text")
SCORE = Score("perplexity, text", -1.0, 3, 1, 1, 10, 5.0)
CHAT = [{"role": "user", "content": "Here?"}]


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> SimpleNamespace:
    """Arguments that would be right elsewhere."""
    base = tiny_base()
    sparse = convert_model(base, ConversionConfig(sparsity=1, window=8))
    return SimpleNamespace(
        base=base,
        sparse=sparse,
        config=sparse.config,
        cache=DynamicCache(config=sparse.config),
        subject=Subject("model", sparse),
        memory=CacheMemory(sparse, SAMPLE.context),
        folder=tmp_path_factory.mktemp("arguments"),
    )


CALLS = [
    # What is passed in place of a model, or a model in place of something else.
    ("model", lambda at: save_routers(at.folder / "new", at.sparse)),
    ("model", lambda at: load_routers(at.folder, at.base)),
    ("model", lambda at: load_routers("name", at.folder)),
    ("model", lambda at: load_routers(None, at.folder)),
    ("model", lambda at: load_routers(at.config, at.folder)),
    ("model", lambda at: load_routers(torch.nn.Linear(2, 2), at.folder)),
    ("path", lambda at: save_cache(at.cache, at.sparse, at.folder / "new")),
    ("model", lambda at: save_cache(at.cache, at.folder / "new", None)),
    ("model", lambda at: save_cache(at.cache, at.folder / "new", at.config)),
    ("model", lambda at: load_cache(at.folder / "cache", "name")),
    ("model", lambda at: trace_routing(None)),
    ("model", lambda at: trace_routing(at.config)),
    ("model", lambda at: calibrate_thresholds(None, [IDS])),
    ("model", lambda at: calibrate_thresholds([IDS], at.sparse)),
    ("model", lambda at: convert_model(None, ConversionConfig(), IDS)),
    ("model", lambda at: convert_model(at.base.config, ConversionConfig(), IDS)),
    ("model", lambda at: convert_model(type(at.base), ConversionConfig(), IDS)),
    ("model", lambda at: to_dense(None)),
    ("model", lambda at: teacher_of("name")),
    ("model", lambda at: load_kvzap("name", at.folder, -4.0)),
    ("model", lambda at: convert_to_native(None, ConversionConfig(window=0), IDS)),
    ("model", lambda at: HealingTrainer(None, at.base)),
    ("teacher", lambda at: HealingTrainer(at.sparse, "name")),
    ("model", lambda at: CacheMemory(SAMPLE.context, at.sparse)),
    ("model", lambda at: filled_cache(IDS, at.sparse)),
    ("model", lambda at: trace_text(TOKENIZER, at.sparse, "A text.")),
    ("subjects[1].model", lambda at: evaluate([at.subject, Subject("name", None)], [SAMPLE])),
    # Paths and names.
    ("directory", lambda at: save_routers(at.sparse, None)),
    ("base_model", lambda at: save_routers(at.sparse, at.folder / "new", 3)),
    ("directory", lambda at: load_routers(at.base, 3)),
    ("directory", lambda at: load_routers(at.base, at.sparse)),
    ("directory", lambda at: load_routers(at.base, "")),
    ("path", lambda at: save_cache(at.cache, None, at.sparse)),
    ("path", lambda at: save_cache(at.cache, "", at.sparse)),
    ("path", lambda at: load_cache(at.sparse, at.folder / "cache")),
    ("path", lambda at: GroupPlan.load([[None]])),
    ("path", lambda at: PLAN.save(None)),
    ("path", lambda at: PLAN.plot(None)),
    ("source", lambda at: convert_checkpoint(at.base, at.folder / "new")),
    ("destination", lambda at: convert_checkpoint(at.folder, ConversionConfig())),
    ("routers", lambda at: convert_checkpoint(at.folder, at.folder / "new", routers=at.sparse)),
    ("model", lambda at: find_source(at.base)),
    ("model", lambda at: find_source("")),
    ("revision", lambda at: find_source("some/name", revision=3)),
    ("directory", lambda at: load_kvzap(at.base, None, -4.0)),
    ("threshold", lambda at: load_kvzap(at.base, at.folder, None)),
    ("names", lambda at: read_text(None)),
    ("names", lambda at: read_text([])),
    ("names", lambda at: read_text([None])),
    ("names", lambda at: read_text(Text(["A text."], "text"))),
    ("output", lambda at: evaluate([at.subject], [SAMPLE], 3)),
    ("path", lambda at: trace_text(at.sparse, TOKENIZER, "A text.").save(None)),
    # Caches.
    ("past_key_values", lambda at: save_cache(at.sparse, at.folder / "new", at.cache)),
    ("past_key_values", lambda at: cache_bytes(None)),
    ("cache", lambda at: decoding_bytes(None)),
    ("cache", lambda at: decoding_bytes(at.sparse)),
    ("cache", lambda at: decoding_bytes(EncoderDecoderCache(at.cache, at.cache))),
    ("cache", lambda at: filled_cache(at.sparse, IDS, cache="static")),
    # Plans and conversions.
    ("num_tokens", lambda at: GROUP.kept_share(0)),
    ("num_tokens", lambda at: GROUP.kept_share(-3)),
    ("num_tokens", lambda at: GROUP.kept_share(None)),
    ("rate", lambda at: GROUP.kept_share(10, "half")),
    ("rate", lambda at: GROUP.kept_share(10, -0.1)),
    ("rate", lambda at: GROUP.kept_share(10, 1.1)),
    ("rate", lambda at: GROUP.kept_share(10, float("nan"))),
    ("budget", lambda at: GROUP.kept_share(10, None, "half")),
    ("budget", lambda at: GROUP.kept_share(10, None, 0)),
    ("num_groups", lambda at: PLAN.validate(None, [None])),
    ("why_dense", lambda at: PLAN.validate([2] * len(PLAN.layers), None)),
    ("why_dense", lambda at: PLAN.validate([2] * len(PLAN.layers), [])),
    ("num_tokens", lambda at: PLAN.plot(at.folder / "plan.png", 0)),
    ("layers", lambda at: GroupPlan(None)),
    ("layers[0]", lambda at: GroupPlan((GROUP,))),
    ("num_layers", lambda at: GroupPlan.uniform("3", 2, GROUP)),
    ("num_layers", lambda at: GroupPlan.uniform(at.config, 2, GROUP)),
    ("num_layers", lambda at: GroupPlan.uniform(0, 2, GROUP)),
    ("num_layers", lambda at: GroupPlan.uniform(-1, 2, GROUP)),
    ("num_groups", lambda at: GroupPlan.uniform(3, 0, GROUP)),
    ("num_groups", lambda at: GroupPlan.uniform(3, 2.0, GROUP)),
    ("num_groups", lambda at: GroupPlan.uniform(3, [2, 2], GROUP)),
    ("num_groups", lambda at: GroupPlan.uniform(3, [2] * 4, GROUP)),
    ("group", lambda at: GroupPlan.uniform(3, 2, None)),
    ("group", lambda at: GroupPlan.uniform(3, 2, {"window": 8, "sparsity": 4})),
    ("dense_layers", lambda at: GroupPlan.uniform(3, 2, GROUP, 1)),
    ("dense_layers", lambda at: GroupPlan.uniform(3, 2, GROUP, [3])),
    ("sparse", lambda at: PLAN.with_sparse(None)),
    ("sparse", lambda at: PLAN.with_sparse({(9, 0): GROUP})),
    ("conversion", lambda at: convert_checkpoint(at.folder, at.folder / "new", IDS)),
    ("conversion", lambda at: convert_to_native(at.base, {"window": 0}, IDS)),
    ("fits", lambda at: convert_model(at.base, ConversionConfig(), IDS, "fits")),
    ("fits", lambda at: convert_model(at.base, ConversionConfig(), IDS, [None])),
    # Texts and tokens.
    ("batches", lambda at: calibrate_thresholds(at.sparse, None)),
    ("batches", lambda at: calibrate_thresholds(at.sparse, [IDS[:, :0]])),
    ("tokenizer", lambda at: calibration_windows("name", SENTENCES)),
    ("tokenizer", lambda at: calibration_windows(at.base, SENTENCES)),
    ("tokenizer", lambda at: calibration_windows(SENTENCES, TOKENIZER)),
    ("num_windows", lambda at: calibration_windows(TOKENIZER, SENTENCES, "4")),
    ("num_windows", lambda at: calibration_windows(TOKENIZER, SENTENCES, 1.5)),
    ("window_length", lambda at: calibration_windows(TOKENIZER, SENTENCES, 2, None)),
    ("num_windows", lambda at: convert_checkpoint(at.folder, at.folder / "new", None, "A text.", num_windows="4")),
    ("tokenizer", lambda at: TokenWindows(None, SENTENCES, 8)),
    ("length", lambda at: TokenWindows(TOKENIZER, SENTENCES, "8")),
    ("top_k", lambda at: HealingTrainer(at.sparse, at.base, top_k="8")),
    ("cache_length", lambda at: HealingTrainer(at.sparse, at.base, cache_length=None)),
    ("documents", lambda at: Text(None, "text")),
    ("documents", lambda at: Text("A text.", "text")),
    ("documents", lambda at: Text([3], "text")),
    ("tokenizer", lambda at: Text([CHAT], "text").as_string(None)),
    ("most_characters", lambda at: read_text("text.txt", "4")),
    ("most_characters", lambda at: read_text("text.txt", 0)),
    ("tokenizer", lambda at: text_samples(None, "text", SENTENCES, 20, 10, 2)),
    ("text", lambda at: text_samples(TOKENIZER, "text", None, 20, 10, 2)),
    ("text", lambda at: text_samples(TOKENIZER, "text", [SENTENCES], 20, 10, 2)),
    ("context", lambda at: text_samples(TOKENIZER, "text", SENTENCES, "20", 10, 2)),
    ("tokenizer", lambda at: fact_samples(SENTENCES, TOKENIZER, 600, 1)),
    ("text", lambda at: fact_samples(TOKENIZER, [SENTENCES], 600, 1)),
    ("contexts", lambda at: fact_samples(TOKENIZER, SENTENCES, 600, 0)),
    ("contexts", lambda at: fact_samples(TOKENIZER, SENTENCES, 600, None)),
    ("tokenizer", lambda at: trace_text(at.sparse, "A text.", TOKENIZER)),
    ("text", lambda at: trace_text(at.sparse, TOKENIZER, ["A text."])),
    ("max_tokens", lambda at: trace_text(at.sparse, TOKENIZER, "A text.", 1.5)),
    ("at", lambda at: trace_text(at.sparse, TOKENIZER, "A text.").groups[0].in_cache(None)),
    ("input_ids", lambda at: filled_cache(at.sparse, [1, 2])),
    ("input_ids", lambda at: filled_cache(at.sparse, IDS[0])),
    ("input_ids", lambda at: filled_cache(at.sparse, IDS[:, :0])),
    ("chunk", lambda at: filled_cache(at.sparse, IDS, 0)),
    ("context", lambda at: CacheMemory(at.sparse, [])),
    ("context", lambda at: CacheMemory(at.sparse, "A text.")),
    ("context", lambda at: CacheMemory(at.sparse, [1.5])),
    ("ids", lambda at: following([1, 2, 3], 1, "task")),
    ("ids", lambda at: following(IDS, 1, "task")),
    ("context", lambda at: following(IDS[0], 0, "task")),
    ("context", lambda at: following(IDS[0], 63, "task")),
    ("context", lambda at: following(IDS[0], "half", "task")),
    # Samples and scores.
    ("subjects", lambda at: evaluate(at.sparse, [SAMPLE])),
    ("subjects", lambda at: evaluate([at.sparse], [SAMPLE])),
    ("subjects", lambda at: evaluate(at.subject, [SAMPLE])),
    ("subjects", lambda at: evaluate([], [SAMPLE])),
    ("samples", lambda at: evaluate([at.subject], SAMPLE)),
    ("samples", lambda at: evaluate([at.subject], [])),
    ("samples", lambda at: evaluate([at.subject], ["A text."])),
    ("samples", lambda at: evaluate([at.subject], [Sample([1, 2], [])])),
    ("samples", lambda at: evaluate([at.subject], [Sample([], SAMPLE.continuations)])),
    ("about", lambda at: evaluate([at.subject], [SAMPLE], None, 3)),
    ("rows", lambda at: table([])),
    ("rows", lambda at: table({"rows": []})),
    ("rows", lambda at: table([{}])),
    ("rows", lambda at: table([{"model": "one", "task": "needle"}])),
    ("task", lambda at: summary([SCORE], "perplexity, text")),
    ("scores", lambda at: summary("perplexity, text", [])),
    ("scores", lambda at: summary("needle", [SCORE])),
    ("memory", lambda at: score(at.sparse, SAMPLE)),
    ("sample", lambda at: score(at.memory, None)),
    ("answers", lambda at: Continuation("task", [3, 4], [(0, 1)])),
    ("answers", lambda at: Continuation("task", [3, 4], [(1, 9)])),
    ("content", lambda at: Sample.from_dict({})),
    ("content", lambda at: Sample.from_dict(SAMPLE)),
]


@pytest.mark.parametrize("name, call", CALLS)
def test_the_argument_is_named(name, call, at):
    with pytest.raises(ValueError, match=f"`{re.escape(name)}`"):
        call(at)


def test_tokens_of_another_vocabulary(at):
    with pytest.raises(ValueError, match="`input_ids` has token ids from 1 to 999, but the vocabulary"):
        CacheMemory(at.sparse, [1, 999])


def test_the_error_says_what_is_expected_and_how_to_call(at):
    with pytest.raises(ValueError) as error:
        load_routers("routers", at.base)
    assert str(error.value) == (
        "`model` must be a model with a config, as `from_pretrained` loads it, got 'routers': "
        "call `load_routers(model, directory)`."
    )
    with pytest.raises(ValueError, match="`source` must be a string or a path.*`convert_model` takes a model"):
        convert_checkpoint(at.base, at.folder / "new")
    with pytest.raises(IsADirectoryError, match=f"{at.folder} is a folder: name a file"):
        PLAN.save(at.folder)
