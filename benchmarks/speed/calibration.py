"""
What it takes to fit routers to a large model: seconds and peak memory by layer, of random weights of an 8 B shape.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.calibration
    OMP_NUM_THREADS=1 python -m benchmarks.speed.calibration --layers 1 2 --windows 1

A process of its own makes the decoder of a Llama 3 8B with a few layers, reads a window as any user would (the
baseline), and then fits routers to windows of random tokens. Peak memory is how far the resident set grows meanwhile,
beside the weights. What a layer adds is the difference of two numbers of layers; all layers of the model are on paper.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaModel

from mosa_hf.conversion.windows import NUM_WINDOWS, WINDOW_LENGTH
from testing.markdown import markdown_table

from ..frontier.methods import fits_of_all
from ..provenance import about, origin_of
from .resident_memory import resident_memory

# Llama 3 8B. The head plays no part: routers are fitted to the decoder.
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
ALL_LAYERS = 32


@torch.inference_mode()
def measure(num_layers: int, num_windows: int, num_tokens: int, shape: dict[str, int]) -> dict[str, float]:
    """In this process: bytes of the weights, seconds of a reading, seconds and peak bytes of a fit."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**shape, num_hidden_layers=num_layers)).eval()
    windows = torch.randint(shape["vocab_size"], (num_windows, num_tokens))
    model(windows[:1, :16], use_cache=False)
    start = time.perf_counter()
    model(windows[:1], use_cache=False)
    reading = time.perf_counter() - start
    start = time.perf_counter()
    peak = resident_memory(lambda: fits_of_all(model, windows))
    return {
        "weights": sum(each.nbytes for each in model.parameters()),
        "reading": reading,
        "fit": time.perf_counter() - start,
        "peak": peak,
    }


def table(found: dict[int, dict[str, float]], num_windows: int) -> str:
    """A row for each number of layers, what a layer adds, and all layers on paper."""
    least, most = min(found), max(found)
    a_layer = {name: (found[most][name] - found[least][name]) / (most - least) for name in found[most]}
    rest = {name: found[least][name] - least * a_layer[name] for name in a_layer}
    all_layers = {name: rest[name] + ALL_LAYERS * a_layer[name] for name in a_layer}
    all_layers["fit"] *= NUM_WINDOWS / num_windows
    # What is noise between two numbers of layers is a memory below nothing, times 32.
    all_layers["peak"] = max(all_layers["peak"], *(own["peak"] for own in found.values()))
    rows = [(f"layers: {layers}", own) for layers, own in sorted(found.items())]
    rows += [("a layer", a_layer), (f"{ALL_LAYERS} layers, {NUM_WINDOWS} windows, on paper", all_layers)]
    units = {"weights": 1e9, "reading": 1, "fit": 1, "peak": 1e9}
    head = ["", "weights, GB", "a reading, s", "the fit, s", "its peak memory, GB"]
    cells = [head, ["---", *["---:"] * len(units)]]
    cells += [[name, *(f"{own[each] / unit:.2f}" for each, unit in units.items())] for name, own in rows]
    return markdown_table(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="numbers of layers, least first")
    parser.add_argument("--windows", type=int, default=2, help="of text")
    parser.add_argument("--tokens", type=int, default=WINDOW_LENGTH, help="of a window")
    parser.add_argument("--width", type=int, default=1, help="divide all widths by this: 32 only says that it runs")
    parser.add_argument("--of-one", type=int, help=argparse.SUPPRESS)  # layers: what the process of its own measures
    options = parser.parse_args()
    narrowed = ("hidden_size", "intermediate_size", "head_dim")
    shape = {name: size // options.width if name in narrowed else size for name, size in SHAPE.items()}
    if options.of_one:
        print(json.dumps(measure(options.of_one, options.windows, options.tokens, shape)))
        return
    words = [f"--{name}={getattr(options, name)}" for name in ("windows", "tokens", "width")]
    found = {}
    for layers in options.layers:
        command = [sys.executable, "-m", "benchmarks.speed.calibration", *words, f"--of-one={layers}"]
        found[layers] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(table(found, options.windows))
    print(f"\nThe text is read three times. Windows: {options.windows}, of {options.tokens} tokens.\n")
    print(about([origin_of("benchmarks.speed.calibration", sys.argv[1:])]))


if __name__ == "__main__":
    main()
