"""A decoding step on Triton against the specification."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.sparse_decode import reference  # noqa: E402
from mosa_hf.kernels.sparse_decode import triton as kernels  # noqa: E402
from mosa_hf.kernels.sparse_decode.triton import sparse_decode  # noqa: E402

from .common import COMPILER, DEVICE, check, close, coded, random_packed  # noqa: E402

# Head size, query heads a group, entries of each range, dtype, scale, softcap, with sinks.
CASES = [
    (16, 1, [[1, 0], [5, 33]], torch.float32, None, None, False),
    (16, 20, [[40, 7], [0, 64]], torch.float32, 0.7, None, True),
    (64, 3, [[100, 3, 17]], torch.float32, None, 1.5, False),
    (80, 2, [[0], [90]], torch.float32, None, 1.5, True),
    (128, 4, [[33, 70]], torch.float16, None, None, False),
    (64, 2, [[0, 0], [0, 0]], torch.float16, 0.3, 2.0, True),
    (256, 1, [[90, 31]], torch.float16, 0.1, 2.0, True),
    (128, 4, [[33, 70]], torch.bfloat16, None, 2.0, True),
]


@pytest.fixture
def cut(monkeypatch):
    """A handful of entries in several blocks and chunks, and a few heads in several blocks, as many of them are."""
    monkeypatch.setattr(kernels, "tile", lambda block_dim, dtype: (16, 16, 4, 2))
    monkeypatch.setattr(kernels, "CHUNKS", 1 << 20)


def random_step(case) -> tuple[torch.Tensor, PackedKeyValues, dict]:
    head_dim, num_heads, count, dtype, scale, softcap, with_sinks = case
    packed = random_packed(torch.tensor(count), head_dim, dtype)
    query = (torch.randn(*packed.length.shape, num_heads, head_dim) * 2).to(dtype)
    sinks = torch.randn(packed.length.shape[1], num_heads) * 2 if with_sinks else None
    return query, packed, {"scale": scale, "softcap": softcap, "sinks": sinks}


@pytest.mark.parametrize("is_coded", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_decode(case, is_coded, cut):
    query, packed, options = random_step(case)
    packed = coded(packed) if is_coded else packed
    before = [x.clone() for x in (query, *packed[:4])]
    with torch.no_grad():
        actual, expected = sparse_decode(query, packed, **options), reference.sparse_decode(query, packed, **options)
    assert actual.dtype == expected.dtype
    close(actual, expected, "output", actual.dtype)
    assert not actual[packed.length == 0].any()
    for x, unchanged in zip((query, *packed[:4]), before, strict=True):
        torch.testing.assert_close(x, unchanged, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_one_chunk_and_blocks_as_they_are(monkeypatch):
    query, packed, options = random_step((64, 2, [[150, 0, 1], [31, 32, 64]], torch.float32, None, None, True))
    monkeypatch.setattr(kernels, "CHUNKS", 1)
    close(sparse_decode(query, packed, **options), reference.sparse_decode(query, packed, **options), "output")
    query, packed, options = random_step((16, 1, [[0]], torch.float32, None, None, False))
    assert not sparse_decode(query, packed._replace(key=packed.key[:0], value=packed.value[:0], max_length=0)).any()


def test_gradients():
    query, packed, options = random_step((16, 2, [[4, 0], [9, 1]], torch.float32, None, 1.5, True))
    query, key, value = query.requires_grad_(), *(x.detach().nan_to_num().requires_grad_() for x in packed[:2])
    packed, sinks = packed._replace(key=key, value=value), options["sinks"].requires_grad_()
    actual, expected = sparse_decode(query, packed, **options), reference.sparse_decode(query, packed, **options)
    check(actual, expected, [query, key, value, sinks])


@torch.no_grad()
def test_asks_nothing_of_the_device():
    """Fake tensors have no numbers."""
    with FakeTensorMode():
        start = torch.empty(2, 3, dtype=torch.int64)
        packed = PackedKeyValues(torch.empty(500, 16), torch.empty(500, 16), start, start, 300)
        assert sparse_decode(torch.empty(2, 3, 4, 16), packed).shape == (2, 3, 4, 16)


@pytest.mark.slow
@torch.no_grad()
def test_op_and_compiled_graph(cut):
    query, packed, options = random_step((16, 2, [[40, 0], [9, 1]], torch.float32, None, 1.5, True))
    states = packed.key.detach().nan_to_num(), packed.value.detach().nan_to_num()
    inputs = (query, *states, None, None, *packed[2:5])
    torch.library.opcheck(kernels._decode, (*inputs, 0.25, 1.5, options["sinks"]))
    compiled = torch.compile(sparse_decode, fullgraph=True, backend=COMPILER)
    close(compiled(query, packed, **options), sparse_decode(query, packed, **options), "output")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_can_be_captured_in_a_cuda_graph(cut):
    """And follows ranges that move and grow between replays."""
    query, packed, options = random_step((64, 4, [[100, 30]], torch.float16, None, None, True))
    sparse_decode(query, packed, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = sparse_decode(query, packed, **options)
    packed.start.add_(1)
    packed.length.sub_(2)
    query.mul_(-1)
    graph.replay()
    close(actual, reference.sparse_decode(query, packed, **options), "output", torch.float16)


def test_heads_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="`head_dim` 512 is more than 256: choose"), torch.no_grad():
        sparse_decode(torch.randn(1, 1, 1, 512), random_packed(torch.tensor([[2]]), 512))
