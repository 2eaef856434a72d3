"""The paper's heads on Triton against the specification: outputs, what a cache appends, and all gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.selected_heads import reference  # noqa: E402
from mosa_hf.kernels.selected_heads.triton import selected_heads  # noqa: E402
from mosa_hf.kernels.tensors import HeadWeights, Tokens

from ...conftest import slow_but
from .common import COMPILER, DEVICE, close, gradients, random_evictions, random_packed  # noqa: E402

PLAIN = {"num_tokens": 40, "heads": 1, "head_dim": 16, "rotary_dim": 16, "rate": 0.3, "past": 0}
PLAIN |= {"dtype": torch.float32, **dict.fromkeys(("bias", "padded", "packed", "evicts"), False)}
HALF = {"dtype": torch.float16}
CASES = {
    "plain": {},
    "queries share keys, bias": {"heads": 3, "bias": True},
    "head of 64, half of it rotated": {"head_dim": 64, "rotary_dim": 32, "heads": 2, **HALF},
    "head of 80, quarter of it rotated": {"head_dim": 80, "rotary_dim": 20, "bias": True},
    "bfloat16": {"head_dim": 64, "rotary_dim": 32, "num_tokens": 20, "past": 9, "dtype": torch.bfloat16},
    "head of 128": {"head_dim": 128, "rotary_dim": 128, "num_tokens": 20, **HALF},
    "padded": {"padded": True, "heads": 2},
    "packed, padded": {"packed": True, "padded": True},
    "nothing selected": {"rate": 0.0},
    "everything selected": {"rate": 1.0, "num_tokens": 70},
    "a single token": {"num_tokens": 1, "rate": 1.0},
    "past, padded": {"past": 30, "padded": True, "bias": True, "heads": 2},
    "past, half precision": {"past": 13, "bias": True, **HALF},
    "a budget evicts, packed": {"evicts": True, "packed": True, "num_tokens": 60, "rate": 0.6},
    "a budget evicts, past, padded": {"evicts": True, "past": 20, "padded": True},
    "past, a single token": {"past": 5, "num_tokens": 1, "rate": 0.6},
}
QUICK = ("plain", "nothing selected", "past, padded", "past, half precision", "a budget evicts, packed")


def random_call(case: dict, seed: int) -> tuple[torch.Tensor, HeadWeights, Tokens, PackedKeyValues | None]:
    """Arguments of `selected_heads`; those of floating point take gradients, but for angles."""
    torch.manual_seed(seed)
    case = PLAIN | case
    batch_size, num_groups, hidden_size = 2, 3, 24
    num_tokens, head_dim, dtype = case["num_tokens"], case["head_dim"], case["dtype"]
    query_dim = case["heads"] * head_dim
    sizes = [(query_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size), (hidden_size, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if case["bias"] else []
    weights = (torch.randn(num_groups, *size) / size[-1] ** 0.5 for size in sizes)
    weights = HeadWeights(*(weight.to(dtype).requires_grad_() for weight in weights))
    hidden_states = torch.randn(batch_size, num_tokens, hidden_size).to(dtype).requires_grad_()

    valid = segment = past = evicted_at = score = None
    position = torch.arange(num_tokens).expand(batch_size, -1)
    if case["padded"]:
        valid = torch.arange(num_tokens) >= torch.tensor([[num_tokens // 3], [0]])
        position = (valid.cumsum(1) - 1).clamp(min=0)
    if case["packed"]:
        segment = (torch.rand(batch_size, num_tokens) < 0.1).long().cumsum(1)
    position = position + case["past"]
    selected = torch.rand(batch_size, num_tokens, num_groups) < case["rate"]
    if valid is not None:
        selected = selected & valid[..., None]
    if case["past"]:
        count = torch.randint(0, case["past"] + 1, (batch_size, num_groups))
        count[0, 0] = 0
        past = random_packed(count, head_dim, dtype)
    if case["evicts"]:
        evicted_at, score = random_evictions(position[..., None].expand_as(selected)), torch.randn(selected.shape)
        evicted_at[0, -1] = position[0, -1]  # evicted at once, unread by itself
        if past is not None:
            past = past._replace(evicted_at=random_evictions(torch.full((len(past.key),), case["past"] - 1)))
    angle = torch.rand(batch_size, num_tokens, case["rotary_dim"])
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gate = torch.rand(selected.shape, requires_grad=True)
    return hidden_states, weights, Tokens(position, valid, segment, cos, sin, selected, gate, score, evicted_at), past


def check(function, arguments: tuple) -> None:
    hidden_states, weights, tokens, past = arguments
    dtype = hidden_states.dtype
    expected, expected_new = reference.selected_heads(*arguments)
    actual, actual_new = function(*arguments)
    assert actual.dtype == dtype
    close(actual, expected, "output", dtype)
    assert torch.equal(actual_new.valid.sum(-1), expected_new.valid.sum(-1))
    for name in ("key", "value", "position", "evicted_at", "score"):  # what a cache would append, in its order
        states, expected_states = (getattr(new, name) for new in (actual_new, expected_new))
        if expected_states is None:
            assert states is None
        else:
            states, expected_states = states[actual_new.valid], expected_states[expected_new.valid]
            close(states, expected_states, name, dtype)
    if not actual.requires_grad:
        return
    inputs = [hidden_states, *(weight for weight in weights if weight is not None), tokens.gate]
    inputs += [] if past is None else [past.key, past.value]
    upstream = torch.randn(expected.shape)
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for i, pair in enumerate(pairs):
        close(*pair, f"gradient {i}", dtype)


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_selected_heads(name):
    check(selected_heads, random_call(CASES[name], seed=len(name)))


STEPS = {
    "plain": {"past": 40},
    "bias, queries share keys": {"past": 20, "heads": 3, "bias": True, "head_dim": 64, "rotary_dim": 32},
    "half precision": {"past": 50, "head_dim": 80, "rotary_dim": 80, "heads": 2, **HALF},
    "a budget evicts": {"past": 20, "evicts": True},
    "nothing selected": {"past": 7, "rate": 0.0},
    "nothing kept yet": {},
}


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_decoding_step(name):
    check(selected_heads, random_call({"num_tokens": 1, "rate": 0.5} | STEPS[name], seed=1))


@pytest.mark.parametrize("name", ["plain", "bias, queries share keys", "half precision", "nothing selected"])
@torch.no_grad()
def test_decoding_step_that_is_remembered(name):
    """A cache takes the token in, and says what it reads."""
    *arguments, packed = random_call({"num_tokens": 1, "rate": 0.5} | STEPS[name], seed=1)
    given = []

    def remember(new):
        given.append(new)
        return packed

    expected, actual = (each(*arguments, remember)[0] for each in (reference.selected_heads, selected_heads))
    close(actual, expected, "output", actual.dtype)
    filled = given[0].valid
    assert torch.equal(filled, given[1].valid) and torch.equal(given[0].position, given[1].position)
    close(given[1].key[filled], given[0].key[filled], "key", actual.dtype)


@torch.no_grad()
def test_decoding_step_reads_selecting_groups_only():
    """What others have may be anything: their weights and their part of the cache."""
    hidden_states, weights, tokens, past = random_call({"num_tokens": 1, "past": 20, "bias": True}, seed=5)
    tokens = tokens._replace(selected=torch.tensor([True, False, False]).expand_as(tokens.selected))
    expected, _ = reference.selected_heads(hidden_states, weights, tokens, past)
    for weight in weights[:7]:
        weight[1:] = torch.nan
    for row, group in ((0, 1), (0, 2), (1, 1), (1, 2)):
        first = past.start[row, group]
        past.key[first : first + past.length[row, group]] = torch.nan
    actual, _ = selected_heads(hidden_states, weights, tokens, past)
    close(actual, expected, "output")


@torch.no_grad()
def test_decoding_step_asks_nothing_of_the_device():
    """Fake tensors have no numbers."""
    hidden_states, weights, tokens, past = random_call({"num_tokens": 1, "past": 20}, seed=0)
    with FakeTensorMode() as mode:
        hidden_states, *others = (
            mode.from_tensor(arguments) if torch.is_tensor(arguments) else
            type(arguments)(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments))
            for arguments in (hidden_states, weights, tokens, past)
        )  # fmt: skip
        assert selected_heads(hidden_states, *others)[0].shape == (2, 1, 24)


@pytest.mark.slow
def test_compiles_into_one_graph():
    compiled = torch.compile(selected_heads, fullgraph=True, backend=COMPILER)
    check(compiled, random_call(CASES["past, padded"], seed=1))


@pytest.mark.slow
@torch.no_grad()
def test_decoding_step_compiles_into_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(selected_heads, fullgraph=True, backend=COMPILER)
    check(compiled, random_call({"num_tokens": 1, "past": 9}, seed=1))


@pytest.mark.slow
def test_deterministic_algorithms():
    """The other way to add up: the same function."""
    arguments = random_call(CASES["queries share keys, bias"], seed=2)
    torch.use_deterministic_algorithms(True)
    try:
        check(selected_heads, arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast():
    """float32 parameters, projected in the autocast type, as PyTorch does with matmuls."""
    hidden_states, weights, tokens, _ = random_call({}, seed=3)
    expected, _ = reference.selected_heads(hidden_states, weights, tokens)
    with torch.autocast(DEVICE, dtype=torch.float16):
        actual, new = selected_heads(hidden_states, weights, tokens)
    assert actual.dtype == new.key.dtype == torch.float16
    close(actual, expected, "output", torch.float16)
    (grad,) = torch.autograd.grad(actual.float().sum(), weights.query)
    (expected_grad,) = torch.autograd.grad(expected.sum(), weights.query)
    assert grad.dtype == torch.float32
    close(grad, expected_grad, "gradient of query", torch.float16)
