"""
Show what a model's groups keep of a text: one page, which needs no network. Installed as the command `mosa-trace`.

    mosa-trace converted --text a.txt --html out.html

Open the page in a browser: the text coloured by how many groups hold each token, a map of layers and groups to click,
and what is in the cache once each token has been read.
"""

import argparse
import sys
from pathlib import Path

from .. import __version__


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mosa-trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model directory, or name on the Hub; with --routers the base model's")
    parser.add_argument("--routers", metavar="DIRECTORY", help="routers alone, of `save_routers` or `mosa-heal`")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument(
        "--tokens", type=int, default=2000, help="of the text that are read, from its beginning (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="that the model computes in (default: its own)")
    parser.add_argument("--version", action="version", version=f"mosa-trace {__version__}")
    options = parser.parse_args(arguments)
    from .run_trace import run  # what computes is imported once there is something to compute

    try:
        traced = run(options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mosa-trace: {' '.join(str(error).split())}")
    held, last = traced.in_cache(len(traced.pieces) - 1), len(traced.pieces)
    print(f"After {last:,} tokens, {len(held)} sparse groups hold {held.float().mean():.1%} of what they have read.")
    print(f"Wrote {options.html}: open it in a browser.")


if __name__ == "__main__":
    main()
