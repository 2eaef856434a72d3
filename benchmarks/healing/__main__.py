"""
What healing brings back: quality of a conversion against the tokens of text that it was healed on.

    python -m benchmarks.healing DIRECTORY
    torchrun --nproc-per-node 2 -m benchmarks.healing DIRECTORY    # the same steps, shared by two processes
    python -m benchmarks.healing DIRECTORY --score
    python -m benchmarks.healing DIRECTORY --smoke

SmolLM2-135M-Instruct is converted to few bytes and healed with adapters, as `mosa-heal` does it; some of the
checkpoints on the way are scored as `benchmarks.frontier` scores conversions, on the same passages. The text that it
is healed on shares no passage with these; one of them is of a kind that healing has never seen.

All that is made lies in DIRECTORY: stop it when you like and give the same directory to go on; with more `--steps`, a
finished healing goes on too. `--score` heals nothing and scores the checkpoints that are there, so that it can run
beside the healing. Rows are appended to
`heal.jsonl` as they are measured, and a row that is there is not measured again; `heal.md` and `heal.png` show them.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer

from mosa_hf.cli.run_heal import heal
from testing import pretrained

from .. import metrics
from ..frontier.measuring import measure_here
from ..frontier.results import Results, row_key
from ..frontier.tasks import SMOKE, Size, Suite, continuations_of_texts
from ..provenance import origin_of
from . import page
from .checkpoints import logged, methods
from .recipe import Recipe, healed_folder, prepare, training


def asked_of(row: dict[str, Any], asked: list[Suite]) -> bool:
    """Whether a row answers one of these suites."""
    return any(row["task"] in each.tasks and row["settings"] == each.all_settings for each in asked)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="DIRECTORY", help="of what is made; it may not exist yet")
    parser.add_argument("--score", action="store_true", help="score the checkpoints that are there, heal nothing")
    parser.add_argument(
        "--steps", type=int, help=f"of {Recipe.examples} x {Recipe.tokens} tokens (default: {Recipe.steps})"
    )
    parser.add_argument("--windows", type=int, help=f"of calibration text (default: {Size.windows})")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which say nothing but that it runs")
    parser.add_argument("--output", type=Path, help="directory of the results; for --smoke a temporary one")
    options = parser.parse_args(arguments)
    recipe, size = Recipe(), Size()
    if options.smoke:
        recipe = Recipe(64, 8, steps=4, tokens=64, save_steps=1, scored=(1, 2), elsewhere=(("128/8", 0.5),))
        size = SMOKE
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (Path(scratch) if options.smoke else Path(__file__).parent.parent / "results")
        run(options, recipe, size, output, origin_of("benchmarks.healing", arguments))


def run(options: argparse.Namespace, recipe: Recipe, size: Size, output: Path, origin: dict[str, Any]) -> None:
    work = options.work
    tokenizer = AutoTokenizer.from_pretrained(pretrained.smollm2_directory())
    # The frontier's own calibration text tells which passages are scored, so that its rows are of the same ones.
    asked = continuations_of_texts(tokenizer, metrics.calibration(tokenizer, size.windows, size.window), size)
    processes = PartialState(cpu=True)
    is_done = options.score or healed_folder(work, recipe).exists()
    healing = None if is_done else training(work, recipe)
    with processes.main_process_first():
        prepare(work, recipe, replace(size, windows=options.windows or size.windows), tokenizer, asked)
    if healing is not None:
        heal(*healing)
    if not processes.is_main_process:
        return
    results, frontier = Results(output / "heal.jsonl"), Results(output / "frontier.jsonl")
    found = logged(work, recipe, origin)
    found += [row for row in frontier.rows.values() if row["method"] == "original" and asked_of(row, asked)]
    results.add([row for row in found if row_key(row) not in results.rows])
    try:
        measure_here(methods(work, recipe), asked, results, origin)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    # Rows of other passages, as of an earlier version, stay in the file.
    shown = [row for row in results.rows.values() if row["task"] == page.DIVERGENCE or asked_of(row, asked)]
    page.write(shown, output)
    print((output / "heal.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
