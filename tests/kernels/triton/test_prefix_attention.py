"""Prefix attention against the specification: outputs and all gradients."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels.prefix_attention import reference  # noqa: E402
from mosa_hf.kernels.prefix_attention import triton as kernels  # noqa: E402
from mosa_hf.kernels.prefix_attention.reference import FarKeys, WindowKeys  # noqa: E402
from mosa_hf.kernels.prefix_attention.triton import prefix_attention  # noqa: E402

from ...conftest import slow_but
from .common import COMPILER, check, gradients  # noqa: E402

# Head size, query heads a group, queries, far slots, window tokens (None: no second source), dtype; what is given of
# bias, limits (evicted_at) and starts, scale, softcap, sinks. Sizes that no block divides, single ones, no far slot.
CASES = [
    (16, 1, 1, 1, None, torch.float32, ""),
    (16, 2, 70, 33, 75, torch.float32, "limits"),
    (64, 1, 90, 70, None, torch.float32, "limits scale"),
    (64, 3, 45, 20, 45, torch.float32, "softcap"),
    (64, 1, 66, 0, 66, torch.float32, "sinks"),
    (80, 3, 40, 40, 50, torch.float32, "limits softcap sinks scale"),
    (80, 1, 33, 90, None, torch.float16, ""),
    (96, 1, 20, 17, 20, torch.float16, "limits softcap"),
    (128, 2, 35, 65, 35, torch.float16, "limits sinks scale"),
    (256, 1, 20, 40, 30, torch.float32, "softcap sinks"),
    (64, 2, 24, 20, 24, torch.bfloat16, "limits softcap sinks scale"),
    (96, 1, 20, 30, None, torch.bfloat16, ""),
]


def random_range(batch_size: int, num_groups: int, num_queries: int, num_slots: int, start: bool):
    """Ranges that grow with the query, at different paces; with `start`, those of packed sequences and empty ones."""
    pace = torch.rand(batch_size, num_groups, 1) * 2 * num_slots / num_queries
    end = (pace * torch.arange(num_queries)).int().clamp(max=num_slots)
    return (end // 3 * 2 - 1).clamp(min=0).roll(-2, -1) if start else None, end


@pytest.mark.parametrize("case", slow_but(CASES[-4:], CASES))
def test_prefix_attention(case):
    head_dim, num_heads, num_queries, num_far, num_window, dtype, given = case
    size = (2, 2)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*size, *shape, head_dim).to(dtype).requires_grad_()

    query, far_key, far_value = states(num_heads, num_queries), states(num_far), states(num_far)
    bias = evicted_at = window = position = sinks = None
    inputs = [query, far_key, far_value]
    if "limits" in given:
        bias = (torch.randn(*size, num_far) * 5).requires_grad_()
        evicted_at = torch.randint(0, 2 * num_queries, (*size, num_far))
        position = torch.arange(num_queries).expand(2, 1, -1)
        inputs.append(bias)
    far = FarKeys(far_key, far_value, *random_range(*size, num_queries, num_far, "limits" in given), bias, evicted_at)
    if num_window is not None:
        start = torch.randint(0, 9, (2, 1, 1)) if "limits" in given else None
        window = WindowKeys(states(num_window), states(num_window), start, 7)
        inputs += window[:2]
    if "sinks" in given:
        sinks = (torch.randn(2, num_heads) * 2).requires_grad_()
        inputs.append(sinks)
    options = 0.4 if "scale" in given else None, 1.5 if "softcap" in given else None, sinks
    actual = prefix_attention(query, far, window, position, *options)
    check(actual, reference.prefix_attention(query, far, window, position, *options), inputs)


def test_layout_that_projections_leave():
    """Heads inside tokens, nothing contiguous; the output is laid out as the queries are."""
    query = torch.randn(2, 40, 2, 3, 16, requires_grad=True)
    states = [torch.randn(2, 40, 3, 16, requires_grad=True) for _ in range(4)]
    key, value, window_key, window_value = (each.transpose(1, 2)[:, 1:] for each in states)
    end = torch.arange(1, 41).expand(1, 1, -1) // 2
    far, window = FarKeys(key, value, None, end), WindowKeys(window_key, window_value, None, 5)
    arguments = query.permute(0, 2, 3, 1, 4), far, window
    output = prefix_attention(*arguments)
    assert output.stride() == arguments[0].stride()
    check(output, reference.prefix_attention(*arguments), [query, *states])


@pytest.mark.parametrize("sink", [None, 0.5, -torch.inf])
def test_nothing_to_read(sink):
    """Zeros and no gradient, for all queries or for some, whatever the slots hold that nobody reads."""
    query = torch.randn(1, 1, 2, 40, 16, requires_grad=True)
    sinks = None if sink is None else torch.full((1, 2), sink, requires_grad=True)
    key, value = (torch.full((1, 1, 9, 16), torch.nan, requires_grad=True) for _ in range(2))
    far = FarKeys(key, value, None, torch.zeros(1, 1, 40, dtype=torch.int32))
    output = prefix_attention(query, far, sinks=sinks)
    assert not output.any()
    for grad in torch.autograd.grad(output.sum(), [query, key, value, *([] if sink is None else [sinks])]):
        assert not grad.any()

    # The first 15 queries read nothing, nobody the slots 0 and 6.
    key, value = (torch.randn(1, 1, 9, 16, requires_grad=True) for _ in range(2))
    end = (torch.arange(40) // 5 - 1).clamp(min=1).expand(1, 1, -1)
    with torch.no_grad():
        for states in (key, value):
            states[:, :, 0], states[:, :, 6:] = torch.nan, torch.nan
    output = prefix_attention(query, FarKeys(key, value, torch.ones_like(end), end), sinks=sinks)
    query_grad, key_grad, value_grad = torch.autograd.grad(output.square().sum(), [query, key, value])
    assert not output[..., :15, :].any() and output[..., 15:, :].all()
    assert not query_grad[..., :15, :].any() and query_grad[..., 20:, :].any(-1).all()  # softmax of one key is flat
    for grad in (key_grad, value_grad):
        assert not grad[:, :, 0].any() and not grad[:, :, 6:].any() and grad[:, :, 1:6].all()


def test_only_blocks_that_read_or_are_read_are_visited():
    """A NaN spoils what visits it, and nothing else: work grows with the window, not with the length."""
    tile, window, length = kernels._tile(kernels.FORWARD, torch.empty(1, 1, 1, 200, 16)), 5, 200
    query, key, value = (torch.randn(*size, length, 16, requires_grad=True) for size in ((1, 1, 1), (1, 1), (1, 1)))
    end = torch.arange(1, length + 1).expand(1, 1, -1)
    far = FarKeys(key[:, :, :0], value[:, :, :0], None, torch.zeros_like(end))

    def spoilt(states: torch.Tensor) -> list[int]:
        return states.isnan().any(-1).flatten().nonzero().flatten().tolist()

    def read(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return prefix_attention(query, far, WindowKeys(key, value, None, window))

    output = read(query, key.index_fill(2, torch.tensor([100]), torch.nan))
    first, last = 100 // tile.rows * tile.rows, (100 + window - 1) // tile.rows * tile.rows + tile.rows
    assert 100 in spoilt(output) and set(spoilt(output)) <= set(range(first, last))

    output = read(query.index_fill(3, torch.tensor([100]), torch.nan), key)
    key_grad, value_grad = torch.autograd.grad(output.nan_to_num().sum(), [key, value])
    first = 100 // tile.rows * tile.rows
    first, last = (slot // tile.slots * tile.slots for slot in (first - window + 1, first + tile.rows - 1))
    for grad in (key_grad, value_grad):
        assert 100 in spoilt(grad) and set(spoilt(grad)) <= set(range(first, last + tile.slots))


def test_what_does_not_fit_is_refused():
    query, key = torch.randn(1, 2, 1, 4, 16), torch.randn(1, 2, 3, 16)
    end = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="float64"):
        prefix_attention(query.double(), FarKeys(key.double(), key.double(), None, end))
    with pytest.raises(ValueError, match="far keys .*torch.float16.* queries torch.float32"):
        prefix_attention(query, FarKeys(key.half(), key, None, end))
    with pytest.raises(ValueError, match=r"window keys \(1, 2, 3, 8\)"):
        prefix_attention(query, FarKeys(key, key, None, end), WindowKeys(key[..., :8], key, None, 1))
    with pytest.raises(ValueError, match="`position`, which is missing"):
        prefix_attention(query, FarKeys(key, key, None, end, evicted_at=torch.zeros(1, 2, 3)))
    with pytest.raises(ValueError, match=r"Sinks \(2,\) do not fit"):
        prefix_attention(query, FarKeys(key, key, None, end), sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="`head_dim` 512 is more than 256: choose"):
        prefix_attention(torch.randn(1, 1, 1, 1, 512), FarKeys(key, key, None, end))


def operands() -> tuple[torch.Tensor, FarKeys, WindowKeys, torch.Tensor]:
    query = torch.randn(1, 1, 2, 20, 16, requires_grad=True)
    states = [torch.randn(1, 1, number, 16, requires_grad=True) for number in (9, 9, 20, 20)]
    end = torch.arange(1, 21, dtype=torch.int32).view(1, 1, -1)
    bias, sinks = torch.randn(1, 1, 9, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    return (
        query,
        FarKeys(*states[:2], None, end // 3, bias),
        WindowKeys(*states[2:], None, 4),
        sinks,
    )


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_the_ops_pass_opcheck(everything):
    query, far, window, sinks = operands()
    others = (*window[:3], None, sinks, 4, 0.25, 2.0) if everything else (None,) * 5 + (0, 0.25, None)
    torch.library.opcheck(kernels._forward, (query, *far, *others))
    inputs = [x.detach() if torch.is_tensor(x) else x for x in (query, *far, *others)]
    output, lse = kernels._forward(*inputs)
    torch.library.opcheck(kernels._backward, (torch.randn_like(output), output, lse, *inputs))


def test_compiles_into_one_graph():
    query, far, window, sinks = operands()
    arguments = (query, far, window, None, 0.3, 2.0, sinks)
    inputs = [query, far.key, far.value, far.bias, window.key, window.value, sinks]
    compiled = torch.compile(prefix_attention, fullgraph=True, backend=COMPILER)
    check(compiled(*arguments), prefix_attention(*arguments), inputs)


def test_gradients_are_the_same_in_every_run():
    query, far, window, sinks = operands()
    inputs = [query, far.key, far.value, far.bias, window.key, window.value, sinks]
    upstream = torch.randn_like(query)
    runs = [
        gradients(prefix_attention(query, far, window, None, None, 2.0, sinks), upstream, inputs) for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
