"""Converted models in vLLM: `make serving` installs it. Engines run in the test's own process, where it can look."""

import importlib.util
import os
from pathlib import Path

import pytest

# Read by vLLM when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
HAS_VLLM = importlib.util.find_spec("vllm") is not None
REASON = "vLLM is not installed: `make serving` runs these in an environment that has it"


class Skipped(pytest.Module):
    """A file of tests that need vLLM, where there is none."""

    def collect(self):
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if HAS_VLLM:
        return None
    return Skipped.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
