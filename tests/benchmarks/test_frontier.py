"""The evaluation of memory against quality: what it measures on, what it measures again, and what it shows."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import cache_dtype, demo, metrics
from benchmarks.frontier import measuring, page, picture, tasks
from benchmarks.frontier.methods import Method, Models, digest_of
from benchmarks.frontier.results import Results
from benchmarks.frontier.tasks import Size, Suite, continuations_of_texts
from benchmarks.provenance import origin_of
from benchmarks.speed import decode
from mosa_hf import ConversionConfig, GroupPlan, convert_model, save_routers, trace_routing
from mosa_hf.evaluation import CacheMemory, Continuation, Sample, following, score
from testing.passages import Passage, cut
from testing.tiny import QUIET, SENTENCES, byte_tokenizer, random_tokens, text_tokenizer, tiny_base

ORIGIN = {
    "command": "python -m benchmarks.frontier",
    "date": "2026-01-01",
    "machine": "one",
    "versions": {"torch": "2"},
}


@pytest.fixture(scope="module")
def models() -> dict:
    original = tiny_base(vocab_size=256)
    converted = convert_model(original, ConversionConfig(sparsity=4, window=5), random_tokens(4, 64))
    return {"original": original, "converted": converted}


def test_a_passage_with_words_of_what_was_seen_is_refused(monkeypatch):
    tokenizer, halves = text_tokenizer(), (SENTENCES[: len(SENTENCES) // 2], SENTENCES[len(SENTENCES) // 2 :])
    own = [Passage("documentation", content) for content in cut(SENTENCES.replace(". ", ".\n"), 4, 6000)]
    monkeypatch.setattr(tasks, "passages", lambda name: own)
    size = Size(prompt=200, scored=50, texts=("documentation",), passages=4)
    for half, first_in_common in ((halves[0], own[0]), (halves[1], own[2])):
        seen = torch.tensor([tokenizer(half)["input_ids"]])
        with pytest.raises(ValueError, match=f"Passage {first_in_common.name} of 'documentation' has 12 words"):
            continuations_of_texts(tokenizer, seen, size)
    unseen = random_tokens(1, 100)
    (suite,) = continuations_of_texts(tokenizer, unseen, size)
    assert suite.settings["passages"] == [each.name for each in own]
    for sample, each in zip(suite.samples, own, strict=True):  # their beginnings
        assert len(sample.context) == 200 and sample.continuations[0].answers == [(1, 51)]
        assert sample.context + sample.continuations[0].ids == tokenizer(each.content)["input_ids"][:251]
    (fewer,) = continuations_of_texts(tokenizer, unseen, replace(size, passages=2))
    assert fewer.samples == suite.samples[::2] and fewer.all_settings != suite.all_settings


def test_random_selection_has_the_rates_of_the_groups_that_it_replaces(models):
    baseline, ids = metrics.random_selection(models["converted"]), random_tokens(4, 400, seed=5)
    with torch.no_grad(), trace_routing(baseline) as selected:
        baseline(ids, use_cache=False)
    for layer, router in baseline.mosa_routers().items():
        drawn = selected[layer][0]
        assert drawn[:, 0].all()
        rates = drawn[:, 1:].float().mean((0, 1))
        torch.testing.assert_close(rates, 1 / torch.tensor(router.sparsity), atol=0.05, rtol=0)


@pytest.fixture
def suite() -> Suite:
    ids = random_tokens(61, seed=6)
    fact = Continuation("fact", [3, 4, 5, 6], [(2, 4)])
    text = following(ids, 40, "perplexity, text")
    return Suite({"prompt": 40}, [text, Sample(ids[:30].tolist(), [fact])])


@QUIET
def test_the_demo_and_the_decoding_benchmark(models, suite):
    """Each model has a speed, and the baseline as many bytes as the converted model, to a token of its window."""
    original, converted = models["original"], models["converted"]
    result = demo.compare(original, converted, suite.samples)
    assert {row["model"] for row in result["rows"]} == set(result["tokens_per_second"])
    assert all(speed > 0 for speed in result["tokens_per_second"].values())
    held = {
        name: sum(row["kv_bytes"] for row in result["rows"] if row["model"] == name)
        for name in result["tokens_per_second"]
    }
    assert held[demo.BASELINE] == pytest.approx(held[demo.CONVERTED], rel=0.2)  # of windows of a dozen tokens
    ids = random_tokens(1, 20)
    decoder = decode.Decoder(converted, ids[:, :12])
    decoder.take_turn(ids[:, 12:], is_busy=False)
    assert decoder.cache.get_seq_length() == 20 and len(decoder.seconds[False]) == 8


@QUIET
def test_8_bit_entries_beside_others(models, suite, tmp_path):
    models["converted"].save_pretrained(tmp_path)
    rows = cache_dtype.compare(tmp_path, suite.samples)["rows"]
    assert [row["model"] for row in rows] == ["None", "None", "int8", "int8"]
    assert all(
        row["share"] < 0.6 and row["log_probability"] != rows[i]["log_probability"] for i, row in enumerate(rows[2:])
    )  # of keys of 8 channels


def test_what_is_there_is_not_measured_again(tmp_path, models, suite):
    built = []

    def method(name, **parameters):
        return Method(name, parameters, lambda: built.append((name, parameters)) or models[name])

    def measure_all(*methods, asked=suite):
        built.clear()
        results = Results(tmp_path / "frontier.jsonl")
        measuring.measure_here(list(methods), [asked], results, ORIGIN)
        return results

    original, converted = method("original"), method("converted", window=5)
    results = measure_all(original, converted)
    assert [name for name, _ in built] == ["original", "converted"]
    rows = (tmp_path / "frontier.jsonl").read_text().splitlines()
    assert len(rows) == 4 and list(map(json.loads, rows)) == list(results.rows.values())
    original_rows = [row for row in results.rows.values() if row["method"] == "original"]
    assert [row["task"] for row in original_rows] == ["perplexity, text", "fact"]
    assert all(row["share"] == 1 and row["settings"]["prompt"] == 40 for row in original_rows)

    measure_all(original, converted)
    assert not built
    measure_all(original, converted, method("converted", window=6))
    assert built == [("converted", {"window": 6})]
    measure_all(original, asked=Suite({"prompt": 40}, suite.samples[:1]))  # other tokens
    assert [name for name, _ in built] == ["original"]
    measure_all(original, asked=Suite({"prompt": 41}, suite.samples))
    assert [name for name, _ in built] == ["original"]
    (tmp_path / "frontier.jsonl").write_text("\n".join(rows[1:]) + "\n")  # as a run that was stopped leaves it
    measure_all(original, converted)
    assert [name for name, _ in built] == ["original"]


def test_baselines_are_asked_for_what_is_lacking(tmp_path, models, suite, monkeypatch):
    scores = [vars(each) for sample in suite.samples for each in score(CacheMemory(models["original"], [1]), sample)]
    jobs = []

    def answers(job):
        jobs.append(job)
        for i, asked in enumerate(job["suites"]):
            for method in asked["methods"]:
                yield {"suite": i, "method": method, "scores": scores, "versions": {"transformers": "5.2"}}

    monkeypatch.setattr(measuring, "baselines_answers", answers)

    class TinyModels:
        directory, original, calibration = tmp_path, models["original"], random_tokens(2, 8)

    snap, tova = (Method(name, {"kept": 0.4}, prompt="dense") for name in ("SnapKV", "TOVA"))
    other = Suite({"prompt": 39}, suite.samples)
    results = Results(tmp_path / "frontier.jsonl")
    for asked, methods in (([suite], [snap]), ([suite, other], [snap, tova]), ([suite, other], [snap, tova])):
        measuring.measure_baselines(methods, asked, results, ORIGIN, TinyModels, byte_tokenizer())
    assert [[each["methods"] for each in job["suites"]] for job in jobs] == [[[0]], [[1], [0, 1]]]
    assert json.loads(json.dumps(jobs)) and len(results.rows) == 8
    assert all(row["versions"]["kvpress"] and row["prompt"] == "dense" for row in results.rows.values())


def test_the_table_and_the_picture(tmp_path, models, suite):
    results = Results(tmp_path / "frontier.jsonl")
    masked = Method("KVzap", {"window": 128}, lambda: models["converted"], frees_memory=False)
    methods = [Method("original", {}, lambda: models["original"]), masked]
    measuring.measure_here(methods, [suite], results, ORIGIN)
    page.write(list(results.rows.values()), tmp_path)
    text = (tmp_path / "frontier.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "|  | KV bytes, texts | KV bytes, facts | prompt | perplexity, text | fact |"
    assert table[2].startswith("| original | 1.000 | 1.000 | sparse |") and len(table) == 4
    assert table[3].startswith("| KVzap, window 128 |") and "masked" in table[3]
    row = next(row for row in results.rows.values() if row["task"] == "perplexity, text")
    assert f"| {row['perplexity']:.2f} |" in table[2]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_methods_of_this_process(tmp_path, models, monkeypatch):
    monkeypatch.setattr(metrics, "calibration", lambda tokenizer, windows, window: random_tokens(windows, window))
    models["original"].save_pretrained(tmp_path / "original")
    models["converted"].save_pretrained(tmp_path / "converted")
    save_routers(models["converted"], tmp_path / "routers")
    GroupPlan.of_config(models["converted"].config).save(tmp_path / "plan.json")
    size = Size(windows=2, window=32)
    own = Models(tmp_path / "original", byte_tokenizer(), size)
    methods = own.methods(["5/4", "7/2.5"])
    methods += own.given([tmp_path / "converted"], [tmp_path / "routers"], [tmp_path / "plan.json"])
    assert [method.name for method in methods] == [
        *("original", "ours", "ours", "random selection", "converted", "routers", "plan")
    ]
    assert methods[2].parameters == {"window": 7, "sparsity": 2.5, "calibration": "2 x 32"}
    assert methods[4].parameters["routers"] == methods[5].parameters["routers"]  # the same, of two folders
    assert str(tmp_path) not in json.dumps([method.parameters for method in methods])
    windows = [
        {kind.window for groups in GroupPlan.of_config(method.build().config).layers for kind in groups}
        for method in methods[1:]
    ]
    assert windows == [{5}, {7}, {5}, {5}, {5}, {5}]
    router = methods[5].build().mosa_routers()[0]
    before = digest_of(methods[5].build())
    router.threshold += 1
    assert digest_of(methods[5].build()) != before


def test_what_is_recorded_has_no_paths_of_this_machine(tmp_path):
    command = origin_of("benchmarks.frontier", ["--converted", str(tmp_path), "--ours", "512/8"])["command"]
    assert command == f"python -m benchmarks.frontier --converted {tmp_path.name} --ours 512/8"


def test_the_readmes_picture_is_made_of_the_rows(tmp_path):
    output = tmp_path / "frontier.png"
    picture.main(["--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")
    size, committed = (Image.open(path).size for path in (output, picture.ROOT / "docs" / "images" / "frontier.png"))
    assert size == committed
