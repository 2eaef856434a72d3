"""
`python -m tests.emulated_gpu` counts what a layer asks of a GPU, and how evenly a decoding step loads one, and writes
`benchmarks/results/gpu_readiness.md` beside the figures of an earlier commit, which are in `gpu_readiness.jsonl`.
"""

import argparse
import dataclasses
import heapq
import json
import os
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which reads it once

import torch  # noqa: E402

from benchmarks.provenance import origin_of  # noqa: E402
from mosa_hf.kernels.sparse_decode import triton as decode  # noqa: E402
from testing.markdown import wrapped  # noqa: E402

from .cases import CASES, layer_costs  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PROGRAMS = 264  # that an H100 runs at once, two a multiprocessor


def decoding_load(batch_size: int, num_groups: int = 8, mean: int = 2000, num_draws: int = 20) -> float:
    """
    How many times as long a step takes as if its reading were spread evenly, the mean over draws of lognormal lengths
    (sigma 0.7): programs are started in the order of the grid, and take as long as the entries that they read.
    """
    ratios = []
    for seed in range(num_draws):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(batch_size * num_groups, generator=generator)
        lengths = (mean * torch.exp(0.7 * draws - 0.245)).clamp(min=64).int().tolist()
        chunk = decode.chunk_size(max(lengths) + 16, len(lengths), decode.tile(128, torch.bfloat16)[0])
        free = [0] * PROGRAMS
        for place in range(-(-max(lengths) // chunk)):
            for length in lengths:
                heapq.heapreplace(free, free[0] + max(0, min(chunk, length - place * chunk)))
        ratios.append(max(free) / (sum(lengths) / PROGRAMS))
    return sum(ratios) / len(ratios)


def measure(path: Path, commit: str) -> None:
    """Add a row for every case and kind of cache."""
    origin = origin_of("tests.emulated_gpu", [])
    for name, case in CASES.items():
        for is_static in (False, True):
            if is_static and case.beams:
                continue
            costs = dataclasses.asdict(layer_costs(case, is_static))
            row = {"commit": commit, "case": name, "static": is_static, **costs, "date": origin["date"]}
            print(row, flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def page(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    before, after = (
        {(x["case"], x["static"]): x for x in rows if (x["commit"] != "this") == is_old} for is_old in (1, 0)
    )

    def cell(row: dict | None, kind: str) -> str:
        return "–" if row is None else f"{row[f'{kind}_launches']:g} ({row[f'{kind}_waits']:.2g})"

    lines = [
        "No GPU has run this package yet: what follows is counted on an emulated device.", "",
        "# Ready for a GPU", "",
        "What a layer asks of a GPU, whole, the original's operations included: operations, and in parentheses how "
        f"often the host waits for the device. Before: at commit {rows[0]['commit']}. `python -m tests.emulated_gpu`, "
        f"{rows[-1]['date']}, 2 shared x86-64 cores. Two rows; window 8, ρ 4. A layer is the difference of two "
        "models, now of the same weights and after a run that has given the device its constants: of 1 and 2 layers "
        "now, of 2 and 4 before, with prompts of 12 tokens and 3 steps now, of 24 tokens and 6 steps before, where "
        "copies of nothing were left out by hand. Steps of the original on a growing cache copy the whole of it; ours "
        "do not.",
        "",
        "| model | cache | prompt before | prompt now | step before | step now |", "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for key, own in after.items():
        cells = [cell(each, kind) for kind in ("prefill", "step") for each in (before.get(key), own)]
        lines.append(f"| {key[0]} | {'static' if key[1] else 'growing'} | {' | '.join(cells)} |")
    mixed, error = sum(x["num_mixed"] for x in after.values()), max(x["error"] for x in after.values())
    lines += [
        "", f"Operations whose tensors lie on different devices: {mixed}. Logits differ from the CPU's by {error:.0e} "
        "at most.", "", "## Load of a decoding step", "",
        f"Simulated: {PROGRAMS} programs at once, 8 groups a row, lengths lognormal (sigma 0.7, mean 2000), times the "
        "time of an even spread.", "", "| batch | times ideal |", "|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {batch_size} | {decoding_load(batch_size):.2f} |" for batch_size in (1, 8, 32)]
    return wrapped("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="this", help="what the figures are of, if not of what is checked out")
    parser.add_argument("--output", default=str(RESULTS), help="folder of gpu_readiness.jsonl and gpu_readiness.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    path = Path(options.output) / "gpu_readiness.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["commit"] != options.commit]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    measure(path, options.commit)
    if options.commit == "this":
        path.with_suffix(".md").write_text(page(path), encoding="utf-8")


if __name__ == "__main__":
    main()
