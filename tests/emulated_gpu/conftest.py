"""Without a compiler there is no emulated device, and without an interpreter no kernel runs on it."""

import pytest
import torch

from .device import COMPILER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    if reason is not None:
        for item in items:
            if item.path.parent.name == "emulated_gpu":
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_not() -> str | None:
    if torch.cuda.is_available():
        return "a GPU is there"
    if torch.version.cuda is not None:  # such a build asks the driver as soon as a tensor says `cuda:0`
        return "this build of torch has CUDA, but there is no driver"
    return "there is no C++ compiler (`c++`)" if COMPILER is None else None
