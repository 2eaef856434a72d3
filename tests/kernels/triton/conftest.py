"""Every test here starts from the same random numbers, on the GPU if there is one."""

import importlib

import pytest
import torch

from .common import DEVICE


def dot(self, a, b, added, *options):
    """
    What the interpreter's `create_dot` should do, which multiplies the bits of bfloat16 as if they were integers.
    """
    interpreter, language, np = (
        importlib.import_module(x) for x in ("triton.runtime.interpreter", "triton.language", "numpy")
    )

    def numbers(factor):
        if factor.dtype.scalar == language.bfloat16:
            return (factor.data.astype(np.uint32) << 16).view(np.float32)
        return factor.data.astype(np.float32)

    return interpreter.TensorHandle(np.matmul(numbers(a), numbers(b)) + added.data, added.dtype.scalar)


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":  # interpreted, a small tile takes as long as a large one
        monkeypatch.setattr(
            importlib.import_module("triton.runtime.interpreter").InterpreterBuilder, "create_dot", dot
        )
        prefix = importlib.import_module("mosa_hf.kernels.prefix_attention.triton")
        small = dict.fromkeys((64, 128, 256), prefix.Tile(32, 32, 4, 2))
        monkeypatch.setattr(prefix, "FLOAT32", dict.fromkeys(prefix.FLOAT32, small))
        tiles = importlib.import_module("mosa_hf.kernels.triton_slots").tiles
        for name in ("gather_project", "project_scatter"):
            module = importlib.import_module(f"mosa_hf.kernels.{name}.triton")
            monkeypatch.setattr(module, "tiles", lambda head_dim, dtype: tiles(head_dim, torch.float16))
    with torch.device(DEVICE):
        yield
