"""8-bit entries: the definition, and what reads and writes them beside it."""

import math

import pytest
import torch

from mosa_hf import use_backend
from mosa_hf.kernels import backend, entries
from mosa_hf.kernels.entry_codes import decode, encode, rounded, turned

from .triton.common import coded, random_packed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_states(dtype: torch.dtype) -> torch.Tensor:
    """Vectors of all magnitudes that the dtype has, one of zeros, and some whose largest number is negative."""
    torch.manual_seed(0)
    exponent = (
        torch.linspace(-4, 4, 4001)[:, None] if dtype == torch.float16 else torch.linspace(-30, 30, 4001)[:, None]
    )
    states = (torch.randn(4001, 16) * 10.0**exponent).to(dtype)
    states[7] = 0.0
    return states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype):
    """Number by number; the nearest of 255, so that nothing is off by more than half a step."""
    states = random_states(dtype)
    codes, scale = encode(states)
    assert codes.dtype == torch.int8 and scale.dtype == dtype and codes.shape == states.shape
    assert codes.abs().max() == 127 and not codes[7].any() and scale[7] == 0
    for i in (0, 7, 100, 2000, 4000):
        largest = max(abs(float(x)) for x in states[i])
        assert float(scale[i]) == largest
        for x, code in zip(states[i].tolist(), codes[i].tolist(), strict=True):
            assert abs(127 * x / (largest or 1.0) - code) <= 0.5 + 1e-4
    held = decode(codes, scale)
    assert held.dtype == dtype
    step = scale.double()[:, None] / 127
    own_rounding = (held.double().abs() + torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
    assert ((held.double() - states.double()).abs() <= step * (0.5 + 1e-4) + own_rounding).all()
    assert torch.equal(rounded(states), held)


@pytest.mark.parametrize("size", [2, 5, 64, 80, 96, 128])
def test_turning_keeps_products_and_spreads_what_one_channel_has(size):
    """By the cosine transform, term by term; what keys lose takes the same from all scores of a query."""
    query, key, center = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 7, size), (3, 9, size), (3, 1, size))
    )
    matrix = torch.tensor(
        [
            [math.sqrt((1 if j == 0 else 2) / size) * math.cos(math.pi * (i + 0.5) * j / size) for j in range(size)]
            for i in range(size)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(turned(query), query @ matrix)
    torch.testing.assert_close(turned(query) @ turned(key).mT, query @ key.mT)
    lost = turned(query) @ turned(key, center).mT - query @ key.mT
    torch.testing.assert_close(lost, lost[..., :1].expand_as(lost))
    outlier = torch.zeros(size, size, dtype=torch.float64).fill_diagonal_(100.0)
    assert turned(outlier).abs().max() <= 100 * math.sqrt(2 / size) + 1e-9
    assert turned(query.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_rounded_has_the_same_codes(dtype):
    """And stands for the same, but for the last bit in float32 and float64."""
    states = random_states(dtype)
    once = rounded(states)
    assert torch.equal(encode(once)[0], encode(states)[0])
    if dtype.itemsize == 2:
        assert torch.equal(rounded(once), once)
    else:
        torch.testing.assert_close(rounded(once), once, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_gradients_pass_as_if_nothing_were_rounded():
    states, upstream = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 8).double()
    output = rounded(states)
    assert torch.equal(output, decode(*encode(states.detach())))
    assert torch.equal(torch.autograd.grad(output, states, upstream, create_graph=True)[0], upstream)
    assert torch.equal(torch.func.vmap(rounded)(states), output)


def test_no_gradient_reaches_what_is_stored():
    states = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="`mosa_cache_dtype`.*one call.*no_grad"):
        decode(*encode(states)).sum().backward()


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_is_read_is_what_the_codes_stand_for(name):
    torch.manual_seed(0)
    packed = coded(random_packed(torch.tensor([[5, 0, 9], [1, 30, 3]]), 8, torch.float64))
    plain = packed._replace(key=decode(*packed.held()[::2]), value=decode(*packed.held()[1::2]))
    query = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    with use_backend(name):
        decoded, expected = (
            backend(query).sparse_decode(query, each)
            for each in (packed, plain._replace(key_scale=None, value_scale=None))
        )
    torch.testing.assert_close(decoded, expected)


def test_a_step_decodes_one_range_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(entries, "decode", lambda codes, scale: sizes.append(len(codes)) or decode(codes, scale))
    count = torch.tensor([[50 + i for i in range(12)]] * 3)
    packed = coded(random_packed(count, 8, torch.float32))
    with use_backend("torch"), torch.no_grad():
        backend(packed.start).sparse_decode(torch.randn(3, 12, 2, 8), packed)
    assert sorted(sizes) == sorted(2 * count.flatten().tolist())
