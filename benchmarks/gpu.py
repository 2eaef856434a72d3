"""
The first thing to run where there is a GPU, in less than ten minutes on one: `python -m benchmarks.gpu`.

Every part runs in a process of its own and adds its rows to `benchmarks/results/gpu.jsonl` as soon as it has them; the
same command goes on with the parts that are not there, or have failed. Then it writes `benchmarks/results/gpu.md`.
Nothing is fetched: models are random.

    python -m benchmarks.gpu --parts kernels decoding
    python -m benchmarks.gpu --smoke  # does it run to its end? On a CPU, in Triton's interpreter
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before anything imports Triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: E402

from benchmarks import result_lines  # noqa: E402
from benchmarks.provenance import origin_of  # noqa: E402
from benchmarks.speed import kernels  # noqa: E402
from mosa_hf import MosaConfig, MosaForCausalLM, MosaLlamaConfig, MosaLlamaForCausalLM  # noqa: E402
from mosa_hf.atomic_write import atomic_file  # noqa: E402
from testing.markdown import wrapped  # noqa: E402

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if HAS_GPU else "cpu"
PART_SECONDS = 150  # that a part may take
Rows = Iterator[dict[str, Any]]


def tests(smoke: bool) -> Rows:
    """Every test that a GPU can run: those marked so, and those of all kernels, which run on it if there is one."""
    chosen = {"marked": ["-m", "gpu", "tests"], "kernels": ["tests/kernels"]}
    if smoke:
        chosen = {"marked": ["-m", "gpu", "tests/kernels/triton/test_sparse_decode.py"]}
    for name, arguments in chosen.items():
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = run.stdout.strip().splitlines() or [run.stderr[-200:]]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        yield {"what": f"tests, {name}", "result": lines[-1].strip("= "), "failed": failed}


def kernel_errors(smoke: bool) -> Rows:
    """Largest errors of outputs and gradients of every backend, in each dtype, against the specification."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)
    for name, case in kernels.CASES.items():
        if name.startswith("smoke") == smoke:
            errors = kernels.check(case.shortened(), dtypes)
            yield {"what": f"errors, {name}", "result": ", ".join(f"{x}: {error:.0e}" for x, error in errors.items())}


def kernel_times(smoke: bool) -> Rows:
    """Milliseconds of every backend beside flash attention, SDPA's choice and flash-decoding, which is SDPA's too."""
    for name in ["smoke-decode"] if smoke else kernels.CASES:
        if name.startswith("smoke") == smoke:
            for _, work, contender, ms, ratio, memory in kernels.time_case(name, 0.01 if smoke else 2.0):
                result = f"{ms} ms, dense / this {ratio}, peak {memory} MiB"
                yield {"what": f"{name}, {work}, {contender}", "result": result}


def shape(smoke: bool) -> dict[str, Any]:
    """A model of a billion parameters, or a toy."""
    hidden, heads, groups, layers, length = (64, 4, 2, 2, 512) if smoke else (2048, 32, 8, 16, 65536)
    return {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads, "vocab_size": 32000,
        "num_key_value_heads": groups, "num_hidden_layers": layers, "max_position_embeddings": length,
        "head_dim": hidden // heads,
    }  # fmt: skip


def synchronised(call: Callable[[], object]) -> float:
    """Seconds that a call takes until the device has done it."""
    if HAS_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if HAS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def a_step(model: Any, cache: Any, token: torch.Tensor) -> Callable[[], object]:
    """A decoding step; on a GPU with a static cache, a CUDA graph of it."""

    def step():
        return model(token, past_key_values=cache).logits

    if not (HAS_GPU and isinstance(cache, StaticCache)):
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def decoding(smoke: bool) -> Rows:
    """Prefill and decoding of a random model, dense and sparse, on growing caches and on static ones with graphs."""
    prompts = [(1, 24)] if smoke else [(1, 8192), (1, 32768), (8, 8192)]
    num_steps = 3 if smoke else 64
    torch.manual_seed(0)
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    sparse = {"mosa_window": 8 if smoke else 512, "mosa_sparsity": 8}
    models = {
        "dense": LlamaForCausalLM(LlamaConfig(**shape(smoke))),
        "MoSA": MosaLlamaForCausalLM(MosaLlamaConfig(**shape(smoke), **sparse)),
    }
    models = {name: model.to(DEVICE, dtype).eval() for name, model in models.items()}
    for (batch_size, length), (name, model), is_static in (
        (prompt, each, static) for prompt in prompts for each in models.items() for static in (False, True)
    ):
        ids = torch.randint(3, 1000, (batch_size, length), device=DEVICE)
        room = length + num_steps + 8
        caches = [
            StaticCache(config=model.config, max_cache_len=room) if is_static else DynamicCache(config=model.config)
            for _ in range(2)  # the first call compiles
        ]
        prefill = [synchronised(lambda cache=cache: model(ids, past_key_values=cache, logits_to_keep=1))  # noqa: B023
                   for cache in caches][-1]  # fmt: skip
        step = a_step(model, caches[-1], ids[:, :1])
        step()
        seconds = synchronised(lambda: [step() for _ in range(num_steps)]) / num_steps  # noqa: B023
        kind = ("static, CUDA graph" if HAS_GPU else "static") if is_static else "dynamic"
        result = f"prefill {1e3 * prefill:.1f} ms, step {1e3 * seconds:.3f} ms"
        yield {"what": f"{name}, {kind}, {batch_size} x {length} tokens", "result": result}


def training(smoke: bool) -> Rows:
    """Steps of the paper's Tiny model, of the same quality dense and with MoSA heads."""
    size = (2, 64) if smoke else (64, 1024)
    layers, hidden = (2, 64) if smoke else (6, 512)
    fields = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": 8000,
        "head_dim": 16 if smoke else 64, "max_position_embeddings": 2048,
    }  # fmt: skip
    none = {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0}
    mosa = {"num_mosa_heads": 17, "num_mosa_key_value_heads": 17, "mosa_sparsity": 32}
    models = {
        "dense": MosaForCausalLM(MosaConfig(**fields, num_attention_heads=9, num_key_value_heads=9, **none)),
        "MoSA": MosaForCausalLM(MosaConfig(**fields, num_attention_heads=4, num_key_value_heads=4, **mosa)),
    }
    ids = torch.randint(3, 8000, size, device=DEVICE)
    for name, model in models.items():
        model.to(DEVICE).train()

        def step(model=model):
            model.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=HAS_GPU):
                model(ids, labels=ids, use_cache=False).loss.backward()

        step()
        times = sorted(synchronised(step) for _ in range(3 if smoke else 10))
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB so far" if HAS_GPU else ""
        result = f"{1e3 * times[len(times) // 2]:.1f} ms a step{memory}"
        yield {"what": f"training of Tiny, {name}, {size[0]} x {size[1]} tokens", "result": result}


PARTS: dict[str, Callable[[bool], Rows]] = {
    "errors": kernel_errors, "times": kernel_times, "decoding": decoding, "training": training, "tests": tests,
}  # fmt: skip


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a page, of each part those of its last run."""
    device = rows[-1]["device"] if rows else ""
    first = f"Measured on {device}." if rows and rows[-1]["has_gpu"] else "No GPU has run this yet: none was at hand."
    lines = [first, "", "# What a GPU gives", "", "`python -m benchmarks.gpu` writes this page.", ""]
    if rows and not rows[-1]["has_gpu"]:
        lines += ["What follows shows that the command runs to its end: a toy on a CPU, in Triton's interpreter.", ""]
    lines += ["| part | what | result |", "|---|---|---|"]
    lines += [f"| {row['part']} | {row['what']} | {row['result']} |" for row in rows if row["what"] != "done"]
    if rows:
        lines += ["", f"`{rows[-1]['command']}` on {rows[-1]['date']}, {rows[-1]['device']}; {rows[-1]['versions']}."]
    return wrapped("\n".join(lines) + "\n")


def run_part(part: str, path: Path, smoke: bool, head: dict[str, Any]) -> None:
    for row in PARTS[part](smoke):
        print(row, flush=True)
        result_lines.append(path, [{"part": part, **row, **head}])
    result_lines.append(path, [{"part": part, "what": "done", "result": "", **head}])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, which a CPU can run in the interpreter")
    parser.add_argument("--output", default=str(RESULTS), help="folder of gpu.jsonl and gpu.md")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if not HAS_GPU:
        if not options.smoke:
            parser.error("there is no GPU: only `--smoke` runs on a CPU")
        kernels.BACKENDS = ("torch", "triton")
        torch.set_num_threads(1)
    path = Path(options.output) / "gpu.jsonl"
    device = torch.cuda.get_device_name() if HAS_GPU else f"{os.cpu_count()} x {platform.machine()}"
    origin = origin_of("benchmarks.gpu", ["--smoke"] if options.smoke else [])
    head = {"device": device, "has_gpu": HAS_GPU, **{name: origin[name] for name in ("command", "date", "versions")}}
    if options.run:
        run_part(options.run, path, options.smoke, head)
        return 0
    for part in options.parts:
        rows = [row for row in result_lines.read(path) if row["part"] == part]
        if rows and rows[-1]["what"] == "done" and rows[-1]["device"] == device:
            continue
        # Of a run that failed half-way, nothing is kept.
        result_lines.write(path, [row for row in result_lines.read(path) if row["part"] != part])
        smoke = ["--smoke"] if options.smoke else []
        command = [sys.executable, "-m", "benchmarks.gpu", "--run", part, "--output", options.output, *smoke]
        try:
            run = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=PART_SECONDS * (1 + 9 * (not HAS_GPU))
            )
            failure = None if run.returncode == 0 else run.stderr.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired:
            failure = [f"took more than {PART_SECONDS} s"]
        if failure is not None:
            failed = {"part": part, "what": "failed", "result": " ".join(failure)[:300], **head}
            result_lines.append(path, [failed])
    rows = result_lines.read(path)
    with atomic_file(path.parent / "gpu.md") as unfinished:
        unfinished.write_text(page(rows), encoding="utf-8")
    print(page(rows))
    return 1 if any(row["what"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
