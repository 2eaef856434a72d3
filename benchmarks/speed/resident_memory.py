"""How much memory one call takes, of this process or of one of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def resident_memory(call: Callable[[], object]) -> int:
    """How far this process' resident set grows during one call, in bytes; Linux only."""

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def of_own_process(module: str, *words: str) -> int:
    """What `module`, called with `--memory-of` and `words`, prints of a call in a process that does nothing else."""
    command = [sys.executable, "-m", module, "--memory-of", *words]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
