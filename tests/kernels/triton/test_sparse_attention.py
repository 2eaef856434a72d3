"""Attention of sparse groups on Triton against the specification: outputs and all gradients."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels.sparse_attention import reference  # noqa: E402
from mosa_hf.kernels.sparse_attention.triton import sparse_attention  # noqa: E402
from mosa_hf.kernels.tensors import KeyValues

from ...conftest import slow_but
from .common import COMPILER, check, close, coded, random_evictions, random_packed  # noqa: E402

PLAIN = {"num_tokens": 40, "heads": 2, "head_dim": 16, "cached": 0, "dtype": torch.float32, "scale": None}
PLAIN |= {"softcap": None, **dict.fromkeys(("padded", "packed", "evicts", "biased", "sinks", "coded"), False)}
CASES = {
    "no window": (0, {}),
    "no window, bias": (0, {"biased": True, "heads": 1, "scale": 0.5}),
    "window of one": (1, {"evicts": True, "num_tokens": 70}),
    "window": (5, {"biased": True, "softcap": 1.5}),
    "window longer than the call": (64, {"biased": True, "sinks": True}),
    "padded": (5, {"padded": True, "heads": 1, "biased": True, "sinks": True}),
    "packed": (5, {"packed": True, "heads": 3, "biased": True}),
    "packed, padded, no window": (0, {"packed": True, "padded": True, "softcap": 1.5, "sinks": True}),
    "cached": (5, {"cached": 13, "num_tokens": 30, "evicts": True, "biased": True}),
    "cached, no window": (0, {"cached": 13, "num_tokens": 30, "softcap": 1.5, "sinks": True}),
    "cached, padded": (4, {"cached": 7, "num_tokens": 20, "padded": True, "evicts": True}),
    "cached codes": (5, {"cached": 13, "num_tokens": 30, "evicts": True, "coded": True}),
    "cached codes, bfloat16": (4, {"cached": 9, "head_dim": 64, "coded": True, "dtype": torch.bfloat16}),
    "cached, one token": (5, {"cached": 90, "num_tokens": 1, "head_dim": 80}),
    "half precision": (5, {"cached": 9, "head_dim": 64, "biased": True, "dtype": torch.float16}),
    "bfloat16": (4, {"cached": 9, "num_tokens": 24, "head_dim": 64, "biased": True, "dtype": torch.bfloat16}),
    "half precision, everything": (
        5,
        {
            "cached": 9, "head_dim": 128, "num_tokens": 24, "biased": True, "evicts": True, "sinks": True,
            "softcap": 3.0, "scale": 0.2, "dtype": torch.float16,
        },
    ),
}  # fmt: skip
QUICK = ("no window", "window", "padded", "cached", "cached codes", "half precision")


def random_call(window: int, case: dict):
    """Arguments of `sparse_attention`, those of them that take gradients, and which queries are real."""
    case = PLAIN | case
    batch_size, num_groups, num_tokens, head_dim, dtype = 2, 2, case["num_tokens"], case["head_dim"], case["dtype"]
    size = (batch_size, num_groups)
    num_before = max(window - 1, 0) if case["cached"] and not case["padded"] else 0  # the window before the call
    num_recent = num_before + num_tokens
    # Kept tokens have left the window of every query.
    position = torch.arange(num_recent).expand(batch_size, -1)
    valid = segment = None
    if case["padded"]:
        valid = position >= torch.tensor([[num_tokens // 3], [0]])
        position = (valid.cumsum(1) - 1).clamp(min=0)
    if case["cached"]:
        position = position + case["cached"] + (window if case["padded"] else 0)
    if case["packed"]:
        segment = (torch.rand(batch_size, num_tokens) < 0.1).long().cumsum(1)
    per_group = (*size, num_recent)
    recent = KeyValues(
        *(torch.randn(*per_group, head_dim).to(dtype).requires_grad_() for _ in range(2)),
        position[:, None].expand(per_group),
        None if valid is None else valid[:, None].expand(per_group),
        torch.rand(per_group) < 0.3,
    )
    inputs, cached, bias, sinks = list(recent[:2]), None, None, None
    if case["evicts"]:
        recent = recent._replace(evicted_at=random_evictions(recent.position))
    if case["cached"]:
        count = torch.randint(0, case["cached"] + 1, size)
        count[0, 0] = 0
        cached = random_packed(count, head_dim, dtype)
        if case["coded"]:
            cached = coded(cached)
        else:
            inputs += cached[:2]
        if case["evicts"]:
            cached = cached._replace(evicted_at=random_evictions(torch.full((len(cached.key),), int(position.min()))))
    if case["biased"]:
        bias = (-torch.rand(per_group)).requires_grad_()
        inputs.append(bias)
    if case["sinks"]:
        sinks = torch.randn(num_groups, case["heads"], requires_grad=True)
        inputs.append(sinks)
    query = torch.randn(*size, case["heads"], num_tokens, head_dim).to(dtype).requires_grad_()
    real = 1.0 if valid is None else valid[:, None, None, num_before:, None]
    arguments = (query, recent, cached, position[:, num_before:], segment, window, bias)
    return (*arguments, case["scale"], case["softcap"], sinks), [query, *inputs], real


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_sparse_attention(name):
    call, inputs, real = random_call(*CASES[name])
    check(sparse_attention(*call), reference.sparse_attention(*call), inputs, real)


@pytest.mark.slow
def test_compiles_into_one_graph():
    call, inputs, real = random_call(*CASES["cached, padded"])
    compiled = torch.compile(sparse_attention, fullgraph=True, backend=COMPILER)
    check(compiled(*call), reference.sparse_attention(*call), inputs, real)


def test_autocast():
    """Values come in the autocast dtype, rotated queries and keys in float32."""
    call, _, _ = random_call(5, {"cached": 13, "num_tokens": 20})
    expected = reference.sparse_attention(*call)
    query, recent, cached, *rest = call
    recent, cached = recent._replace(value=recent.value.half()), cached._replace(value=cached.value.half())
    actual = sparse_attention(query, recent, cached, *rest)
    assert actual.dtype == torch.float16
    close(actual, expected, "output", torch.float16)
