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


def _run_selected_heads(
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    query_bias: MaybeTensor,
    key_bias: MaybeTensor,
    value_bias: MaybeTensor,
    *tokens: MaybeTensor,
) -> torch.Tensor:
    weights = HeadWeights(query, key, value, output, query_bias, key_bias, value_bias)
    tokens = Tokens(*tokens[:7], until=tokens[7])
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


@torch.library.custom_op("mosa::selected_heads", mutates_args=())
def _selected_heads(
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    query_bias: MaybeTensor,
    key_bias: MaybeTensor,
    value_bias: MaybeTensor,
    position: torch.Tensor,
    valid: MaybeTensor,
    segment: MaybeTensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    selected: torch.Tensor,
    gate: torch.Tensor,
    until: MaybeTensor,
) -> torch.Tensor:
    weights = (query, key, value, output, query_bias, key_bias, value_bias)
    tokens = (position, valid, segment, cos, sin, selected, gate, until)
    return _run_selected_heads(hidden_states, *weights, *tokens)


@torch.library.custom_op("mosa::selected_heads_backward", mutates_args=())
def _selected_heads_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    query_bias: MaybeTensor,
    key_bias: MaybeTensor,
    value_bias: MaybeTensor,
    position: torch.Tensor,
    valid: MaybeTensor,
    segment: MaybeTensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    selected: torch.Tensor,
    gate: torch.Tensor,
    until: MaybeTensor,
) -> list[torch.Tensor]:
    weights = (query, key, value, output, query_bias, key_bias, value_bias)
    tokens = (position, valid, segment, cos, sin, selected, gate, until)
    return _gradients(_run_selected_heads, grad, (hidden_states, *weights, *tokens), SELECTED_HEADS_LEARN)


@torch.library.custom_op("mosa::all_attention", mutates_args=())
def _all_attention(
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
    return _run_all_attention(query, key, value, far_bias, position, valid, segment, selected, until, window)


@torch.library.custom_op("mosa::all_attention_backward", mutates_args=())
def _all_attention_backward(
    grad: torch.Tensor,
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
) -> list[torch.Tensor]:
    inputs = (query, key, value, far_bias, position, valid, segment, selected, until, window)
    return _gradients(_run_all_attention, grad, inputs, ALL_ATTENTION_LEARN)


# Which inputs have gradients.
SELECTED_HEADS_LEARN = (0, 1, 2, 3, 4, 5, 6, 7, 14)  # hidden states, weights and biases, gate
ALL_ATTENTION_LEARN = (0, 1, 2, 3)  # queries, keys, values, bias


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


def _register(op, backward_op, learn: tuple[int, ...]) -> None:
    """The op's output is shaped like its first input, and its gradients like their inputs."""

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


_register(_selected_heads, _selected_heads_backward, SELECTED_HEADS_LEARN)
_register(_all_attention, _all_attention_backward, ALL_ATTENTION_LEARN)
