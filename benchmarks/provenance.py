"""What rows of results say of where they come from."""

import datetime
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
import transformers

import mosa_hf
from mosa_hf.modeling.devices import dtype_name


def origin_of(module: str, arguments: list[str], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """How, when and with what a run of `module` measures, models of `dtype`; without paths of this machine."""
    words = [Path(word).name if Path(word).is_absolute() or Path(word).exists() else word for word in arguments]
    num_threads = torch.get_num_threads()
    threads = f"{num_threads} thread" if num_threads == 1 else f"{num_threads} threads"
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {threads}, {dtype_name(dtype)}",
        "versions": {
            "mosa_hf": mosa_hf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def about(lines: list[dict[str, Any]]) -> str:
    """A list in Markdown: commands, dates, machines and versions of all lines."""
    found = [f"`{command}`" for command in sorted({line["command"] for line in lines})]
    found += ["; ".join(sorted({line[what] for line in lines})) for what in ("date", "machine")]
    versions = sorted({f"{package} {version}" for line in lines for package, version in line["versions"].items()})
    return "\n".join(f"- {each}" for each in [*found, ", ".join(versions)])
