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
        NotADirectoryError, PermissionError: see `_check_place`.
    """
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists: remove it or choose another destination.")
    _check_place(destination)


def check_replaceable(destination: Path) -> None:
    """
    The same of a file; `atomic_file` asks too.

    Raises:
        IsADirectoryError: if `destination` is a folder.
        NotADirectoryError, PermissionError: see `_check_place`.
    """
    if destination.is_dir():
        raise IsADirectoryError(f"{destination} is a folder: name a file in it, or another one.")
    _check_place(destination)


def _check_place(destination: Path) -> None:
    """
    Raises:
        NotADirectoryError: if what is to be a folder above `destination` is none.
        PermissionError: if the nearest one that there is may not be written to.
    """
    parent = next(each for each in destination.absolute().parents if os.path.lexists(each))
    if not parent.is_dir():
        raise NotADirectoryError(f"{destination} cannot be made: {parent} is no folder. Choose another destination.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{destination} cannot be made: {parent} may not be written to. Choose another destination."
        )


@contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """
    A directory to fill: it becomes `destination` when the block ends, and vanishes if the block fails.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: see `check_absent`.
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
        IsADirectoryError, NotADirectoryError, PermissionError: see `check_replaceable`.
    """
    check_replaceable(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        yield Path(scratch) / destination.name
        os.replace(Path(scratch) / destination.name, destination)
