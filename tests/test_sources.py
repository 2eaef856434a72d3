"""`testing`: the texts and the model that benchmarks and tests read: fetched once, whole or not at all."""

import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from testing import corpora, packages, pretrained
from testing.packages import SourceUnavailable


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_python_topics_are_in_the_order_of_their_keys():
    text = corpora.text("python_topics")
    first, last = min(topics), max(topics)
    assert text.startswith(topics[first].strip())
    assert text.endswith(topics[last].strip())
    assert len(text) > 100_000


def test_an_unknown_text_names_those_that_exist():
    with pytest.raises(ValueError, match="shakespeare"):
        corpora.text("hamlet")


@pytest.mark.parametrize(
    "name", ["documentation", "code", "data", "shakespeare", "encyclopaedia", "python_docs", "debian_handbook"]
)
def test_a_tool_that_fails_is_reported_with_its_own_words(name, empty_cache, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="W: retrying\nE: no route to host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SourceUnavailable, match="failed: E: no route to host$"):
        corpora.text(name)
    assert not files(empty_cache)


def test_a_missing_tool_is_named(empty_cache, monkeypatch):
    def no_such_tool(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_such_tool)
    with pytest.raises(SourceUnavailable, match="apt-get is not installed"):
        corpora.text("debian_handbook")


def test_unknown_debian_package_is_looked_up_in_fresh_lists(empty_cache, monkeypatch):
    calls = []

    def without_lists(command, cwd, **options):
        calls.append(command)
        if command == ("apt-get", "download", "python3.11-doc"):
            raise subprocess.CalledProcessError(100, command, stderr="Unable to locate package")
        if "download" in command:
            (cwd / "python3.11-doc.deb").touch()
        if command[0] == "dpkg-deb":
            pages = cwd / "unpacked/usr/share/doc/python3.11/html/_sources/library"
            pages.mkdir(parents=True)
            (pages / "heapq.rst.txt").write_text("Heap queue\n", encoding="utf-8")
            (pages / "bisect.rst.txt").write_text("Bisection\n", encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", without_lists)
    assert corpora.text("python_docs") == "Bisection\n\n\nHeap queue"
    assert [command[0] for command in calls] == ["apt-get"] * 3 + ["dpkg-deb"]
    assert "update" in calls[1]


def test_cached_is_built_once(empty_cache):
    def build(scratch):
        (scratch / "made").write_text("whole", encoding="utf-8")
        return scratch / "made"

    assert packages.cached("thing", build).read_text(encoding="utf-8") == "whole"
    assert packages.cached("thing", None) == empty_cache / "thing"
    assert files(empty_cache) == [empty_cache / "thing"]


def test_an_interrupted_build_leaves_nothing(empty_cache):
    def build(scratch):
        (scratch / "made").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.cached("thing", build)
    assert list(empty_cache.iterdir()) == []


def test_a_folder_that_another_process_finished_first_is_kept(empty_cache):
    def build(scratch):
        for folder in (scratch / "made", empty_cache / "thing"):
            folder.mkdir()
            (folder / "owner").write_text(folder.name, encoding="utf-8")
        return scratch / "made"

    assert (packages.cached("thing", build) / "owner").read_text(encoding="utf-8") == "thing"
    assert list(empty_cache.iterdir()) == [empty_cache / "thing"]


def test_handbook_page_keeps_prose_and_listings_only():
    page = corpora._HandbookPage()
    page.feed(
        '<html><head><title>APT</title><link rel="next" href="b.html" /></head><body>'
        '<ul class="docnav"><li><a href="a.html">Prev</a></li></ul>'
        '<h2 class="title"><a id="x"></a>6.3. The <code>apt-cache</code>\n Command</h2>'
        '<div class="para">See <em>this</em>: <div class="url">→ <a href="#">address</a></div></div>'
        "<pre>$ <strong>ls</strong>\n  a &amp; b\n</pre></body></html>"
    )
    assert page.blocks == ["6.3. The apt-cache Command", "See this:", "$ ls\n  a & b"]
    assert page.next_page == "b.html"


# What each text must contain to be the text we mean, and what would betray leftovers of its format.
CORPORA = {
    "documentation": (800_000, [":tocdepth: 2", ".. confval:: html_short_title"], ["\r"]),
    "code": (3_000_000, ["class DiGraph(Graph):"], ["\r"]),
    "data": (800_000, ["iata,name,city,state", '"Miles_per_Gallon":13'], ["\r"]),
    "shakespeare": (6_000_000, ["To be, or not to be", "Of Mans First Disobedience"], ["Gutenberg", "\r", "\ufeff"]),
    "encyclopaedia": (70_000, ["baptized in the parish church of Stratford"], ["###", "[[", "[^", "||", "p.772"]),
    "python_docs": (10_000_000, ["This module provides an implementation of the heap queue algorithm"], ["\r"]),
    "debian_handbook": (1_000_000, ["VOCABULARY Cache", "Chapter 16. Conclusion"], ["Download the ebook", "\nNext\n"]),
}


@pytest.mark.real
@pytest.mark.parametrize("name", CORPORA)
def test_fetched_text_is_clean(name):
    try:
        text = corpora.text(name)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    least, passages, leftovers = CORPORA[name]
    assert len(text) > least
    assert [passage for passage in passages if passage not in text] == []
    assert [leftover for leftover in leftovers if leftover in text] == []


@pytest.mark.real
def test_smollm2_is_an_ordinary_checkpoint():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        directory = pretrained.smollm2_directory()
    except SourceUnavailable as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continuation = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(continuation[0, -1]) == " Paris"
