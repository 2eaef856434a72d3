"""The page and the picture of what `benchmarks.pretrain` measured."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mosa_hf.atomic_write import atomic_file
from testing.markdown import markdown_table, wrapped

from ..provenance import about
from .runs import BY_THRESHOLD, FEWER, HEADLINE, MATCH, SPARSITY, Run, Studies, in_order

# Student's t: half-width of a central interval of 95 %, by degrees of freedom, in standard errors.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
NAMES = {"dense": "dense", "stride": "fixed stride", "window": "windows alone"}
Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean over seeds, half the width of its interval of 95 % (nan for one seed), and how many seeds there are."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        """
        Raises:
            KeyError: for more seeds than `T_95` knows.
        """
        count = len(values)
        half = T_95[count - 1] * stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(mean(values), half, count)

    @property
    def is_sure(self) -> bool:
        """Whether it leaves out 0."""
        return abs(self.mean) > self.half  # False for nan

    def text(self, sign: str = "") -> str:
        value = f"{self.mean:{sign}.4f}"
        return value if math.isnan(self.half) else f"{value} ± {self.half:.4f}"


def name_of(run: Run) -> str:
    return NAMES.get(run.kind) or f"MoSA, trained by {run.routing.replace('_', ' ')}"


def exact(row: Row, text: str = "held out") -> float:
    return row["loss"][text]["exact"]


def followed(row: Row) -> float | None:
    """The loss by the thresholds that training left; None for a model that has none."""
    return row["loss"]["held out"].get("followed")


def published(row: Row) -> float | None:
    """Read by expert choice; None for a model that has no such rule."""
    return row["loss"]["held out"].get("expert_choice")


class Measured:
    """Rows by what their runs have in common but for the seed."""

    def __init__(self, rows: list[Row]):
        self.rows: dict[str, dict[int, Row]] = {}
        for row in rows:
            self.rows.setdefault(self._key(row["run"]), {})[row["run"]["seed"]] = row

    @classmethod
    def of_study(cls, study: list[Run], rows: list[Row]) -> "Measured":
        """Its runs alone: a mean over seeds that another study has as well would be compared with one without them."""
        own = {json.dumps(run.to_dict(), sort_keys=True) for run in study}
        return cls([row for row in rows if json.dumps(row["run"], sort_keys=True) in own])

    @staticmethod
    def _key(run: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in run.items() if name != "seed"}, sort_keys=True)

    def of(self, run: Run) -> dict[int, Row]:
        """Seed → row, of all the seeds of a run."""
        return self.rows.get(self._key(run.to_dict()), {})

    def __contains__(self, run: Run) -> bool:
        return run.seed in self.of(run)

    def difference(self, run: Run, reference: Run, value=exact, of_reference=exact) -> Interval | None:
        """Over the seeds that both have, which read the same batches; None if there are none."""
        own, others = self.of(run), self.of(reference)
        seeds = sorted(own.keys() & others.keys())
        return Interval.of([value(own[seed]) - of_reference(others[seed]) for seed in seeds]) if seeds else None


def without_seeds(study: list[Run]) -> list[Run]:
    """One run of each kind, in order."""
    first: dict[str, Run] = {}
    for run in study:
        first.setdefault(Measured._key(run.to_dict()), run)
    return list(first.values())


def write(studies: Studies, rows: list[Row], directory: Path) -> None:
    """`pretrain.md` and `pretrain.png` of the rows that belong to `studies`."""
    with atomic_file(directory / "pretrain.md") as unfinished:
        unfinished.write_text(page(studies, rows), encoding="utf-8")
    with atomic_file(directory / "pretrain.png") as unfinished:
        draw(studies, rows).savefig(unfinished, format="png", dpi=130)


# Of a run, what a table may show.
FIELDS = (
    "length",
    "dense_heads",
    "mosa_heads",
    "sparsity",
    "window",
    "momentum",
    "include_first",
    "aux_loss",
    "learning_rate",
    "intermediate_size",
)


def table_of(study: list[Run], measured: Measured) -> str:
    """A row for each kind of run that was measured; differences to dense of the same length, seed by seed."""
    kinds = [run for run in without_seeds(study) if measured.of(run)]
    varied = [name for name in FIELDS if len({getattr(run, name) for run in kinds}) > 1]
    head = [
        "model",
        *(name.replace("_", " ") for name in varied),
        "seeds",
        "by expert choice",
        "followed",
        "exact",
        "leak, at most",
    ]
    head += ["exact − dense", "exact, unseen kind", "selected", "KV bytes", "parameters"]
    head += ["training TFLOP", "with padding", "CPU ms a step"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for run in kinds:
        cells = [name_of(run), *(_field(run, name) for name in varied)]
        lines.append(cells + _losses(study, run, measured) + _costs(list(measured.of(run).values())))
    return markdown_table(lines)


def _losses(study: list[Run], run: Run, measured: Measured) -> list[str]:
    """The cells of a table that tell what a kind of run predicts, after the number of its seeds."""
    rows = list(measured.of(run).values())
    cells = [str(len(rows))]
    for value in (published, followed, exact):
        cells.append("" if value(rows[0]) is None else Interval.of([value(row) for row in rows]).text())
    leak = None if published(rows[0]) is None else Interval.of([exact(row) - published(row) for row in rows])
    cells.append("" if leak is None else leak.text("+"))
    reference = dense_of(study, run)
    difference = None if reference is None or run == reference else measured.difference(run, reference)
    cells.append("" if difference is None else difference.text("+"))
    cells.append(Interval.of([exact(row, "unseen") for row in rows]).text())
    return cells


def _costs(rows: list[Row]) -> list[str]:
    """The cells of a table that tell what a kind of run takes."""
    cells = [f"{mean(row['selected_share'] for row in rows):.3f}" if "selected_share" in rows[0] else ""]
    cells.append(f"{mean(sum(row['kv_bytes'].values()) for row in rows):,.0f}")
    cells.append(f"{rows[0]['parameters']:,}")
    for name in ("training_flops_of_selected", "training_flops_with_padding"):
        cells.append(f"{mean(row.get(name, row['training_flops']) for row in rows) / 1e12:.3g}")
    cells.append(f"{mean(row['step_cpu_ms'] for row in rows):.0f}")
    return cells


def _field(run: Run, name: str) -> str:
    """A field of a run; empty where its kind of model has none."""
    value = getattr(run, name)
    of_heads = ("mosa_heads", "sparsity", "momentum", "include_first", "aux_loss")
    of_others = name in of_heads and run.kind in ("dense", "window")
    if of_others or value is None or (name == "momentum" and run.routing != "threshold"):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def dense_of(study: list[Run], run: Run) -> Run | None:
    """The dense run of a study that has the length of `run`."""
    return next((each for each in study if each.kind == "dense" and each.length == run.length), None)


def sentences(study: list[Run], measured: Measured) -> list[str]:
    """The three that answer the question, whatever the answer is; fewer where runs are missing."""
    kinds = {name_of(run): run for run in without_seeds(study)}
    dense = kinds["dense"]
    found = []
    by_choice, by_threshold = (kinds[f"MoSA, trained by {rule}"] for rule in ("expert choice", "threshold"))
    for run in (by_choice, by_threshold):
        difference = measured.difference(run, dense)
        if difference is None:
            continue
        verdict = "not told from" if not difference.is_sure else "above" if difference.mean > 0 else "below"
        found.append(
            f"At equal training FLOPs ({run.training_flops() / dense.training_flops():.3f} of the dense model's "
            f"{dense.training_flops() / 1e12:.3g} TFLOP), the decode-exact loss of {name_of(run)}, is "
            f"{difference.text('+')} nats a token from dense's "
            f"(95 %, {_counted(difference.seeds, 'seed')}, paired): {verdict} it."
        )
    gain = measured.difference(by_choice, dense, published)
    leak = measured.difference(by_choice, by_choice, exact, published)
    if gain is not None:
        text = "Read teacher-forced by expert choice, as published figures are, the first would be "
        text += f"{gain.text('+')} from dense"
        if gain.is_sure and gain.mean < 0:
            part = leak.mean / -gain.mean
            text += (
                f"; {leak.text('+')} of that, {part:.0%} of the gain, is the rule of reading, and no decoder has it."
            )
        else:
            verdict = "above it" if gain.is_sure else "not told from it either"
            text += f", {verdict}: there is no gain here that the leak ({leak.text('+')}) could explain a part of."
        found.append(text)
    return found


def against_stride(study: list[Run], measured: Measured) -> str | None:
    """What it adds that a router chooses; None where runs are missing."""
    kinds = without_seeds(study)
    stride = next(run for run in kinds if run.kind == "stride")
    found = []
    for run in kinds:
        difference = measured.difference(run, stride)
        if run.kind == "mosa" and difference is not None:
            found.append(f"{difference.text('+')} ({name_of(run)}; {_counted(difference.seeds, 'seed')})")
    if not found:
        return None
    return (
        "What choosing by content adds, decode-exact loss against a fixed stride, which has about as many heads and "
        f"parameters: {', '.join(found)}."
    )


def fewest_heads(study: list[Run], measured: Measured) -> str | None:
    """Which model with MoSA heads reaches dense's loss with the fewest of them; None where too few were tried."""
    dense = study[0]
    tried = [run for run in without_seeds(study) if run.kind == "mosa" and measured.difference(run, dense) is not None]
    reached = [run for run in tried if measured.difference(run, dense).mean <= 0]
    numbers = ", ".join(str(run.mosa_heads) for run in tried)
    if len(tried) < 2:
        return None
    if not reached:
        return f"None of the numbers tried ({numbers}) reaches the dense model's decode-exact loss."
    best = min(reached, key=lambda run: run.mosa_heads)
    own, others = (list(measured.of(run).values()) for run in (best, dense))
    ratios = {
        "training FLOPs": best.training_flops() / dense.training_flops(),
        "KV bytes": mean(sum(row["kv_bytes"].values()) for row in own)
        / mean(sum(row["kv_bytes"].values()) for row in others),
        "CPU time of a step": mean(row["step_cpu_ms"] for row in own) / mean(row["step_cpu_ms"] for row in others),
    }
    return (
        f"Of the numbers tried ({numbers}), {best.mosa_heads} heads are the fewest that reach the dense model's "
        f"decode-exact loss ({_counted(measured.difference(best, dense).seeds, 'seed')}): "
        + ", ".join(f"{name} × {ratio:.2f}" for name, ratio in ratios.items())
        + "."
    )


def page(studies: Studies, rows: list[Row]) -> str:
    """Markdown: how it was measured, the answer, and a table for each study, of the rows that belong to one."""
    rows = [row for own in Measured.of_study(in_order(studies), rows).rows.values() for row in own.values()]
    worst = max(abs(row["sample"]["teacher_forced"] - row["sample"]["decoded"]) for row in rows)
    parts = [PAGE.format(facts=f"{about(rows)}\n- {effort_of(rows)}", worst=worst)]
    for name in studies:
        parts += section_of(name, studies, rows)
    return wrapped("\n\n".join(parts) + "\n")


def effort_of(rows: list[Row]) -> str:
    """How long that took."""
    minutes = sum(row["seconds"] for row in rows) / 60
    training = sum(row["step_cpu_ms"] * row["run"]["steps"] for row in rows) / 60e3
    return (
        f"{len(rows)} runs, {minutes:.0f} minutes of a machine that may have done other work too; training steps "
        f"took {training:.0f} minutes of CPU time, by their medians"
    )


def section_of(name: str, studies: Studies, rows: list[Row]) -> list[str]:
    """The paragraphs of one study."""
    study, parts = studies[name], [f"## {name[0].upper()}{name[1:]}"]
    measured = Measured.of_study(study, rows)
    own = set(study) - (set(studies[HEADLINE]) if name != HEADLINE and HEADLINE in studies else set())
    if any(run in measured for run in own):
        if name == HEADLINE:
            parts += ["\n".join(f"{i + 1}. {each}" for i, each in enumerate(sentences(study, measured)))]
            parts.append("![Loss of each model, and of each sparsity](pretrain.png)")
        if name.startswith(MATCH) and study[0] in measured and (line := fewest_heads(study, measured)):
            parts.append(line)
        parts.append(table_of(study, measured))
        if name == HEADLINE and (line := against_stride(study, measured)):
            parts.append(line)
        parts.append(settings_of(study))
    if missing := [run for run in dict.fromkeys(study) if run not in measured]:
        seeds = {kind: [run.seed for run in missing if same_but_seed(run, kind)] for kind in without_seeds(missing)}
        named = [
            ", ".join(filter(None, (name_of(kind), changes_of(kind, study[0]), _listed("seed", own_seeds))))
            for kind, own_seeds in seeds.items()
        ]
        parts.append(f"**Missing**, {len(missing)} of {len(set(study))} runs: {'; '.join(named)}.")
    return parts


def settings_of(study: list[Run]) -> str:
    """The fields that all runs of a study share and that a table leaves out."""
    shared = {
        name: value for name, value in study[0].to_dict().items() if all(run.to_dict()[name] == value for run in study)
    }
    return "Shared: " + ", ".join(f"{name} {value}" for name, value in shared.items() if value is not None) + "."


def same_but_seed(run: Run, other: Run) -> bool:
    return dataclasses.replace(run, seed=other.seed) == other


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(noun: str, values: list[int]) -> str:
    return f"{noun}{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"


def changes_of(run: Run, base: Run) -> str:
    own, others = run.to_dict(), base.to_dict()
    names = (name for name in own if own[name] != others[name] and name not in ("seed", "kind", "routing"))
    return ", ".join(f"{name} {value}" for name in names if (value := _field(run, name)))


PAGE = """# Pretraining at equal FLOPs

Small models trained from scratch on real text, with as many multiplications and additions in a forward as the dense
model (`benchmarks/pretrain/flops.py`). Losses are nats a token of text that no model was trained on, of the kinds that
all were trained on, and of another kind.

- "By expert choice": teacher-forced, as published figures are; it may read the future.
- "Exact": by thresholds, which were set on training text. Decoding token by token gives the same loss (largest
  difference on a sample of each model: {worst:.1e}).
- "Followed": by the thresholds that training left.
- "Leak, at most": exact minus by expert choice, which is what was read of the future, and what it costs to be read by
  another rule than one was trained by. A model that was trained by thresholds had no future to learn from, and shows
  what the rule alone does.
- ± is half of an interval of 95 % over seeds (t distribution); differences are of models that read the same batches.
- KV bytes are those of the live tensors after one text of that length.
- Training FLOPs are those of the tokens that were selected; and as the CPU computes them, where every group has as
  many slots as the one that selects most.
- CPU time is of one thread, forward, backward and optimiser, at the clock and with the neighbours of its moment.

{facts}"""


def draw(studies: Studies, rows: list[Row]) -> Figure:
    """Loss by model, by sparsity and by heads: exact, and as expert choice reads it."""
    in_headline, all_measured = set(studies.get(HEADLINE, [])), Measured(rows)
    panels = [
        name
        for name in (HEADLINE, SPARSITY, MATCH)
        if name == HEADLINE or any(run in all_measured for run in studies.get(name, []) if run not in in_headline)
        if name in studies
    ]
    figure = Figure(figsize=(5.4 * max(len(panels), 1), 4.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        measured, kinds = _panel(name, studies, rows)
        if not kinds:
            continue
        if name == HEADLINE:
            _draw_models(axes, kinds, measured)
        else:
            field, label = ("sparsity", "sparsity ρ") if name == SPARSITY else ("mosa_heads", "MoSA heads a layer")
            _draw_curves(axes, kinds, measured, field)
            axes.set(xlabel=label, title="equal FLOPs" if name == SPARSITY else "fewer FLOPs")
        axes.set_ylabel("held-out loss, nats a token")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _panel(name: str, studies: Studies, rows: list[Row]) -> tuple[Measured, list[Run]]:
    """What is measured of the study `name` and of those that are drawn with it, and its kinds of runs."""
    study = [*studies[name], *studies.get(name + BY_THRESHOLD, [])]
    if name == SPARSITY:
        study += [run for run in studies.get(FEWER, []) if run.intermediate_size != study[0].intermediate_size]
    measured = Measured.of_study(study, rows)
    kinds = [run for run in without_seeds(study) if measured.of(run)]
    if name != HEADLINE:  # a mean over other seeds would not be on one curve with it
        kinds = [run for run in kinds if study[0].seed in measured.of(run)]
    return measured, kinds


def _draw_models(axes, kinds: list[Run], measured: Measured) -> None:
    for value, label, marker in ((exact, "exact: what decoding gives", "o"), (published, "by expert choice", "x")):
        own = [
            (i, Interval.of(values))
            for i, run in enumerate(kinds)
            if (values := [value(row) for row in measured.of(run).values()])[0] is not None
        ]
        if own:
            places, intervals = zip(*own, strict=True)
            errors = [0.0 if math.isnan(each.half) else each.half for each in intervals]
            axes.errorbar(places, [each.mean for each in intervals], errors, fmt=marker, capsize=4, label=label)
    names = [name_of(run).replace(", trained by ", ",\n") for run in kinds]
    axes.set_xticks(range(len(kinds)), names, rotation=20)
    axes.set_title("equal FLOPs, 95 % over seeds")


def _draw_curves(axes, kinds: list[Run], measured: Measured, field: str) -> None:
    common = set.intersection(*(set(measured.of(run)) for run in kinds))  # seeds

    def over_seeds(run: Run, value) -> float:
        return mean(value(measured.of(run)[seed]) for seed in common)

    dense = [run for run in kinds if run.kind == "dense"]
    for run, style in zip(dense, (":", "--"), strict=False):
        label = f"dense, {run.dense_heads} heads, FFN {run.intermediate_size}"
        axes.axhline(over_seeds(run, exact), color="black", linestyle=style, linewidth=1, label=label)
    readings = {
        "expert_choice": (
            (published, "C1x--", "by expert choice, read by it"),
            (exact, "C0o-", "by expert choice, exact"),
        ),
        "threshold": ((exact, "C2s-", "by threshold, exact"),),
    }
    places = set()
    for routing, values in readings.items():
        curve = [run for run in kinds if run.kind == "mosa" and run.routing == routing]
        curve.sort(key=lambda run: getattr(run, field))
        for value, style, label in values:
            points = [(getattr(run, field), over_seeds(run, value)) for run in curve]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"trained {label}")
        places |= {getattr(run, field) for run in curve}
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
    axes.minorticks_off()
