"""What of this backend is compiled ahead of time, without a GPU, by `benchmarks/speed/compile_kernels.py`."""

from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction


class KernelBuild(NamedTuple):
    """
    One kernel at one production setting. Every op file exports its own as `production_builds() -> list[KernelBuild]`.
    """

    name: str  # as the table shows it: the kernel and what distinguishes this setting, "prefix_forward d=128 R=4"
    function: JITFunction
    signature: dict[str, str]  # run-time argument → Triton type: "*bf16", "fp32", "i32", or "i32:16", a multiple of 16
    constants: dict[str, Any]  # constexpr argument → value; arguments that are None belong here as well
    num_warps: int
    num_stages: int


def tensors(kind: str, *names: str) -> dict[str, str]:
    """The signature's part of the arguments `<name>_ptr`."""
    return {f"{name}_ptr": kind for name in names}


# What kernels that walk slots take of them.
SLOTS = tensors("*i32", "index", "count")
SLOTS |= dict.fromkeys(("batch_size", "num_tokens", "num_groups", "num_slots"), "i32")
