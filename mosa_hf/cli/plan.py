"""
Search for what each key/value group of a model should become, so that its cache takes a given share of the original's
bytes.

    mosa-plan org/model plan.json --share 0.25 --text a.txt b.txt
    mosa-convert org/model converted --plan plan.json --calibration a.txt b.txt

What was measured is kept beside the plan until the plan is written: the same command goes on from there.
"""

import sys
from pathlib import Path

from .options import TEXT_HELP, add_loading, command_parser, one_line_errors, speak

# What messages of the Python functions call by other names than this command's options have.
WORDS = {"input_ids": "--text", "calibration": "--text", "num_tokens": "--tokens", "num_windows": "--windows"}


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("mosa-plan", __doc__)
    parser.add_argument("source", metavar="MODEL", help="model directory, a .gguf file, or a name on the Hub")
    parser.add_argument(
        "destination", metavar="PLAN", type=Path, help="JSON file to write, which `mosa-convert --plan` reads"
    )
    parser.add_argument("--share", type=float, required=True, help="of the bytes of the original's cache")
    parser.add_argument("--tokens", type=int, default=4096, help="that are in the cache (default: %(default)s)")
    parser.add_argument(
        "--text", nargs="+", metavar="TEXT", help=f"like that which it will read: {TEXT_HELP} (default: our own)"
    )
    parser.add_argument(
        "--texts", type=int, default=3, help="stretches of it that plans are measured on (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="exchanges that are tried (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=18, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    add_loading(parser, "read the text")
    parser.add_argument(
        "--uniform", type=Path, metavar="FILE", help="write the best uniform plan too, to compare with"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the plan as a heat map (PNG; needs matplotlib)")
    options = parser.parse_args(arguments)
    speak()
    try:
        with one_line_errors(parser.prog, parser, WORDS):
            from .run_plan import run

            run(options)
    except KeyboardInterrupt:
        sys.exit("mosa-plan: stopped. What was measured is kept; the same command goes on from there.")


if __name__ == "__main__":
    main()
