"""The pages of docs: their examples run, and what they quote of results is what the results say."""

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import mosa_hf
from benchmarks.frontier import scoreboard
from benchmarks.frontier.any_model import RIVALS
from benchmarks.pretrain.page import Measured
from benchmarks.pretrain.rows import read_rows
from benchmarks.pretrain.runs import PRESETS, Run
from testing.markdown import too_wide, unwrapped, wrapped
from testing.tiny import tiny_base

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


PAGES = ["routing.md", "choosing.md", "evaluating.md", "benchmarks.md", "limits.md", "evidence.md", "using.md"]


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


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.parent.glob("*.md")), *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_lines_fit_a_page(page):
    """`python -m testing.markdown` wraps what does not; a table that is wider becomes a list."""
    assert too_wide(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.md")), ids=lambda page: page.name)
def test_prose_of_results_fits_a_page(page):
    """Their tables are as wide as what was measured."""
    wide = too_wide(page.read_text(encoding="utf-8"))
    assert [line for line in wide if not line.startswith("|")] == []


def test_wide_lines_are_found_and_wrapped():
    word = "word " * 40
    code = f"`python {'-m module ' * 20}`"
    page = f"# Title\n\n{word}\n\n- item {word}\n- {code}\n\n```\n{word}\n```\n| {word} |\n"
    assert len(too_wide(page)) == 3  # the paragraph, the item, the row
    again = wrapped(page)
    assert too_wide(again) == [f"| {word} |"]
    assert wrapped(again) == again and " ".join(again.split()) == " ".join(page.split())
    assert unwrapped(again).splitlines()[4] == f"- item {word.strip()}"
    assert all(line[:2] in ("  ", "- ") for line in again.splitlines()[5:7])
    assert wrapped("x" * 118 + " 1. y") == "x" * 118 + " 1.\ny"  # which would begin a list


# Where the repository's files are for who reads the README elsewhere, as `pyproject.toml` says.
HERE = re.compile(r"https://(?:github\.com/mosa-hf/mosa_hf/blob|raw\.githubusercontent\.com/mosa-hf/mosa_hf)/main/")
FILE = re.compile(r"\b(?:benchmarks|conversion_scripts|docs|mosa_hf|testing|tests)/[\w./-]+\.(?:py|md|png)\b")


def test_files_that_pages_name_are_there():
    root = DOCS.parent
    named = [
        (page.name, name)
        for page in (*root.glob("*.md"), *DOCS.glob("*.md"), *RESULTS.glob("*.md"))
        for name in FILE.findall(HERE.sub("", page.read_text(encoding="utf-8")))
    ]
    assert len(named) > 20 and [each for each in named if not (root / each[1]).exists()] == []


def test_links_of_pages_lead_somewhere():
    """`make docs` asks that of the site's own, with the places in them; this asks it of all, within a second."""
    for page in (*DOCS.parent.glob("*.md"), *DOCS.glob("*.md")):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            assert "://" in link or (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_the_readmes_links_work_elsewhere():
    """PyPI shows the page too: every link is absolute, and those into the repository lead to files that are there."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    links = re.findall(r"\]\(([^)\s]+)\)", (DOCS.parent / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and all(link.startswith("https://") for link in links)
    own = [link for link in links if "mosa-hf/mosa_hf" in link]
    assert len(own) > 10 and project["urls"]["Source"] == "https://github.com/mosa-hf/mosa_hf"
    for link in own:
        assert HERE.match(link) and (DOCS.parent / HERE.sub("", link).partition("#")[0]).is_file(), link


def test_leak_figures_are_those_of_the_result():
    result, page = (path.read_text(encoding="utf-8") for path in (RESULTS / "leak.md", DOCS / "routing.md"))
    table = [line for line in result.splitlines() if line.startswith("|")]
    assert len(table) == 5  # head, rule, three cases
    assert "\n".join(table) in page
    figures = r"[+-]\d\.\d+ ± \d\.\d+"
    assert re.findall(figures, page) == re.findall(figures, result)  # and there are no others
    assert "python -m benchmarks.leak" in result and "python -m benchmarks.leak" in page


def test_the_pages_quote_the_frontier():
    """The README's table has columns of the result as rows; it and the page about choices say some of them again."""
    readme, choosing = (path.read_text(encoding="utf-8") for path in (DOCS.parent / "README.md", DOCS / "choosing.md"))
    page = (RESULTS / "frontier-Qwen2.5-Coder-0.5B-Instruct-bfloat16.md").read_text(encoding="utf-8")
    (head, _, *rows), (own_head, _, *own_rows) = (table_with(text, "niah_single_1") for text in (page, readme))
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    shown = [by_name[name] for name in own_head[1:]]
    assert len(own_rows) == 8 and len(shown) == 4
    assert own_rows == [[name, *(each[name] for each in shown)] for name, *_ in own_rows]
    original, ours, *_ = shown
    # The README and the page say what others answer about two of the contexts, and what the defaults do there.
    lines = [*scoreboard.lines(RESULTS / "frontier-Qwen2.5-Coder-0.5B-Instruct-bfloat16.jsonl").values()]
    lines = scoreboard.latest([line for line in lines if line["base"] == lines[-1]["base"]])
    those = scoreboard.cells([line for line in lines if line["index"] < 2], 4096)
    for task, called in (("niah_single_1", "Lone needles:"), ("niah_multikey_3", "Random strings:")):
        said = unwrapped(readme)[unwrapped(readme).index(called) :].partition(".")[0]
        found = {name: "{right}/{answers}".format(**row[task]) for name, row in those.items()}
        assert set(RIVALS) & found.keys() == set(RIVALS) - {"StreamingLLM"}
        assert all(f"{name} {found[name]}" in said for name in RIVALS if name in found)
        default = found["default, window 512, sparsity 8"]
        assert f"the defaults {default}" in said and f"({found['KVzip']} for {default}" in unwrapped(choosing)
    for task in ("niah_single_1", "niah_multikey_3"):
        (found, asked), (kept, _) = (each[task].partition(" ")[0].split("/") for each in (original, ours))
        assert f"{kept} of {asked} for {found}" in unwrapped(readme) or f"({kept} for {found})" in unwrapped(readme)
    for task in ("niah_single_1", "niah_multikey_2", "niah_multikey_3"):
        found, kept = (each[task].partition(" ")[0] for each in (original, ours))
        said = unwrapped(choosing)[unwrapped(choosing).index(task) :]
        assert re.search(r"\((?:[^()]* )?(\d+/\d+) for [^()]*?(\d+/\d+)\)", said).groups() == (kept, found)
    assert f"{ours['KV bytes']} of the bytes" in paragraph(choosing, "niah_single_1")


def test_choosing_quotes_what_healing_brings_back_of_retrieval():
    page = (RESULTS / "frontier-Qwen2.5-Coder-0.5B-Instruct.md").read_text(encoding="utf-8")
    head, _, *rows = table_with(page, "niah_single_1")
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    names = ("ours, converted", "healed, healed-65k", "healed, healed-131k", "original")
    *healed, original = (by_name[name] for name in names)
    said = paragraph(unwrapped((DOCS / "choosing.md").read_text(encoding="utf-8")), "benchmarks.healing.mixed_text")
    assert f"({healed[0]['KV bytes']} of the bytes there)" in said
    for task in ("niah_multikey_2", "niah_single_1", "niah_multikey_3"):
        first, second, third, whole = (each[task].partition(" ")[0] for each in (*healed, original))
        assert re.search(rf"{first}, {second} and {third} of (the original's )?{whole}", said)
    for text in ("documentation", "code", "data", "shakespeare"):
        changes = [re.search(r"\(([+-]\d+\.\d)%", each[text]).group(1).removeprefix("+") for each in healed]
        assert "{}, {} and {} %".format(*changes) in said.replace(" above the original's", "")


def table_with(page: str, column: str) -> list[list[str]]:
    """Head, rule and rows of the first table that has a column."""
    lines = next(part for part in page.split("\n\n") if part.startswith("|") and column in part).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_evidence_is_that_of_the_result():
    paths = RESULTS / "pretrain.md", DOCS / "evidence.md"
    result, page = (unwrapped(path.read_text(encoding="utf-8")) for path in paths)
    headline = re.search(r"^## Headline\n(.*?)^## ", result, re.MULTILINE | re.DOTALL)[1]
    own, quoted = (columns_of(text) for text in (headline, page))
    assert len(quoted) > 5 and len(quoted["model"]) == 6
    assert all(own[name] == cells for name, cells in quoted.items())
    answers = [re.findall(r"^\d\. .*$", text, re.MULTILINE) for text in (headline, page)]
    own, quoted = (re.findall(FIGURE, "\n".join(sentences)) for sentences in answers)
    assert len(answers[0]) == 3 and len(own) > 3 and quoted == own
    for line in re.findall(r"^What choosing.*$", result, re.MULTILINE):
        assert all(figure in page for figure in re.findall(FIGURE, line))
    found = set(re.findall(FIGURE, page))
    assert found <= set(re.findall(FIGURE, result)) | set(evidence()), "no others"


def columns_of(page: str) -> dict[str, list[str]]:
    """Of the first table of a page: head → the cells below it."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), page.splitlines())
    rows = [line[1:-1].split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {head.strip(): [cell.strip() for cell in cells] for head, *cells in zip(*rows, strict=True)}


FIGURE = r"[+-]?\d\.\d{4}(?: ± \d\.\d{4})?"


def evidence() -> list[str]:
    """The figures of docs/evidence.md that are in no page of results, from the rows of `pretrain.jsonl`."""
    measured = Measured(list(read_rows(RESULTS / "pretrain.jsonl").values()))
    change = dataclasses.replace
    dense, base = Run(kind="dense"), Run(kind="mosa", dense_heads=4)
    mosa, few = base.matched(dense), change(dense, dense_heads=4)
    wide, sparse = few.matched(dense, "intermediate_size"), change(base, sparsity=32.0).matched(dense)
    long = [change(run, steps=1800) for run in (dense, mosa, change(mosa, routing="threshold"))]

    def loss(run: Run) -> float:
        return measured.of(run)[0]["loss"]["held out"]["exact"]

    def by_threshold(runs: list[Run]) -> list[Run]:
        return [change(run, routing="threshold") for run in runs]

    def one_seed(run: Run, reference: Run = dense, seed: int = 0) -> str:
        own, other = (measured.of(each)[seed]["loss"]["held out"]["exact"] for each in (run, reference))
        return f"{own - other:+.4f}"

    def one_seed_each(runs: list[Run]) -> list[str]:
        return [one_seed(run) for run in runs]

    def three_seeds(run: Run, reference: Run = dense) -> str:
        difference = measured.difference(run, reference)
        assert difference.seeds == 3
        return difference.text("+")

    heads = [change(base, mosa_heads=number) for number in (4, 8, 16, 32, 70)]
    sparsities = [change(base, sparsity=value).matched(dense) for value in (2.0, 4.0, 8.0, 16.0, 32.0)]
    lengths = [
        [change(run, length=length, batch_size=1024 // length, sparsity=length / 32) for run in (mosa, dense)]
        for length in (128, 256, 512)
    ]
    threshold = change(mosa, routing="threshold")
    at_random, few_at_random, mosa_at_random = (change(run, zero_outputs=False) for run in (dense, few, mosa))

    # Claims that have no figure.
    verdict = measured.difference(sparse, wide)
    assert not verdict.is_sure and not measured.difference(few, dense).is_sure
    others = [change(Run.from_dict(row["run"]), seed=0) for rows in measured.rows.values() for row in rows.values()]
    for run in {run for run in others if run.kind == "mosa" and (run.length, run.steps) == (256, 600)}:
        assert measured.difference(run, wide).mean > 0
    for rate in (1e-3, 2e-3, 5e-3):
        assert measured.difference(change(at_random, learning_rate=rate), at_random).mean > 0
    assert all(run in measured for study in PRESETS["cpu"]().values() for run in study)  # nothing is missing

    return [
        *(one_seed(mosa, seed=seed) for seed in range(3)),
        *(three_seeds(wide), three_seeds(sparse, wide), three_seeds(few), three_seeds(mosa, few), one_seed(few)),
        f"{few.training_flops() / dense.training_flops():.2f}",
        *one_seed_each(heads),
        *one_seed_each(by_threshold(heads)),
        three_seeds(sparse),
        *one_seed_each([sparsities[i] for i in (0, 1, 3)]),
        *one_seed_each(by_threshold(sparsities)),
        *one_seed_each([change(base, dense_heads=number).matched(dense) for number in (0, 1, 2, 4)]),
        *(f"{own.training_flops() / other.training_flops():.2f}" for own, other in lengths),
        *(one_seed(*pair) for pair in lengths),
        *(one_seed(run, long[0]) for run in long[1:]),
        *(one_seed(change(mosa, aux_loss=0.01)), one_seed(mosa), one_seed(change(mosa, include_first=False))),
        *one_seed_each([change(threshold, momentum=each) for each in (0.9, 0.95, 0.99)]),
        *(three_seeds(mosa_at_random, at_random), one_seed(few_at_random, at_random)),
        *(f"{loss(dense):.4f}", f"{loss(long[0]):.4f}"),
    ]


def test_the_evidence_has_these_figures():
    page = unwrapped((DOCS / "evidence.md").read_text(encoding="utf-8"))
    for figure in evidence():
        assert figure in page


def paragraph(page: str, text: str) -> str:
    """The first paragraph that has this text."""
    return next(each for each in page.split("\n\n") if text in each)


def rows_of(page: Path) -> dict[str, list[str]]:
    """Rows of the tables of a page: the first cell, and the others."""
    lines = page.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {first: others for first, *others in cells}


def test_choices_have_the_frontiers_figures():
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    head, _, *rows = table_with((RESULTS / "frontier-SmolLM2-135M-Instruct.md").read_text(encoding="utf-8"), "code")
    results = {row[0].partition(", ")[2] or row[0]: dict(zip(head, row, strict=True)) for row in rows}
    _, _, *choices = table_with(page, "perplexity, code")
    assert len(choices) == 8 == len(results)
    for _, choice, *figures in choices:
        name = {"the original": "original"}.get(choice, choice.partition(":")[0])
        own = results["sink + window" if "no routers" in choice else name]
        assert figures == [own[column] for column in ("KV bytes", "documentation", "code")]
    old = rows_of(FRONTIER)
    quoted = paragraph(page, "frontier.md")
    found = []
    for name in ("sink + window, window 1344", "ours, window 512, sparsity 8"):
        share, *_, keys = old[name]
        keys = keys.partition(",")[0]
        assert share in quoted and f"found {keys}" in quoted
        found.append(int(keys.partition("/")[0]))
    assert found[0] < found[1]


def test_choices_have_the_figures_of_healing_and_decoding():
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    rows = [re.findall(r"[^|]+", line) for line in (RESULTS / "heal.md").read_text(encoding="utf-8").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    by_name = {(name, tokens): scores for name, tokens, _, *scores in cells}
    before, after = (by_name["window 256, sparsity 14", tokens] for tokens in ("0", "1,015,808"))
    original = by_name["original", ""]
    quoted = paragraph(page, "benchmarks.healing")
    assert all(figure in quoted for figure in (*before[:2], *after[:2], *original[:2], "1,015,808"))
    steps = decoding_steps()
    (choice,) = (line for line in unwrapped(page).splitlines() if "benchmarks.speed.decode" in line)
    assert all(steps["8192", name][1] in choice for name in ("converted", "converted, static"))


def decoding_steps() -> dict[tuple[str, str], tuple[str, str]]:
    """Of `cpu.md`'s first table of decoding: context and contender → shares of the original's time and bytes."""
    text = (RESULTS / "cpu.md").read_text(encoding="utf-8")
    table = text[text.index("## One decoding step") :].partition("\nGrowth")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| [^|]+ \| ([^|]+) \| [^|]+ \| ([^|]+) \|$", table, re.MULTILINE)
    return {(context, name): (time, share) for context, name, time, share in rows}


def test_the_readme_quotes_the_timings():
    quoted = paragraph((DOCS.parent / "README.md").read_text(encoding="utf-8"), "benchmarks.speed.decode")
    steps = decoding_steps()
    assert all(steps[length, "converted"][0] in quoted for length in ("1024", "8192"))
    text = (RESULTS / "cpu.md").read_text(encoding="utf-8").partition("## One decoding step")[0]
    ratios = re.findall(r"^\|[^|]+\| forward \+ backward \|[^|]+\|[^|]+\| ([\d.]+) \|", text, re.MULTILINE)
    ratios = [float(ratio) for ratio in ratios]
    assert len(ratios) == 4
    assert f"{min(ratios):.1f}" in quoted and f"{max(ratios):.1f}" in quoted


def test_the_ways_of_loading(tmp_path, monkeypatch):
    """The original, a conversion, routers alone, and the folder of a healing."""
    block = next(block for block in BLOCKS if block.mark == "load")
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    base.save_pretrained("path/to/base")
    text = torch.randint(3, 250, (2, 64), generator=torch.Generator().manual_seed(0))
    conversion = mosa_hf.ConversionConfig(window=8, sparsity=4)
    mosa_hf.convert_checkpoint("path/to/base", "converted", conversion, text)
    model = mosa_hf.MosaLlamaForCausalLM.from_pretrained("converted")
    mosa_hf.save_routers(model, "routers")
    mosa_hf.save_routers(model, "healed")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained("healed")
    names, models = {}, ("original", "converted", "routers_only", "healed")
    exec(compile(block.code, block.page, "exec"), names)
    with torch.no_grad():
        logits = {name: names[name].eval()(text).logits for name in models}
        assert type(names["original"]) is LlamaForCausalLM
        assert torch.equal(logits["original"], base.eval()(text).logits)
        assert torch.equal(logits["converted"], logits["routers_only"])
        assert not torch.equal(logits["converted"], logits["original"])
        torch.testing.assert_close(logits["healed"], adapted(text).logits)
        assert not torch.allclose(logits["healed"], logits["converted"])


def test_benchmarks_page_names_every_command_and_result():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.md"):
        assert f"`{path.name}`" in page
    root = RESULTS.parent.parent
    for path in sorted(RESULTS.parent.rglob("*.py")):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
            named = re.search(rf"python -m {re.escape(name)}(?![\w.])", page)
            assert named or name == "benchmarks.demo"  # `make demo`
