"""
Which derivatives are taken of what runs. The fast forms have a first gradient; for transforms of `torch.func` and
gradients of gradients there is the reference, of PyTorch's own operations alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

SECOND = (
    "The fast forms of sparse attention have no gradient of a gradient (`create_graph=True`, `torch.func`): run the "
    'model within `with mosa_hf.use_backend("reference"):`, its dense heads with `attn_implementation="eager"`.'
)


def is_transformed() -> bool:
    """
    Whether this runs under `vmap`, forward-mode differentiation, or several transforms of `torch.func`. A single
    `grad` is what autograd does.
    """
    is_forward = forward_ad._current_level >= 0
    if not (is_forward or torch._C._are_functorch_transforms_active()) or torch.compiler.is_compiling():
        return False
    if is_forward:
        return True
    transforms = [each.key() for each in retrieve_all_functorch_interpreters()]
    return transforms != [torch._C._functorch.TransformType.Grad]


def is_vmapped() -> bool:
    """Whether this runs under `torch.func.vmap`, or what is made of it (`jacrev`, `hessian`)."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in retrieve_all_functorch_interpreters())


def is_differentiated_again(grad: torch.Tensor) -> bool:
    """Asked in a backward pass of a gradient: whether that may be differentiated, or is several at once (`vmap`)."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def plain_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: tuple[Any, ...],
    needed: tuple[bool, ...],
    grads: torch.Tensor | tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor | None, ...]:
    """
    Gradients of the `needed` inputs of a function of PyTorch's own operations, from `grads` of what it returns; they
    can be differentiated again.
    """
    learn = [i for i, is_needed in enumerate(needed) if is_needed]

    def output_of(*states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        changed = dict(zip(learn, states, strict=True))
        return function(*(changed.get(i, x) for i, x in enumerate(inputs)))

    pull_back = torch.func.vjp(output_of, *(inputs[i] for i in learn))[1]
    own = dict(zip(learn, pull_back(grads), strict=True))
    return tuple(own.get(i) for i in range(len(inputs)))


def refuse_second_gradient(op: torch.library.CustomOpDef) -> None:
    """Let an op that computes gradients say what to do when someone asks for the gradient of those."""

    def refuse(ctx, *grads):
        raise RuntimeError(SECOND)

    op.register_autograd(refuse)


def once(heads: torch.Tensor) -> torch.Tensor:
    """
    `heads`, what PyTorch's fused attention gave, which has no gradient of its gradient: with an error that says what
    to do instead.
    """
    # Where PyTorch chose to compute it by products, its name is another, and there is one.
    if heads.requires_grad and not torch._C._are_functorch_transforms_active():
        if "ScaledDotProduct" in type(heads.grad_fn).__name__:
            heads.register_hook(_refuse)
    return heads


def _refuse(grad: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND)
