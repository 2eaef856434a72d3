"""
How many requests run at once in equal cache memory, and what that brings: `python -m benchmarks.serving.throughput
[ORIGINAL CONVERTED ...]`, in an environment with vLLM (`make serving`). Without models, SmolLM2-135M-Instruct and what
`mosa-convert` makes of it.

All contenders take turns, measurement by measurement, in a process and with a thread each. Ratios are of this run;
"work" is the seconds that a process computed, which others on the machine change less than the clock's. Then vLLM's
OpenAI server answers vLLM's own benchmark, at several loads. Each measurement is a line of `serving.jsonl` in the
folder of results; a run that was stopped goes on after the last one.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.provenance import origin_of
from mosa_hf import ConversionConfig, convert_checkpoint
from testing import corpora, pretrained

from .. import result_lines
from . import page
from .contenders import Contender
from .load import Server

RESULTS = Path(__file__).parents[1] / "results"
# The second is fitted on little text: what serving costs depends on how much is kept, not on what.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "converted": {},
    "converted-256-14": {"conversion": ConversionConfig(window=256, sparsity=14), "num_windows": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="folders; the first one is what ratios are to")
    parser.add_argument("--memory", type=int, default=200, help="MiB of cache")
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512, help="tokens that a step reads at most, of converted models")
    parser.add_argument(
        "--original",
        nargs="+",
        default=["512:12:128", "2048:3:32"],
        help="settings of the original: chunk:requests at once:tokens of a block",
    )
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=1400, help="tokens")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--rounds", type=int, default=1, help="of all requests")
    parser.add_argument("--alone", type=int, default=5, help="rounds of one request alone")
    parser.add_argument(
        "--loads", type=int, nargs="*", default=[1, 12, 48], help="requests of mixed lengths at once, over HTTP"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of lines, table and picture")
    parser.add_argument("--conversions", type=Path, help="folder to keep what is converted in, for a run that goes on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models or default_models(options.conversions or Path(scratch))
        measure(models, options)
    print(page.write(options.results / "serving.jsonl"))


def default_models(folder: Path) -> list[Path]:
    """SmolLM2 and its conversions, made in `folder` where they are not there."""
    base = pretrained.smollm2_directory()
    for name, settings in CONVERSIONS.items():
        if not (folder / name).exists():
            convert_checkpoint(base, folder / name, **settings)
    return [base, *(folder / name for name in CONVERSIONS)]


def measure(models: list[Path], options: argparse.Namespace) -> None:
    """Whatever has no line yet."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    text = corpora.text("python_topics")
    tokens = tokenizer(text[: 8 * options.requests * options.prompt])["input_ids"]
    prompts = [tokens[i * options.prompt : (i + 1) * options.prompt] for i in range(options.requests)]
    tasks = [("alone", i, prompts[:1]) for i in range(options.alone)]
    tasks += [("together", i, prompts) for i in range(options.rounds)]
    record = Record(options, models[0])
    contenders = list(contenders_of(models, options))
    try:
        for task, index, batch in tasks:
            for each in contenders:
                if record.lacks(task, index, each, len(batch)):
                    record.add(task, index, each, len(batch), each.measure(batch, options.new))
    finally:
        for each in contenders:
            each.close()
    for each in contenders:
        numbers = [number for number in options.loads if record.lacks("load", 0, each, number)]
        if numbers:
            with tempfile.TemporaryDirectory() as scratch, Server(each, Path(scratch)) as server:
                for number in numbers:
                    record.add("load", 0, each, number, server.measure(questions(text, number)))


class Record:
    """The lines of `serving.jsonl`."""

    def __init__(self, options: argparse.Namespace, original: Path):
        self.options, self.original = options, original
        self.path = options.results / "serving.jsonl"
        self.known = page.lines(self.path)
        self.origin = origin_of("benchmarks.serving.throughput", sys.argv[1:])

    def _head(self, task: str, index: int, contender: Contender, requests: int) -> dict[str, Any]:
        return {
            "task": task,
            "index": index,
            "model": contender.name,
            "is_original": contender.model == self.original,
            "settings": contender.settings,
            "requests": requests,
            "prompt": None if task == "load" else self.options.prompt,
            "new": None if task == "load" else self.options.new,
        }

    def lacks(self, task: str, index: int, contender: Contender, requests: int) -> bool:
        return page.key(self._head(task, index, contender, requests)) not in self.known

    def add(self, task: str, index: int, contender: Contender, requests: int, found: dict[str, Any]) -> None:
        line = {**self._head(task, index, contender, requests), **found, **self.origin}
        result_lines.append(self.path, [line])
        print(f"{task} {index}, {requests} requests: {contender.name}", file=sys.stderr, flush=True)


def questions(text: str, number: int) -> list[tuple[str, str]]:
    """Passages of 40 to 900 tokens or so, and passages as long as their answers, of 16 to 96."""
    draw = random.Random(number)
    found = []
    for _ in range(number):
        start, length, answer = draw.randrange(len(text) - 4000), draw.randint(160, 3600), draw.randint(64, 384)
        found.append((text[start : start + length], text[start : start + answer]))
    return found


def contenders_of(models: list[Path], options: argparse.Namespace) -> Iterator[Contender]:
    others = {"memory": options.memory << 20, "max_len": options.max_len}
    for setting in options.original:
        chunk, sequences, block = map(int, setting.split(":"))
        yield Contender("original", models[0], chunk, sequences, block, others)
    for model in models[1:]:
        yield Contender(name_of(model), model, options.chunk, options.requests, None, others)


def name_of(model: Path) -> str:
    """What its plan says, if all groups are sparse and have one window; how much they keep may differ."""
    plan = json.loads((model / "config.json").read_text(encoding="utf-8")).get("mosa_plan") or []
    groups = [group for layer in plan for group in layer]
    windows = {group and group["window"] for group in groups}
    if len(windows) != 1 or None in windows:
        return model.name
    sparsity = 1 / statistics.mean(1 / group["sparsity"] for group in groups)
    return f"window {windows.pop()}, sparsity {sparsity:.2g}"


if __name__ == "__main__":
    main()
