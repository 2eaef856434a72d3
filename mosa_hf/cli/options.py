"""What the commands have in common: options that several have, progress in words, and errors in one line."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from mosa_hf import __version__

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
TRACED_TOKENS = 2000  # that `mosa-trace` reads of a text where nothing else is said
TEXT_HELP = (
    "text files; JSON lines (.jsonl) and Parquet, whose rows have `text` or `messages` (chats); or data sets, "
    "`name[:configuration[:split]]`, with the extra `datasets`"
)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows its name and its version."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{name} {__version__}")
    return parser


def add_loading(parser: argparse.ArgumentParser, work: str) -> None:
    """The options of `mosa_hf.conversion.Loading`; `work` is what the model computes for."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--token", help="for private and gated models (default: that of `hf auth login`)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=f"to {work} in (default: the model's own)")
    parser.add_argument(
        "--device-map",
        "--device",
        metavar="DEVICE",
        help=f'where to {work}: "cpu", "cuda", "cuda:1", "auto" over all devices (default: a GPU if there is one)',
    )


def loading_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `mosa_hf.conversion.Loading`."""
    return {
        "revision": options.revision,
        "token": options.token,
        "dtype": options.dtype,
        "device_map": options.device_map or default_device_map(),
    }


def hub_of(options: Any) -> dict[str, str]:
    """How the Hub is asked for what `options` name, as `from_pretrained` takes it."""
    return {name: value for name in ("revision", "token") if (value := getattr(options, name)) is not None}


def default_device_map() -> str | None:
    """Over all accelerators if there is any; None: the CPU."""
    import torch

    return "auto" if torch.accelerator.is_available() else None


@contextmanager
def one_line_errors(name: str, parser: argparse.ArgumentParser, words: Mapping[str, str]) -> Iterator[None]:
    """
    What a user can do something about ends the command with one line that names its own options.

    Args:
        name: of the command.
        parser: of its options.
        words: what messages call by the names of Python's arguments, in this command's words; what has an option of
            the same name needs none.
    """
    options = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    known = options | dict(words)

    def own(match: re.Match) -> str:
        return f"`{known[match[1]]}{match[2]}`" if match[1] in known else match[0]

    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        message = re.sub(r"`(\w+)((?:=[^`]*)?)`", own, " ".join(str(error).split()))
        sys.exit(f"{name}: {message}")


class StandardError(logging.StreamHandler):
    """Whatever standard error is when something is said."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def speak() -> None:
    """Show on standard error what the package says of its work, as it does it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes the first alone
        return
    logger = logging.getLogger("mosa_hf")
    if not logger.handlers:
        handler = StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
