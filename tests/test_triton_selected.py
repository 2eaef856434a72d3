"""Form "selected" on Triton kernels against the specification: outputs, what a cache appends, and all gradients."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels import reference  # noqa: E402
from mosa_hf.kernels.layout import HeadWeights, KeyValues, Tokens  # noqa: E402
from mosa_hf.kernels.triton import selected_heads  # noqa: E402

from .test_kernels import random_until  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor takes half a minute on a CPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the largest value
PLAIN = {
    "batch_size": 2,
    "num_tokens": 40,
    "num_groups": 3,
    "heads_per_group": 1,
    "head_dim": 16,
    "rotary_dim": 16,
    "hidden_size": 24,
    "rate": 0.3,
    "bias": False,
    "padded": False,
    "packed": False,
    "num_past": 0,
    "evicts": False,
}
CASES = {
    "plain": {},
    "queries share keys, bias": {"heads_per_group": 3, "bias": True},
    "head of 64, half of it rotated": {"head_dim": 64, "rotary_dim": 32, "heads_per_group": 2},
    "head of 80, quarter of it rotated": {"head_dim": 80, "rotary_dim": 20, "bias": True},
    "head of 128": {"head_dim": 128, "rotary_dim": 128, "num_tokens": 20},
    "padded": {"padded": True, "heads_per_group": 2},
    "packed": {"packed": True, "num_tokens": 70},
    "packed, padded": {"packed": True, "padded": True},
    "nothing selected": {"rate": 0.0},
    "everything selected": {"rate": 1.0, "num_tokens": 130, "batch_size": 1},
    "a single token": {"num_tokens": 1, "rate": 1.0},
    "past": {"num_past": 13, "heads_per_group": 2},
    "past, padded": {"num_past": 30, "padded": True, "bias": True},
    "a budget evicts": {"evicts": True, "num_tokens": 60, "rate": 0.6},
    "a budget evicts, packed": {"evicts": True, "packed": True},
    "a budget evicts, past, padded": {"evicts": True, "num_past": 20, "padded": True, "heads_per_group": 2},
    "past, a single token": {"num_past": 5, "num_tokens": 1, "rate": 0.6},
}


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.float() / scale,
        expected.float() / scale,
        rtol=0,
        atol=TOLERANCE[actual.dtype],
        msg=lambda m: f"{name}: {m}",
    )


def random_call(case: dict, dtype: torch.dtype, seed: int) -> tuple:
    """Arguments of `selected_heads`."""
    torch.manual_seed(seed)
    case = {**PLAIN, **case}
    batch_size, num_tokens, num_groups, head_dim = (
        case[name] for name in ("batch_size", "num_tokens", "num_groups", "head_dim")
    )
    query_dim, hidden_size, num_past = case["heads_per_group"] * head_dim, case["hidden_size"], case["num_past"]
    sizes = [(query_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size), (hidden_size, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if case["bias"] else []
    weights = HeadWeights(*((torch.randn(num_groups, *size) / size[-1] ** 0.5) for size in sizes))
    hidden_states = torch.randn(batch_size, num_tokens, hidden_size)

    valid = segment = past = None
    position = torch.arange(num_tokens).expand(batch_size, -1)
    if case["padded"]:
        valid = torch.arange(num_tokens) >= torch.randint(0, num_tokens + 1, (batch_size, 1))
        position = (valid.cumsum(1) - 1).clamp(min=0)
    if case["packed"]:
        segment = (torch.rand(batch_size, num_tokens) < 0.1).long().cumsum(1)
    angle = torch.rand(batch_size, num_tokens, case["rotary_dim"])
    selected = torch.rand(batch_size, num_tokens, num_groups) < case["rate"]
    if valid is not None:
        selected = selected & valid[..., None]
    gate = torch.rand(batch_size, num_tokens, num_groups)
    if num_past:
        filled = torch.arange(num_past) < torch.randint(0, num_past + 1, (batch_size, num_groups, 1))
        past_position = torch.arange(num_past).expand(batch_size, num_groups, -1)
        key, value = (torch.randn(batch_size, num_groups, num_past, head_dim) for _ in range(2))
        past = KeyValues(key, value, past_position, filled, None)
        if case["evicts"]:
            past = past._replace(until=random_until(past_position), score=torch.randn(past_position.shape))

    def place(tensors):
        """On the device, floating point tensors in `dtype` but for the gate, and with a gradient but for angles."""
        placed = (None if x is None else x.to(DEVICE) for x in tensors)
        return [x if x is None or not x.is_floating_point() else x.to(dtype).requires_grad_() for x in placed]

    position = position + num_past
    tokens = Tokens(position, valid, segment, angle.cos().to(dtype), angle.sin().to(dtype), selected, gate)
    if case["evicts"]:
        until = random_until(position[..., None].expand_as(selected))
        tokens = tokens._replace(until=until, score=torch.randn(selected.shape))
    tokens = Tokens(*(None if x is None else x.to(DEVICE) for x in tokens))
    tokens.gate.requires_grad_()
    (hidden_states,) = place([hidden_states])
    return hidden_states, HeadWeights(*place(weights)), tokens, None if past is None else KeyValues(*place(past))


def gradients(output: torch.Tensor, weight: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    grads = torch.autograd.grad((output.float() * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def check(function, arguments: tuple) -> None:
    hidden_states, weights, tokens, past = arguments
    expected, expected_new = reference.selected_heads(*arguments)
    actual, actual_new = function(*arguments)
    close(actual, expected, "output")
    assert torch.equal(actual_new.valid.sum(-1), expected_new.valid.sum(-1))
    for name in ("key", "value", "position", "until", "score"):  # what a cache would append, in its order
        states, expected_states = (getattr(new, name) for new in (actual_new, expected_new))
        if expected_states is None:
            assert states is None
        elif name in ("key", "value"):
            close(states[actual_new.valid], expected_states[expected_new.valid], name)
        else:
            assert torch.equal(states[actual_new.valid], expected_states[expected_new.valid])

    inputs = [hidden_states, *(weight for weight in weights if weight is not None), tokens.gate]
    inputs += [] if past is None else [past.key, past.value]
    upstream = torch.randn(expected.shape, device=DEVICE)
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for i, (grad, expected_grad) in enumerate(pairs):
        close(grad.to(hidden_states.dtype), expected_grad.to(hidden_states.dtype), f"gradient {i}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_selected_heads(name, dtype):
    check(selected_heads, random_call(CASES[name], dtype, seed=len(name)))


@pytest.mark.parametrize("name", ["queries share keys, bias", "packed", "past, padded"])
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    check(
        torch.compile(selected_heads, fullgraph=True, backend=COMPILER),
        random_call(CASES[name], torch.float32, seed=1),
    )


def test_deterministic_algorithms():
    """The other way to add up: the same function."""
    arguments = random_call(CASES["queries share keys, bias"], torch.float32, seed=2)
    torch.use_deterministic_algorithms(True)
    try:
        check(selected_heads, arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast():
    """float32 parameters, projected in the autocast type, as PyTorch does with matmuls."""
    hidden_states, weights, tokens, _ = random_call({}, torch.float32, seed=3)
    expected, _ = reference.selected_heads(hidden_states, weights, tokens)
    with torch.autocast(DEVICE, dtype=torch.float16):
        actual, new = selected_heads(hidden_states, weights, tokens)
    assert actual.dtype == new.key.dtype == torch.float16
    close(actual, expected.to(torch.float16), "output")
    (grad,) = torch.autograd.grad(actual.float().sum(), weights.query)
    (expected_grad,) = torch.autograd.grad(expected.sum(), weights.query)
    assert grad.dtype == torch.float32
    close(grad.half(), expected_grad.half(), "gradient of query")
