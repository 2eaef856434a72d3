"""
Show what a model's groups keep of a text: one page, which needs no network.

    mosa-trace converted --text a.txt --html out.html

Open the page in a browser: the text coloured by how many groups hold each token, a map of layers and groups to click,
and what is in the cache once each token has been read.
"""

import sys

from .options import TEXT_HELP, TRACED_TOKENS, add_loading, command_parser, one_line_errors, speak


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("mosa-trace", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="model directory, or name on the Hub; with --routers the base model's"
    )
    parser.add_argument("--routers", metavar="ROUTERS", help="routers alone (directory or name)")
    parser.add_argument("--text", required=True, metavar="TEXT", help=TEXT_HELP)
    parser.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    parser.add_argument(
        "--tokens",
        type=int,
        help=f"of the text, from its beginning (default: {TRACED_TOKENS}, or what the model reads)",
    )
    add_loading(parser, "read the text")
    options = parser.parse_args(arguments)
    speak()
    try:
        with one_line_errors(parser.prog, parser, {"max_tokens": "--tokens"}):
            from .run_trace import run

            run(options)
    except KeyboardInterrupt:
        sys.exit("mosa-trace: stopped. Nothing was written.")


if __name__ == "__main__":
    main()
