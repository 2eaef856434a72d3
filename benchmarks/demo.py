"""`make demo`: `mosa-convert` of SmolLM2-135M with no option, and what that did to quality, memory and speed.

python -m benchmarks.demo [--keep DIRECTORY] [options of mosa-convert, such as --dtype bfloat16 --window 256]

Texts, passages and the calibration text are the same on every machine, and so is the table but for rounding.
"""

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf.cli import convert
from mosa_hf.evaluation import Sample, Subject, evaluate, table
from testing import pretrained

from . import metrics
from .frontier.tasks import Size, suites

SIZE = Size(prompt=1536, scored=128, texts=("code",), context=1500)
PROMPT = "A file system keeps track of"
ORIGINAL, CONVERTED, BASELINE = "original", "MoSA", "first token + window, equal bytes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="directory to write the converted model to")
    options, others = parser.parse_known_args(arguments)
    start = time.perf_counter()

    source = pretrained.smollm2_directory()
    with tempfile.TemporaryDirectory() as scratch:
        destination = options.keep or Path(scratch) / "converted"
        convert.main([str(source), str(destination), *others])
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(destination)  # the model as its users will load it
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source)

    result = compare(original, model, samples(tokenizer))
    print(
        f"\nSmolLM2-135M-Instruct, converted in {seconds:.0f} s by mosa-convert {' '.join(others)}\n"
        f"{datetime.date.today()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n"
    )
    print(table(result["rows"]))
    print("\ntokens/s:", ", ".join(f"{name} {speed:.1f}" for name, speed in result["tokens_per_second"].items()))
    for name, each in ((ORIGINAL, original), (CONVERTED, model)):
        inputs = tokenizer(PROMPT, return_tensors="pt")
        tokens = each.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(f"\n{name}: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Passages of code, and needles: few enough for minutes."""
    asked = suites(tokenizer, metrics.calibration(tokenizer), SIZE)[: len(SIZE.texts) + 1]
    return [sample for suite in asked for sample in suite.samples]


def compare(original: PreTrainedModel, model: PreTrainedModel, samples: list[Sample]) -> dict[str, Any]:
    """
    `mosa_hf.evaluation.evaluate` of both and of the baseline whose window makes its cache as large as the model's, on
    average; and tokens per second after the first of the samples, which begin with a text.
    """
    first = samples[0]
    prompt = torch.tensor([first.context + first.continuations[0].ids])
    subjects = [Subject(ORIGINAL, original, "here"), Subject(CONVERTED, model, "here")]  # no need to tell apart
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "scores.json"
        records = evaluate(subjects, samples, path)["scores"]
        held = {each.name: _mean(records, each.name, "kv_bytes") for each in subjects}
        share, length = held[CONVERTED] / held[ORIGINAL], _mean(records, ORIGINAL, "length")
        window = metrics.window_of_share(model, share, round(length))
        subjects.append(Subject(BASELINE, metrics.first_token_and_window(model, window)))
        speeds = {
            each.name: metrics.decode_speed(each.model, metrics.filled_cache(each.model, prompt), prompt[:, -1:])
            for each in subjects
        }
        return evaluate(subjects, samples, path, about={"tokens_per_second": speeds})


def _mean(records: list[dict[str, Any]], name: str, field: str) -> float:
    """Of a field of one model's scores."""
    return statistics.fmean(each[field] for record in records if record["model"] == name for each in record["scores"])


if __name__ == "__main__":
    main()
