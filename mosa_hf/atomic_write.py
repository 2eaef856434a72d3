"""Files and directories that appear when they are whole, or not at all."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_absent(destination: Path) -> None:
    """
    Long work asks before it begins; `atomic_directory` asks too.

    Raises:
        FileExistsError: if `destination` exists.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} exists: remove it or choose another destination.")


@contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """
    A directory to fill: it becomes `destination` when the block ends, and vanishes if the block fails.

    Raises:
        FileExistsError: if `destination` exists.
    """
    check_absent(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile.mkdtemp`, whose directories are private whatever the user's umask is.
    unfinished = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        yield unfinished
        os.rename(unfinished, destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """
    A path to write to: the file replaces `destination` when the block ends, and vanishes if the block fails.

    Raises:
        IsADirectoryError: if `destination` is a folder.
    """
    if destination.is_dir():
        raise IsADirectoryError(f"{destination} is a folder: name a file in it, or another one.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        yield Path(scratch) / destination.name
        os.replace(Path(scratch) / destination.name, destination)
