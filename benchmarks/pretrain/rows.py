"""
Pretraining from scratch at equal training FLOPs: dense models against MoSA by both rules of routing, the same heads at
a fixed stride, and windows.

    python -m benchmarks.pretrain --preset cpu-smoke
    python -m benchmarks.pretrain --preset cpu
    python -m benchmarks.pretrain --config my_run.json

How much of what expert choice gains is the future leaking through the selection? Each model is read teacher-forced
under expert choice, as published figures are, by thresholds, and token by token with a cache. The last two have to
agree to 1e-4 nats on a sample, or this fails.

A run is a `Run` of `benchmarks/pretrain_runs.py`; a file for `--config` has its fields. Rows are added to
`pretrain.jsonl` as runs end, and a run whose row is there is not trained again; one that was interrupted goes on from
its last checkpoint. `pretrain.md` and `pretrain.png` show what there is, and say what is missing.

"cpu" is meant to take at most 90 minutes on two quiet cores, "cpu-smoke" two minutes. It needs matplotlib. Times are
CPU time of one thread.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mosa_hf.whole_files import whole_file

from . import pretrain_table, sources
from .origin import origin_of
from .pretrain_data import Corpus, corpus
from .pretrain_model import evaluate, train
from .pretrain_runs import PRESETS, Run, Studies, in_order

RESULTS = Path(__file__).parent / "results"


def corpus_of(run: Run) -> Corpus:
    return corpus(run.texts, run.unseen, run.vocab_size, run.characters)


def key_of(run: dict[str, Any], data: str) -> str:
    """What tells a row from others: the fields of its run, and a digest of all that it reads."""
    return json.dumps([run, data], sort_keys=True)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of JSON lines, which may not exist yet, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key_of(row["run"], row["data"]): row for row in map(json.loads, lines)}


def train_all(runs: list[Run], path: Path, checkpoints: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Add to `path` the rows that it lacks.

    Returns:
        the rows of `runs` that are there now: all of them, unless it was interrupted.
    """
    rows = read_rows(path)
    keys = {run: key_of(run.to_dict(), corpus_of(run).digest) for run in runs}
    try:
        for run in tqdm([run for run, key in keys.items() if key not in rows], desc="Pretraining", unit="run"):
            started = time.perf_counter()
            checkpoint = checkpoints / f"{hashlib.sha256(keys[run].encode()).hexdigest()[:16]}.pt"
            model, training = train(run, corpus_of(run), checkpoint)
            row = {"run": run.to_dict(), **evaluate(run, model, corpus_of(run)), **training}
            row |= {"data": corpus_of(run).digest, "seconds": time.perf_counter() - started, **origin}
            rows[keys[run]] = row
            with whole_file(path) as unfinished:
                unfinished.write_text("".join(json.dumps(each) + "\n" for each in rows.values()), encoding="utf-8")
            checkpoint.unlink(missing_ok=True)
    except KeyboardInterrupt:
        print("Stopped. What was trained is kept; the same command goes on from there.")
    return [rows[key] for key in keys.values() if key in rows]


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--preset", choices=PRESETS)
    wanted.add_argument("--config", nargs="+", type=Path, metavar="FILE", help="JSON of a run, or of a list of them")
    parser.add_argument(
        "--output",
        type=Path,
        help="directory of the results; by default that of the repository for "
        "the preset cpu, a temporary one for others",
    )
    parser.add_argument("--table", action="store_true", help="train nothing, show what there is")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.preset:
        studies: Studies = PRESETS[options.preset]()
    else:
        given = [json.loads(path.read_text(encoding="utf-8")) for path in options.config]
        fields = [each for own in given for each in (own if isinstance(own, list) else [own])]
        studies = {"runs": [Run.from_dict(each) for each in fields]}
    runs = in_order(studies)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (RESULTS if options.preset == "cpu" else Path(scratch))
        path = output / "pretrain.jsonl"
        if options.table:
            rows = list(read_rows(path).values())
        else:
            rows = train_all(
                runs, path, sources.cache_directory() / "pretrain", origin_of("benchmarks.pretrain", arguments)
            )
        if rows:
            pretrain_table.write(studies, rows, output)
            print((output / "pretrain.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
