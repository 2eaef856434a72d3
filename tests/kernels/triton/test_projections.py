"""Projections of the selected tokens into heads, and of heads back into tokens, against dense einsums."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels.gather_project import triton as gather_project_module  # noqa: E402
from mosa_hf.kernels.gather_project.triton import gather_project  # noqa: E402
from mosa_hf.kernels.project_scatter.triton import project_scatter  # noqa: E402
from mosa_hf.kernels.selected_heads import reference  # noqa: E402
from mosa_hf.kernels.tensors import HeadWeights, Tokens
from mosa_hf.kernels.triton_slots import sum_by_token  # noqa: E402

from . import common  # noqa: E402

# Head size, rotary dim, query heads a group, bias, rows, tokens, hidden size, dtype. More slots than a block holds in
# some, more channels than a block holds in others, and hidden sizes that no block divides.
CASES = [
    (16, 16, 1, False, 2, 40, 24, torch.float16),
    (16, 8, 3, True, 1, 90, 40, torch.float32),
    (64, 64, 2, False, 3, 20, 72, torch.float32),
    (64, 32, 1, True, 2, 1, 16, torch.float16),
    (80, 80, 1, True, 1, 20, 136, torch.float32),
    (80, 20, 2, False, 2, 40, 16, torch.float16),
    (128, 64, 3, True, 1, 9, 20, torch.float32),
    (160, 160, 1, True, 1, 12, 16, torch.float32),
    (256, 128, 1, False, 1, 20, 40, torch.float16),
    (64, 32, 2, True, 2, 20, 40, torch.bfloat16),
]


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, name
    common.close(actual, expected, name, actual.dtype)


def random_slots(batch_size: int, num_tokens: int, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending random tokens; one group of one row selects nothing, another everything."""
    selected = torch.rand(batch_size, num_groups, num_tokens) < 0.4
    selected[0, 0], selected[-1, -1] = False, True
    count = selected.sum(-1, dtype=torch.int32)
    index = torch.zeros(batch_size, num_groups, num_tokens + 2, dtype=torch.int32)
    index[torch.arange(num_tokens + 2) < count[..., None]] = selected.nonzero()[:, 2].int()
    return index, count


def random_weights(head_dim: int, num_heads: int, bias: bool, hidden_size: int, dtype: torch.dtype) -> HeadWeights:
    query_dim = num_heads * head_dim
    sizes = [(query_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size), (hidden_size, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if bias else []
    weights = (torch.randn(2, *size) / size[-1] ** 0.5 for size in sizes)
    return HeadWeights(*(weight.to(dtype).requires_grad_() for weight in weights))


def gradients(outputs, upstream, inputs) -> list[torch.Tensor]:
    loss = sum((x.float() * weight).sum() for x, weight in zip(outputs, upstream, strict=True))
    return list(torch.autograd.grad(loss, inputs))


@pytest.fixture
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


# Both ways to add up do the same in every case but for the last step.
each_case = pytest.mark.parametrize(
    ("case", "deterministic"),
    [(case, False) for case in CASES[::2]]
    + [pytest.param(case, False, marks=pytest.mark.slow) for case in CASES[1::2]]
    + [(CASES[1], True)],
    indirect=["deterministic"],
    ids=str,
)


@each_case
def test_gather_project(case, deterministic):
    head_dim, rotary_dim, num_heads, bias, batch_size, num_tokens, hidden_size, dtype = case
    weights = random_weights(head_dim, num_heads, bias, hidden_size, dtype)
    hidden_states = torch.randn(batch_size, num_tokens, hidden_size, dtype=dtype, requires_grad=True)
    angle = torch.rand(batch_size, num_tokens, rotary_dim)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    index, count = random_slots(batch_size, num_tokens, 2)

    actual = gather_project(hidden_states, index, count, *weights[:3], *weights[4:7], cos, sin)
    tokens = Tokens(None, None, None, cos, sin, None, None)
    query, key, value = reference.project(hidden_states, weights, tokens)
    filled = torch.arange(index.shape[2]) < count[..., None]  # [B, G, K]
    expected = []
    for states in (query.unbind(2), (key,), (value,)):
        slots = [
            x.gather(2, index.long()[..., None].expand(-1, -1, -1, head_dim)).where(filled[..., None], 0.0)
            for x in states
        ]
        expected.append(torch.stack(slots, dim=2))
    expected = [expected[0], expected[1][:, :, 0], expected[2][:, :, 0]]
    for name, *pair in zip(("query", "key", "value"), actual, expected, strict=True):
        close(*pair, name)

    inputs = [hidden_states, *weights[:3], *(x for x in weights[4:7] if x is not None)]
    upstream = [torch.randn(x.shape) for x in expected]
    names = ["hidden states", "query", "key", "value", "query bias", "key bias", "value bias"]
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for name, pair in zip(names, pairs, strict=False):
        close(*pair, f"gradient of {name}")


@each_case
def test_project_scatter(case, deterministic):
    head_dim, _, num_heads, _, batch_size, num_tokens, hidden_size, dtype = case
    weight = random_weights(head_dim, num_heads, False, hidden_size, dtype).output
    index, count = random_slots(batch_size, num_tokens, 2)
    num_slots = index.shape[2]
    heads = torch.randn(batch_size, 2, num_heads, num_slots, head_dim).to(dtype).requires_grad_()
    gate = torch.rand(batch_size, 2, num_slots, requires_grad=True)

    actual = project_scatter(heads, gate, weight, index, count, num_tokens)
    filled = torch.arange(num_slots) < count[..., None]
    rows = torch.einsum("bgrkd,gnrd->bgkn", heads.float(), weight.float().unflatten(-1, (num_heads, head_dim)))
    rows = rows * (gate * filled)[..., None]
    place = (torch.arange(batch_size)[:, None, None] * num_tokens + index).flatten().long()
    expected = torch.zeros(batch_size * num_tokens, hidden_size).index_add(0, place, rows.flatten(0, 2))
    expected = expected.view(batch_size, num_tokens, hidden_size).to(dtype)
    close(actual, expected, "output")

    inputs = [heads, gate, weight]
    upstream = [torch.randn(expected.shape)]
    pairs = zip(gradients([actual], upstream, inputs), gradients([expected], upstream, inputs), strict=True)
    for name, (grad, expected_grad) in zip(("heads", "gate", "weight"), pairs, strict=True):
        if name == "gate":  # float32 always, but as exact as the heads and weights it comes from
            grad, expected_grad = grad.to(dtype), expected_grad.to(dtype)
        close(grad, expected_grad, f"gradient of {name}")


def test_sum_by_token_does_not_read_empty_slots():
    index, count = random_slots(2, 9, 3)
    rows = torch.randn(2, 3, 11, 5)
    filled = torch.arange(11) < count[..., None]
    rows = rows.masked_fill(~filled[..., None], torch.nan)
    expected = torch.zeros(2, 9, 5)
    for b, g, k in filled.nonzero():
        expected[b, index[b, g, k]] += rows[b, g, k]
    close(sum_by_token(rows, index, count, 9), expected, "sum")


def test_frozen_projections_have_no_gradient(monkeypatch):
    """And those that train have the gradient that they have together."""
    asked, own = [], gather_project_module.weight_gradient
    monkeypatch.setattr(gather_project_module, "weight_gradient", lambda *x: asked.append(len(x)) or own(*x))
    weights = random_weights(16, 2, True, 24, torch.float32)
    hidden_states = torch.randn(1, 12, 24)
    angle = torch.rand(1, 12, 16)
    slots = random_slots(1, 12, 2)

    def loss(weights: HeadWeights) -> torch.Tensor:
        outputs = gather_project(hidden_states, *slots, *weights[:3], *weights[4:7], angle.cos(), angle.sin())
        return sum(x.square().sum() for x in outputs)

    expected = torch.autograd.grad(loss(weights), weights[:3])[2]
    assert len(asked) == 3
    frozen = HeadWeights(*(weight.detach() for weight in weights[:7]))._replace(value=weights.value)
    close(torch.autograd.grad(loss(frozen), weights.value)[0], expected, "value")
    assert len(asked) == 4


@pytest.mark.slow
def test_ops_are_well_behaved():
    weights = random_weights(16, 2, True, 24, torch.float32)
    hidden_states = torch.randn(2, 12, 24, requires_grad=True)
    angle = torch.rand(2, 12, 8)
    index, count = random_slots(2, 12, 2)
    arguments = (hidden_states, index, count, *weights[:3], *weights[4:7], angle.cos(), angle.sin())
    torch.library.opcheck(gather_project, arguments)
    heads = torch.randn(2, 2, 2, 14, 16, requires_grad=True)
    gate = torch.rand(2, 2, 14, requires_grad=True)
    torch.library.opcheck(project_scatter, (heads, gate, weights.output, index, count, 12))
