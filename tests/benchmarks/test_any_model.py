"""The evaluation of any model: what its contexts hold, what counts as an answer, that it goes on, what it shows."""

import json
import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import metrics
from benchmarks.frontier import __main__ as command
from benchmarks.frontier import any_model, ruler, scoreboard, writing
from benchmarks.frontier.asking import Question, ask
from mosa_hf import ConversionConfig, GroupPlan, SparseGroup, convert_model, save_routers
from mosa_hf.evaluation import filled_cache
from testing.passages import Passage
from testing.tiny import SENTENCES, byte_tokenizer, random_tokens, text_tokenizer, tiny_base


def of_a_needle(context: str, prompt: str) -> list[str]:
    """What the only needle with the key says."""
    (key,) = set(re.findall(r"for (\S+) mentioned", prompt))
    return re.findall(rf"One of the special magic \w+ for {key} is: (\S+)\.", context)


def of_a_value(context: str, prompt: str) -> list[str]:
    """All variables that lead to the value, wherever they stand."""
    (value,) = set(re.findall(r"the value (\d+)", prompt))
    said = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context))

    def value_of(name):
        return value_of(said[name]) if name in said else name

    return [name for name in said if value_of(name) == value]


def most_common(words: list[str], number: int) -> list[str]:
    counted = Counter(words).most_common(number + 1)
    assert counted[number - 1][1] > counted[number][1]  # there is no doubt about it
    return [word for word, _ in counted[:number]]


RIGHT = {
    **dict.fromkeys(("niah_single_1", "niah_multikey_2", "niah_multikey_3"), of_a_needle),
    "vt": of_a_value,
    "cwe": lambda context, prompt: most_common(re.findall(r"\d+\. (\w+)", context), 10),
    "fwe": lambda context, prompt: most_common(re.findall(r"\b[a-z]{6}\b", context.partition("words. ")[2]), 3),
}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_contexts_hold_what_is_asked(task):
    tokenizer, length = text_tokenizer(), 6000
    reading = ruler.reading(tokenizer, task, length, 0, 4)
    longest = max(len(each.prompt) + each.max_new_tokens for each in reading.questions)
    assert 0.9 * length < len(reading.context) + longest <= length
    assert reading == ruler.reading(tokenizer, task, length, 0, 4) != ruler.reading(tokenizer, task, length, 1, 4)
    assert len(reading.questions) == (1 if task in ("cwe", "fwe") else 4)
    context = tokenizer.decode(reading.context)
    for each in reading.questions:
        answer, prompt = tokenizer.decode(each.answer), tokenizer.decode(each.prompt)
        assert all(reference in answer for reference in each.references)
        assert not any(reference in prompt for reference in each.references)  # nothing is found by repeating
        assert sorted(each.references) == sorted(RIGHT[task](context, prompt))


def test_a_list_is_written_that_comes_round():
    tokenizer, length = text_tokenizer(), 6000
    reading = writing.reading(tokenizer, length, 0)
    (question,) = reading.questions
    assert 0.9 * length < len(reading.context) + 1 + question.max_new_tokens <= length
    assert len(question.answer) >= writing.LEAST_TOKENS
    assert reading == writing.reading(tokenizer, length, 0) != writing.reading(tokenizer, length, 1)
    read = tokenizer.decode(reading.context).splitlines()[1:]
    written = tokenizer.decode(question.answer).splitlines()
    assert [int(line.split(".")[0]) for line in read + written] == [*range(1, len(read + written) + 1)]
    entries = [line.split(". ")[1] for line in read + written]
    size = len(set(entries))
    assert entries == [entries[i % size] for i in range(len(entries))] and size < len(read)  # all can be looked up
    assert tuple(written) == question.references
    # Only a continuation in the right order has them.
    assert not set(question.references) & set(read)


def test_what_a_length_has_no_room_for():
    with pytest.raises(ValueError, match="300 tokens have no room for what cwe asks"):
        ruler.reading(byte_tokenizer(), "cwe", 300, 0, 1)
    with pytest.raises(ValueError, match="1500 tokens have no room for what long_writing asks"):
        writing.reading(byte_tokenizer(), 1500, 0)


def test_answers_are_those_of_greedy_decoding():
    model, tokenizer, context = tiny_base(vocab_size=256), byte_tokenizer(), random_tokens(1, 40, seed=2)
    model.generation_config.eos_token_id = None
    prompt = [5, 6, 7]
    decoded = model.generate(torch.cat([context, torch.tensor([prompt])], 1), max_new_tokens=12, do_sample=False)
    decoded = decoded[0, 43:].tolist()
    cache = filled_cache(model, context)
    reader = any_model.CacheReader(model, cache)
    wrong = [(decoded[0] + 1) % 256, *decoded[1:4]]

    def question(answer, references, most):
        return ruler.Question(prompt, answer, references, most)

    early, late = (tokenizer.decode(part) for part in (decoded[:4], decoded[6:12]))
    right = ask(reader, tokenizer, question(decoded[:4], (early,), 12))
    assert (right.found, right.of, right.tokens) == (1, 1, 4)
    with torch.no_grad():
        ids = torch.cat([context, torch.tensor([prompt + decoded[:4]])], 1)
        expected = model(ids, use_cache=False).logits[0, 42:46].log_softmax(-1)[range(4), decoded[:4]].sum()
    assert right.log_probability == pytest.approx(float(expected), abs=1e-4)
    # Not what was expected, but with some of the references in it, later on.
    some = ask(reader, tokenizer, question(wrong, (late, "not in it"), 12))
    assert (some.found, some.of) == (1, 2) and some.log_probability < right.log_probability
    assert late not in tokenizer.decode(decoded[:11])
    assert ask(reader, tokenizer, question(wrong, (late,), 11)).found == 0
    model.generation_config.eos_token_id = decoded[11]  # what comes after the end is no answer
    assert ask(reader, tokenizer, question(wrong, (late,), 12)).found == 0
    assert cache.get_seq_length() == 40


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    """Of a tiny model, by the command."""
    monkeypatch.setenv("MOSA_HF_CACHE", str(tmp_path / "cache"))
    own = [Passage("code", SENTENCES[i * 900 :][:2000]) for i in range(2)]
    monkeypatch.setattr(any_model, "passages", lambda name: own)
    monkeypatch.setattr(any_model, "NAMES", {"code": "one two"})
    monkeypatch.setattr(any_model, "PROMPTS", {1500: 300})
    monkeypatch.setattr(any_model, "SCORED", 40)
    tiny_base(vocab_size=256, max_position_embeddings=2048).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    where = ["--model", str(tmp_path / "tiny"), "--output", str(tmp_path), "--lengths", "1500", "4096"]
    asked = ["--tasks", "niah_single_1", "code", "--contexts", "2", "--questions", "2", "--dtype", "float32"]
    return [*where, "--ours", "64/8", "512/8", *asked]


@pytest.mark.slow
def test_one_command_gives_the_table_and_goes_on(options, tmp_path, monkeypatch, capsys):
    board, read = tmp_path / "frontier-tiny-float32.jsonl", []
    original = any_model.Asked.read_by

    def stopping(self, tokenizer, model):
        if len(read) == 6:
            raise KeyboardInterrupt
        read.append((self.task, self.index))
        return original(self, tokenizer, model)

    def counting(self, tokenizer, model):
        read.append((self.task, self.index))
        return original(self, tokenizer, model)

    monkeypatch.setattr(any_model.Asked, "read_by", stopping)
    command.main(options)
    assert "Left out, since the model reads 2048 tokens at most: 4096" in capsys.readouterr().out
    # Both kinds come before the second of one; each is read by all methods.
    assert read == [("niah_single_1", 0)] * 4 + [("code", 0)] * 2
    half = board.read_text()
    assert len(half.splitlines()) == 6
    board.write_text(half + half.splitlines()[0][:50])  # killed while it wrote
    monkeypatch.setattr(any_model.Asked, "read_by", counting)
    command.main(options)
    assert len(read) == 16 and board.read_text().startswith(half)
    rows = [json.loads(line) for line in board.read_text().splitlines()]
    assert len(rows) == 16 == len(scoreboard.lines(board))
    command.main(options)
    assert len(read) == 16  # all of it is there

    methods = ("original", "ours", "sink + window", "default")
    originals, ours, windows, defaults = ([row for row in rows if row["method"] == each] for each in methods)
    assert len(originals) == len(ours) == len(windows) == len(defaults) == 4
    assert all(row["command"].startswith("python -m benchmarks.frontier") for row in rows)
    for row, own in zip(windows, ours, strict=True):  # as many bytes as the first conversion, on the same contexts
        assert row["digest"] == own["digest"] and row["kv_bytes"] == pytest.approx(own["kv_bytes"], rel=0.15)
    page = board.with_suffix(".md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table[0] == "|  | KV bytes | niah_single_1 | code |" and len(table) == 6
    assert table[2].startswith("| original | 1.000 | ") and "/4 (" in table[2]
    assert table[3].startswith("| ours, window 64, sparsity 8 | 0.") and "±" in table[3]
    assert "Passages of each text: 2 to 2." in page and str(tmp_path) not in page
    assert board.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # What is there of other weights, or of another dtype, is no part of the page.
    with board.open("a") as file:
        file.write(json.dumps(rows[0] | {"base": "0" * 16, "kv_bytes": 1}) + "\n")
    command.main(options)
    assert board.with_suffix(".md").read_text() == page and len(read) == 16
    # Nor is what was measured before with routers of another fit.
    earlier = [row | {"parameters": row["parameters"] | {"routers": "0" * 12}, "kv_bytes": 1} for row in ours]
    board.write_text("".join(json.dumps(row) + "\n" for row in earlier) + board.read_text())
    command.main(options)
    assert board.with_suffix(".md").read_text() == page and len(read) == 16
    # Of texts alone there is nothing to draw.
    texts = board.with_name("texts.jsonl")
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows if "loss" in row))
    written = scoreboard.write(texts, "texts", rows[0]["base"])
    assert "| original | 1.000 |" in written and "png" not in written
    assert not texts.with_suffix(".png").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_window_of_as_many_bytes_leaves_sliding_layers_theirs(family):
    base, ids = tiny_base(family), random_tokens(1, 400, seed=3)
    converted = convert_model(base, ConversionConfig(window=24, sparsity=4), random_tokens(4, 64)).eval()
    original, own = (metrics.kv_bytes(model, ids) for model in (base, converted))
    window = metrics.window_of_share(converted, own / original, ids.shape[1])
    alone = metrics.first_token_and_window(converted, window)
    assert metrics.kv_bytes(alone, ids) == pytest.approx(own, rel=0.05) and own < 0.8 * original


@pytest.mark.slow
def test_plans_and_8_bit_entries_are_conversions_too(options, tmp_path):
    near, far = SparseGroup(window=64, sparsity=8), SparseGroup(window=16, sparsity=2)
    GroupPlan(((near, far), (None, near), (far, far))).save(tmp_path / "plan.json")
    ours = ["64/8", "64/8/int8", str(tmp_path / "plan.json")]
    command.main([*options, "--ours", *ours, "--tasks", "code", "--contexts", "1"])
    board = tmp_path / "frontier-tiny-float32.jsonl"
    original, own, window, coded, planned = [json.loads(line) for line in board.read_text().splitlines()]
    assert window["method"] == "sink + window"
    assert coded["kv_bytes"] < 0.5 * own["kv_bytes"] and coded["loss"] != own["loss"]
    assert coded["parameters"] == own["parameters"] | {"cache_dtype": "int8"}
    assert planned["parameters"]["plan"] == "plan.json"
    # One of six groups is dense, three have 64 tokens and an eighth of the rest, the others 16 and half of it.
    share = (1 + 3 * (64 + 276 / 8) / 340 + 2 * (16 + 324 / 2) / 340) / 6
    assert planned["kv_bytes"] / original["kv_bytes"] == pytest.approx(share, rel=0.2)
    labels = [line.split("|")[1].strip() for line in board.with_suffix(".md").read_text().splitlines() if "| " in line]
    assert labels[-3:] == ["sink + window", "ours, window 64, sparsity 8, int8", "ours, plan.json"]
    for wrong in ("64/8/int4", "64-8", "64/8/int8/1"):
        with pytest.raises(SystemExit):
            command.main([*options, "--ours", wrong])


@pytest.mark.slow
def test_folders_are_conversions_too_healed_or_not(options, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    converted = convert_model(base, ConversionConfig(window=64, sparsity=8), random_tokens(4, 64))
    converted.save_pretrained(tmp_path / "converted")
    save_routers(converted, tmp_path / "routers")
    save_routers(converted, tmp_path / "healed")
    healed = get_peft_model(converted, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    healed.save_pretrained(tmp_path / "healed")
    ours = ["--ours", *(str(tmp_path / name) for name in ("converted", "routers", "healed", "healed/int8"))]
    command.main([*options, *ours, "--tasks", "code", "--contexts", "1"])
    board = tmp_path / "frontier-tiny-float32.jsonl"
    original, whole, window, alone, of_adapters, coded = map(json.loads, board.read_text().splitlines())
    assert whole["loss"] == alone["loss"] and (whole["method"], alone["method"]) == ("ours", "ours")
    assert coded["kv_bytes"] < 0.5 * of_adapters["kv_bytes"]
    assert coded["parameters"] == of_adapters["parameters"] | {"cache_dtype": "int8"}
    assert coded["loss"] != of_adapters["loss"] == pytest.approx(coded["loss"], rel=0.01)
    rows = {"original": original, "ours": whole, "healed": of_adapters}
    assert all(row["method"] == method for method, row in rows.items()) and window["method"] == "sink + window"
    sample = any_model.Asked("code", 1500, 0, 2).sample(byte_tokenizer())
    for method, model in (("original", base), ("ours", converted), ("healed", healed)):
        with torch.no_grad():  # adapters are in `converted` too: they are set aside, not merged
            plain = healed.disable_adapter() if method == "ours" else nullcontext()
            with plain:
                logits = model(torch.tensor([sample.context + sample.continuations[0].ids]), use_cache=False).logits
        (start, _), *_ = sample.continuations[0].answers
        targets = torch.tensor(sample.continuations[0].ids[start:])
        expected = torch.nn.functional.cross_entropy(logits[0, len(sample.context) + start - 1 : -1], targets)
        assert rows[method]["loss"] == pytest.approx(float(expected), abs=1e-4), method
    page = board.with_suffix(".md").read_text()
    assert all(f"| {label} | " in page for label in ("ours, converted", "healed, healed", "healed, healed, int8"))
    # Other adapters in the same folder are another conversion.
    assert "weights" in rows["healed"]["parameters"] and "weights" not in rows["ours"]["parameters"]


@pytest.mark.slow
def test_rivals_have_as_many_bytes_and_the_same_questions(options, tmp_path, monkeypatch):
    board, jobs = tmp_path / "frontier-tiny-float32.jsonl", []

    def answers(job):
        jobs.append(json.loads(json.dumps(job)))
        for i, reading in enumerate(job["readings"]):
            for name, kept in reading["methods"].items():
                own = {"reading": i, "method": name, "kv_bytes": kept, "tokens": len(reading["context"])}
                if "questions" in reading:
                    answer = {"found": 0, "of": 1, "log_probability": -3.0, "tokens": 2}
                    own["answers"] = [answer for _ in reading["questions"]]
                else:
                    own["loss"] = 4.0
                yield own | {"versions": {"transformers": "5.2"}}

    monkeypatch.setattr(any_model, "baselines_answers", answers)
    command.main([*options, "--rivals", "SnapKV"])
    command.main([*options, "--rivals", "SnapKV", "KVzip"])
    command.main([*options, "--rivals", "KVzip"])
    assert [[[*each["methods"]] for each in job["readings"]] for job in jobs] == [[["SnapKV"]] * 4, [["KVzip"]] * 4]
    rows = [json.loads(line) for line in board.read_text().splitlines()]
    ours = {(row["task"], row["index"]): row for row in rows if row["parameters"].get("window") == 64}
    originals = {(row["task"], row["index"]): row for row in rows if row["method"] == "original"}
    rivals = [row for row in rows if row["method"] in ("SnapKV", "KVzip")]
    assert len(ours) == 4 and len(rivals) == 8
    tokenizer = byte_tokenizer()
    for row in rivals:
        place = row["task"], row["index"]
        assert row["digest"] == ours[place]["digest"] and row["versions"]["kvpress"]
        assert row["kv_bytes"] == ours[place]["kv_bytes"] / originals[place]["kv_bytes"]
    needles, passage = jobs[0]["readings"][0], jobs[0]["readings"][1]
    asked = any_model.Asked("niah_single_1", 1500, 0, 2).reading(tokenizer)
    assert needles["context"] == asked.context and jobs[0]["dtype"] == "float32"
    assert [Question.from_dict(each) for each in needles["questions"]] == asked.questions
    assert len(passage["context"]) == 300 and passage["continuations"][0]["answers"] == [[1, 41]]
    page = board.with_suffix(".md").read_text()
    assert "by the code of kvpress" in page and "| SnapKV | " in page
