"""JSON files that a test changes."""

import json
from collections.abc import Callable
from pathlib import Path


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
