"""
How many requests run at once in equal cache memory, and what that brings: `python -m benchmarks.serving.throughput
ORIGINAL CONVERTED ...`, in an environment with vLLM (`make serving`).

Every model is served in turn, as often as `--rounds` says, in a process of its own. Ratios are of this run; "work" is
the seconds that the process computed, which other processes on the machine do not change.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.provenance import origin_of
from testing import corpora

MARK = "MEASURED "  # before what `engine.py` prints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders; the first one is what ratios are to")
    parser.add_argument("--memory", type=int, default=200, help="MiB of cache")
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512, help="tokens that a step reads at most")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=1400, help="tokens")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a page to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.models[0])
    text = corpora.text("python_topics")
    tokens = tokenizer(text[: 8 * options.requests * options.prompt])["input_ids"]
    prompts = [tokens[i * options.prompt : (i + 1) * options.prompt] for i in range(options.requests)]
    settings = {
        "memory": options.memory << 20,
        "max_len": options.max_len,
        "chunk": options.chunk,
        "prompts": prompts,
        "new": options.new,
    }
    found: dict[Path, list[dict[str, Any]]] = {model: [] for model in options.models}
    for _ in range(options.rounds):
        for model in options.models:
            found[model].append(served(model, settings))
            print(model.name, json.dumps(found[model][-1]), flush=True)
    page = page_of(found, options)
    print(page)
    if options.output is not None:
        options.output.write_text(page, encoding="utf-8")


def served(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `engine.py` measures of a model."""
    command = [sys.executable, "-m", "benchmarks.serving.engine", json.dumps({"model": str(model), **settings})]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"{model}: the engine failed.\n{run.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


def page_of(found: dict[Path, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """A table, the first model's numbers as they are and ratios of all."""
    origin = origin_of("benchmarks.serving.throughput", sys.argv[1:])

    def middle(model: Path, *path: str) -> float:
        values = []
        for each in found[model]:
            for name in path:
                each = each[name]
            values.append(each)
        return statistics.median(values)

    rows = [
        "| | at once | preempted | all: seconds | all: decoding tokens/s | alone: seconds per token | alone: prompt |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = options.models[0]
    measures = (
        ("together", "seconds", "work"),
        ("together", "work", "decoding tokens/s"),
        ("alone", "work", "time per token"),
        ("alone", "work", "prompt"),
    )
    for model in options.models:
        cells = [model.name, f"{middle(model, 'together', 'at once'):.0f}"]
        cells.append(f"{middle(model, 'together', 'preemptions'):.0f}")
        for path in measures:
            value, reference = middle(model, *path), middle(base, *path)
            cells.append(f"{value:.3g} ({value / reference:.2f})" if reference else f"{value:.3g}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# Serving at equal cache memory",
            "",
            f"{options.requests} requests of {options.prompt} + {options.new} tokens, {options.memory} MiB of cache,",
            f"`max_model_len` {options.max_len}, chunks of {options.chunk}. Seconds are those that the process",
            "computed; in brackets the ratio to the first row.",
            "",
            *rows,
            "",
            f"`{origin['command']}`, {origin['date']}, {origin['machine']}; Transformers "
            f"{origin['versions']['transformers']}, torch {origin['versions']['torch']}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
