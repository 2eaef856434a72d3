"""A row for each run: what is there already, and what is trained to add."""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import result_lines
from .data import Corpus, corpus
from .model import evaluate, train
from .runs import Run

TELLS_APART = ("run", "data")  # the fields of a run, and a digest of all that it reads
read_rows = partial(result_lines.by_key, names=TELLS_APART)


def corpus_of(run: Run) -> Corpus:
    return corpus(run.texts, run.unseen, run.vocab_size, run.characters)


def key_of(run: Run) -> str:
    """What tells the row of a run from others."""
    return result_lines.key({"run": run.to_dict(), "data": corpus_of(run).digest}, TELLS_APART)


def train_all(runs: list[Run], path: Path, checkpoints: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Add to `path` the rows that it lacks.

    Returns:
        the rows of `runs` that are there now: all of them, unless it was interrupted.
    """
    rows = read_rows(path)
    keys = {run: key_of(run) for run in runs}
    try:
        for run in tqdm([run for run, key in keys.items() if key not in rows], desc="Pretraining", unit="run"):
            started = time.perf_counter()
            checkpoint = checkpoints / f"{hashlib.sha256(keys[run].encode()).hexdigest()[:16]}.pt"
            model, training = train(run, corpus_of(run), checkpoint)
            row = {"run": run.to_dict(), **evaluate(run, model, corpus_of(run)), **training}
            row |= {"data": corpus_of(run).digest, "seconds": time.perf_counter() - started, **origin}
            rows[keys[run]] = row
            result_lines.write(path, rows.values())
            checkpoint.unlink(missing_ok=True)
    except KeyboardInterrupt:
        print("Stopped. What was trained is kept; the same command goes on from there.")
    return [rows[key] for key in keys.values() if key in rows]
