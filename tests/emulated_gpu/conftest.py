"""Without a compiler there is no emulated device, and without an interpreter no kernel runs on it."""

import pytest
import torch

from .device import COMPILER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "a GPU is there" if torch.cuda.is_available() else "there is no C++ compiler (`c++`)"
    if torch.cuda.is_available() or COMPILER is None:
        for item in items:
            if item.path.parent.name == "emulated_gpu":
                item.add_marker(pytest.mark.skip(reason=reason))
