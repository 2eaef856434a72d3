"""
Pretraining from scratch at equal training FLOPs: dense models against MoSA by both rules of routing, the same heads at
a fixed stride, and windows.

    python -m benchmarks.pretrain --preset cpu-smoke
    python -m benchmarks.pretrain --preset cpu
    python -m benchmarks.pretrain --config my_run.json

How much of what expert choice gains is the future leaking through the selection? Each model is read teacher-forced
under expert choice, as published figures are, by thresholds, and token by token with a cache. The last two have to
agree to 1e-4 nats on a sample, or this fails.

A run is a `Run` of `benchmarks/pretrain/runs.py`; a file for `--config` has its fields. Rows are added to
`pretrain.jsonl` as runs end, and a run whose row is there is not trained again; one that was interrupted goes on from
its last checkpoint. `pretrain.md` and `pretrain.png` show what there is, and say what is missing.

"cpu" is meant to take at most 90 minutes on two quiet cores, "cpu-smoke" two minutes. It needs matplotlib. Times are
CPU time of one thread.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from testing import packages

from ..provenance import origin_of
from . import page
from .rows import read_rows, train_all
from .runs import PRESETS, Run, Studies, in_order

RESULTS = Path(__file__).parent.parent / "results"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
                runs, path, packages.cache_directory() / "pretrain", origin_of("benchmarks.pretrain", arguments)
            )
        if rows:
            page.write(studies, rows, output)
            print((output / "pretrain.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
