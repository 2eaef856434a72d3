"""
A GPU that is not there: its tensors say `cuda:0`, lie in the CPU's memory, and are computed on there. What a model
asks of it is counted: operations, as a GPU would have them launched, waits of the host for the device, and operations
whose tensors lie on different devices. Triton's kernels run in the interpreter. No backward pass runs on it.
"""

import collections
import contextlib
import ctypes
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

from mosa_hf import kernels
from testing.packages import cached

DEVICE = torch.device("cuda:0")
GUARD = Path(__file__).with_name("guard.cpp")
COMPILER = shutil.which("c++")
aten = torch.ops.aten

# Operations whose result has a size that depends on data, or is a number of the host's.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_", "copy"}
# What a GPU has no launch for: other views of the same memory, and memory that nothing is written to.
FREE = set(
    "view _unsafe_view expand transpose t permute slice select unsqueeze squeeze as_strided alias detach split "
    "split_with_sizes unbind narrow reshape _reshape_alias lift_fresh unfold diagonal view_as_real chunk movedim "
    "is_same_size empty new_empty empty_like empty_strided new_empty_strided set_ resize_ _local_scalar_dense "
    "is_nonzero".split()
)
FOLDERS = ("mosa_hf", "transformers")


@dataclass
class Counts:
    """What has been asked of the device, by operation and by where in the code."""

    launches: Counter = field(default_factory=collections.Counter)
    waits: Counter = field(default_factory=collections.Counter)
    mixed: Counter = field(default_factory=collections.Counter)

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()


_counts: Counts | None = None  # where it is counted; None: nowhere
_looks_up_places = False  # which takes most of the time


def _note(kind: str, what: str) -> None:
    if _counts is not None:
        getattr(_counts, kind)[f"{what} {_place()}" if _looks_up_places or kind != "launches" else what] += 1


def _place() -> str:
    """The two innermost lines of our code or Transformers'."""
    lines = []
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if (folder := next((each for each in FOLDERS if each in parts), None)) is not None:
            lines.append(f"{'/'.join(parts[parts.index(folder) + 1 :])}:{frame.lineno}")
            if len(lines) == 2:
                break
    return " < ".join(lines)


class DeviceTensor(torch.Tensor):
    """A tensor of the device: `held` is what it holds."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=requires_grad,
            storage_size=held.untyped_storage().nbytes(),
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held})"

    def tolist(self) -> list:
        _note("waits", "tolist")
        return self.held.tolist()

    def cpu(self) -> torch.Tensor:
        _note("waits", "cpu")
        return self.held.clone()


def _is_waiting(func: Any, args: tuple) -> bool:
    name, _, overload = func.name().partition(".")
    if name in WAITING or f"{name}.{overload}" in WAITING:
        return True
    if name.partition("::")[2] in INDEXING:  # by a mask, whose places have to be counted first
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None)
    return False


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the device does instead of a GPU."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    own = [each for each in tensors if isinstance(each, DeviceTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not own and asked != "cuda":
        return func(*args, **kwargs)
    op = func.name().partition("::")[2].partition(".")[0]
    if op in COPIES:
        source = args[1] if op == "copy_" else args[0]
        to_device = isinstance(args[0], DeviceTensor) if op == "copy_" else (asked or "cuda") == "cuda"
        if isinstance(source, DeviceTensor) != to_device and source.numel():
            _note("waits", f"{'to' if to_device else 'from'} the device")
    elif own and any(each.ndim and each.numel() and not isinstance(each, DeviceTensor) for each in tensors):
        _note("mixed", func.name())
    if _is_waiting(func, args):
        _note("waits", func.name())
    is_kernel = func.namespace == "mosa"  # of our own: what it launches is counted one by one
    if op not in FREE and not is_kernel:
        _note("launches", func.name())
    wrappers = {id(each.held): each for each in own}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, DeviceTensor) else x, (args, kwargs))
    if asked == "cuda":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if is_kernel:
        with InKernel():  # which would step aside for an operation that it is asked of, and miss what that one runs
            output = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    else:
        output = func(*args, **kwargs)
    if asked not in (None, "cuda"):  # a copy for the host
        return output.clone() if id(output) in wrappers else output
    if op == "_local_scalar_dense" or (op == "copy_" and not isinstance(tensors[0], DeviceTensor)):
        return output

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x)

    return tree_map(wrapped, output)


class InKernel(TorchDispatchMode):
    """Counts what a kernel of ours asks for, whose tensors are all the device's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            with self:  # below autograd, what is made of other operations comes as it is called
                output = func.decompose(*args, **(kwargs or {}))
            if output is not NotImplemented:
                return output
            if _is_waiting(func, args):
                _note("waits", func.name())
            if func.name().partition("::")[2].partition(".")[0] not in FREE:
                _note("launches", func.name())
        return func(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Tensors that are made for `cuda` are the device's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Let there be a GPU meanwhile, and Triton's kernels run on it."""
    _install_guard()
    kernels._load("triton")
    make_tensor, run_kernel, mark = torch.tensor, interpreter.GridExecutor.__call__, torch._dynamo.mark_static_address

    def tensor(data: Any, *, device: Any = None, **kwargs) -> torch.Tensor:
        made = make_tensor(data, **kwargs)
        if device is None or torch.device(device).type != "cuda":
            return made if device is None else made.to(device)
        if made.numel():
            _note("waits", "torch.tensor to the device")
        return DeviceTensor(made)

    def launch(self, *args, **kwargs):
        _note("launches", f"triton::{self.fn.__name__}")
        with torch.utils._python_dispatch._disable_current_modes():
            return run_kernel(self, *args, **kwargs)

    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(torch, "tensor", tensor),
            mock.patch.object(interpreter.GridExecutor, "__call__", launch),
            mock.patch.object(torch._dynamo, "mark_static_address", lambda x, *args: mark(getattr(x, "held", x))),
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            mock.patch.object(torch.cuda, "current_device", lambda: 0),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
            mock.patch.object(kernels, "_has_gpu_build", True),
            OnDevice(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


@contextlib.contextmanager
def counting(places: bool = False) -> Iterator[Counts]:
    """Count what happens meanwhile; with the `places` in the code that launch something."""
    global _counts, _looks_up_places
    before = _counts, _looks_up_places
    counts, _looks_up_places = Counts(), places
    _counts = counts
    try:
        yield counts
    finally:
        _counts, _looks_up_places = before


def on_device(tensor: torch.Tensor) -> DeviceTensor:
    return DeviceTensor(tensor)


def move(model: nn.Module) -> nn.Module:
    """Put a model's weights and buffers on the device, tied ones still tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                learns = parameter.requires_grad
                moved.setdefault(id(parameter), nn.Parameter(DeviceTensor(parameter.detach()), learns))
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = DeviceTensor(buffer.detach())
    return model


def _install_guard() -> None:
    """Compile what PyTorch asks of a device, once for each version of it, and let PyTorch have it."""

    def build(scratch: Path) -> Path:
        root = Path(torch.__file__).parent
        library = scratch / "guard.so"
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([COMPILER, str(GUARD), *flags, "-o", str(library)], check=True, capture_output=True)
        return library

    ctypes.CDLL(str(cached(f"emulated-gpu-{torch.__version__}.so", build))).install()
