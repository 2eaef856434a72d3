"""
Training the paper's layer on a CPU: our heads with their routers against the published code's computation
(`benchmarks.speed.paper_layer`), forward and backward, forward alone, and peak memory.

Both are checked for equal outputs and gradients first. Then they take turns in one process on one thread; a ratio is
the median over the rounds of baseline / ours. Peak memory is how far one call raises the resident set of a process of
its own.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.training
    OMP_NUM_THREADS=1 python -m benchmarks.speed.training --shapes 2,1024,17,32 --rounds 50
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from mosa_hf import MosaConfig
from mosa_hf.modeling.forward_context import ForwardContext
from mosa_hf.modeling.heads import MosaHeads
from mosa_hf.routing import CallLayout, TokenMask

from .paper_layer import PaperLayer, published_layout
from .resident_memory import of_own_process, resident_memory

HIDDEN_SIZE, HEAD_DIM = 512, 64
SHAPES = [(2, 1024, 17, 32), (2, 1024, 128, 64), (1, 4096, 64, 16), (1, 8192, 60, 128)]  # B, T, groups, ρ


class OurLayer(nn.Module):
    """`MosaHeads` in training, called as the baseline is. Like angles, its layout serves all layers of a model."""

    def __init__(self, heads: MosaHeads, batch_size: int, num_tokens: int):
        super().__init__()
        self.heads = heads
        position = torch.arange(num_tokens)[None]
        self.layout = CallLayout.build(
            torch.empty(batch_size, num_tokens), TokenMask(), position, None, may_be_packed=False
        )

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.heads(hidden_states, (cos, sin), ForwardContext(self.layout, {}, torch.is_grad_enabled()))


def heads_and_baseline(
    batch_size: int, num_tokens: int, num_groups: int, sparsity: float, dtype: torch.dtype = torch.float32
) -> tuple[OurLayer, PaperLayer, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Both layers with the same random weights; hidden states, cosine and sine of half the channels."""
    torch.manual_seed(0)
    config = MosaConfig(
        hidden_size=HIDDEN_SIZE,
        head_dim=HEAD_DIM,
        num_mosa_heads=num_groups,
        mosa_sparsity=sparsity,
        mosa_include_first=False,
    )
    heads = MosaHeads(config).to(dtype).train()
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=HIDDEN_SIZE**-0.5)
    hidden_states = torch.randn(batch_size, num_tokens, HIDDEN_SIZE, dtype=dtype, requires_grad=True)
    frequency = 10000 ** -torch.linspace(0, 1, HEAD_DIM // 4 + 1, dtype=dtype)[:-1]
    angle = (torch.arange(num_tokens, dtype=dtype)[:, None] * frequency).repeat(1, 2).expand(batch_size, -1, -1)
    return OurLayer(heads, batch_size, num_tokens), PaperLayer(heads), (hidden_states, angle.cos(), angle.sin())


def with_gradients(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of hidden states and parameters for an upstream gradient of ones."""
    learned = {"hidden_states": inputs[0], **dict(layer.named_parameters())}
    output = layer(*inputs)
    gradients = torch.autograd.grad(output, list(learned.values()), torch.ones_like(output))
    return {"output": output.detach(), **{f"d {name}": grad for name, grad in zip(learned, gradients, strict=True)}}


def largest_errors(
    ours: OurLayer, baseline: PaperLayer, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Largest differences of output and gradients, each relative to the largest value."""
    expected, actual = with_gradients(baseline, inputs), with_gradients(ours, inputs)
    names = (f"d heads.{name}_proj" for name in "qkvo")
    actual["d input"], actual["d output"] = published_layout(*(actual[name] for name in names))
    actual["d router"] = actual["d heads.router.weight"]
    return {
        name: ((actual[name] - values).abs().max() / values.abs().max()).item() for name, values in expected.items()
    }


def calls_of(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], object]]:
    """What is timed → a call that does it once."""
    return {
        "forward + backward": lambda: with_gradients(layer, inputs),
        "forward": torch.no_grad()(lambda: layer(*inputs)),
    }


def compare(baseline: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[str]:
    """Median wall milliseconds of both, and the median ratios of wall time and of the process' own CPU time."""
    seconds = []
    for call in (baseline, ours):
        call()
    for _ in range(rounds):
        for call in (baseline, ours):
            start = time.perf_counter(), time.process_time()
            call()
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    pairs = list(zip(seconds[::2], seconds[1::2], strict=True))
    ratios = [median(theirs[clock] / own[clock] for theirs, own in pairs) for clock in (0, 1)]
    wall = [median(pair[contender][0] for pair in pairs) * 1e3 for contender in (0, 1)]
    return [*(f"{milliseconds:.1f}" for milliseconds in wall), *(f"{ratio:.2f}" for ratio in ratios)]


def parse_shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", type=parse_shape, default=SHAPES, metavar="B,T,groups,rho")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # shape, contender, work: see `of_own_process`
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        shape, contender, work = options.memory_of
        ours, baseline, inputs = heads_and_baseline(*parse_shape(shape))
        print(resident_memory(calls_of(ours if contender == "ours" else baseline, inputs)[work]))
        return
    head = [
        "B, T, groups, ρ",
        "work",
        "baseline, ms",
        "ours, ms",
        "ratio",
        "ratio, CPU time",
        "baseline, bytes",
        "ours, bytes",
    ]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for shape in options.shapes:
        ours, baseline, inputs = heads_and_baseline(*shape)
        errors = largest_errors(ours, baseline, inputs)
        if max(errors.values()) > 1e-4:
            raise AssertionError(f"The layers differ: {errors}")
        baselines = calls_of(baseline, inputs)
        for work, call in calls_of(ours, inputs).items():
            times = compare(baselines[work], call, options.rounds)
            words = ",".join(map(str, shape))
            memory = [
                f"{of_own_process('benchmarks.speed.training', words, contender, work):,}"
                for contender in ("baseline", "ours")
            ]
            print("| " + " | ".join([", ".join(map(str, shape)), work, *times, *memory]) + " |", flush=True)


if __name__ == "__main__":
    main()
