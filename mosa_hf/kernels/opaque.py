"""A function on tensors as one `torch.library` op with gradients, for `torch.compile(fullgraph=True)`.

How many tokens are selected is data, which the compiler cannot trace through. Here it sees one op whose output has a
known shape; what runs inside runs eagerly. The backward op runs the forward again.
"""

from collections.abc import Callable

import torch

from .derivatives import plain_gradients, refuse_second_gradient

MaybeTensor = torch.Tensor | None


def opaque_op(
    name: str, function: Callable[..., torch.Tensor], parameters: str, learn: tuple[int, ...], channels: int = 0
) -> Callable[..., torch.Tensor]:
    """
    `function` as the op `mosa::name`, and another for its gradients.

    Args:
        name: of the op, without its namespace.
        function: its output is shaped like its first input, but for the last size.
        parameters: of a schema, in the order of the function's.
        learn: which of them have gradients.
        channels: which of them, a tensor, has as many channels, its last size, as the output.
    """

    def run(first: torch.Tensor, *others) -> torch.Tensor:
        return function(first, *others).to(first.dtype).contiguous()

    op = torch.library.custom_op(f"mosa::{name}", run, mutates_args=(), schema=f"({parameters}) -> Tensor")

    @torch.library.custom_op(
        f"mosa::{name}_backward", mutates_args=(), schema=f"(Tensor grad, {parameters}) -> Tensor[]"
    )
    def backward_op(grad: torch.Tensor, *inputs) -> list[torch.Tensor]:
        """Gradients of the inputs `learn`; an empty tensor for an input that is None."""
        needed = tuple(i in learn and x is not None for i, x in enumerate(inputs))
        grads = plain_gradients(run, inputs, needed, grad)  # not by autograd: an op runs below it
        return [grad.new_empty(0) if (own := grads[i]) is None else own.contiguous() for i in learn]

    refuse_second_gradient(backward_op)

    @op.register_fake
    def _(first: torch.Tensor, *others) -> torch.Tensor:
        return first.new_empty(*first.shape[:-1], (first, *others)[channels].shape[-1])

    @backward_op.register_fake
    def _(grad: torch.Tensor, *inputs) -> list[torch.Tensor]:
        return [grad.new_empty(0) if (own := inputs[i]) is None else own.new_empty(own.shape) for i in learn]

    def setup_context(ctx, inputs, output) -> None:
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.others = {i: x for i, x in enumerate(inputs) if not isinstance(x, torch.Tensor)}

    def backward(ctx, grad: torch.Tensor) -> tuple[MaybeTensor, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [ctx.others[i] if i in ctx.others else next(tensors) for i in range(ctx.num_inputs)]
        grads: list[MaybeTensor] = [None] * ctx.num_inputs
        for i, grad_input in zip(learn, backward_op(grad.contiguous(), *inputs), strict=True):
            grads[i] = None if inputs[i] is None else grad_input
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)
    return op
