"""Files of JSON lines, to which runs append what they measure, and which pages show."""

import json
from pathlib import Path
from typing import Any

from mosa_hf.atomic_write import atomic_file


def read(path: Path) -> list[dict[str, Any]]:
    """
    What a file holds, which may not exist yet. Its last line may be half, of a run that was killed: it is cut off, so
    that lines can be appended.
    """
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if whole and not whole.endswith("\n"):
        whole = whole[: whole.rfind("\n") + 1]
        with atomic_file(path) as unfinished:
            unfinished.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
