"""What of this backend is compiled ahead of time, without a GPU, by `benchmarks/speed/compile_kernels.py`."""

from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction


class KernelBuild(NamedTuple):
    """One kernel at one production setting. Op files export theirs by `production_builds() -> list[KernelBuild]`."""

    name: str  # as the table shows it: the kernel and what distinguishes this setting, "prefix_forward d=128 R=4"
    function: JITFunction
    signature: dict[str, str]  # run-time argument → Triton type: "*bf16", "fp32", "i32", or "i32:16", a multiple of 16
    constants: dict[str, Any]  # constexpr argument → value; arguments that are None belong here as well
    num_warps: int
    num_stages: int
    backend: str | None = None  # Triton's that it is made for; None: all


# What builds are made for: Triton's names of dtypes, and head sizes, powers of 2 or not.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LABELS = {"bf16": "", "fp16": " fp16", "fp32": " fp32"}  # of builds' names
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def tensors(kind: str, *names: str) -> dict[str, str]:
    """The signature's part of the arguments `<name>_ptr`."""
    return {f"{name}_ptr": kind for name in names}


# What kernels that walk slots take of them.
SLOTS = tensors("*i32", "index", "count")
COUNTS = ["batch_size", "num_tokens", "num_groups", "num_slots"]  # of a call: worth no build of their own
SLOTS |= dict.fromkeys(COUNTS, "i32")
