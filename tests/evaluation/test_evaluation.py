"""What models remember of a context: what is scored, what is asked, and the command that shows it."""

import copy
import json
import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mosa_hf import ConversionConfig, cache_bytes, convert_model, save_routers
from mosa_hf.cli import evaluate as command
from mosa_hf.cli import run_evaluate, trace
from mosa_hf.cli.run_evaluate import identity
from mosa_hf.compat import CACHE
from mosa_hf.conversion import calibration_windows
from mosa_hf.evaluation import (
    CacheMemory,
    Continuation,
    Sample,
    Subject,
    decoding_bytes,
    evaluate,
    fact_samples,
    filled_cache,
    following,
    report,
    retrieval,
    score,
    table,
    text_samples,
)
from mosa_hf.evaluation.report import cell, change, interval
from mosa_hf.modeling.router_files import write_routers
from testing.tiny import QUIET, SENTENCES, byte_tokenizer, random_tokens, text_tokenizer, tiny_base
from testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def models() -> dict:
    original = tiny_base(vocab_size=256, max_position_embeddings=2048)
    windows = calibration_windows(byte_tokenizer(), SENTENCES, 4, 64)
    converted = convert_model(original, ConversionConfig(sparsity=4, window=5), windows)
    return {"original": original, "converted": converted}


@pytest.mark.parametrize("name", ["original", "converted"])
def test_scores_are_a_plain_forwards_loss(name, models):
    model, ids = models[name], random_tokens(1, 61, seed=3)
    (own,) = score(CacheMemory(model, ids[0, :40].tolist()), following(ids[0], 40, "text"))
    labels = ids.clone()
    labels[:, :41] = -100  # the context, and the first token after it, which is read only
    with torch.no_grad():
        loss = model(ids, labels=labels, use_cache=False).loss
    assert own.tokens == 20 and own.length == 61
    assert own.log_probability / own.tokens == pytest.approx(-loss.item(), abs=1e-5)
    dense = 61 * 2 * 3 * 2 * 8 * 4  # keys and values, layers, groups, size of a head, bytes
    assert own.kv_bytes == dense if name == "original" else 0 < own.kv_bytes < 0.8 * dense
    if name == "original":
        assert own.kv_bytes == sum(cache_bytes(filled_cache(model, ids)).values())


def test_layers_with_a_sliding_window_are_counted_as_they_decode():
    """After a call of many tokens they hold all of them; one token later, what they will read."""
    model, ids = tiny_base("gemma3_text"), random_tokens(1, 61, seed=3)
    cache = filled_cache(model, ids)
    own = [layer for layer in cache.layers if layer.is_sliding]
    kept = [min(layer.keys.shape[2], 61) for layer in cache.layers]
    assert own and decoding_bytes(cache) == sum(kept) * 2 * 2 * 8 * 4 < sum(
        cache_bytes(filled_cache(model, ids)).values()
    )
    with torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in own] == [own[0].sliding_window - 1] * len(own)


def test_right_is_what_greedy_decoding_gives(models):
    model, context = models["converted"], random_tokens(1, 30, seed=4)
    question = torch.tensor([[5, 6, 7]])
    answer = model.generate(torch.cat([context, question], dim=1), max_new_tokens=4, do_sample=False)[0, 33:].tolist()
    wrong = [*answer[:-1], (answer[-1] + 1) % 256]
    asked = [Continuation("fact", [5, 6, 7, *each], [(3, 7)]) for each in (answer, wrong, answer)]
    scores = score(CacheMemory(model, context[0].tolist()), Sample(context[0].tolist(), asked))
    assert [each.right for each in scores] == [1, 0, 1]
    assert scores[0] == scores[2]  # the context is remembered as it was, whatever was asked before
    assert scores[1].log_probability < scores[0].log_probability


def test_needles_are_in_their_context():
    tokenizer = text_tokenizer()
    sample = retrieval.needles(tokenizer, SENTENCES, 3000, seed=1)
    assert 2700 < len(sample.context) <= 3100
    context = tokenizer.decode(sample.context)
    single = [each for each in sample.continuations if each.task == "needle"]
    together = [each for each in sample.continuations if each.task == "needles together"]
    assert len(single) == 8 and len(together) == 2
    codes, places = {}, []
    for each in single:
        asked = tokenizer.decode(each.ids)
        (answer,) = answers_of(tokenizer, each)
        assert asked.startswith("\nThe code of the ") and asked.endswith(answer) and len(answer) == len(" 12345")
        assert context.count(f"{asked[1:]}.") == 1
        codes[asked.removeprefix("\nThe code of the ").partition(" is ")[0]] = answer
        places.append(context.index(asked[1:]) / len(context))
    assert len(set(codes.values())) == 8
    assert max(abs(place - (i + 0.5) / 8) for i, place in enumerate(places)) < 0.05  # eight depths
    for each in together:
        asked, answers = tokenizer.decode(each.ids), answers_of(tokenizer, each)
        named = asked.partition(" are ")[0].removeprefix("\nThe codes of the ").replace(" and the ", ", the ")
        assert answers == [codes[place] for place in named.split(", the ")] and len(answers) == 3


def test_keys_are_in_their_context():
    tokenizer = text_tokenizer()
    sample = retrieval.key_values(tokenizer, SENTENCES, 2000, seed=1)
    context = tokenizer.decode(sample.context)
    assert len(sample.continuations) == 8
    for each in sample.continuations:
        line = tokenizer.decode(each.ids).removeprefix("\nFrom the dictionary:\n")
        assert context.count(f"\n{line}\n") == 1
        assert answers_of(tokenizer, each) == [line.partition(":")[2]]
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def answers_of(tokenizer, continuation: Continuation) -> list[str]:
    return [tokenizer.decode(continuation.ids[start:stop]) for start, stop in continuation.answers]


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="fewer"):
        retrieval.needles(byte_tokenizer(), "One sentence. Another.", 3000, seed=0)
    with pytest.raises(ValueError, match="200 tokens have no room for a sentence of the text beside the facts"):
        fact_samples(byte_tokenizer(), SENTENCES, 200, 1)


def test_intervals():
    """Wilson's, as Newcombe (Statistics in Medicine 17, 1998) tabulates it; and what a difference is worth."""
    for right, answers, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert interval(right, answers) == pytest.approx(expected, abs=5e-5)
    assert interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    found = change([1.0, 3.0], [1.1, 3.3])
    assert found["change"] == pytest.approx(math.exp(0.2) - 1)
    assert found["standard_error"] == pytest.approx(math.exp(0.2) * 0.1)  # of the mean of 0.1 and 0.3
    assert change([1.0], [1.0]) == {"change": 0.0}
    assert cell({"right": 13, "answers": 24, "log_probability": -0.426}) == "13/24 (35%–72%), -0.43"
    assert cell({"perplexity": 9.5, **found}) == "9.50 (+22.1% ± 12.2%)"


# --- a user's texts ---


def test_slices_of_a_text():
    """What is read is the text's own, a context and what follows it, from all over the text."""
    tokenizer = text_tokenizer()
    samples = text_samples(tokenizer, "boats", SENTENCES, 300, 50, 3)
    assert len(samples) == 3
    starts = []
    for sample in samples:
        (continuation,) = sample.continuations
        assert len(sample.context) == 300 and len(continuation.ids) == 51 and continuation.answers == [(1, 51)]
        assert continuation.task == "perplexity, boats"
        starts.append(SENTENCES.index(tokenizer.decode(sample.context + continuation.ids)))
    assert starts[0] == 0 and starts[1] > len(SENTENCES) / 3 and starts[2] > len(SENTENCES) - 2 * 351

    with pytest.raises(ValueError, match="boats has 40 tokens, fewer than the 351 of a context"):
        text_samples(tokenizer, "boats", SENTENCES[:40], 300, 50, 3)
    with pytest.raises(ValueError, match="must be at least 1, got 300, 0, 3"):
        text_samples(tokenizer, "boats", SENTENCES, 300, 0, 3)


def test_contexts_begin_as_the_tokenizer_begins_a_text():
    plain, tokenizer = text_tokenizer(), text_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_bos_token = True
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos
    for sample in text_samples(tokenizer, "boats", SENTENCES, 300, 50, 3) + fact_samples(
        tokenizer, SENTENCES, 1500, 1
    ):
        assert sample.context[0] == bos and bos not in sample.context[1:]
        assert all(bos not in continuation.ids for continuation in sample.continuations)
    lengths = [len(each.context) for each in text_samples(tokenizer, "boats", SENTENCES, 300, 50, 3)]
    assert lengths == [300] * 3
    assert all(bos not in each.context for each in text_samples(plain, "boats", SENTENCES, 300, 50, 3))


def test_facts_of_either_kind():
    samples = fact_samples(byte_tokenizer(), SENTENCES, 1500, 2)
    assert [{each.task for each in sample.continuations} for sample in samples] == [
        *([{"needle", "needles together"}] * 2),
        *([{"key"}] * 2),
    ]
    assert len({tuple(sample.context) for sample in samples}) == 4


# --- side by side ---


@pytest.fixture
def samples() -> list[Sample]:
    fact = Sample(random_tokens(30).tolist(), [Continuation("fact", [3, 4, 5, 6], [(2, 4)])])
    return [*text_samples(byte_tokenizer(), "boats", SENTENCES, 200, 40, 3), fact]


def test_rows_and_table(models, samples):
    subjects = [Subject("original", models["original"]), Subject("converted", models["converted"])]
    rows = evaluate(subjects, samples)["rows"]
    assert [(row["model"], row["task"]) for row in rows] == [
        (name, task) for name in ("original", "converted") for task in ("perplexity, boats", "fact")
    ]
    original, _, converted, fact = rows
    losses = {}
    for name, model in models.items():
        tokens = torch.tensor([sample.context + sample.continuations[0].ids for sample in samples[:3]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, 200:-1]
        answers = tokens[:, 201:]
        losses[name] = torch.nn.functional.cross_entropy(logits.mT, answers, reduction="none").mean(1)
    assert original["perplexity"] == pytest.approx(losses["original"].mean().exp().item(), rel=1e-4)
    assert converted["perplexity"] == pytest.approx(losses["converted"].mean().exp().item(), rel=1e-4)
    assert original["tokens"] == 3 * 40 and original["length"] == 241
    assert (original["share"], original["change"], original["standard_error"]) == (1, 0, 0)
    difference = losses["converted"] - losses["original"]
    assert converted["change"] == pytest.approx(difference.mean().expm1().item(), rel=1e-3)
    error = difference.std().item() / 3**0.5 * difference.mean().exp().item()
    assert converted["standard_error"] == pytest.approx(error, rel=1e-3) and error > 1e-4
    assert original["kv_bytes"] == 241 * 2 * 3 * 2 * 8 * 4
    assert converted["share"] == converted["kv_bytes"] / original["kv_bytes"] < 0.5
    assert fact["answers"] == 1 and "perplexity" not in fact and "change" not in fact

    head, _, first, second = table(rows).splitlines()
    assert head == "|  | KV bytes, 241 tokens | perplexity, boats | KV bytes, 34 tokens | fact |"
    assert first.startswith(
        f"| original | 92,544 (1.000) | {original['perplexity']:.2f} | 13,056 (1.000) | 0/1 (0%–79%), "
    )
    assert f"{converted['perplexity']:.2f} ({converted['change']:+.1%} ± {converted['standard_error']:.1%})" in second


def test_models_are_evaluated_as_they_decode(models, samples):
    """A model that is being trained drops and biases; what it remembers is measured without, and training goes on."""
    model = copy.deepcopy(models["converted"])
    expected = evaluate([Subject("converted", model)], samples)
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert evaluate([Subject("converted", model)], samples) == expected
    assert all(module.training for module in model.modules())


def test_an_interrupted_run_goes_on(models, samples, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    read = []

    def counted(memory, sample, stop_after=None):
        if len(read) == stop_after:
            raise KeyboardInterrupt
        read.append(sample)
        return score(memory, sample)

    def run(*subjects, stop_after=None, **options):
        read.clear()
        monkeypatch.setattr(report, "score", lambda *given: counted(*given, stop_after))
        return evaluate(list(subjects), samples, path, **options)

    original, converted = (Subject(name, model, "first") for name, model in models.items())
    with pytest.raises(KeyboardInterrupt):
        run(original, converted, stop_after=5)
    assert len(json.loads(path.read_text())["scores"]) == 5
    result = run(original, converted, about={"date": "today"})
    assert read == samples[1:]  # what the second model has not read
    assert json.loads(path.read_text()) == result and result["date"] == "today" and len(result["scores"]) == 8
    assert result["rows"] == evaluate([original, converted], samples)["rows"]

    assert run(original, converted)["rows"] == result["rows"] and not read
    run(original, converted._replace(identity="trained"))
    assert read == samples  # it is another model
    assert len(json.loads(path.read_text())["scores"]) == 12
    assert run(original, converted)["rows"] == result["rows"] and not read  # nor was anything lost by that
    assert {each.name for each in tmp_path.iterdir()} == {"results.json"}
    path.write_text('{"scores": [{"model": "original"}]}')
    with pytest.raises(ValueError, match="results.json is no file that an evaluation wrote.*choose another"):
        run(original, converted)


def test_scores_of_another_model_of_one_name_do_not_count(models, samples, tmp_path):
    """Nor those of the same numbers with other fields, or in another dtype."""
    original, converted = models.values()
    converted.save_pretrained(tmp_path / "converted")
    budget = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", mosa_cache_budget=3)
    for number, model in enumerate((original, converted, budget, copy.deepcopy(original).bfloat16()), 1):
        found = evaluate([Subject("model", model)], samples, tmp_path / "results.json")
        assert len(json.loads((tmp_path / "results.json").read_text())["scores"]) == number * len(samples)
        assert found["rows"] == evaluate([Subject("model", model)], samples)["rows"]
    assert found == evaluate([Subject("model", model)], samples, tmp_path / "results.json")


def test_what_cannot_be_evaluated(models):
    subject = Subject("original", models["original"])
    with pytest.raises(ValueError, match="Two models have one name"):
        evaluate([subject, subject], [following(random_tokens(50), 40, "perplexity, short")])
    with pytest.raises(ValueError, match="original reads at most 2048 tokens.*fewer than the 2051.*shorter context"):
        evaluate([subject], [following(random_tokens(2051), 2000, "perplexity, long")])
    pictures = tiny_multimodal("llava")
    most = pictures.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"llava reads at most {most} tokens.*fewer than the {most + 1}"):
        evaluate([Subject("llava", pictures)], [following(random_tokens(most + 1), most - 9, "perplexity, long")])


# --- the command ---


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """A model, conversions of it, routers with an adapter as healing writes them, and a text."""
    path = tmp_path_factory.mktemp("evaluate")
    for name, model in models.items():
        model.save_pretrained(path / name)
        byte_tokenizer().save_pretrained(path / name)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path / "converted"),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False),
    )
    (path / "healed").mkdir()
    adapted.save_pretrained(path / "healed")
    write_routers(adapted, path / "healed", str(path / "converted"))
    save_routers(models["converted"], path / "routers")
    (path / "boats.txt").write_text(SENTENCES, encoding="utf-8")
    return path


def evaluated(folders, capsys, *arguments) -> list[dict]:
    """The rows of the command's file, which its table shows."""
    output = folders / "results.json"
    sizes = ["--context", 1500, "--scored", 100, "--slices", 2]
    command.main([str(each) for each in (*arguments, "--text", folders / "boats.txt", *sizes, "--output", output)])
    content = json.loads(output.read_text())
    assert table(content["rows"]) == capsys.readouterr().out.strip()
    assert content["settings"]["model"] == str(arguments[0]) and content["settings"]["context"] == 1500
    assert content["versions"]["mosa_hf"] and content["date"] and content["machine"]
    output.unlink()
    return content["rows"]


@QUIET
def test_command(folders, capsys):
    rows = evaluated(folders, capsys, folders / "converted", "--facts", 1)
    names = ["its weights, dense", "converted"]
    tasks = ["perplexity, boats.txt", "needle", "needles together", "key"]
    assert [(row["model"], row["task"]) for row in rows] == [(name, task) for name in names for task in tasks]
    assert all(row["share"] < 0.5 for row in rows[4:]) and rows[4]["change"] != 0
    assert [row["answers"] for row in rows[1:4]] == [8, 6, 8]

    given = evaluated(folders, capsys, folders / "converted", "--original", folders / "original")
    plain = evaluated(folders, capsys, folders / "original")
    routers = evaluated(folders, capsys, folders / "original", "--routers", folders / "routers")
    assert [row["model"] for row in given + plain + routers] == [
        *("original", "converted", "original", "original", "routers")
    ]
    for row, expected in ((given[0], rows[0]), (plain[0], rows[0]), (routers[0], rows[0]), (routers[1], rows[4])):
        assert row | {"model": ""} == pytest.approx(expected | {"model": ""})
    assert given[1] == rows[4]


def test_command_reads_rows(folders, capsys):
    """As it reads a file of text."""
    (folders / "boats.jsonl").write_text(json.dumps({"text": SENTENCES}) + "\n")
    sizes = ["--context", "200", "--scored", "20", "--slices", "2"]
    text = ["--text", str(folders / "boats.txt"), str(folders / "boats.jsonl")]
    command.main([str(folders / "original"), *text, *sizes, "--output", str(folders / "rows.json")])
    rows = json.loads((folders / "rows.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["perplexity, boats.txt", "perplexity, boats.jsonl"]
    assert rows[0]["perplexity"] == rows[1]["perplexity"]


def test_command_writes_the_model_card(folders, capsys):
    """What was measured is in the card in place of "not measured", and the files of the model are as they were."""
    before, card = (folders / "routers" / "README.md").read_text(), folders / "routers" / "README.md"
    sizes = ["--context", "200", "--scored", "20", "--slices", "1"]
    text = ["--text", str(folders / "boats.txt")]
    original = AutoModelForCausalLM.from_pretrained(folders / "original")
    known = identity([str(folders / "routers")], original)
    command.main([str(folders / "original"), "--routers", str(folders / "routers"), *text, *sizes, "--card"])
    shown, after = capsys.readouterr().out.partition("Wrote it into")[0].strip(), card.read_text()
    assert shown in after and "Not measured here" in before and "Not measured here" not in after
    assert "1 slices of each text, 20 tokens scored after 200" in after
    assert [part for part in before.split("## ") if part not in after.split("## ")] == [
        next(part for part in before.split("## ") if part.startswith("What it loses"))
    ]
    assert identity([str(folders / "routers")], original) == known
    with pytest.raises(SystemExit, match="mosa-evaluate: .*README.md"):
        command.main([str(folders / "original"), *text, *sizes, "--card"])


def test_command_on_what_healing_writes(folders, capsys):
    """A folder of routers and an adapter, on its base or by itself: the original has no adapter."""
    on_base = evaluated(folders, capsys, folders / "original", "--routers", folders / "healed")
    alone = evaluated(folders, capsys, folders / "healed")
    plain = evaluated(folders, capsys, folders / "converted")
    for rows in (on_base, alone):
        assert rows[0]["perplexity"] == pytest.approx(plain[0]["perplexity"])
        assert rows[1]["perplexity"] == pytest.approx(on_base[1]["perplexity"])
        assert abs(rows[1]["perplexity"] / plain[1]["perplexity"] - 1) > 1e-3  # the adapter counts
        assert rows[1]["share"] < 0.5


def test_a_trace_of_what_healing_writes(folders, tmp_path, monkeypatch):
    """The same folders, read alike: the adapter counts."""
    monkeypatch.chdir(folders)
    kinds = {"on base": ["original", "--routers", "healed"], "alone": ["healed"], "plain": ["converted"]}
    pages = {}
    for name, arguments in kinds.items():
        trace.main([*arguments, "--text", "boats.txt", "--tokens", "200", "--html", str(tmp_path / "page.html")])
        pages[name] = re.sub(r'"name":"[^"]*"', "", (tmp_path / "page.html").read_text())
        (tmp_path / "page.html").unlink()
    assert pages["on base"] == pages["alone"] != pages["plain"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["converted", "--context", "3000"], "reads at most 2048 tokens"),
        (["converted", "--scored", "0"], "must be at least 1"),
        (["no/such/folder"], "no/such/folder"),
        (["original", "--routers", "no/such/folder"], "no/such/folder"),
        (["routers"], r"routers has routers \(mosa_config.json\), without the model.*`--routers`"),
        (["converted", "--original", "routers"], "routers has routers"),
        (["converted", "--original", "healed"], r"healed has an adapter \(adapter_config.json\), without the model"),
    ],
)
def test_command_names_what_is_wrong(arguments, message, folders, monkeypatch):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit, match=f"^mosa-evaluate: .*({message})"):
        command.main([*arguments, "--text", "boats.txt"])


def test_a_changed_folder_is_another_model(tmp_path):
    model = tiny_base()
    (tmp_path / "config.json").write_text("{}")
    before = identity([str(tmp_path)], model)
    assert identity([str(tmp_path)], model) == before != identity(["someone/model"], model)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert identity([str(tmp_path)], model) != before


def test_so_is_another_commit_dtype_or_version(monkeypatch):
    model, names = tiny_base(), ["someone/routers", "someone/model"]
    known = [identity(names, model), identity(names, model, "routers")]
    model.config._commit_hash = "model"
    known += [identity(names, model), identity(names, model.bfloat16()), identity(names, model.to("meta"))]
    monkeypatch.setattr(torch, "__version__", "0.1")
    known.append(identity(names, model))
    assert len(set(known)) == 6


def test_routers_on_the_hub_are_of_a_commit(tmp_path, monkeypatch):
    path = "models--someone--routers/snapshots/0123456789abcdef0123456789abcdef01234567/mosa_config.json"
    monkeypatch.setattr(run_evaluate, "cached_file", lambda name, file, token: str(tmp_path / path))
    found = [run_evaluate.routers_commit(Namespace(routers=x, token=None)) for x in ("a/b", str(tmp_path), None)]
    assert found == ["0123456789abcdef0123456789abcdef01234567", None, None]


def test_the_command_measures_again_what_computes_otherwise(folders, capsys, monkeypatch):
    """The same command reuses all; one of another dtype gives what it gives without the file of the first one."""
    common = [str(folders / "converted"), "--text", str(folders / "boats.txt"), "--context", "200", "--scored", "20"]

    def run(dtype: str, name: str) -> list[dict]:
        command.main([*common, "--slices", "2", "--dtype", dtype, "--output", str(folders / name)])
        return json.loads((folders / name).read_text())["rows"]

    full, half = run("float32", "dtypes.json"), run("bfloat16", "dtypes.json")
    assert half == run("bfloat16", "alone.json") and half[0]["kv_bytes"] * 2 == full[0]["kv_bytes"]

    def refuse(*given):
        raise AssertionError("measured again")

    monkeypatch.setattr(report, "score", refuse)
    assert run("bfloat16", "dtypes.json") == half
    capsys.readouterr()


def test_a_file_of_other_models_is_refused(folders, monkeypatch):
    """Before anything is read; of the same ones, with other settings, it is written."""
    monkeypatch.chdir(folders)
    text = ["--text", "boats.txt", "--context", "100", "--scored", "10", "--output", "of_one.json"]
    command.main(["original", "--slices", "1", *text])
    before = Path("of_one.json").read_text()
    text[1] = "nothing.txt"
    for arguments, names in (
        (["converted"], "`model`"),
        (["original", "--routers", "routers"], "`--routers`"),
        (["converted", "--original", "original"], "`model`, `--original`"),
    ):
        with pytest.raises(SystemExit, match=f"^mosa-evaluate: of_one.json .* with another {names}: .*`--output`, or"):
            command.main([*arguments, *text])
    assert Path("of_one.json").read_text() == before
    Path("python.json").write_text(json.dumps({"rows": [], "scores": []}))  # by `evaluate`, of models that it names
    with pytest.raises(SystemExit, match="python.json .* with another `model`:"):
        command.main(["original", *text[:-1], "python.json"])
    command.main(["original", "--slices", "2", *text, "--text", "boats.txt"])
    assert len(json.loads(Path("of_one.json").read_text())["scores"]) == 2
    Path("of_one.json").unlink()


def test_an_interrupted_command_says_what_is_kept(folders, capsys, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    arguments = [str(folders / "original"), "--text", str(folders / "boats.txt"), "--context", "100", "--scored", "10"]
    for keeps in (False, True):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(report, "score", stop)
            command.main([*arguments, "--output", str(folders / "stopped.json")])
        assert caught.value.code == 130
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("Stopped.") and said.endswith("the same command goes on from it.") == keeps
        if not keeps:
            command.main([*arguments, "--slices", "1", "--output", str(folders / "stopped.json")])
            capsys.readouterr()
