"""What the tests of Triton kernels share: devices, comparisons, random ranges of a cache."""

import torch

from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.entry_codes import encode
from mosa_hf.kernels.tensors import NEVER

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor compiles for half a minute on a CPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest value


def close(actual: torch.Tensor, expected: torch.Tensor, name: str, dtype: torch.dtype = torch.float32) -> None:
    assert actual.shape == expected.shape, name
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double() / scale, expected.double() / scale, rtol=0, atol=TOLERANCE[dtype], msg=lambda m: f"{name}: {m}"
    )


def gradients(output: torch.Tensor, upstream: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the sum of `output` times `upstream`; zeros for inputs that it does not depend on."""
    grads = torch.autograd.grad((output.float() * upstream).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def check(
    actual: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], real: torch.Tensor | float = 1.0
) -> None:
    """Output and all gradients agree where `real` is not 0; the rest may be any finite number."""
    dtype = actual.dtype
    assert dtype == expected.dtype and actual.isfinite().all()
    close(actual * real, expected * real, "output", dtype)
    upstream = torch.randn(expected.shape, device=expected.device) * real
    pairs = zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    for i, pair in enumerate(pairs):
        close(*pair, f"gradient {i}", dtype)


def random_evictions(position: torch.Tensor) -> torch.Tensor:
    """When a budget evicts the tokens of these positions: never, or any time from the token's own on."""
    evicted_at = position + (torch.rand(position.shape, device=position.device) * 20).long()
    return evicted_at.masked_fill(torch.rand(position.shape, device=position.device) < 0.3, NEVER)


def random_packed(
    count: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.float32, room: int = 3
) -> PackedKeyValues:
    """Ranges of `count` [B, G] entries that lie in no order, with NaN between them, which must never be read."""
    size = count.flatten() + room
    order = torch.randperm(size.numel(), device=count.device)
    start = torch.empty_like(size)
    start[order] = size[order].cumsum(0) - size[order] + 1  # the reference reads the first entry and masks it
    num_entries = int(size.sum()) + 1
    filled = torch.zeros(num_entries, dtype=torch.bool, device=count.device)
    filled[0] = True
    for first, number in zip(start.tolist(), count.flatten().tolist(), strict=True):
        filled[first : first + number] = True
    key, value = (
        torch.randn(num_entries, head_dim, device=count.device).masked_fill(~filled[:, None], torch.nan).to(dtype)
        for _ in range(2)
    )
    return PackedKeyValues(
        key.requires_grad_(), value.requires_grad_(), start.view_as(count), count, int(count.max()) + room
    )


def coded(packed: PackedKeyValues) -> PackedKeyValues:
    """The same entries as codes; between ranges, scales are no numbers."""
    (key, key_scale), (value, value_scale) = encode(packed.key.detach()), encode(packed.value.detach())
    return packed._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)
