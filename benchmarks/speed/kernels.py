"""
Correctness and speed of the operations on whatever this machine has: `python -m benchmarks.speed.kernels`.

On a GPU the backends "torch" and "triton" take part, elsewhere "torch" alone. Each case is first compared with the
specification in float64, at a length that the specification can bear, outputs and gradients. Then backends and
baselines take turns in one process; a time is the median of a contender's calls, on a GPU between two events around a
call, launching included.

    python -m benchmarks.speed.kernels --cases heads-1k attention-8k --seconds 2
    python -m benchmarks.speed.kernels --cases smoke-attention smoke-decode smoke-heads --seconds 0.01  # does it run?
"""

import argparse
import ctypes
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mosa_hf import MosaConfig, use_backend
from mosa_hf.kernels import backend
from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.rotary import rotate
from mosa_hf.kernels.tensors import KeyValues
from mosa_hf.modeling.devices import dtype_name
from mosa_hf.modeling.forward_context import ForwardContext
from mosa_hf.modeling.heads import MosaHeads
from mosa_hf.routing import CallLayout, TokenMask

from .paper_layer import PaperLayer
from .resident_memory import resident_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton") if DEVICE == "cuda" else ("torch",)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest value
CHECKED_TOKENS, CHECKED_ROWS = 256, 2  # the specification scores every pair
MIN_ROUNDS = 3
PAPER = "paper's layer"


@dataclass(frozen=True)
class Case:
    """
    What is timed: "sparse_attention" of a whole sequence, "sparse_decode" of one token on full ranges of a cache, or
    "selected_heads" as a layer in training, router included. The dense rival of the first two has the same heads and
    groups, and no projections; that of the last is a layer with projections and `dense_heads` heads.
    """

    operation: str
    batch_size: int
    num_tokens: int
    num_groups: int
    sparsity: float
    heads_per_group: int = 1
    head_dim: int = 64
    window: int = 0
    hidden_size: int = 512
    dense_heads: int = 9
    gpu_only: bool = False

    @property
    def num_selected(self) -> int:
        return int(self.num_tokens / self.sparsity)

    def shortened(self) -> "Case":
        """The case, as far as the specification can follow."""
        if self.operation == "sparse_decode":
            return self
        rows, tokens = min(self.batch_size, CHECKED_ROWS), min(self.num_tokens, CHECKED_TOKENS)
        return replace(self, batch_size=rows, num_tokens=tokens)


# Shapes of SmolLM2 and of the paper that a CPU can run, and what takes a GPU.
CASES = {
    "smoke-attention": Case("sparse_attention", 1, 128, 2, 4, 2, 16, window=8),
    "smoke-decode": Case("sparse_decode", 2, 128, 2, 4, 2, 16, window=8),
    "smoke-heads": Case("selected_heads", 2, 64, 4, 8, head_dim=16, hidden_size=32, dense_heads=2),
    "attention-8k": Case("sparse_attention", 1, 8192, 3, 8, 3, window=64),
    "decode-8k": Case("sparse_decode", 1, 8192, 3, 8, 3, window=64),
    "heads-1k": Case("selected_heads", 2, 1024, 128, 64, dense_heads=8),
    "heads-8k": Case("selected_heads", 1, 8192, 60, 128),
    "attention-32k": Case("sparse_attention", 1, 32768, 8, 8, 4, 128, window=64, gpu_only=True),
    "decode-32k": Case("sparse_decode", 8, 32768, 8, 8, 4, 128, window=64, gpu_only=True),
    "heads-paper": Case("selected_heads", 16, 1024, 505, 64, gpu_only=True),
}


class Contender(NamedTuple):
    """A call, and what it has gradients for; none: it has no backward."""

    call: Callable[[], torch.Tensor]
    inputs: list[torch.Tensor]

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.call()

    def backward(self) -> list[torch.Tensor]:
        """The output and its gradients, for an upstream gradient that equals the output."""
        output = self.call()
        return [output.detach(), *torch.autograd.grad(output, self.inputs, output.detach())]

    def on(self, name: str) -> "Contender":
        """The case on the named backend."""
        return Contender(use_backend(name)(self.call), self.inputs)


class Draw:
    """Random tensors with gradients: the same numbers in every dtype, those of `rounded_to`."""

    def __init__(self, dtype: torch.dtype, rounded_to: torch.dtype):
        torch.manual_seed(0)
        self.dtype, self.rounded_to = dtype, rounded_to

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(self.rounded_to).to(DEVICE, self.dtype).requires_grad_()


def flash():
    """Flash attention or an error on a GPU; whatever PyTorch chooses on a CPU."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION] + [SDPBackend.MATH] * (DEVICE == "cpu"))


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`query` [B, H, T, d], causal where it is more than one token; `key`, `value` [B, G, S, d]."""
    with flash():
        return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def sparse_attention(case: Case, draw: Draw) -> tuple[Contender, dict[str, Contender]]:
    size = (case.batch_size, case.num_groups, case.num_tokens)
    query = draw(*size[:2], case.heads_per_group, case.num_tokens, case.head_dim)
    key, value = (draw(*size, case.head_dim) for _ in range(2))
    selected = (torch.rand(size) < 1 / case.sparsity).to(DEVICE)
    position = torch.arange(case.num_tokens, device=DEVICE).expand(case.batch_size, -1)
    recent = KeyValues(key, value, position[:, None].expand(size), None, selected)

    def ours() -> torch.Tensor:
        return backend(query).sparse_attention(query, recent, None, position, None, case.window)

    def dense() -> torch.Tensor:
        return dense_attention(query.flatten(1, 2), key, value)

    inputs = [query, key, value]
    return Contender(ours, inputs), {"dense": Contender(dense, inputs)}


def sparse_decode(case: Case, draw: Draw) -> tuple[Contender, dict[str, Contender]]:
    size, length = (case.batch_size, case.num_groups), case.num_selected + case.window
    query = draw(*size, case.heads_per_group, case.head_dim)
    start = torch.arange(case.batch_size * case.num_groups, device=DEVICE).view(size) * length
    key, value = (draw(start.numel() * length, case.head_dim) for _ in range(2))
    packed = PackedKeyValues(key, value, start, torch.full_like(start, length), length, stride=length)
    dense_key, dense_value = (draw(*size, case.num_tokens, case.head_dim) for _ in range(2))

    def ours() -> torch.Tensor:
        return backend(query).sparse_decode(query, packed)

    def dense() -> torch.Tensor:
        return dense_attention(query.flatten(1, 2)[:, :, None], dense_key, dense_value)

    return Contender(ours, []), {"dense": Contender(dense, [])}


def selected_heads(case: Case, draw: Draw) -> tuple[Contender, dict[str, Contender]]:
    hidden_states = draw(case.batch_size, case.num_tokens, case.hidden_size)
    config = MosaConfig(
        hidden_size=case.hidden_size,
        head_dim=case.head_dim,
        num_mosa_heads=case.num_groups,
        mosa_sparsity=case.sparsity,
        mosa_include_first=False,
    )
    heads = MosaHeads(config).to(DEVICE, draw.dtype).train()  # by expert choice
    dense = DenseLayer(case.hidden_size, case.dense_heads, case.head_dim).to(DEVICE, draw.dtype)
    for parameter in (*heads.parameters(), *dense.parameters()):
        parameter.data = draw(*parameter.shape, scale=case.hidden_size**-0.5).detach()
    paper = PaperLayer(heads)
    position = torch.arange(case.num_tokens, device=DEVICE)[None]
    angle = position[..., None] * 10000 ** -torch.linspace(0, 1, case.head_dim // 2, device=DEVICE)
    angle = angle.repeat(1, 1, 2).expand(case.batch_size, -1, -1)
    cos, sin = (x.to(draw.rounded_to).to(draw.dtype) for x in (angle.cos(), angle.sin()))
    layout = CallLayout.build(hidden_states, TokenMask(), position, None, may_be_packed=False)

    def ours() -> torch.Tensor:
        return heads(hidden_states, (cos, sin), ForwardContext(layout, {}, torch.is_grad_enabled()))

    baselines = {PAPER: paper, "dense": dense}
    return Contender(ours, [hidden_states, *heads.parameters()]), {
        name: Contender(lambda layer=layer: layer(hidden_states, cos, sin), [hidden_states, *layer.parameters()])
        for name, layer in baselines.items()
    }


class DenseLayer(nn.Module):
    """Causal attention with rotary positions, and its projections."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` → `[B, T, D]`; cos, sin `[B, T, d]`."""
        states = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = states.chunk(3, dim=1)
        cos, sin = cos[:, None], sin[:, None]
        heads = dense_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(heads.transpose(1, 2).flatten(2))


OPERATIONS = {"sparse_attention": sparse_attention, "sparse_decode": sparse_decode, "selected_heads": selected_heads}


def check(case: Case, dtypes: tuple[torch.dtype, ...] = (torch.float32, DTYPE)) -> dict[str, float]:
    """
    Largest errors of output and gradients, relative to the largest value, of each backend in each dtype, and of the
    paper's layer in float32 (its logits in bfloat16 select other tokens).

    Raises:
        AssertionError: for an error beyond the tolerance.
    """
    build, errors = OPERATIONS[case.operation], {}
    for dtype in dict.fromkeys(dtypes):
        ours, baselines = build(case, Draw(dtype, dtype))
        candidates = {name: ours.on(name) for name in BACKENDS}
        if dtype == torch.float32 and PAPER in baselines:  # of its gradients, the input's has the same layout
            candidates[PAPER] = baselines[PAPER]._replace(inputs=baselines[PAPER].inputs[:1])
        specification = build(case, Draw(torch.float64, dtype))[0].on("reference")
        expected = specification.backward() if specification.inputs else [specification.forward()]
        for name, candidate in candidates.items():
            actual = candidate.backward() if candidate.inputs else [candidate.forward()]
            error = max(
                ((own - right).abs().max() / right.abs().max()).item()
                for own, right in zip(actual, expected, strict=name != PAPER)
            )
            kind = dtype_name(dtype)
            assert error <= TOLERANCE[dtype], f"{name} in {kind}: error {error:.1e} of {case}"
            errors[f"{name} {kind}"] = error
    return errors


def milliseconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def take_turns(calls: dict, seconds: float) -> dict:
    """Median milliseconds of each call; a change of the machine's speed meets all of them."""
    measured = {key: [] for key in calls}
    rounds, deadline = 0, time.perf_counter() + seconds * len(calls)
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        for key, call in calls.items():
            measured[key].append(milliseconds(call))
        rounds += 1
    return {key: statistics.median(each) for key, each in measured.items()}


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that one call takes on top of what is there before it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would be used again, and not be seen
    return resident_memory(call)


def time_case(name: str, seconds: float) -> list[list[str]]:
    """Rows of the table."""
    case = CASES[name]
    ours, baselines = OPERATIONS[case.operation](case, Draw(DTYPE, DTYPE))
    contenders = {f"MoSA {each}": ours.on(each) for each in BACKENDS} | baselines
    calls = {("forward", each): contender.forward for each, contender in contenders.items()}
    calls |= {
        ("forward + backward", each): contender.backward for each, contender in contenders.items() if contender.inputs
    }
    for call in calls.values():
        call()  # compiles what has to be compiled
    times = take_turns(calls, seconds)
    return [
        [
            *(name, work, each, f"{times[work, each]:.3f}", f"{times[work, 'dense'] / times[work, each]:.2f}"),
            f"{peak_memory(call) / 2**20:.1f}",
        ]
        for (work, each), call in calls.items()
    ]


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name, case in CASES.items() if "smoke" not in name and (DEVICE == "cuda" or not case.gpu_only)]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each contender")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    print(f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {DTYPE}")
    print()
    print_row("case", "largest errors")
    print_row("---", "---")
    for name in options.cases:
        errors = check(CASES[name].shortened())
        print_row(name, ", ".join(f"{who}: {error:.0e}" for who, error in errors.items()))
    print()
    print_row("case", "work", "contender", "ms", "dense / this", "peak memory, MiB")
    print_row("---", "---", "---", "---:", "---:", "---:")
    for name in options.cases:
        for row in time_case(name, options.seconds):
            print_row(*row)


if __name__ == "__main__":
    main()
