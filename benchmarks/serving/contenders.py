"""What is served beside each other, each in a process of its own, of which one works at a time."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import MARK

CONCURRENCY = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x")  # of vLLM's log


@dataclass
class Contender:
    """
    A model with the settings of its engine, which starts when it is first asked to serve.

    Args:
        name: of the model, in tables.
        model: its folder.
        chunk: tokens that a step reads at most.
        sequences: requests that may run at once.
        block: tokens of one cache block; None: as the model has it.
        others: `memory` in bytes and `max_len`, which all contenders share.
    """

    name: str
    model: Path
    chunk: int
    sequences: int
    block: int | None
    others: dict[str, int]
    process: subprocess.Popen | None = field(default=None, init=False)
    log: list[str] = field(default_factory=list, init=False)

    @property
    def settings(self) -> dict[str, int | None]:
        return {**self.others, "chunk": self.chunk, "sequences": self.sequences, "block": self.block}

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """
        What `engine.Served.measure` returns, and vLLM's figure of concurrency.

        Raises:
            RuntimeError: if the engine dies, with the end of its log.
        """
        if self.process is None:
            settings = json.dumps({"model": str(self.model), **self.settings})
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving.engine", settings],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._answer()
            self._ask({"prompts": [prompts[0][:64]], "new": 8})  # warm
        measured = self._ask({"prompts": prompts, "new": new})
        return {"concurrency": float(CONCURRENCY.findall("".join(self.log))[-1]), **measured}

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.log.append(line)
        raise RuntimeError(f"{self.model}: the engine failed.\n{''.join(self.log)[-2000:]}")

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None
