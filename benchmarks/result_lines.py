"""Files of JSON lines, to which runs append what they measure, and which pages show."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mosa_hf.atomic_write import atomic_file

Lines = Iterable[dict[str, Any]]


def read(path: Path) -> list[dict[str, Any]]:
    """
    What a file holds, which may not exist yet. Its last line may be half, of a run that was killed: it is cut off, so
    that lines can be appended.
    """
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]
    if whole and not whole.endswith("\n"):
        write(path, lines)
    return lines


def key(line: dict[str, Any], names: Iterable[str]) -> str:
    """What tells a line from others: what it has of `names`."""
    return json.dumps([line[name] for name in names], sort_keys=True)


def by_key(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The lines of a file that may not exist yet, by `key`; of several with one key the last."""
    return {key(line, names): line for line in read(path)}


def append(path: Path, lines: Lines) -> None:
    """Add `lines` to a file, which may not exist yet, and neither may its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_text(lines))


def write(path: Path, lines: Lines) -> None:
    """Let a file hold `lines` and no others."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(_text(lines), encoding="utf-8")


def _text(lines: Lines) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
