"""The paper's heads in PyTorch against the specification: outputs, what a cache appends, and all gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.gather_project import pytorch as gather_project
from mosa_hf.kernels.selected_heads import pytorch, reference
from mosa_hf.kernels.tensors import HeadWeights, Tokens

from .triton.common import random_evictions, random_packed

FAST = settings(max_examples=200, suppress_health_check=list(HealthCheck))
HIDDEN_SIZE = 12
SHAPE = {
    "batch_size": st.integers(1, 3),
    "num_tokens": st.integers(1, 70),
    "num_groups": st.integers(1, 5),
    "heads_per_group": st.integers(1, 3),
    "sparsity": st.sampled_from([1, 2, 3, 9, 1000]),
    "head_dim": st.sampled_from([2, 6, 16]),
    "rotary_share": st.sampled_from([0.5, 1.0]),
    "has_bias": st.booleans(),
    "padded": st.booleans(),
    "packed": st.booleans(),
    "most_past": st.sampled_from([0, 0, 1, 13]),
    "evicts": st.booleans(),
    "seed": st.integers(0, 2**16),
}
PLAIN = {"batch_size": 2, "num_tokens": 40, "num_groups": 3, "heads_per_group": 2, "sparsity": 3, "head_dim": 16}
PLAIN |= {"rotary_share": 0.5, "most_past": 0, "seed": 0}
PLAIN |= dict.fromkeys(("has_bias", "padded", "packed", "evicts"), False)


def normal(*size: int, fan_in: int = 1) -> torch.Tensor:
    return (torch.randn(*size, dtype=torch.float64) / fan_in**0.5).requires_grad_()


def random_call(shape: dict) -> tuple[torch.Tensor, HeadWeights, Tokens, PackedKeyValues | None]:
    """Arguments of `selected_heads`, as the routers would hand them over; padding only where there is no packing."""
    torch.manual_seed(shape["seed"])
    batch_size, num_tokens, num_groups = shape["batch_size"], shape["num_tokens"], shape["num_groups"]
    head_dim, query_dim = shape["head_dim"], shape["heads_per_group"] * shape["head_dim"]
    sizes = [(query_dim, HIDDEN_SIZE), (head_dim, HIDDEN_SIZE), (head_dim, HIDDEN_SIZE), (HIDDEN_SIZE, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if shape["has_bias"] else []
    weights = HeadWeights(
        *(normal(num_groups, *size, fan_in=size[-1]) for size in sizes),
        router=normal(num_groups, HIDDEN_SIZE),
        router_bias=normal(num_groups) if shape["has_bias"] else None,
    )
    hidden_states = normal(batch_size, num_tokens, HIDDEN_SIZE)

    valid = segment = past = evicted_at = score = None
    position = torch.arange(num_tokens).expand(batch_size, -1)
    if shape["padded"]:
        valid = torch.arange(num_tokens) >= torch.randint(0, num_tokens + 1, (batch_size, 1))
        position = (valid.cumsum(1) - 1).clamp(min=0)
    elif shape["packed"] and not shape["most_past"]:
        segment = torch.randint(0, 2, (batch_size, num_tokens)).cumsum(1) // 4
    position = position + shape["most_past"]
    selected = torch.rand(batch_size, num_tokens, num_groups) < 1 / shape["sparsity"]
    if valid is not None:
        selected = selected & valid[..., None]
    if shape["most_past"]:
        count = torch.randint(0, shape["most_past"] + 1, (batch_size, num_groups))
        past = random_packed(count, head_dim, torch.float64)
    if shape["evicts"]:
        evicted_at, score = random_evictions(position[..., None].expand_as(selected)), torch.randn(selected.shape)
        if past is not None:
            past = past._replace(evicted_at=random_evictions(torch.full((len(past.key),), shape["most_past"] - 1)))
    angle = torch.rand(batch_size, num_tokens, max(2, int(head_dim * shape["rotary_share"]) // 2 * 2)).double()
    tokens = Tokens(position, valid, segment, angle.cos(), angle.sin(), selected, None, score, evicted_at)
    return hidden_states, weights, with_gate(hidden_states, weights, tokens), past


def with_gate(hidden_states: torch.Tensor, weights: HeadWeights, tokens: Tokens) -> Tokens:
    logits = torch.einsum("btn,gn->btg", hidden_states, weights.router)
    logits = logits if weights.router_bias is None else logits + weights.router_bias
    return tokens._replace(gate=logits.sigmoid())


def given_of(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [x for x in tensors if x is not None]


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    # The gate's graph is the same for several outputs.
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(output, inputs, upstream, **options)


def check(function, call: tuple[torch.Tensor, HeadWeights, Tokens, PackedKeyValues | None], routed: bool) -> None:
    """`routed`: `function` learns the router by way of `weights`, and not of the gate."""
    hidden_states, weights, tokens, past = call
    apart = weights._replace(router=None, router_bias=None)
    expected, expected_new = reference.selected_heads(hidden_states, apart, tokens, past)
    actual, new = function(hidden_states, weights if routed else apart, tokens, past)
    torch.testing.assert_close(actual, expected)
    if new is not None:  # what a cache would append, in its order
        assert torch.equal(new.valid.sum(-1), expected_new.valid.sum(-1))
        for name in ("key", "value", "position", "evicted_at", "score"):
            states, expected_states = getattr(new, name), getattr(expected_new, name)
            assert (states is None) == (expected_states is None), name
            if states is not None:
                torch.testing.assert_close(states[new.valid], expected_states[expected_new.valid])
    inputs = given_of(hidden_states, *weights, *(() if past is None else past[:2]))
    for i, pair in enumerate(zip(gradients(actual, inputs), gradients(expected, inputs), strict=True)):
        torch.testing.assert_close(*pair, msg=lambda text, i=i: f"gradient {i}: {text}")


@FAST
@given(st.fixed_dictionaries(SHAPE), st.booleans(), st.sampled_from([1, 2**20]))
def test_equal_to_the_specification(shape, routed, block_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_project, "BLOCK_SIZE", block_size)
        check(pytorch.selected_heads, random_call(shape), routed)


def test_router_learns_from_selected_tokens_alone():
    hidden_states, weights, tokens, _ = random_call(PLAIN)
    output, _ = pytorch.selected_heads(hidden_states, weights, tokens)
    assert torch.autograd.grad(output.sum(), tokens.gate, allow_unused=True) == (None,)


@pytest.mark.parametrize("learned", ["hidden_states", "query", "key", "output", "router", "value_bias", "router_bias"])
def test_whatever_is_frozen(learned):
    hidden_states, weights, tokens, _ = random_call({**PLAIN, "has_bias": True})
    inputs = {"hidden_states": hidden_states, **weights._asdict()}
    (expected,) = gradients(pytorch.selected_heads(hidden_states, weights, tokens)[0], [inputs[learned]])
    frozen = {name: x.detach().requires_grad_(name == learned) for name, x in inputs.items()}
    hidden_states, *weights = frozen.values()
    weights = HeadWeights(*weights)
    output, _ = pytorch.selected_heads(hidden_states, weights, with_gate(hidden_states, weights, tokens))
    torch.testing.assert_close(gradients(output, [frozen[learned]]), (expected,))


def test_same_bits_every_time():
    call = random_call({**PLAIN, "num_groups": 5, "sparsity": 1})
    inputs = given_of(call[0], *call[1])
    once, again = (gradients(pytorch.selected_heads(*call)[0], inputs) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    hidden_states, weights, tokens, _ = random_call({**PLAIN, "has_bias": True})
    inputs = given_of(hidden_states, *weights)
    output = reference.selected_heads(hidden_states, weights, tokens)[0]
    dtype = torch.float32 if autocast else torch.bfloat16
    low = [x.detach().to(dtype).requires_grad_() for x in inputs]
    low[8:] = [x.detach().float().requires_grad_() for x in inputs[8:]]  # the router
    low_weights = HeadWeights(*low[1:])
    low_tokens = with_gate(low[0].float(), low_weights, tokens)
    low_tokens = low_tokens._replace(cos=tokens.cos.to(dtype), sin=tokens.sin.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low_output, new = pytorch.selected_heads(low[0], low_weights, low_tokens)
    assert low_output.dtype == dtype and new.key.dtype == torch.bfloat16
    pairs = [(low_output, output), *zip(gradients(low_output, low), gradients(output, inputs), strict=True)]
    for actual, expected in pairs:
        assert (actual.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_compiled():
    compiled = torch.compile(pytorch.selected_heads, fullgraph=True, backend="aot_eager")
    check(compiled, random_call({**PLAIN, "has_bias": True, "padded": True}), routed=True)
