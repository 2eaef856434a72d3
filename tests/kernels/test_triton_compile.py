"""Triton kernels compile, and fit their target, on a machine without a GPU: each for one of the targets, in turn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a kernel takes of a GPU is its compiler's doing: 3.5 spills in one of them, on sm_80.
pytest.importorskip("triton", minversion="3.9")
pytestmark = pytest.mark.real
TARGETS = ("sm_80", "sm_90a", "gfx942")
KERNELS = r"^(?!.*fp32).*d=64"  # what else was compiled, and spills: benchmarks/results/kernels_compiled.md


def test_kernels_compile_without_spills():
    """
    Of head size 64, in a process of its own: this one may interpret kernels. All sizes, dtypes and targets take an
    hour: `python -m benchmarks.speed.compile_kernels` has what was compiled of them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.speed.compile_kernels",
            "--in-turn",
            "--only",
            KERNELS,
            "--targets",
            *TARGETS,
        ],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for kernel in ("gather_project", "project_scatter", "prefix_forward", "prefix_key_gradient", "decode_attend"):
        assert f"| {kernel} " in run.stdout
    for target in TARGETS:
        assert run.stdout.count(f"| {target} |") >= 7
