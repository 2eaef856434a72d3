"""Whether code runs on the data that it computes with, or is captured for other data that will come."""

import torch

FAKE = torch._C._TorchDispatchModeKey.FAKE


def is_captured() -> bool:
    """
    Whether this runs in `torch.compile`, `torch.export` or `torch.jit.trace`, or on fake tensors. What depends on the
    values of tensors may not be decided in Python then: the decision would be part of the graph. Nor may a tensor be
    kept for later calls.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._get_dispatch_mode(FAKE) is not None


def is_exported() -> bool:
    """
    Whether this is captured to run elsewhere, `torch.export` or `torch.jit.trace`: on any number of rows and tokens,
    and maybe where nobody knows our operations.
    """
    # What `torch.compiler.is_exporting()` returns: within `torch.compile`, torch 2.9 takes that function for True. And
    # what `torch.jit.is_tracing()` looks at, without its two calls: every layer asks.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None
