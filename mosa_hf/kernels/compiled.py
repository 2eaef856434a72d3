"""The portable path over a whole sequence as `torch.library` ops, for `torch.compile(fullgraph=True)`.

How many tokens are selected is data, which the compiler cannot trace through. Here it sees one op whose output has a
known shape; what runs inside is `portable`, eagerly. The backward op runs the forward again.
"""

from collections.abc import Callable

import torch

from . import portable
from .layout import HeadWeights, KeyValues, Tokens

MaybeTensor = torch.Tensor | None


def selected_heads(
    hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens, past: None = None
) -> tuple[torch.Tensor, None]:
    """Same function as `reference.selected_heads`, without a cache: nothing is there to append."""
    return _selected_heads(*selected_inputs(hidden_states, weights, tokens)), None


def all_attention(
    query: torch.Tensor,
    near: KeyValues,
    kept: None,
    tokens: Tokens,
    window: int,
    far_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same function as `reference.all_attention`, without a cache."""
    return _all_attention(*all_inputs(query, near, tokens, window, far_bias))


def selected_inputs(hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens) -> tuple[MaybeTensor, ...]:
    """What the op `mosa::selected_heads` takes, in its order."""
    return hidden_states, *weights, *tokens[:7], tokens.until


def all_inputs(
    query: torch.Tensor, near: KeyValues, tokens: Tokens, window: int, far_bias: MaybeTensor
) -> tuple[MaybeTensor | int, ...]:
    """What the op `mosa::all_attention` takes, in its order."""
    where = (tokens.position, tokens.valid, tokens.segment, near.selected, near.until)
    return query, near.key, near.value, far_bias, *where, window


def _run_selected_heads(hidden_states: torch.Tensor, *inputs: MaybeTensor) -> torch.Tensor:
    weights, tokens = HeadWeights(*inputs[:7]), Tokens(*inputs[7:14], until=inputs[14])
    return portable.selected_heads(hidden_states, weights, tokens)[0].to(hidden_states.dtype).contiguous()


def _run_all_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far_bias: MaybeTensor,
    position: torch.Tensor,
    valid: MaybeTensor,
    segment: MaybeTensor,
    selected: torch.Tensor,
    until: MaybeTensor,
    window: int,
) -> torch.Tensor:
    tokens = Tokens(position, valid, segment, None, None, selected.transpose(1, 2), None)
    near_valid = None if valid is None else valid[:, None].expand_as(selected)
    near = KeyValues(key, value, position[:, None].expand_as(selected), near_valid, selected, until)
    return portable.all_attention(query, near, None, tokens, window, far_bias).to(query.dtype).contiguous()


def _gradients(
    function: Callable[..., torch.Tensor], grad: torch.Tensor, inputs: tuple, learn: tuple[int, ...]
) -> list[torch.Tensor]:
    """Gradients of the inputs `learn`; an empty tensor for an input that is None."""
    given = [i for i in learn if inputs[i] is not None]

    def output_of(*states: torch.Tensor) -> torch.Tensor:
        changed = dict(zip(given, states, strict=True))
        return function(*(changed.get(i, x) for i, x in enumerate(inputs)))

    # Not by autograd: an op runs below it.
    _, pull_back = torch.func.vjp(output_of, *(inputs[i] for i in given))
    grads = dict(zip(given, pull_back(grad), strict=True))
    return [grads[i].contiguous() if i in grads else grad.new_empty(0) for i in learn]


def _op(
    name: str, function: Callable[..., torch.Tensor], parameters: str, learn: tuple[int, ...]
) -> Callable[..., torch.Tensor]:
    """
    `function` as the op `mosa::name`, and another for its gradients.

    Args:
        function: its output is shaped like its first input.
        parameters: of a schema, in the order of the function's.
        learn: which of them have gradients.
    """
    op = torch.library.custom_op(f"mosa::{name}", function, mutates_args=(), schema=f"({parameters}) -> Tensor")

    @torch.library.custom_op(
        f"mosa::{name}_backward", mutates_args=(), schema=f"(Tensor grad, {parameters}) -> Tensor[]"
    )
    def backward_op(grad: torch.Tensor, *inputs) -> list[torch.Tensor]:
        return _gradients(function, grad, inputs, learn)

    @op.register_fake
    def _(first: torch.Tensor, *others) -> torch.Tensor:
        return torch.empty_like(first, memory_format=torch.contiguous_format)

    @backward_op.register_fake
    def _(grad: torch.Tensor, *inputs) -> list[torch.Tensor]:
        return [
            grad.new_empty(0)
            if inputs[i] is None
            else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
            for i in learn
        ]

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


_selected_heads = _op(
    "selected_heads",
    _run_selected_heads,
    "Tensor hidden_states, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? query_bias, "
    "Tensor? key_bias, Tensor? value_bias, Tensor position, Tensor? valid, Tensor? segment, Tensor cos, Tensor sin, "
    "Tensor selected, Tensor gate, Tensor? until",
    learn=(0, 1, 2, 3, 4, 5, 6, 7, 14),  # hidden states, weights and biases, gate
)
_all_attention = _op(
    "all_attention",
    _run_all_attention,
    "Tensor query, Tensor key, Tensor value, Tensor? far_bias, Tensor position, Tensor? valid, Tensor? segment, "
    "Tensor selected, Tensor? until, int window",
    learn=(0, 1, 2, 3),  # queries, keys, values, bias
)
