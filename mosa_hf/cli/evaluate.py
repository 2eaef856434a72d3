"""
What a model remembers of long contexts, and what that takes, beside its original.

    mosa-evaluate converted --text a.txt b.txt --facts 2 --output results.json

Of each text, slices are read: a context, and the tokens after it, whose perplexity is measured. Facts are five-digit
codes and a list of made-up words, hidden in a context and asked for. Bytes are those of the cache's live tensors after
all of it. Without --original, a converted model is compared with its own weights, all groups dense.
"""

import sys
from pathlib import Path

from .options import TEXT_HELP, add_loading, command_parser, one_line_errors, speak

WORDS = {"contexts": "--facts"}  # what messages call by another name than this command's options have


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("mosa-evaluate", __doc__)
    parser.add_argument("model", help="model directory, or name on the Hub; with --routers the base model's")
    parser.add_argument(
        "--routers", metavar="ROUTERS", help="`save_routers`' or `mosa-heal`'s, with its adapter; or a name on the Hub"
    )
    parser.add_argument("--original", metavar="MODEL", help="what is compared with (default: see above)")
    parser.add_argument("--text", nargs="+", required=True, metavar="TEXT", help=f"each of {TEXT_HELP}")
    parser.add_argument("--context", type=int, default=3072, help="tokens read first (default: %(default)s)")
    parser.add_argument("--scored", type=int, default=512, help="tokens scored after them (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=4, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--facts", type=int, default=0, metavar="N", help="contexts with facts, of either kind, in the first text"
    )
    add_loading(parser, "compute")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON to write; the same command goes on from it if interrupted"
    )
    parser.add_argument(
        "--card", action="store_true", help="write the table into the model card in the model's or routers' directory"
    )
    options = parser.parse_args(arguments)
    speak()
    try:
        with one_line_errors(parser.prog, parser, WORDS):
            from .run_evaluate import run

            run(options)
    except KeyboardInterrupt:
        is_kept = options.output is not None and options.output.exists()
        kept = f" {options.output} has what was measured: the same command goes on from it." if is_kept else ""
        print(f"Stopped.{kept}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
