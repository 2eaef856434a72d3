"""The table and the picture of what `benchmarks.frontier` measured."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mosa_hf.atomic_write import atomic_file
from mosa_hf.evaluation import PERPLEXITY
from mosa_hf.evaluation.report import cell, change
from testing.markdown import markdown_table

from ..provenance import about

OMITTED = ("calibration",)  # parameters that rows have and labels do without


def label(method: str, parameters: dict[str, Any]) -> str:
    """How a table names a method with its parameters."""
    shown = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in parameters.items()
        if name not in OMITTED
    ]
    return f"{method}, {', '.join(shown)}" if shown else method


def write(rows: list[dict[str, Any]], directory: Path) -> None:
    """`frontier.md` and `frontier.png` of rows, all of which answer the same questions."""
    methods = by_method(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with atomic_file(directory / "frontier.md") as unfinished:
        unfinished.write_text(page(methods, tasks), encoding="utf-8")
    with atomic_file(directory / "frontier.png") as unfinished:
        draw(methods, tasks).savefig(unfinished, format="png", dpi=150)


def by_method(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Each method's rows by task; the method that keeps most comes first."""
    methods: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(label(row["method"], row["parameters"]), {})[row["task"]] = row
    return sorted(methods.values(), key=lambda own: share(own, list(own)), reverse=True)


def share(own: dict[str, dict[str, Any]], tasks: list[str]) -> float:
    """The share of the original's bytes, over those of `tasks` that a method has rows of; nan if it has none."""
    shares = [own[task]["share"] for task in tasks if task in own]
    return sum(shares) / len(shares) if shares else math.nan


def texts_and_facts(tasks: list[str]) -> tuple[list[str], list[str]]:
    """The tasks of either kind; they differ in length, and so in what a window is a share of."""
    texts = [task for task in tasks if task.startswith(PERPLEXITY)]
    return texts, [task for task in tasks if task not in texts]


def perplexity(own: dict[str, dict[str, Any]]) -> float:
    """Over all texts."""
    rows = [row for task, row in own.items() if task.startswith(PERPLEXITY)]
    return math.exp(-sum(row["log_probability"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows))


def page(methods: list[dict[str, dict[str, Any]]], tasks: list[str]) -> str:
    """Markdown: how it was measured, and a row for each method."""
    rows = [row for own in methods for row in own.values()]
    kinds = {
        f"KV bytes, {name}": own for name, own in zip(("texts", "facts"), texts_and_facts(tasks), strict=True) if own
    }
    head = ["", *kinds, "prompt", *tasks]
    lines = [head, ["---", *["---:"] * len(kinds), "---", *["---:"] * len(tasks)]]
    original = next((own for own in methods if next(iter(own.values()))["method"] == "original"), {})
    for own in methods:
        first = next(iter(own.values()))
        freed = "" if first["frees_memory"] else " (masked)"
        cells = [label(first["method"], first["parameters"])]
        cells += [f"{share(own, kind):.3f}{freed}" for kind in kinds.values()]
        lines.append([*cells, first["prompt"]] + [_cell(own.get(task), original.get(task)) for task in tasks])
    return PAGE.format(facts=about(rows), table=markdown_table(lines))


PAGE = """# Memory against quality

SmolLM2-135M-Instruct. Perplexity of the tokens that follow a context, on passages that calibration never saw
(`testing/passages.py`); in brackets the change against the original and its standard error from passage to passage.
Facts: answers that greedy decoding gives, out of how many, with a 95 % interval of their share, and the mean
log-probability of a token of the right answer.

KV bytes are those of live tensors at the end of what is scored, as a share of the original's at the same length; texts
are longer than contexts with facts, so a window is a smaller share of them.
Methods with a "dense" prompt compute all of it and prune it once, and keep all that follows; meanwhile they hold as
much as the original. KVzap goes on pruning; it only masks, nothing is freed, and its bytes are those of the entries
that are not masked; its scorer is trained on our calibration text. "ours": one fit of the routers for all. "random
selection": the rates of our groups, tokens drawn by chance. "sink + window" reads the prompt through its window too,
StreamingLLM in full.

{facts}

{table}

![Perplexity and facts against the share of the bytes](frontier.png)
"""


def _cell(row: dict[str, Any] | None, original: dict[str, Any] | None) -> str:
    """Of a table; a perplexity with its change against the original's, passage by passage."""
    if row is None:
        return ""
    if original is not None and "losses" in row and row is not original:
        row = row | change(original["losses"], row["losses"])
    return cell(row)


def draw(methods: list[dict[str, dict[str, Any]]], tasks: list[str]) -> Figure:
    """Perplexity, and the log-probability of each kind of facts, against the share of the bytes; a line a method."""
    texts, facts = texts_and_facts(tasks)
    panels = [("perplexity, all texts", perplexity, texts)]
    panels += [
        (f"{task}: mean log-probability", lambda own, task=task: own[task]["log_probability"], [task])
        for task in facts
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained")
    for axes, (title, value, needed) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for own in methods:
            if all(task in own for task in needed):
                name = next(iter(own.values()))["method"]
                curves.setdefault(name, []).append((share(own, needed), value(own)))
        for i, (name, points) in enumerate(curves.items()):
            places, values = zip(*points, strict=True)
            if name == "original":
                axes.axhline(values[0], color="black", linewidth=0.8, linestyle=":", label=name)
                continue
            emphasis = {"linewidth": 2.2, "zorder": 3} if name == "ours" else {"linewidth": 1, "alpha": 0.8}
            axes.plot(places, values, marker="os^Dv<>pPX*"[i % 11], markersize=4, label=name, **emphasis)
        axes.set(xlabel="KV bytes, share of the original's", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure
