"""The lines that `any_model.py` measured, as a table and a picture."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mosa_hf.atomic_write import atomic_file
from mosa_hf.evaluation.report import cell, change, interval
from testing.markdown import markdown_table

from .. import result_lines
from ..provenance import about

TELLS_APART = ("base", "method", "parameters", "task", "length", "index", "questions")
key = partial(result_lines.key, names=TELLS_APART)
lines = partial(result_lines.by_key, names=TELLS_APART)


def write(path: Path, name: str, base: str) -> str:
    """
    The table beside a file of lines, and the picture; returns the former. They show the lines of one `base` alone: a
    model of other weights, or whose weights another dtype has rounded, has a fingerprint of its own, and no average
    with this one.
    """
    found = latest([line for line in lines(path).values() if line["base"] == base])
    if not found:
        return "Nothing is measured yet."
    asked = any("answers" in line for line in found)  # else there is nothing to draw
    text = page(found, name, path.with_suffix(".png").name if asked else None)
    with atomic_file(path.with_suffix(".md")) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    if asked:
        with atomic_file(path.with_suffix(".png")) as unfinished:
            draw(found).savefig(unfinished, format="png", dpi=110)
    return text


def latest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a setting that was measured with routers of several fits, those lines that are of the last one."""
    last = {label(line): line["parameters"] for line in found}
    return [line for line in found if line["parameters"] == last[label(line)]]


def label(line: dict[str, Any]) -> str:
    given, words = line["parameters"], [line["method"]]
    if "window" in given:
        words += [f"window {given['window']}", f"sparsity {given['sparsity']:g}"]
    words += [given[name] for name in ("plan", "folder", "cache_dtype") if name in given]
    return ", ".join(words)


def cells(found: list[dict[str, Any]], length: int) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Label → task → what `report.cell` shows, at one length: answers, or a perplexity with its change against the
    original's on the passages that both have read. And under "KV bytes" the `share` of the original's, on average.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in found:
        if line["length"] == length:
            grouped.setdefault((label(line), line["task"]), []).append(line)
    original = {
        (line["task"], line["index"]): line
        for line in found
        if line["length"] == length and line["method"] == "original"
    }
    shares: dict[str, list[float]] = {}
    for (name, task), own in grouped.items():
        if "loss" in own[0]:
            losses = [line["loss"] for line in own]
            row = {"perplexity": math.exp(sum(losses) / len(losses)), "passages": len(losses)}
            if own[0]["method"] != "original":
                row |= change([original[task, line["index"]]["loss"] for line in own], losses)
        else:
            answers = [answer for line in own for answer in line["answers"]]
            row = {
                "right": sum(answer["found"] for answer in answers),
                "answers": sum(answer["of"] for answer in answers),
                "log_probability": sum(answer["log_probability"] for answer in answers)
                / sum(answer["tokens"] for answer in answers),
            }
        table.setdefault(name, {})[task] = row
        shares.setdefault(name, []).extend(
            line["kv_bytes"] / original[task, line["index"]]["kv_bytes"] for line in own
        )
    for name, own_shares in shares.items():
        table[name]["KV bytes"] = {"share": sum(own_shares) / len(own_shares)}
    return table


def page(found: list[dict[str, Any]], name: str, picture: str | None) -> str:
    """Markdown, which shows the file `picture`."""
    parts = []
    for length in sorted({line["length"] for line in found}):
        table = cells(found, length)
        tasks = list(dict.fromkeys(task for own in table.values() for task in own if task != "KV bytes"))
        rows = [["", "KV bytes", *tasks], ["---", *["---:"] * (len(tasks) + 1)]]
        for own_name, own in table.items():
            shown = [cell(own[task]) if task in own else "" for task in tasks]
            rows.append([own_name, f"{own['KV bytes']['share']:.3f}", *shown])
        numbers = [row["passages"] for own in table.values() for row in own.values() if "passages" in row]
        few = f"\nPassages of each text: {min(numbers)} to {max(numbers)}.\n" if numbers else ""
        parts.append(f"## {length} tokens\n\n{markdown_table(rows)}\n{few}")
    return PAGE.format(
        name=name,
        about=about(found),
        rivals=OF_RIVALS if any("kvpress" in line.get("versions", {}) for line in found) else "",
        tables="\n".join(parts),
        picture="" if picture is None else f"\n![Answers and their intervals]({picture})\n",
    )


PAGE = """# Memory against quality: {name}

Six tasks after the templates of RULER, by a generator of our own: references that greedy decoding gives, out of how
many, with a 95 % interval of their share (which takes answers about one context for independent), and the mean
log-probability of a token of the right answer. In "long_writing" each answer is a line of the 1,500 tokens that the
model writes by itself. Perplexity of 512 tokens of passages that calibration never saw; in
brackets the change against the original and its standard error from passage to passage. KV bytes are those of live
tensors, as a share of the original's after the same tokens, on average. "sink + window" keeps the first token and a
window of as many bytes as the first conversion takes of each context. The prompt is read as sparsely as all else.
{rivals}
{about}

{tables}{picture}"""


OF_RIVALS = """Other methods, by the code of kvpress, read the prompt in full and keep as many bytes of it as the first
conversion has of the same context, and all of what follows: of texts, which are read on, they end with more. KVzip
reads the prompt twice, and what it drops is only masked.
"""


def draw(found: list[dict[str, Any]]) -> Figure:
    """Of each length: the share of right answers of each task, with intervals, a mark for each method."""
    lengths = sorted({line["length"] for line in found})
    figure = Figure(figsize=(7.5, 3.2 * len(lengths) + 0.5), layout="constrained")
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        table = cells([line for line in found if "answers" in line], length)
        tasks = list(dict.fromkeys(task for own in table.values() for task, row in own.items() if "answers" in row))
        apart = min(0.15, 0.8 / max(len(table), 1))
        for i, (name, own) in enumerate(table.items()):
            rows = [(place, own[task]) for place, task in enumerate(tasks) if task in own]
            shares = [row["right"] / row["answers"] for _, row in rows]
            bounds = [interval(row["right"], row["answers"]) for _, row in rows]
            errors = [
                [max(share - low, 0) for share, (low, _) in zip(shares, bounds, strict=True)],
                [max(high - share, 0) for share, (_, high) in zip(shares, bounds, strict=True)],
            ]
            places = [place + apart * (i - (len(table) - 1) / 2) for place, _ in rows]
            named = f"{name} ({own['KV bytes']['share']:.2f} of the bytes)"
            marks = {"fmt": "os^Dv"[i % 5], "markersize": 5, "capsize": 2, "label": named}
            if rows:
                axes.errorbar(places, shares, yerr=errors, **marks)
        axes.set(title=f"{length} tokens", ylim=(-0.03, 1.03), xlim=(-0.6, max(len(tasks), 1) - 0.4))
        axes.set_xticks(range(len(tasks)), tasks, fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:  # below, where it hides no point
        figure.legend(handles, labels, fontsize=7, ncols=2, loc="outside lower center")
    return figure
