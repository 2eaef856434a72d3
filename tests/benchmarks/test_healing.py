"""The benchmark of healing: what it learns from, what it scores, and that it goes on."""

import argparse
import json
import random
import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.frontier import tasks
from benchmarks.frontier.tasks import Size, word_runs
from benchmarks.healing import __main__ as command
from benchmarks.healing import mixed_text, paper_form
from benchmarks.healing import recipe as healed
from mosa_hf import ConversionConfig
from testing import corpora, pretrained
from testing.markdown import unwrapped
from testing.passages import Passage
from testing.tiny import byte_tokenizer, tiny_base

pytestmark = pytest.mark.slow  # models are healed and scored

SIZE = Size(
    prompt=150, scored=50, texts=("debian_handbook", "python_docs"), passages=1, windows=2, window=60, characters=None
)
RECIPE = healed.Recipe(window=5, sparsity=4, steps=4, tokens=32, save_steps=2, scored=(2,), elsewhere=(("9/4", 0.5),))
ORIGIN = {
    "command": "python -m benchmarks.healing run",
    "date": "2026-01-01",
    "machine": "one",
    "versions": {"torch": "2"},
}


def text_of(name: str) -> str:
    chance = random.Random(name)
    if name == "shakespeare":  # as the documentation does with itself, it repeats a passage of another text
        return "\n\n".join((text_of("python_docs")[1500:3500], *(text_of(f"part {i}") for i in range(2))))
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(60)]
    return "\n\n".join(" ".join(chance.choices(words, k=20)) for _ in range(60))


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(healed, "PIECE", 300)
    monkeypatch.setattr(corpora, "text", text_of)
    monkeypatch.setattr(tasks, "passages", lambda name: [Passage(name, text_of(name)[2000:3000])])
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda: tmp_path / "base")
    tiny_base().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "work"


def run(work, recipe=RECIPE, **options):
    command.run(
        argparse.Namespace(work=work, windows=None, **{"score": False, **options}), recipe, SIZE, work.parent, ORIGIN
    )
    return [json.loads(line) for line in (work.parent / "heal.jsonl").read_text().splitlines()]


def test_it_heals_scores_and_goes_on(work):
    rows = run(work)
    scored = {
        (row["method"], row["parameters"].get("window"), row["parameters"].get("tokens")): row["perplexity"]
        for row in rows
        if row["task"] == "perplexity, python_docs"
    }
    assert scored.keys() == {
        *(("original", None, None), ("converted", 5, 0), ("healed", 5, 128), ("healed", 5, 256)),
        *(("converted", 9, 0), ("healed", 9, 256)),
    }
    assert len(set(scored.values())) == 6 and len([row for row in rows if row["method"] == "healing"]) == 4
    assert all(row["share"] < 0.8 for row in rows if row["method"] in ("converted", "healed"))
    assert (work / "healed-4" / "adapter_model.safetensors").exists()
    assert run(work) == rows  # all of it is there

    longer = run(work, replace(RECIPE, steps=8))  # the first of these steps still has the rate of the last one
    assert longer[: len(rows)] == rows
    assert {row["parameters"]["tokens"] for row in longer[len(rows) :]} == {320, 384, 448, 512}
    page = unwrapped((work.parent / "heal.md").read_text())
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 10 and table[2].startswith("| original |  | 1.000 |")
    assert f"| {scored['healed', 5, 256]:.3f} |" in table[5] and table[5].startswith("| window 5, sparsity 4 | 256 |")
    assert "After 320 tokens the learning rate" in page and page.count("tokens the learning rate") == 1
    assert (work.parent / "heal.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns_from_nothing_that_is_scored(work, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "heal", lambda *args: None)
    monkeypatch.setattr(command, "measure_here", lambda methods, suites, *args: asked.extend(suites))
    run(work)
    learned = (work / "text.txt").read_text()
    held = [sample.context + sample.continuations[0].ids for each in asked for sample in each.samples]
    assert len(held) == 2
    for passage in map(byte_tokenizer().decode, held):
        assert word_runs(passage).isdisjoint(word_runs(learned))
    whole = sum(len(text_of(name)) for name in healed.TEXTS)
    assert 0.5 * whole < len(learned) < whole
    assert text_of("encyclopaedia")[:200] in learned and text_of("debian_handbook")[:200] not in learned


def test_the_mixed_text_asks_for_what_is_long_past_and_has_nothing_that_is_scored(tmp_path, monkeypatch):
    texts = {name: "\n\n".join(text_of(f"{name} {i}") for i in range(3)) for name in (*mixed_text.TEXTS, "data")}
    own = {name: [Passage(name, text[1000:3000])] for name, text in texts.items()}
    monkeypatch.setattr(corpora, "text", texts.__getitem__)
    monkeypatch.setattr(mixed_text, "passages", own.__getitem__)
    monkeypatch.setattr(mixed_text, "NAMES", dict.fromkeys(own))
    monkeypatch.setattr(mixed_text, "CHARACTERS", 4000)
    mixed_text.main([str(tmp_path / "text.jsonl"), "--rows", "8"])
    rows = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows == list(mixed_text.rows(8))
    generated, real = rows[::2], rows[1::2]
    held = set().union(*(word_runs(passage.content) for [passage] in own.values()))
    assert held.isdisjoint(set().union(*map(word_runs, rows))) and all(held)
    for name in mixed_text.TEXTS:
        pieces = texts[name].split("\n\n")
        assert sum(piece in text for piece in pieces for text in real) > 20
    for text in generated:
        lines = text.splitlines()
        names = [re.findall(r"[a-z]+_[0-9]+", line) for line in lines]
        first = {}
        asked = [(first.setdefault(name, i), i) for i, found in enumerate(names) for name in found]
        asked = [(fact, question) for fact, question in asked if fact < question]
        assert asked and all(question - fact >= mixed_text.FACTS_BETWEEN for fact, question in asked)
        for fact, question in asked:  # the last word of the value is in the question or the answer below it
            assert lines[fact].rstrip(".").split()[-1] in "".join(lines[question : question + 2])


def test_scoring_alone_heals_nothing(work, monkeypatch):
    monkeypatch.setattr(command, "heal", lambda *args: pytest.fail("it healed"))
    rows = run(work, score=True)
    assert {row["method"] for row in rows} == {"original", "converted"}
    assert AutoModelForCausalLM.from_pretrained(work / "converted").config.mosa_window == 5


def test_processes_that_a_step_cannot_be_shared_among(work, monkeypatch):
    for module in (command, healed):
        monkeypatch.setattr(module, "PartialState", lambda **kwargs: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="3 processes cannot share 2 examples"):
        run(work)
    assert not work.exists()


def test_the_papers_heads_beside_sparse_groups(work, capsys):
    """Each model is scored before training and after; with more steps it goes on; times are of what is there."""
    recipe = paper_form.Recipe(
        (2,),
        ConversionConfig(window=0, sparsity=4),
        ConversionConfig(window=5, sparsity=4),
        steps=2,  # the first has a learning rate of 0
        scored=(0, 2),
        tokens=32,
        rounds=1,
        decoded=2,
    )

    def rows(recipe, is_timed=False):
        paper_form.run(work, recipe, SIZE, work.parent, ORIGIN, is_timed)
        return [json.loads(line) for line in (work.parent / "paper_form.jsonl").read_text().splitlines()]

    first = rows(recipe)
    cells = {(row["method"], row["parameters"].get("tokens")): row for row in first}
    assert cells.keys() == {(paper_form.ORIGINAL, None), *product((paper_form.PAPER, paper_form.SPARSE), (0, 64))}
    assert len({row["losses"][0] for row in first}) == len(first)  # what was trained is not what it was
    assert cells[paper_form.ORIGINAL, None]["share"] == 1
    assert all(row["share"] < 1 for row in first if row["method"] != paper_form.ORIGINAL)

    longer = rows(replace(recipe, steps=3))
    assert longer[: len(first)] == first
    assert {row["parameters"]["tokens"] for row in longer[len(first) :]} == {96}
    assert len(longer) == len(first) + 2 * len(SIZE.texts)

    timed = rows(recipe, is_timed=True)[len(longer) :]
    assert [row["task"] for row in timed] == [each for each in paper_form.TIMES.values() for _ in range(2)]
    page = unwrapped((work.parent / "paper_form.md").read_text())
    sparse = [row for row in first if row["method"] == paper_form.SPARSE and row["parameters"]["tokens"] == 64]
    assert f"| 2 | sparse groups | 64 | {sum(row['share'] for row in sparse) / len(sparse):.3f} |" in page
    assert f"{timed[0]['ratio']:.2f}" in page.splitlines()[-1]


def test_both_forms_swap_the_same_groups(work):
    recipe = paper_form.Recipe((3,), ConversionConfig(window=0, sparsity=4), ConversionConfig(window=5, sparsity=4))
    models = paper_form.Models(work, recipe, SIZE)
    own = [models.converted(form, 3) for form in (paper_form.PAPER, paper_form.SPARSE)]
    first, second = (each.config.mosa_conversion["groups"] for each in own)
    assert len(first) == 3 and first == second
