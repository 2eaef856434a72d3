"""
Correctness and speed of the MoSA heads on whatever this machine has: `python -m benchmarks.kernels`.

First every function of the active backend, and a whole layer, is compared with the float64 specification; then a
whole layer is timed against dense attention (`scaled_dot_product_attention`, flash on a GPU) and, in form "selected",
against the layer that the paper's equations describe. Contenders take turns within one run; times are medians.

    python -m benchmarks.kernels --cases selected-1k all-8k --seconds 2
    python -m benchmarks.kernels --cases smoke --seconds 0.01       # does it run at all
"""

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Measurement, Timer

from mosa_hf import MosaConfig
from mosa_hf.kernels import backend, portable, use_backend
from mosa_hf.kernels.layout import FixedKeyValues, HeadWeights, KeyValues, Tokens, rotate
from mosa_hf.modeling.heads import MosaHeads, RoutingState

from .paper_layer import PaperLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value


@dataclass(frozen=True)
class Case:
    """
    What is timed. Form "decode" is one token of form "all" on a full cache of fixed size. The dense rival has
    `dense_heads` query heads, and in the forms "all" and "decode" the same heads and groups as MoSA.
    """

    form: str
    batch_size: int
    num_tokens: int
    hidden_size: int
    num_groups: int
    sparsity: float
    heads_per_group: int = 1
    head_dim: int = 64
    window: int = 0
    dense_heads: int = 0
    gpu_only: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if DEVICE == "cuda" else torch.float32

    @property
    def num_selected(self) -> int:
        return int(self.num_tokens / self.sparsity)

    def flops(self, contender: str) -> float:
        """Multiplications and additions of matmuls in one forward."""
        rows = self.batch_size * self.num_tokens
        if self.form == "selected" and contender == "dense":
            width = self.dense_heads * self.head_dim
            return rows * (8 * self.hidden_size * width + 2 * self.num_tokens * width)
        width = self.num_groups * self.heads_per_group * self.head_dim  # of the queries
        projections = 4 * self.hidden_size * (width + self.num_groups * self.head_dim)
        router = 0 if contender == "dense" else 2 * self.hidden_size * self.num_groups
        if self.form == "selected":
            selected = self.batch_size * self.num_selected
            return rows * router + selected * (projections + 2 * self.num_selected * width)
        read = self.num_tokens / 2 if contender == "dense" else self.num_selected / 2 + self.window
        return rows * (projections + router + 4 * read * width)

    def cache_bytes(self, contender: str) -> int:
        """Keys and values that one step of decoding reads."""
        read = self.num_tokens if contender == "dense" else self.num_selected + self.window
        return 2 * self.batch_size * self.num_groups * read * self.head_dim * self.dtype.itemsize


# Layers of the paper's kind that a CPU can run, one like SmolLM2's, and what takes a GPU.
CASES = {
    "smoke": Case("selected", 2, 64, 32, 4, 8, head_dim=16, dense_heads=2),
    "smoke-all": Case("all", 1, 128, 32, 2, 4, heads_per_group=2, head_dim=16, window=8),
    "smoke-decode": Case("decode", 2, 128, 32, 2, 4, heads_per_group=2, head_dim=16, window=8),
    "selected-1k": Case("selected", 2, 1024, 512, 128, 64, dense_heads=8),
    "selected-4k": Case("selected", 1, 4096, 512, 64, 16, dense_heads=8),
    "selected-8k": Case("selected", 1, 8192, 512, 60, 128, dense_heads=9),
    "all-8k": Case("all", 1, 8192, 576, 3, 8, heads_per_group=3, window=64),
    "selected-paper": Case("selected", 16, 1024, 512, 505, 64, dense_heads=9, gpu_only=True),
    "all-32k": Case("all", 1, 32768, 4096, 8, 8, heads_per_group=4, head_dim=128, window=64, gpu_only=True),
    "decode-32k": Case("decode", 8, 32768, 4096, 8, 8, heads_per_group=4, head_dim=128, window=64, gpu_only=True),
}


class DenseLayer(nn.Module):
    """Causal attention with rotary positions, and its projections."""

    def __init__(self, hidden_size: int, num_heads: int, num_groups: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_groups) * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.sizes = [num_heads, num_groups, num_groups]

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` → `[B, T, D]`; cos, sin `[B, T, rotary_dim]`."""
        states = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = states.split(self.sizes, dim=1)
        cos, sin = cos[:, None], sin[:, None]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        with flash():
            heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def flash():
    """Flash attention or an error on a GPU; whatever PyTorch chooses on a CPU."""
    return sdpa_kernel(
        SDPBackend.FLASH_ATTENTION if DEVICE == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    )


def mosa_heads(case: Case) -> MosaHeads:
    """Heads with random weights; form "selected" trains with expert choice, form "all" evaluates with a threshold."""
    config = MosaConfig(
        hidden_size=case.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=case.head_dim,
        num_mosa_heads=case.num_groups * case.heads_per_group,
        num_mosa_key_value_heads=case.num_groups,
        mosa_sparsity=case.sparsity,
        mosa_query_tokens=case.form,
        mosa_window=case.window,
        mosa_include_first=False,
    )
    heads = MosaHeads(config, 0)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=case.hidden_size**-0.5)
    return heads.to(DEVICE, case.dtype).train(case.form == "selected")


def layers(case: Case) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """Contender → its forward, and → what it has gradients for."""
    torch.manual_seed(0)
    shape = (case.batch_size, case.num_tokens)
    hidden_states = torch.randn(*shape, case.hidden_size, device=DEVICE, dtype=case.dtype, requires_grad=True)
    position = torch.arange(case.num_tokens, device=DEVICE).expand(shape)
    angle = position[..., None] * 10000 ** -torch.linspace(0, 1, case.head_dim // 2, device=DEVICE)
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    heads = mosa_heads(case)
    state = RoutingState.build(hidden_states, None, position, None, may_be_packed=False)
    if case.form == "all":
        with torch.no_grad():  # one token in `sparsity` reaches the threshold
            logits = F.linear(hidden_states.float(), heads.router.weight.float()).flatten(0, 1)
            heads.router.threshold.copy_(logits.sort(dim=0).values[-case.batch_size * case.num_selected])

    def mosa() -> torch.Tensor:
        state.thresholds.clear()  # of the call before
        return heads(hidden_states, (cos, sin), state)

    num_heads = case.dense_heads or case.num_groups * case.heads_per_group
    dense = DenseLayer(case.hidden_size, num_heads, case.dense_heads or case.num_groups, case.head_dim)
    dense = dense.to(DEVICE, case.dtype)
    forwards = {"MoSA": mosa, "dense": lambda: dense(hidden_states, cos, sin)}
    inputs = {
        "MoSA": [hidden_states, *heads.parameters()],
        "dense": [hidden_states, *dense.parameters()],
    }
    if active_backend() is not portable:

        def torch_backend() -> torch.Tensor:
            with use_backend("torch"):
                return mosa()

        forwards["MoSA, torch backend"], inputs["MoSA, torch backend"] = torch_backend, inputs["MoSA"]
    if case.form == "selected":
        paper = PaperLayer(heads)
        forwards["paper's equations"] = lambda: paper(hidden_states, cos, sin)
        inputs["paper's equations"] = [hidden_states, *paper.parameters()]
    return forwards, inputs


def attentions(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """Contender → the attention of form "all" alone, between projections, on random selections."""
    torch.manual_seed(0)
    batch_size, groups, num_tokens = case.batch_size, case.num_groups, case.num_tokens
    options = {"device": DEVICE, "dtype": case.dtype}
    query = torch.randn(batch_size, groups, case.heads_per_group, num_tokens, case.head_dim, **options)
    key, value = torch.randn(2, batch_size, groups, num_tokens, case.head_dim, **options)
    selected = torch.rand(batch_size, num_tokens, groups, device=DEVICE) < 1 / case.sparsity
    position = torch.arange(num_tokens, device=DEVICE).expand(batch_size, -1)
    tokens = Tokens(position, None, None, None, None, selected, None)
    near = KeyValues(key, value, position[:, None].expand(-1, groups, -1), None, selected.transpose(1, 2))

    def dense() -> torch.Tensor:
        with flash():
            return F.scaled_dot_product_attention(query.flatten(1, 2), key, value, is_causal=True, enable_gqa=True)

    return {
        "MoSA": lambda: active_backend().all_attention(query, near, None, tokens, case.window),
        "dense": dense,
    }


def selected_ops(case: Case) -> dict[str, Callable[[], object]]:
    """The steps of form "selected" one by one, where Triton is the backend: the portable path has no such steps."""
    if active_backend() is portable:
        return {}
    from mosa_hf.kernels.triton.attention import FarKeys, prefix_attention
    from mosa_hf.kernels.triton.gather_project import gather_project
    from mosa_hf.kernels.triton.project_scatter import project_scatter
    from mosa_hf.kernels.triton.select import selected_positions

    torch.manual_seed(0)
    shape, options = (case.batch_size, case.num_tokens), {"device": DEVICE, "dtype": case.dtype}
    heads = mosa_heads(case)
    weights = (heads.q_proj, heads.k_proj, heads.v_proj)
    hidden_states = torch.randn(*shape, case.hidden_size, **options)
    cos, sin = torch.rand(2, *shape, case.head_dim, **options)
    order = torch.rand(*shape, case.num_groups, device=DEVICE).argsort(1).argsort(1)
    selected = order < case.num_selected
    index, count = selected_positions(selected, case.num_selected)
    query, key, value = gather_project(hidden_states, index, count, *weights, None, None, None, cos, sin)
    far = FarKeys(key, value, None, torch.arange(1, case.num_selected + 1, device=DEVICE))
    gate = torch.rand(index.shape, device=DEVICE)
    return {
        "select": lambda: selected_positions(selected, case.num_selected),
        "gather-project": lambda: gather_project(hidden_states, index, count, *weights, None, None, None, cos, sin),
        "prefix attention": lambda: prefix_attention(query, far),
        "project-scatter": lambda: project_scatter(query, gate, heads.o_proj, index, count, case.num_tokens),
    }


def decode_steps(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """Contender → one step of the attention of a token, on caches that are full."""
    torch.manual_seed(0)
    batch_size, groups, head_dim = case.batch_size, case.num_groups, case.head_dim
    options = {"device": DEVICE, "dtype": case.dtype}
    state = full_cache(batch_size, groups, case.num_selected, case.window, case.num_tokens, head_dim, case.dtype)
    query = torch.randn(batch_size, groups, case.heads_per_group, head_dim, **options)
    key, value = torch.randn(2, batch_size, groups, head_dim, **options)
    score = torch.randn(batch_size, groups, device=DEVICE)
    score = score.masked_fill(torch.rand_like(score) > 1 / case.sparsity, -torch.inf)
    budget = case.num_selected
    dense_key, dense_value = torch.randn(2, batch_size, groups, case.num_tokens, head_dim, **options)

    def dense() -> torch.Tensor:
        with flash():
            return F.scaled_dot_product_attention(
                query.flatten(1, 2)[:, :, None], dense_key, dense_value, enable_gqa=True
            )

    return {"MoSA": lambda: active_backend().decode_all(query, key, value, score, None, state, budget), "dense": dense}


def full_cache(batch_size, num_groups, num_kept, window, num_tokens, head_dim, dtype) -> FixedKeyValues:
    """A cache that holds `num_kept` selected tokens in every row and group, and a window."""
    shape = (batch_size, num_groups)
    kept = torch.randn(2, *shape, num_kept, head_dim, device=DEVICE).to(dtype)
    ring = torch.randn(2, *shape, window, head_dim, device=DEVICE).to(dtype)
    position = torch.arange(num_kept, device=DEVICE, dtype=torch.int32).expand(*shape, -1).contiguous()
    return FixedKeyValues(
        *kept,
        position,
        torch.randn(*shape, num_kept, device=DEVICE),
        torch.full(shape, num_kept, device=DEVICE, dtype=torch.int32),
        torch.zeros(shape, device=DEVICE, dtype=torch.int32),
        *ring,
        torch.full((*shape, window), -torch.inf, device=DEVICE),
        torch.full(shape[:1], num_tokens, device=DEVICE),
    )


def runs(case: Case) -> dict[tuple[str, str], Callable[[], object]]:
    """(contender, what it does) → a call that does it once."""
    if case.form == "decode":
        return {(name, "step"): without_gradients(step) for name, step in decode_steps(case).items()}
    forwards, inputs = layers(case)
    calls = {(name, "forward"): without_gradients(forward) for name, forward in forwards.items()}
    if case.form == "all":
        calls |= {(name, "attention alone"): without_gradients(call) for name, call in attentions(case).items()}
    else:
        calls |= {(name, "op alone"): without_gradients(call) for name, call in selected_ops(case).items()}
    for name, forward in forwards.items():
        calls[name, "forward + backward"] = with_gradients(forward, inputs[name])
    return calls


def without_gradients(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
    return torch.no_grad()(forward)


def with_gradients(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
    def call():
        output = forward()
        # Evaluated, form "all" has no gradient for its router.
        return torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

    return call


def medians(calls: dict[tuple[str, str], Callable[[], object]], seconds: float, rounds: int = 3) -> dict:
    """Seconds a call; the contenders take turns, so that a change of the machine's speed meets them all."""
    measured = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            measured[key].append(timer.blocked_autorange(min_run_time=seconds / rounds))
    return {key: Measurement.merge(values)[0].median for key, values in measured.items()}


def peak_memory(name: str, key: tuple[str, str], call: Callable[[], object]) -> int:
    """Bytes that one call takes on top of what is there before it. On a CPU a process of its own measures it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "benchmarks.kernels", "--memory-of", name, *key]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident_memory(call: Callable[[], object]) -> int:
    """How far this process' resident set grows during one call, in bytes; Linux only."""

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of a large square matmul."""
    left, right = torch.randn(2, size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / medians({("matmul", ""): lambda: left @ right}, seconds=1)["matmul", ""]


def copy_bandwidth(num_bytes: int = 2**30) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / medians({("copy", ""): lambda: target.copy_(source)}, seconds=1)["copy", ""]


def time_case(name: str, seconds: float, rates: tuple[float, float] | None) -> list[list[str]]:
    """Rows of the table. `rates`: of matmuls and of copies; None: not compared."""
    case = CASES[name]
    calls = runs(case)
    for call in calls.values():
        call()  # compiles what has to be compiled
    rows = []
    for (contender, work), duration in medians(calls, seconds).items():
        memory = peak_memory(name, (contender, work), calls[contender, work])
        share = ""
        if rates is not None and work == "forward":
            share = f"{case.flops(contender) / duration / rates[0]:.0%} of matmul"
        elif rates is not None and work == "step":
            share = f"{case.cache_bytes(contender) / duration / rates[1]:.0%} of copy"
        rows.append([name, work, contender, f"{duration * 1e3:.3f}", f"{memory / 2**20:.1f}", share])
    return rows


def check() -> list[list[str]]:
    """
    Rows of a table: largest errors of the active backend's functions and of whole layers, in every dtype that the
    device computes with, against the specification in float64.

    Raises:
        AssertionError: for an error beyond the tolerance.
    """
    dtypes = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32]
    rows = []
    for dtype in dtypes:
        for name, function in CHECKS.items():
            torch.manual_seed(0)
            values = function(dtype)
            with use_backend("reference"):
                torch.manual_seed(0)
                expected_values = function(torch.float64, rounded_to=dtype)
            error = max(
                ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
                for value, expected in zip(values, expected_values, strict=True)
            )
            assert error <= TOLERANCE[dtype], f"{name} in {dtype}: error {error:.1e}"
            rows.append([name, str(dtype).removeprefix("torch."), f"{error:.1e}", f"{TOLERANCE[dtype]:.0e}"])
    return rows


def random_tensor(*shape: int, dtype: torch.dtype, rounded_to: torch.dtype | None, scale: float = 1.0) -> torch.Tensor:
    """The same numbers in every dtype: those of `rounded_to`, or of `dtype` itself."""
    return (torch.randn(shape) * scale).to(rounded_to or dtype).to(DEVICE, dtype).requires_grad_()


def with_random_upstream(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and its gradients."""
    upstream = torch.randn(output.shape).to(DEVICE, output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def random_tokens(batch_size: int, num_tokens: int, num_groups: int, rotary_dim: int, dtype, rounded_to) -> Tokens:
    """A third selected; the first row begins with padding."""
    valid = torch.arange(num_tokens) >= torch.tensor([[5]] + [[0]] * (batch_size - 1))
    position = (valid.cumsum(1) - 1).clamp(min=0)
    angle = torch.rand(batch_size, num_tokens, rotary_dim)
    cos, sin = (x.to(rounded_to or dtype).to(DEVICE, dtype) for x in (angle.cos(), angle.sin()))
    selected = (torch.rand(batch_size, num_tokens, num_groups) < 0.3) & valid[..., None]
    gate = torch.rand(batch_size, num_tokens, num_groups)
    gate = gate.to(DEVICE, torch.promote_types(dtype, torch.float32)).requires_grad_()
    position, valid, selected = (x.to(DEVICE) for x in (position, valid, selected))
    return Tokens(position, valid, None, cos, sin, selected, gate)


def random_weights(num_groups: int, num_heads: int, head_dim: int, hidden_size: int, **kinds) -> HeadWeights:
    query_dim = num_heads * head_dim
    sizes = [(query_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size), (hidden_size, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)]
    return HeadWeights(*(random_tensor(num_groups, *size, **kinds, scale=0.1) for size in sizes))


def check_selected_heads(dtype: torch.dtype, rounded_to: torch.dtype | None = None) -> list[torch.Tensor]:
    kinds = {"dtype": dtype, "rounded_to": rounded_to}
    hidden_states = random_tensor(2, 200, 96, **kinds)
    weights = random_weights(3, 2, 64, 96, **kinds)
    tokens = random_tokens(2, 200, 3, 32, **kinds)
    output, _ = active_backend().selected_heads(hidden_states, weights, tokens)
    return with_random_upstream(output, [hidden_states, tokens.gate, *weights])


def check_all_attention(dtype: torch.dtype, rounded_to: torch.dtype | None = None) -> list[torch.Tensor]:
    kinds = {"dtype": dtype, "rounded_to": rounded_to}
    tokens = random_tokens(2, 200, 3, 64, **kinds)
    query = random_tensor(2, 3, 2, 200, 64, **kinds)
    key, value = (random_tensor(2, 3, 200, 64, **kinds) for _ in range(2))
    position, valid = (x[:, None].expand(-1, 3, -1) for x in (tokens.position, tokens.valid))
    near = KeyValues(key, value, position, valid, tokens.selected.transpose(1, 2))
    output = active_backend().all_attention(query, near, None, tokens, window=16)
    output = output * tokens.valid[:, None, None, :, None]  # what padding gets is free
    return with_random_upstream(output, [query, key, value])


def check_decode(name: str) -> Callable[..., list[torch.Tensor]]:
    """Six steps on a full cache of fixed size: outputs, and what the cache holds after them."""

    def check(dtype: torch.dtype, rounded_to: torch.dtype | None = None) -> list[torch.Tensor]:
        kinds = {"dtype": dtype, "rounded_to": rounded_to}
        window = 8 if name == "decode_all" else 0
        state = full_cache(2, 3, 70, window, 100, 64, rounded_to or dtype)
        state = FixedKeyValues(*(x.to(dtype) if x.dtype == (rounded_to or dtype) else x for x in state))
        weights = HeadWeights(*(x.detach() for x in random_weights(3, 2, 64, 96, **kinds)))
        values = []
        for _ in range(6):
            score = torch.randn(2, 3).masked_fill(torch.rand(2, 3) < 0.3, -torch.inf).to(DEVICE)
            if name == "decode_all":
                query = random_tensor(2, 3, 2, 64, **kinds).detach()
                key, value = (random_tensor(2, 3, 64, **kinds).detach() for _ in range(2))
                values.append(active_backend().decode_all(query, key, value, score, None, state, 70))
            else:
                hidden_states = random_tensor(2, 96, **kinds).detach()
                cos, sin = (random_tensor(2, 32, **kinds).detach() for _ in range(2))
                gate = torch.rand(2, 3).to(DEVICE)
                values.append(
                    active_backend().decode_selected(hidden_states, weights, cos, sin, score, gate, None, state, 70)
                )
        return [*values, state.position, state.count, state.num_evicted]

    return check


def check_layer(form: str) -> Callable[..., list[torch.Tensor]]:
    """`MosaHeads` with its router, in training."""

    def check(dtype: torch.dtype, rounded_to: torch.dtype | None = None) -> list[torch.Tensor]:
        case = Case(form, 2, 200, 96, 3, 4, heads_per_group=2, window=16 if form == "all" else 0)
        heads = mosa_heads(case).train()
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        heads = heads.to(rounded_to or dtype).to(dtype)
        hidden_states = random_tensor(2, 200, 96, dtype=dtype, rounded_to=rounded_to)
        angle = torch.rand(2, 200, 64)
        cos, sin = (x.to(rounded_to or dtype).to(DEVICE, dtype) for x in (angle.cos(), angle.sin()))
        position = torch.arange(200, device=DEVICE).expand(2, -1)
        state = RoutingState.build(hidden_states, None, position, None, may_be_packed=False)
        output = heads(hidden_states, (cos, sin), state)
        return with_random_upstream(output, [hidden_states, *heads.parameters()])

    return check


CHECKS = {
    "selected_heads": check_selected_heads,
    "all_attention": check_all_attention,
    "decode_selected": check_decode("decode_selected"),
    "decode_all": check_decode("decode_all"),
    'layer, form "selected"': check_layer("selected"),
    'layer, form "all"': check_layer("all"),
}


def active_backend() -> ModuleType:
    """What the MoSA heads run on this device."""
    return backend(torch.empty(0, device=DEVICE))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name, case in CASES.items() if "smoke" not in name and (DEVICE == "cuda" or not case.gpu_only)]
    parser.add_argument("--cases", nargs="*", choices=CASES, default=default, help="none: check only")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each contender")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # case, contender, work: see `peak_memory`
    options = parser.parse_args()
    if options.memory_of:
        name, *key = options.memory_of
        print(resident_memory(runs(CASES[name])[tuple(key)]))
        return
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    name = active_backend().__name__.rpartition(".")[2]
    print(
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"backend {name}\n"
    )
    print(markdown(["function", "dtype", "largest error", "tolerance"], check()) + "\n")
    rates = None
    if DEVICE == "cuda":
        rates = matmul_rate(torch.bfloat16), copy_bandwidth()
        print(f"Matmul, bfloat16: {rates[0] / 1e12:.0f} TFLOP/s; copy: {rates[1] / 1e12:.2f} TB/s\n")
    rows = [row for name in options.cases for row in time_case(name, options.seconds, rates)]
    if rows:
        print(markdown(["case", "work", "contender", "ms", "peak memory, MiB", "share of the device"], rows))


if __name__ == "__main__":
    main()
