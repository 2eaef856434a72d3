"""
docs/choosing.md's picture, of what `benchmarks.frontier` measured: perplexity and keys found again, against bytes.

    python -m benchmarks.frontier.picture
"""

import argparse
from pathlib import Path

from mosa_hf.atomic_write import atomic_file
from mosa_hf.evaluation import PERPLEXITY

from .page import by_method, draw
from .results import Results

ROOT = Path(__file__).parents[2]
KEYS = "key"  # the task of facts that the picture shows: the one that tells methods apart most


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks" / "results" / "frontier.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "frontier.png")
    options = parser.parse_args(arguments)
    rows = list(Results(options.rows).rows.values())
    shown = [row for row in rows if row["task"].startswith(PERPLEXITY) or row["task"] == KEYS]
    figure = draw(by_method(shown), list(dict.fromkeys(row["task"] for row in shown)))
    figure.set_size_inches(9.6, 4)
    with atomic_file(options.output) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


if __name__ == "__main__":
    main()
