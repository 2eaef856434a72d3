"""
Give a pretrained model sparse key/value groups.

    mosa-convert org/model converted

Reads some text twice, fits the routers of all groups to what the model attends to, and writes a directory that
`from_pretrained` loads. Weight files are linked, never rewritten. Fitting is not resumed if it is interrupted; the
directory appears only when it is whole.
"""

import sys
from pathlib import Path

from .options import TEXT_HELP, add_loading, command_parser, one_line_errors, speak

# What messages of the Python functions call by other names than this command's options have.
WORDS = {
    "conversion": "--plan`, `--groups`, `--sparsity`, `--window",
    "input_ids": "--calibration",
    "text": "--calibration",
    "num_windows": "--windows",
}


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("mosa-convert", __doc__)
    parser.add_argument("source", metavar="MODEL", help="model directory, a .gguf file, or a name on the Hub")
    parser.add_argument("destination", metavar="DIRECTORY", help="to create; it appears only when it is whole")
    parser.add_argument("--plan", metavar="FILE", help="JSON plan of which groups are sparse, and how")
    parser.add_argument("--groups", type=int, help="groups that become sparse, over all layers (default: all)")
    parser.add_argument("--sparsity", type=float, help="select one token in this many, over all groups (default: 8)")
    parser.add_argument("--window", type=int, help="recent tokens that are always read (default: 512)")
    parser.add_argument(
        "--routers", metavar="ROUTERS", help="ready routers (directory or name), in place of a plan and calibration"
    )
    parser.add_argument("--routers-only", action="store_true", help="write routers alone, not the model")
    parser.add_argument(
        "--calibration", nargs="+", metavar="TEXT", help=f"that routers are fitted on: {TEXT_HELP} (default: our own)"
    )
    parser.add_argument("--windows", type=int, help="calibration windows (default: 18)")
    parser.add_argument(
        "--window-length", type=int, help="tokens of a window (default: 1024, or half of what the model reads)"
    )
    add_loading(parser, "fit routers")
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload the directory to the Hub, under this name")
    parser.add_argument("--save-plan", metavar="FILE", help="write the plan to a JSON file")
    parser.add_argument("--plot-plan", metavar="FILE", help="draw the plan as a heat map (PNG; needs matplotlib)")
    options = parser.parse_args(arguments)
    speak()
    try:
        with one_line_errors(parser.prog, parser, WORDS):
            from .run_convert import run

            run(options)
    except KeyboardInterrupt:
        if Path(options.destination).exists():
            sys.exit(f"mosa-convert: stopped. {options.destination} is whole; what came after it was not done.")
        sys.exit("mosa-convert: stopped. Nothing was written, and the next time begins anew.")


if __name__ == "__main__":
    main()
