"""Attention of sparse groups, PyTorch against the specification: outputs and all gradients, on random shapes."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf import kernels, use_backend
from mosa_hf.kernels import backend
from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.sparse_attention import pytorch as sparse_attention
from mosa_hf.kernels.sparse_decode import pytorch as sparse_decode
from mosa_hf.kernels.tensors import KeyValues

from .triton.common import coded, random_evictions, random_packed

FAST = {"suppress_health_check": list(HealthCheck)}
OPTIONS = {
    "scale": st.sampled_from([None, 0.3]),
    "softcap": st.sampled_from([None, 2.0]),
    "has_sinks": st.booleans(),
}
SHAPES = {
    "batch_size": st.integers(1, 3),
    "num_groups": st.integers(1, 4),
    "heads_per_group": st.integers(1, 3),
    "head_dim": st.sampled_from([2, 6, 16]),
    "seed": st.integers(0, 2**16),
}


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64).requires_grad_()


def random_cached(batch_size: int, num_groups: int, most: int, head_dim: int) -> PackedKeyValues | None:
    """Ranges of up to `most` entries, some empty."""
    if not most:
        return None
    count = torch.randint(0, most + 1, (batch_size, num_groups))
    return random_packed(count * (torch.rand(count.shape) < 0.8), head_dim, torch.float64)


def check(name: str, arguments: tuple, options: dict, real: torch.Tensor | float = 1.0) -> None:
    """One operation of both backends: the same output where `real` is not 0, and the same gradients from there."""
    flat = [x for part in (*arguments, *options.values()) for x in (part if isinstance(part, tuple) else [part])]
    inputs = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    results, upstream = [], None
    for which in ("reference", "torch"):
        with use_backend(which):
            output = getattr(backend(arguments[0]), name)(*arguments, **options) * real
        upstream = torch.randn_like(output) if upstream is None else upstream
        gradients = [None] * len(inputs)
        if output.requires_grad:
            gradients = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
        results.append([output, *(0 * x if grad is None else grad for x, grad in zip(inputs, gradients, strict=True))])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, expected.nan_to_num().abs().max().item())
        actual, expected = actual.nan_to_num(), expected.nan_to_num()  # of entries between ranges: what is never read
        assert (actual - expected).abs().max() < 1e-10 * scale, "output" if i == 0 else f"gradient {i - 1}"


@settings(max_examples=150, **FAST)
@given(
    num_tokens=st.integers(1, 70) | st.just(1),
    sparsity=st.integers(1, 9),
    window=st.integers(0, 9),
    padding=st.sampled_from(["none", "left", "packed"]),
    num_cached=st.sampled_from([0, 0, 1, 13]),
    evicts=st.booleans(),
    biased=st.booleans(),
    small_blocks=st.booleans(),
    is_coded=st.booleans(),
    **SHAPES,
    **OPTIONS,
)
def test_sparse_attention(
    batch_size, num_groups, heads_per_group, head_dim, seed, num_tokens, sparsity, window, padding, num_cached, evicts,
    biased, small_blocks, is_coded, has_sinks, **options,
):  # fmt: skip
    torch.manual_seed(seed)
    cached = None if padding == "packed" else random_cached(batch_size, num_groups, num_cached, head_dim)
    # Before the call's own tokens, some that the window covers; cached ones have left the window of every query.
    num_before = int(torch.randint(0, max(window, 1), ())) if cached is not None else 0
    num_recent = num_before + num_tokens
    valid, slot = None, torch.arange(num_recent).expand(batch_size, -1)
    position = slot if cached is None else slot + num_cached + window
    if padding == "left":
        num_empty = torch.randint(0, num_recent + 1, (batch_size, 1))
        valid, position = slot >= num_empty, (position - num_empty).clamp(min=0 if cached is None else window)
    segment = torch.randint(0, 2, (batch_size, num_tokens)).cumsum(1) // 4 if padding == "packed" else None
    size = (batch_size, num_groups, num_recent)
    position = position[:, None].expand(size)
    recent = KeyValues(
        normal(*size, head_dim),
        normal(*size, head_dim),
        position,
        None if valid is None else valid[:, None].expand(size),
        torch.rand(size) < 1 / sparsity,
        random_evictions(position) if evicts else None,
    )
    if is_coded and cached is not None:
        cached = coded(cached)
    if evicts and cached is not None:
        cached = cached._replace(evicted_at=random_evictions(torch.full((len(cached.key),), num_cached + window)))
    query = normal(batch_size, num_groups, heads_per_group, num_tokens, head_dim)
    far_bias = -normal(*size).abs().detach().requires_grad_() if biased else None
    options["sinks"] = normal(num_groups, heads_per_group) if has_sinks else None
    real = 1.0 if valid is None else valid[:, None, None, num_before:, None]
    block, sparse_attention.QUERY_BLOCK = sparse_attention.QUERY_BLOCK, 16 if small_blocks else 64
    try:
        arguments = (query, recent, cached, position[:, 0, num_before:], segment, window, far_bias)
        check("sparse_attention", arguments, options, real)
    finally:
        sparse_attention.QUERY_BLOCK = block


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sparse_attention_learns_in_bfloat16(autocast, biased):
    """The reference's output and gradients in float32; under autocast, rotated queries and keys come in float32."""
    torch.manual_seed(0)
    size, window = (2, 2, 150), 20
    position, selected = torch.arange(150).expand(size), torch.rand(size) < 0.2
    states = [torch.randn(shape).bfloat16() for shape in ((2, 2, 3, 150, 16), (*size, 16), (*size, 16))]
    bias = -torch.rand(size).bfloat16()
    upstream, results = torch.randn(2, 2, 3, 150, 16), []
    for which in ("reference", "torch"):
        dtypes = [torch.float32] * 4 if which == "reference" else [torch.bfloat16] * 4
        if autocast and which == "torch":
            dtypes[:2] = [torch.float32] * 2
        inputs = [each.to(dtype).requires_grad_() for each, dtype in zip((*states, bias), dtypes, strict=True)]
        query, key, value, far_bias = inputs
        recent = KeyValues(key, value, position, None, selected)
        with use_backend(which), torch.autocast("cpu", torch.bfloat16, enabled=autocast and which == "torch"):
            output = backend(query).sparse_attention(
                query, recent, None, position[:, 0], None, window, far_bias if biased else None
            )
        assert output.dtype == dtypes[2]
        results.append([output, *torch.autograd.grad(output, inputs[: 3 + biased], upstream.to(output.dtype))])
    for expected, actual in zip(*results, strict=True):
        assert (actual.float() - expected).abs().max() < 0.03 * expected.abs().max()


@settings(max_examples=80, **FAST)
@given(
    count=st.sampled_from([0, 1, 40]),
    layout=st.sampled_from(["runs", "loop", "evenly"]),
    is_coded=st.booleans(),
    **SHAPES,
    **OPTIONS,
)
def test_sparse_decode(
    batch_size, num_groups, heads_per_group, head_dim, seed, count, layout, is_coded, has_sinks, **options
):  # fmt: skip
    """One by one, all at once, and of ranges that lie evenly."""
    torch.manual_seed(seed)
    packed = random_cached(batch_size, num_groups, count, head_dim)
    if packed is None:
        packed = random_packed(torch.zeros(batch_size, num_groups, dtype=torch.int64), head_dim, torch.float64)
    if layout == "evenly":  # with entries before and behind each, that nothing may read
        stride, num_ranges = count + 5, batch_size * num_groups
        start = (torch.arange(num_ranges) * stride + 2).view(batch_size, num_groups)
        states = [normal(num_ranges * stride + 1, head_dim) for _ in range(2)]
        packed = PackedKeyValues(*states, start, packed.length, max(count, 1), stride, offset=2)
    packed = coded(packed) if is_coded else packed
    query = normal(batch_size, num_groups, heads_per_group, head_dim)
    options["sinks"] = normal(num_groups, heads_per_group) if has_sinks else None
    loop, sparse_decode.LOOP = sparse_decode.LOOP, 99 if layout == "loop" else 0
    try:
        check("sparse_decode", (query, packed), options)
    finally:
        sparse_decode.LOOP = loop


def test_what_triton_does_not_take_goes_to_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "_has_gpu_build", True)
    monkeypatch.setattr(kernels, "_is_worth_it", lambda device: True)
    monkeypatch.setitem(kernels._backends, "triton", "triton")
    states = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    dims = [(), (256,), (64, 64), (257,), (512, 512), (64, 128)]
    assert [backend(states, *each) == "triton" for each in dims] == [True, True, True, False, False, False]
    states.dtype = torch.float64
    assert backend(states, 64) is kernels._backends["torch"]


def test_use_backend():
    states, names = torch.zeros(1), []
    for name in ("reference", "torch"):
        with use_backend(name):
            names.append(backend(states).sparse_attention.__module__.rpartition(".")[2])
            with use_backend("torch"):
                assert backend(states).sparse_decode is sparse_decode.sparse_decode
            assert backend(states).sparse_attention.__module__.endswith(names[-1])
    assert names == ["reference", "pytorch"]
    default = backend(states)
    with pytest.raises(ValueError, match="'cuda' is not available.*reference.*torch"), use_backend("cuda"):
        pass
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert backend(states) is default
