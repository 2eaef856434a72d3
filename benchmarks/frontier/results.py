"""Rows of a file of results: what is there already, and what is added."""

from functools import partial
from pathlib import Path
from typing import Any

from mosa_hf.evaluation import PERPLEXITY, Score, summary
from mosa_hf.evaluation.report import losses

from .. import result_lines
from .methods import Method
from .tasks import Suite

TELLS_APART = ("method", "parameters", "task", "settings")
row_key = partial(result_lines.key, names=TELLS_APART)


class Results:
    """The rows of a file of JSON lines, which may not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = result_lines.by_key(path, TELLS_APART)

    def lacks(self, method: Method, suite: Suite) -> bool:
        return any(row_key(row) not in self.rows for row in self.heads(method, suite))

    def heads(self, method: Method, suite: Suite) -> list[dict[str, Any]]:
        """What tells the rows of a method and an suite from others."""
        head = {"method": method.name, "parameters": method.parameters, "settings": suite.all_settings}
        return [{**head, "task": task} for task in suite.tasks]

    def add(self, rows: list[dict[str, Any]]) -> None:
        result_lines.append(self.path, rows)
        self.rows |= {row_key(row): row for row in rows}


def make_rows(
    method: Method, suite: Suite, scores: list[Score], bytes_per_token: int, origin: dict[str, Any]
) -> list[dict[str, Any]]:
    """
    A row for each task.

    Args:
        scores: of all continuations of the suite.
        bytes_per_token: that the original's keys and values take.
        origin: how, when and with what it was measured.
    """
    rows = []
    for task in suite.tasks:
        result = summary(task, scores)
        length = result.pop("length")
        rows.append(
            {
                "method": method.name,
                "parameters": method.parameters,
                "task": task,
                "share": result["kv_bytes"] / (length * bytes_per_token),
                **result,
                **({"losses": losses(task, scores)} if task.startswith(PERPLEXITY) else {}),
                "prompt": method.prompt,
                "frees_memory": method.frees_memory,
                "settings": suite.all_settings,
                **origin,
            }
        )
    return rows
