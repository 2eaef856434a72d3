"""Prefix attention and form "all" on Triton, against dense masked attention; outputs and all gradients."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mosa_hf.kernels import reference  # noqa: E402
from mosa_hf.kernels.layout import KeyValues  # noqa: E402
from mosa_hf.kernels.triton import attention  # noqa: E402
from mosa_hf.kernels.triton.all_attention import all_attention  # noqa: E402
from mosa_hf.kernels.triton.attention import FarKeys, NearKeys, prefix_attention  # noqa: E402

from .test_kernels import all_form_call, gradients  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor compiles for half a minute on a CPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the largest value
# Head size, query heads a group, queries, far slots, near tokens (None: no second source), dtype, with bias, limits
# (`until`) and starts. Sizes that no block divides, single ones, and no far slots at all.
CASES = [
    (16, 1, 1, 1, None, torch.float32, False),
    (16, 2, 70, 33, 75, torch.float32, True),
    (64, 1, 130, 70, None, torch.float32, True),
    (64, 3, 45, 20, 45, torch.float32, False),
    (64, 1, 66, 0, 66, torch.float32, False),
    (80, 3, 50, 40, 60, torch.float32, True),
    (80, 1, 33, 90, None, torch.float16, False),
    (96, 1, 20, 17, 20, torch.float16, True),
    (128, 2, 65, 65, 65, torch.float16, True),
    (256, 1, 20, 40, 30, torch.float32, True),
]


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":  # interpreted, a small tile takes as long as a large one
        monkeypatch.setattr(attention, "FLOAT32", dict.fromkeys((64, 128, 256), attention.Tile(32, 32, 4, 2)))
    with torch.device(DEVICE):
        yield


def close(actual: torch.Tensor, expected: torch.Tensor, name: str, dtype: torch.dtype = torch.float32) -> None:
    assert actual.shape == expected.shape, name
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double() / scale, expected.double() / scale, rtol=0, atol=TOLERANCE[dtype], msg=lambda m: f"{name}: {m}"
    )


def dense(query: torch.Tensor, far: FarKeys, near: NearKeys | None, position: torch.Tensor | None) -> torch.Tensor:
    """What `prefix_attention` computes, every pair scored in float64."""
    batch_size, num_groups, _, num_queries, _ = query.shape
    size = (batch_size, num_groups, num_queries)
    keys, values, masks, biases = [], [], [], []
    for source in (far, *([] if near is None else [FarKeys(*near)])):
        slot = torch.arange(source.key.shape[2])
        start = torch.zeros(()) if source.start is None else source.start
        mask = (slot >= start.expand(size)[..., None]) & (slot < source.end.expand(size)[..., None])
        if source.until is not None:
            mask = mask & (position.expand(size)[..., None] < source.until[:, :, None])
        keys.append(source.key)
        values.append(source.value)
        masks.append(mask)
        bias = torch.zeros(mask.shape[:2] + slot.shape) if source.bias is None else source.bias
        biases.append(bias[:, :, None].expand(mask.shape))
    keys = [torch.cat(states, dim=2).double() for states in (keys, values)]
    keys = KeyValues(*keys, position=None, valid=None, selected=None)
    return reference.attend(query.double(), keys, torch.cat(masks, dim=-1), torch.cat(biases, dim=-1).double())


def random_range(batch_size: int, num_groups: int, num_queries: int, num_slots: int, start: bool):
    """Ranges that grow with the query, at different paces; with `start`, those of packed sequences and empty ones."""
    pace = torch.rand(batch_size, num_groups, 1) * 2 * num_slots / num_queries
    end = (pace * torch.arange(num_queries)).int().clamp(max=num_slots)
    return (end // 3 * 2 - 1).clamp(min=0).roll(-2, -1) if start else None, end


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefix_attention(case):
    head_dim, num_heads, num_queries, num_far, num_near, dtype, everything = case
    size = (2, 2)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*size, *shape, head_dim).to(dtype).requires_grad_()

    query, far_key, far_value = states(num_heads, num_queries), states(num_far), states(num_far)
    bias = until = near = position = None
    inputs = [query, far_key, far_value]
    if everything:
        bias = (torch.randn(*size, num_far) * 5).requires_grad_()
        until = torch.randint(0, 2 * num_queries, (*size, num_far))
        position = torch.arange(num_queries).expand(2, 1, -1)
        inputs.append(bias)
    far = FarKeys(far_key, far_value, *random_range(*size, num_queries, num_far, everything), bias, until)
    if num_near is not None:
        end = num_near - num_queries + torch.arange(1, num_queries + 1).expand(2, 1, -1)
        near = NearKeys(states(num_near), states(num_near), (end - 7).clamp(min=0), end)
        inputs += near[:2]

    actual, expected = prefix_attention(query, far, near, position), dense(query, far, near, position)
    assert actual.dtype == dtype
    close(actual, expected, "output", dtype)
    upstream = torch.randn(expected.shape).to(dtype)
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for i, pair in enumerate(pairs):
        close(*pair, f"gradient {i}", dtype)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_dense_causal_attention_is_a_special_case(num_heads):
    """With the layout that projections leave: heads inside tokens, nothing contiguous."""
    query = torch.randn(2, 70, 2, num_heads, 64, requires_grad=True)
    key, value = (torch.randn(2, 70, 2, 64, requires_grad=True) for _ in range(2))
    heads = query.permute(0, 2, 3, 1, 4), key.transpose(1, 2), value.transpose(1, 2)
    end = torch.arange(1, 71).expand(1, 1, -1).expand(2, 1, -1)
    actual = prefix_attention(heads[0], FarKeys(*heads[1:], None, end))
    expected = F.scaled_dot_product_attention(heads[0], *(states[:, :, None] for states in heads[1:]), is_causal=True)
    close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    inputs = [query, key, value]
    for pair in zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True):
        close(*pair, "gradient")


def test_nothing_to_read():
    """Zeros and no gradient, for all queries or for some, whatever the slots hold that nobody reads."""
    query = torch.randn(1, 1, 2, 40, 16, requires_grad=True)
    key, value = (torch.full((1, 1, 9, 16), torch.nan, requires_grad=True) for _ in range(2))
    output = prefix_attention(query, FarKeys(key, value, None, torch.zeros(1, 1, 40, dtype=torch.int32)))
    assert not output.any()
    for grad in torch.autograd.grad(output.sum(), [query, key, value]):
        assert not grad.any()

    # The first 15 queries read nothing, nobody the slots 0 and 6.
    key, value = (torch.randn(1, 1, 9, 16, requires_grad=True) for _ in range(2))
    end = (torch.arange(40) // 5 - 1).clamp(min=1).expand(1, 1, -1)
    with torch.no_grad():
        for states in (key, value):
            states[:, :, 0], states[:, :, 6:] = torch.nan, torch.nan
    output = prefix_attention(query, FarKeys(key, value, torch.ones_like(end), end))
    query_grad, key_grad, value_grad = torch.autograd.grad(output.square().sum(), [query, key, value])
    assert not output[..., :15, :].any() and output[..., 15:, :].all()
    assert not query_grad[..., :15, :].any() and query_grad[..., 20:, :].any(-1).all()  # softmax of one key is flat
    for grad in (key_grad, value_grad):
        assert not grad[:, :, 0].any() and not grad[:, :, 6:].any() and grad[:, :, 1:6].all()


def test_only_blocks_that_read_or_are_read_are_visited():
    """A NaN spoils what visits it, and nothing else: work grows with the window, not with the length."""
    tile, window, length = attention._tile(attention.FORWARD, torch.empty(1, 1, 1, 200, 16)), 5, 200
    query, key, value = (torch.randn(*size, length, 16, requires_grad=True) for size in ((1, 1, 1), (1, 1), (1, 1)))
    end = torch.arange(1, length + 1).expand(1, 1, -1)
    far = FarKeys(key[:, :, :0], value[:, :, :0], None, torch.zeros_like(end))

    def spoilt(states: torch.Tensor) -> list[int]:
        return states.isnan().any(-1).flatten().nonzero().flatten().tolist()

    def read(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return prefix_attention(query, far, NearKeys(key, value, (end - window).clamp(min=0), end))

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
    with pytest.raises(ValueError, match=r"near keys \(1, 2, 3, 8\)"):
        prefix_attention(query, FarKeys(key, key, None, end), NearKeys(key[..., :8], key, None, end))
    with pytest.raises(ValueError, match="`position`, which is missing"):
        prefix_attention(query, FarKeys(key, key, None, end, until=torch.zeros(1, 2, 3)))
    with pytest.raises(ValueError, match="512 is larger than 256"):
        prefix_attention(torch.randn(1, 1, 1, 1, 512), FarKeys(key, key, None, end))


def operands(num_near: int) -> tuple[torch.Tensor, FarKeys, NearKeys]:
    query = torch.randn(1, 2, 2, 20, 16, requires_grad=True)
    far = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(2)]
    near = [torch.randn(1, 2, num_near, 16, requires_grad=True) for _ in range(2)]
    end = torch.arange(1, 21, dtype=torch.int32).expand(1, 2, -1).contiguous()
    bias = torch.randn(1, 2, 9, requires_grad=True)
    return query, FarKeys(*far, None, end // 3, bias), NearKeys(*near, (end - 4).clamp(min=0), end)


@pytest.mark.parametrize("with_near", [True, False])
def test_the_ops_pass_opcheck(with_near):
    query, far, near = operands(20)
    nears = near if with_near else (None, None, None, None)
    torch.library.opcheck(attention._forward, (query, *far, *nears, None))
    inputs = [x.detach() if torch.is_tensor(x) else x for x in (query, *far, *nears, None)]
    output, lse = attention._forward(*inputs)
    torch.library.opcheck(attention._backward, (torch.randn_like(output), output, lse, *inputs))


def test_prefix_attention_compiles_into_one_graph():
    query, far, near = operands(20)
    inputs = [query, far.key, far.value, far.bias, near.key, near.value]
    upstream = torch.randn_like(query)
    expected = prefix_attention(query, far, near)
    actual = torch.compile(prefix_attention, fullgraph=True, backend=COMPILER)(query, far, near)
    close(actual, expected, "output")
    for pair in zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True):
        close(*pair, "gradient")


SHAPE = {"batch_size": 2, "num_tokens": 40, "num_groups": 2, "heads_per_group": 2, "sparsity": 4, "head_dim": 16}
SHAPE |= {"rotary_share": 1.0, "padded": False, "packed": False, "num_past": 0, "evicts": False}


@pytest.mark.parametrize("window, biased", [(0, True), (1, False), (5, False), (5, True), (64, True)])
@pytest.mark.parametrize(
    "change, fixed",
    [
        ({"num_tokens": 70, "evicts": True}, False),
        ({"padded": True, "heads_per_group": 1}, False),
        ({"packed": True, "heads_per_group": 3}, False),
        ({"num_past": 13, "num_tokens": 30, "evicts": True}, False),
        ({"num_past": 13, "num_tokens": 30, "evicts": True}, True),
        ({"num_past": 90, "num_tokens": 1, "head_dim": 80}, False),
        ({"padded": True, "num_past": 7, "num_tokens": 20}, True),
    ],
    ids=str,
)
def test_all_attention(change, fixed, window, biased):
    call, inputs = all_form_call(SHAPE | change, window, biased, fixed)
    actual, expected = all_attention(*call), reference.all_attention(*call)
    valid = call[3].valid
    real = torch.ones(()) if valid is None else valid[:, None, None, :, None]
    close(actual * real, expected * real, "output")  # what padding queries get is free
    assert actual.isfinite().all()
    upstream = torch.randn_like(expected) * real
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for i, pair in enumerate(pairs):
        close(*pair, f"gradient {i}")


def test_all_attention_compiles_into_one_graph():
    """With the entries of a cache of fixed size, whose number no shape tells."""
    shape = SHAPE | {"num_tokens": 20, "padded": True, "num_past": 7, "evicts": True}
    call, inputs = all_form_call(shape, window=5, biased=True, fixed=True)
    expected, actual = all_attention(*call), torch.compile(all_attention, fullgraph=True, backend=COMPILER)(*call)
    close(actual, expected, "output")
    upstream = torch.randn_like(expected)
    for pair in zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True):
        close(*pair, "gradient")


def test_all_attention_under_autocast():
    """Values come in the autocast dtype, rotated queries and keys in float32."""
    call, _ = all_form_call(SHAPE | {"num_past": 13, "num_tokens": 20}, window=5, biased=False)
    query, near, kept, *rest = call
    expected = reference.all_attention(*call)
    near, kept = near._replace(value=near.value.half()), kept._replace(value=kept.value.half())
    actual = all_attention(query, near, kept, *rest)
    assert actual.dtype == torch.float16
    close(actual, expected, "output", torch.float16)
