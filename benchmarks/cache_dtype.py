"""
What 8-bit entries cost: a converted SmolLM2 beside itself with `mosa_cache_dtype="int8"`, on facts in a context and
passages of the frontier.

python -m benchmarks.cache_dtype CONVERTED [--passages 4] [--output FILE]

An output that is there is gone on with.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf.evaluation import Sample, Subject, evaluate, table

from . import metrics
from .frontier.tasks import Size, suites
from .provenance import about, origin_of


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted", type=Path, help="folder that mosa-convert wrote")
    parser.add_argument("--passages", type=int, default=4, help="of each text (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file of all scores")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.converted)
    size = Size(prompt=512, scored=1280, context=1500, passages=options.passages)
    asked = suites(tokenizer, metrics.calibration(tokenizer), size)
    result = compare(options.converted, [sample for suite in asked for sample in suite.samples], options.output)
    print(f"{about([origin_of('benchmarks.cache_dtype', arguments)])}\n\n{table(result['rows'])}")


def compare(folder: Path, samples: list[Sample], output: Path | None = None) -> dict[str, Any]:
    """`evaluation.evaluate` of a converted model, and of the same with 8-bit entries."""
    subjects = [
        Subject(str(dtype), AutoModelForCausalLM.from_pretrained(folder, mosa_cache_dtype=dtype))
        for dtype in (None, "int8")
    ]
    return evaluate(subjects, samples, output)


if __name__ == "__main__":
    main()
