"""
Prompts that are read at once, by the original SmolLM2 and by its conversion: the time, and the memory that it takes.

    python -m benchmarks.speed.prompt                           # converts it first, with the converter's defaults
    python -m benchmarks.speed.prompt --converted DIRECTORY

Both take turns in one process, and the figure is the median of the ratios of a turn. Memory is how far the resident
set grows at most while a process of its own reads its first long prompt, caches included; it differs from run to run,
since malloc keeps pieces, so the figure is the median of several processes. `OMP_NUM_THREADS` sets the number of
threads.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mosa_hf import ConversionConfig, convert_model
from mosa_hf.conversion import calibration_windows
from testing import corpora, pretrained

from .. import metrics
from ..provenance import about, origin_of
from .resident_memory import of_own_process, resident_memory

WARM_UP = 16  # tokens read before anything is measured


def reader(model: PreTrainedModel, input_ids: torch.Tensor) -> Callable[[], object]:
    """A call that reads a prompt `[1, T]` into a cache."""

    @torch.inference_mode()
    def read() -> object:
        return model(input_ids, use_cache=True, logits_to_keep=1)

    return read


def seconds_of(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Of each call, in `rounds` in which all take their turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converted", type=Path, help="a converted SmolLM2, as `mosa-convert` wrote it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 512, 4096], help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=9, help="that are timed of each length")
    parser.add_argument("--processes", type=int, default=5, help="whose memory is measured, at the last length")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # folder, text, length: see `of_own_process`
    options = parser.parse_args()
    if options.memory_of:
        folder, text, length = options.memory_of
        model, input_ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.load(text)
        reader(model, input_ids[:, :WARM_UP])()
        print(resident_memory(reader(model, input_ids[:, : int(length)])))
        return
    directory = pretrained.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    original = AutoModelForCausalLM.from_pretrained(directory).eval()
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = options.converted, Path(scratch) / "text.pt"
        if folder is None:
            folder = Path(scratch) / "converted"
            convert_model(original, ConversionConfig(), metrics.calibration(tokenizer)).save_pretrained(folder)
        converted = AutoModelForCausalLM.from_pretrained(folder).eval()
        input_ids = calibration_windows(tokenizer, corpora.text("shakespeare"), 1, max(options.lengths))
        torch.save(input_ids, text)
        print("| tokens | | original | converted | of the original's |\n| ---: | --- | ---: | ---: | ---: |")
        for length in options.lengths:
            calls = [reader(model, input_ids[:, :length]) for model in (original, converted)]
            seconds_of(calls, 1)
            theirs, ours = seconds_of(calls, options.rounds)
            ratio = median(own / base for base, own in zip(theirs, ours, strict=True))
            cells = [f"{1e3 * median(each):.1f}" for each in (theirs, ours)] + [f"{ratio:.2f}"]
            print(f"| {length} | ms | {' | '.join(cells)} |", flush=True)
        taken: dict[Path, list[int]] = {directory: [], folder: []}
        words = [str(text), str(options.lengths[-1])]
        for _ in tqdm(range(options.processes), desc="Memory", unit="pair"):
            for each, own in taken.items():
                own.append(of_own_process("benchmarks.speed.prompt", str(each), *words))
    base, own = (median(each) for each in taken.values())
    print(f"| {options.lengths[-1]} | peak bytes | {base:,} | {own:,} | {own / base:.2f} |")
    spread = ", ".join(f"{min(each):,} to {max(each):,}" for each in taken.values())
    print(f"\nPeak bytes from process to process: {spread}.\n")
    print(about([origin_of("benchmarks.speed.prompt", sys.argv[1:])]))


if __name__ == "__main__":
    main()
