"""
How long `torch.compile` takes on a training step: of a Llama, and of the same model with all groups sparse, with
frozen and with trained routers.

Each run is a process of its own, with the compiler's caches off; contenders take turns. "compilation" is the first
step (forward, backward, compilation of both) less a later one; the figures are medians over the rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.compile_training
    OMP_NUM_THREADS=1 python -m benchmarks.speed.compile_training --layers 12 --rounds 5
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mosa_hf import MosaLlamaConfig, MosaLlamaForCausalLM

CONTENDERS = ("original", "frozen routers", "trained routers")
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BATCH = (2, 256)
LATER_STEPS = 5


def model_of(contender: str, num_layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if contender == "original":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=num_layers))
    slope = 1.0 if contender == "trained routers" else 0.0
    config = MosaLlamaConfig(
        **SHAPE, num_hidden_layers=num_layers, mosa_window=32, mosa_sparsity=8, mosa_gate_slope=slope
    )
    return MosaLlamaForCausalLM(config)


def measure(contender: str, num_layers: int) -> dict[str, float]:
    """Seconds of the first step and of a later one, graphs and graph breaks."""
    model = model_of(contender, num_layers).train()
    compiled = torch.compile(model)
    ids = torch.randint(2, SHAPE["vocab_size"], BATCH)
    seconds = []
    for _ in range(1 + LATER_STEPS):
        start = time.perf_counter()
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return {
        "first": seconds[0],
        "later": median(seconds[1:]),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def in_own_process(contender: str, num_layers: int) -> dict[str, float]:
    module = [sys.executable, "-m", "benchmarks.speed.compile_training"]
    command = [*module, "--layers", str(num_layers), "--run", contender]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)  # see `in_own_process`
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options.layers)))
        return
    rounds = [{name: in_own_process(name, options.layers) for name in CONTENDERS} for _ in range(options.rounds)]
    head = ["model", "compilation, s", "ratio to the original", "a later step, ms", "graphs", "graph breaks"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for name in CONTENDERS:
        compilation = [(run["first"] - run["later"] for run in (each[name], each["original"])) for each in rounds]
        own, original = zip(*compilation, strict=True)
        row = [
            name,
            f"{median(own):.1f}",
            f"{median(x / y for x, y in zip(own, original, strict=True)):.2f}",
            f"{median(each[name]['later'] for each in rounds) * 1e3:.1f}",
            str(rounds[0][name]["graphs"]),
            str(rounds[0][name]["breaks"]),
        ]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
