"""Triton kernels compile, and fit their target, on a machine without a GPU: each for one of the targets, in turn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a kernel takes of a GPU is its compiler's doing: 3.5 spills in one of them, on sm_80.
pytest.importorskip("triton", minversion="3.9")
pytestmark = pytest.mark.real


def test_kernels_compile_without_spills():
    """In a process of its own: this one may interpret kernels. All targets take three times as long as this."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.compile_kernels", "--in-turn"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for kernel in ("gather_project", "project_scatter", "prefix_forward", "prefix_key_gradient", "selected_positions"):
        assert f"| {kernel} " in run.stdout
    for target in ("sm_80", "sm_90a", "gfx942"):
        assert run.stdout.count(f"| {target} |") >= 10
