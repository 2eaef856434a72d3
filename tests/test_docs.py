"""The pages of docs: their examples run, and what they quote of results is what the results say."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FRONTIER = RESULTS / "frontier.md"
FENCE = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    line: int
    mark: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text.count("\n", 0, found.start("code")), found["mark"].strip(), found["code"])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in sorted(DOCS.glob("*.md")) for block in blocks_of(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_example_runs(block, tmp_path, monkeypatch):
    """As a script of its own would, in an empty folder."""
    if block.mark != "runnable":
        pytest.skip(f"{block.page}:{block.line} is not marked runnable")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile("\n" * block.line + block.code, str(DOCS / block.page), "exec"), {"__name__": "__main__"})


PAGES = ["routing.md", "choosing.md", "evaluating.md", "benchmarks.md", "limits.md", "evidence.md"]


@pytest.mark.parametrize("page", PAGES)
def test_page_has_an_example(page):
    assert any(block.page == page and block.mark == "runnable" for block in BLOCKS)


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(RESULTS.glob("*.md"))]
)
def test_tables_are_whole(page):
    """Every row of a table has as many cells as its head."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for is_table, rows in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        if is_table:
            assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1


def test_leak_figures_are_those_of_the_result():
    result, page = (path.read_text(encoding="utf-8") for path in (RESULTS / "leak.md", DOCS / "routing.md"))
    table = [line for line in result.splitlines() if line.startswith("|")]
    assert len(table) == 5  # head, rule, three cases
    assert "\n".join(table) in page
    figures = r"[+-]\d\.\d+ ± \d\.\d+"
    assert re.findall(figures, page) == re.findall(figures, result)  # and there are no others
    assert "python -m benchmarks.leak" in result and "python -m benchmarks.leak" in page


def test_the_readme_quotes_the_frontier():
    """Its first table has rows of the result, the original's among them, in their order."""
    result, page = (path.read_text(encoding="utf-8").splitlines() for path in (FRONTIER, DOCS.parent / "README.md"))
    start = next(i for i, line in enumerate(page) if line.startswith("|"))
    quoted = list(itertools.takewhile(lambda line: line.startswith("|"), page[start:]))
    rows = iter(line for line in result if line.startswith("|"))
    assert all(line in rows for line in quoted)  # consumes `rows`
    assert len(quoted) > 10 and quoted[2].startswith("| original | 1.000 |")


def test_the_evidence_is_that_of_the_result():
    result, page = (path.read_text(encoding="utf-8") for path in (RESULTS / "pretrain.md", DOCS / "evidence.md"))
    headline = re.search(r"^## Headline\n(.*?)^## ", result, re.MULTILINE | re.DOTALL)[1]
    sentences = re.findall(r"^\d\. .*$", headline, re.MULTILINE)
    table = "\n".join(line for line in headline.splitlines() if line.startswith("|"))
    assert len(sentences) == 3 and len(table.splitlines()) > 5
    assert "\n".join(sentences) in page and table in page
    for line in re.findall(r"^(?:Of the numbers tried|None of the numbers|What choosing).*$", result, re.MULTILINE):
        assert line in page
    interval = r"[+-]?\d\.\d{4}(?: ± \d\.\d{4})?"
    assert set(re.findall(interval, page)) <= set(re.findall(interval, result))  # and there are no others


def test_benchmarks_page_names_every_command_and_result():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.md"):
        assert f"`{path.name}`" in page
    for path in RESULTS.parent.glob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "demo":  # `make demo`
            assert f"python -m benchmarks.{path.stem}" in page
