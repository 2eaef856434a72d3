"""Models side by side: what they make of the same samples, in a file that an interrupted run goes on from."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.utils import logging

from ..arguments import check_argument, checked
from ..atomic_write import atomic_file, check_replaceable
from ..modeling.fingerprint import numbers_fingerprint
from ..modeling.token_ids import check_num_tokens
from .memory import CacheMemory
from .scoring import Sample, Score, score

PERPLEXITY = "perplexity"  # tasks whose name begins with it are texts; the others ask for facts


class Subject(NamedTuple):
    """
    A model that is evaluated.

    name: unlike that of the others.
    model: a causal language model.
    identity: what changes when the model does, or what it computes in; scores on disk count for a model of the same
        name and identity. By default its dtype, config, and all numbers, which it takes a while to read.
    """

    name: str
    model: PreTrainedModel
    identity: str = ""


@checked()
def evaluate(
    subjects: list[Subject],
    samples: list[Sample],
    output: str | os.PathLike | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    What models make of the same samples.

    Args:
        subjects: the first is what the others are compared with.
        samples: see `text_samples`, `fact_samples` and `following`.
        output: JSON file, written after each sample. What it holds already of the same models and samples is not
            measured again.
        about: entries that the result shall have besides.

    Returns:
        `{**about, "rows": ..., "scores": ...}`, the file's content: a row for each model and task, see `rows_of`, and
        for each model and sample the `Score`s of its continuations. The file keeps the scores of other calls besides.

    Raises:
        ValueError: for models of the same name, samples without tokens, a file that is no earlier output, and
            contexts longer than a model reads.
        IsADirectoryError, NotADirectoryError, PermissionError: if `output` cannot be written.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"Two models have one name in `subjects`: {', '.join(names)}; give another.")
    if not all(each.context and each.continuations and all(one.ids for one in each.continuations) for each in samples):
        raise ValueError("`samples` has one without tokens: each must have a context, and something to read after it.")
    for i, subject in enumerate(subjects):
        check_argument(f"subjects[{i}].model", subject.model, PreTrainedModel, "load it first")
        _check_length(subject, samples)
    path = None if output is None else Path(output)
    known = {} if path is None else _known(path)
    records = []
    with logging.tqdm(total=len(subjects) * len(samples), desc="Evaluating", unit="sample") as progress:
        for subject in subjects:
            identity = subject.identity or ("" if path is None else _identity(subject.model))
            for sample in samples:
                key = {"model": subject.name, "identity": identity, "sample": _digest(sample)}
                record = known.get(_key(key))
                if record is None:
                    scores = score(CacheMemory(subject.model, sample.context), sample)
                    record = key | {"scores": [dataclasses.asdict(each) for each in scores]}
                    known[_key(key)] = record
                    if path is not None:
                        _write(path, {**(about or {}), "rows": [], "scores": list(known.values())})
                records.append(record)
                progress.update()
    result = {**(about or {}), "rows": rows_of(records), "scores": records}
    if path is not None:
        _write(path, {**result, "scores": list(known.values())})  # those of other calls too
    return result


def _identity(model: PreTrainedModel) -> str:
    config = hashlib.sha256(model.config.to_json_string().encode()).hexdigest()[:16]
    return f"{model.dtype} {config} {numbers_fingerprint(model)}"


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    A row for each model and task of `evaluate`'s scores: `summary`, and beside the first model

        share: of its bytes after the same samples.
        change: of perplexity, as a share; of texts only.
        standard_error: of `change`, from slice to slice; of texts with several slices only.
    """
    by_model: dict[str, list[Score]] = {}
    for record in records:
        by_model.setdefault(record["model"], []).extend(Score(**each) for each in record["scores"])
    first = next(iter(by_model.values()))
    rows = []
    for name, scores in by_model.items():
        for task in dict.fromkeys(each.task for each in scores):
            row: dict[str, Any] = {"model": name, "task": task, **summary(task, scores)}
            row["share"] = row["kv_bytes"] / summary(task, first)["kv_bytes"]
            if task.startswith(PERPLEXITY):
                row |= change(losses(task, first), losses(task, scores))
            rows.append(row)
    return rows


def losses(task: str, scores: list[Score]) -> list[float]:
    """Mean loss of a token, of each sample of a task."""
    return [-each.log_probability / each.tokens for each in _of(task, scores)]


def change(before: list[float], after: list[float]) -> dict[str, float]:
    """
    What two models' `losses` on the same slices make of the second one's perplexity: its `change` as a share, and, of
    several slices, the `standard_error` of that. Slices are compared one by one: what is easy or hard about a text is
    so for both.
    """
    differences = [ours - own for own, ours in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    found = {"change": math.expm1(mean)}
    if len(differences) > 1:
        found["standard_error"] = math.exp(mean) * statistics.stdev(differences) / len(differences) ** 0.5
    return found


def interval(right: int, answers: int) -> tuple[float, float]:
    """Wilson's interval, of 95 %, of the share of right answers, where so many out of so many were."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = right / answers, z * z / answers
    centre, half = share + weight / 2, z * math.sqrt(share * (1 - share) / answers + weight / (4 * answers))
    return max((centre - half) / (1 + weight), 0.0), min((centre + half) / (1 + weight), 1.0)


@checked()
def summary(task: str, scores: list[Score]) -> dict[str, float]:
    """
    What the scores of one task give: mean `log_probability` of the answers' `tokens`; `perplexity` of a text, else
    answers that are `right`, out of how many; means of `length` and `kv_bytes`.
    """
    if not (own := _of(task, scores)):
        raise ValueError(f"`scores` has none of `task` {task!r}, but of {sorted({each.task for each in scores})}.")
    sums = {field.name: sum(getattr(each, field.name) for each in own) for field in dataclasses.fields(Score)[1:]}
    result = {"log_probability": sums["log_probability"] / sums["tokens"], "tokens": sums["tokens"]}
    if task.startswith(PERPLEXITY):
        result["perplexity"] = math.exp(-result["log_probability"])
    else:
        result |= {"right": sums["right"], "answers": sums["answers"]}
    return result | {"length": sums["length"] / len(own), "kv_bytes": sums["kv_bytes"] / len(own)}


@checked(rows="pass `evaluate(...)['rows']`")
def table(rows: list[dict[str, Any]]) -> str:
    """
    Markdown of `rows_of`: a line for each model, bytes at the mean length of its texts and of its facts.

    Raises:
        ValueError: for rows that are not those of each model and task.
    """
    try:
        return _table(rows)
    except KeyError as error:
        raise ValueError(f"`rows` lacks {error}, of some model and task: pass `evaluate(...)['rows']`.") from error


def _table(rows: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    texts = [task for task in tasks if task.startswith(PERPLEXITY)]
    kinds = [kind for kind in (texts, [task for task in tasks if task not in texts]) if kind]
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["task"]] = row
    lines = []
    for name, own in by_model.items():
        cells, head = [name], [""]
        for kind in kinds:
            length, held, share = (
                statistics.fmean(own[task][what] for task in kind) for what in ("length", "kv_bytes", "share")
            )
            head += [f"KV bytes, {length:.0f} tokens", *kind]
            cells += [f"{held:,.0f} ({share:.3f})", *(cell(own[task]) for task in kind)]
        lines.append(cells)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(row: dict[str, Any]) -> str:
    """Of a table: perplexity and its change, or answers with their interval and the log-probability of a token."""
    if "perplexity" not in row:
        low, high = interval(row["right"], row["answers"])
        return f"{row['right']}/{row['answers']} ({low:.0%}–{high:.0%}), {row['log_probability']:.2f}"
    if row.get("change", 0) == 0:
        return f"{row['perplexity']:.2f}"
    error = f" ± {row['standard_error']:.1%}" if "standard_error" in row else ""
    return f"{row['perplexity']:.2f} ({row['change']:+.1%}{error})"


def _of(task: str, scores: list[Score]) -> list[Score]:
    return [each for each in scores if each.task == task]


def _check_length(subject: Subject, samples: list[Sample]) -> None:
    longest = max(len(each.context) + len(one.ids) for each in samples for one in each.continuations)
    what, remedy = "the longest context and what follows it", "ask for a shorter context"
    check_num_tokens(longest, subject.model.config, what, remedy, subject.name)


def _digest(sample: Sample) -> str:
    return hashlib.sha256(json.dumps(sample.to_dict()).encode()).hexdigest()[:16]


def _key(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["model"], record["identity"], record["sample"]


def _known(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The scores of a file that `evaluate` wrote, and is to write."""
    check_replaceable(path)
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["scores"]
        for record in records:
            _ = [Score(**each) for each in record["scores"]]
        return {_key(record): record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file that an evaluation wrote ({error!r}): choose another output.") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
