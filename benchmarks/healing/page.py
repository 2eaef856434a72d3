"""The table and the picture of what `benchmarks.healing` measured."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mosa_hf.atomic_write import atomic_file
from testing.markdown import markdown_table, wrapped

from ..provenance import about

PERPLEXITY = "perplexity"
DIVERGENCE = "divergence from the original"


def write(rows: list[dict[str, Any]], directory: Path) -> None:
    """`heal.md` and `heal.png` of rows."""
    with atomic_file(directory / "heal.md") as unfinished:
        unfinished.write_text(page(rows), encoding="utf-8")
    with atomic_file(directory / "heal.png") as unfinished:
        draw(rows).savefig(unfinished, format="png", dpi=150)


def scored(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """(what, tokens healed on) → its rows by task; the original first."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["task"].startswith(PERPLEXITY):
            found.setdefault((name_of(row), row["parameters"].get("tokens", 0)), {})[row["task"]] = row
    order = list(dict.fromkeys(name for name, _ in found))
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def name_of(row: dict[str, Any]) -> str:
    given = row["parameters"]
    adapters = f", adapters times {given['adapters']}" if "adapters" in given else ""
    return f"window {given['window']}, sparsity {given['sparsity']}{adapters}" if given else "original"


def healings(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was healed → the rows that its healing logged, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["parameters"].get("tokens", 0)):
        if row["task"] == DIVERGENCE:
            found.setdefault(name_of(row), []).append(row)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: how it was measured, and a row for each checkpoint."""
    conversions = scored(rows)
    tasks = list(dict.fromkeys(task for own in conversions.values() for task in own))
    lines = [["", "healed on, tokens", "KV bytes", *tasks], ["---", *["---:"] * (2 + len(tasks))]]
    for (name, tokens), own in conversions.items():
        share = sum(row["share"] for row in own.values()) / len(own)
        lines.append([name, f"{tokens:,}" if name != "original" else "", f"{share:.3f}"])
        lines[-1] += [f"{own[task]['perplexity']:.3f}" if task in own else "" for task in tasks]
    table = markdown_table(lines)
    return wrapped(PAGE.format(facts=about(rows), table=table, steps=divergences(rows)))


def divergences(rows: list[dict[str, Any]]) -> str:
    """The divergence that each healing logged, averaged over quarters of it."""
    return "".join(_divergences(name, logged) for name, logged in healings(rows).items())


def _divergences(name: str, logged: list[dict[str, Any]]) -> str:
    size = -(-len(logged) // 4)
    parts = [logged[start : start + size] for start in range(0, len(logged), size)]
    means = [f"{sum(row['divergence'] for row in part) / len(part):.4f}" for part in parts]
    rates = [row["learning_rate"] for row in logged]
    text = (
        f"{name.capitalize()}: divergence from the original on the text that it learns from, nats a token, mean over "
        f"each quarter of {len(logged)} steps: {', '.join(means)}. The learning rate, which falls to 0 at the end of "
        f"a run, was {max(rates):.1e} at most and {rates[-1]:.1e} in the last of them.\n\n"
    )
    top = rates.index(max(rates))
    for i in range(top + 1, len(rates)):
        if rates[i] > rates[i - 1]:
            tokens = logged[i - 1]["parameters"]["tokens"]
            text += (
                f"After {tokens:,} tokens the learning rate rises to {rates[i]:.1e}: a finished run was given more "
                "steps.\n\n"
            )
    return text


PAGE = """# Healing

SmolLM2-135M-Instruct, all groups converted, and LoRA adapters of rank 16 on all linear layers trained on the
divergence from the original's next-token distribution, as `mosa-heal` does it; routers and thresholds stay. Perplexity
of 512 tokens after 3072 others, two passages of each text, as `benchmarks.frontier` scores it: the model reads through
its sparse cache, in float32. These are few tokens, so neighbouring points differ by chance too. Bytes are those of the
live cache, as a share of the original's. Healing read other pages of python_docs, and Shakespeare, the reference
inside Python and an article of an encyclopaedia; of debian_handbook it read nothing. The trainer computes in bfloat16
(autocast), on windows of 2048 tokens, two a step. A setting without a divergence below has the adapters of the one
that has, as they are or times the number that it says, which was chosen on the passages of python_docs: one was tried
for each.

{facts}

{table}

{steps}![Perplexity and divergence against the tokens healed on](heal.png)
"""


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Perplexity of each text, and the logged divergence, against the tokens that were healed on."""
    conversions = scored(rows)
    tasks = list(dict.fromkeys(task for own in conversions.values() for task in own))
    figure = Figure(figsize=(5 * (len(tasks) + 1), 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for name in dict.fromkeys(name for name, _ in conversions):
            points = [
                (tokens, own[task]["perplexity"])
                for (each, tokens), own in conversions.items()
                if each == name and task in own
            ]
            if name == "original":
                axes.axhline(points[0][1], color="black", linewidth=0.8, linestyle=":", label=name)
            else:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set(title=task, xlabel="tokens healed on")
    for name, logged in healings(rows).items():
        tokens, divergence = zip(*((row["parameters"]["tokens"], row["divergence"]) for row in logged), strict=True)
        last.plot(tokens, divergence, marker=".", linewidth=0.8, label=name)
    last.set(title=f"{DIVERGENCE}, nats a token", xlabel="tokens healed on")
    for axes in (*panels, last):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
