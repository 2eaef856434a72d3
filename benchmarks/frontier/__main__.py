"""
Memory against quality: what is lost for how many bytes of keys and values, by conversions and by their baselines.

    python -m benchmarks.frontier
    python -m benchmarks.frontier --converted DIRECTORY --routers DIRECTORY --plan FILE
    python -m benchmarks.frontier --smoke
    python -m benchmarks.frontier --model NAME-or-folder

The last is of any model, by tasks that need one which retrieves, and has options of its own (`--model NAME --help`,
`any_model.py`). The others are of SmolLM2, the quick model, beside rivals.

SmolLM2-135M-Instruct reads a context; then the log-probability of what follows it is measured on unseen texts, and
whether facts in the context are found again (`mosa_hf/evaluation/retrieval.py`). Each method is measured as it would
decode, and its bytes at the end of what is scored. Conversions read the prompt as sparsely as all else; baselines by
the code of kvpress read it in full and prune it once.

Rows are appended to `frontier.jsonl` as they are measured, and a row that is there is not measured again: stop it when
you like and run it again. `frontier.md` and `frontier.png` show them.

It needs matplotlib; kvpress gets an environment of its own, in the cache of `testing/packages.py`.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from testing import pretrained

from ..provenance import origin_of
from . import any_model, page
from .measuring import measure_baselines, measure_here
from .methods import Method, Models, kvpress_methods
from .results import Results
from .tasks import SMOKE, Size, suites

OURS = ("1024/8", "512/8", "256/8", "512/16", "128/4", "256/16")
WINDOWS = (1344, 896, 576)  # 0.375, 0.25 and 0.16 of the tokens


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(word.partition("=")[0] == "--model" for word in arguments):
        return any_model.main(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="WINDOW/SPARSITY", help="conversions, of one fit")
    parser.add_argument("--converted", nargs="*", default=[], type=Path, metavar="DIRECTORY", help="`mosa-convert`'s")
    parser.add_argument("--routers", nargs="*", default=[], type=Path, metavar="DIRECTORY", help="`save_routers`'s")
    parser.add_argument("--plan", nargs="*", default=[], type=Path, metavar="FILE", help="`GroupPlan.save`'s")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="such as original, ours, SnapKV; all by default")
    parser.add_argument("--passages", type=int, help="of each text")
    parser.add_argument("--contexts", type=int, help="with facts, of each kind")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which say nothing but that it runs")
    parser.add_argument("--output", type=Path, help="directory of the results; for --smoke a temporary one")
    options = parser.parse_args(arguments)

    size = SMOKE if options.smoke else Size()
    chosen = {name: value for name in ("passages", "contexts") if (value := getattr(options, name)) is not None}
    size = replace(size, **chosen)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (Path(scratch) if options.smoke else Path(__file__).parent.parent / "results")
        ours = ["64/8"] if options.smoke else options.ours
        run(options, ours, size, output, origin_of("benchmarks.frontier", arguments))


def run(options: argparse.Namespace, ours: list[str], size: Size, output: Path, origin: dict[str, Any]) -> None:
    directory = pretrained.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    models = Models(directory, tokenizer, size)
    here = models.methods(ours) + models.given(options.converted, options.routers, options.plan)
    here += [
        Method("sink + window", {"window": window}, lambda window=window: models.window_alone(window))
        for window in ([64] if options.smoke else WINDOWS)
    ]
    elsewhere = kvpress_methods((0.44,), (0.355,)) if options.smoke else kvpress_methods()
    if options.only is not None:
        if unknown := set(options.only) - {method.name for method in here + elsewhere}:
            raise SystemExit(f"--only: no such method: {', '.join(sorted(unknown))}")
        here, elsewhere = ([each for each in some if each.name in options.only] for some in (here, elsewhere))
    asked = suites(tokenizer, models.calibration, size)
    results = Results(output / "frontier.jsonl")
    try:
        measure_here(here, asked, results, origin)
        measure_baselines(elsewhere, asked, results, origin, models, tokenizer)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    keys = {task: suite.all_settings for suite in asked for task in suite.tasks}
    rows = [row for row in results.rows.values() if row["settings"] == keys.get(row["task"])]
    if rows:
        page.write(rows, output)
        print((output / "frontier.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
