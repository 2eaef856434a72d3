"""
Time of one decoding step against the length of the context: the original model, its conversion, and the conversion on
a static cache.

    python -m benchmarks.decode --converted path/to/converted

Both models take turns on the same machine, token by token; the figure is the median step of each, and their ratio.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, StaticCache

import mosa_hf  # noqa: F401  (registers the model)
from mosa_hf.conversion import calibration_windows

from . import measure, sources

LENGTHS = (1024, 8192)


class Decoder:
    """A model with a filled cache, ready to read one token after another."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache | None = None):
        self.model = model
        self.cache = measure.filled_cache(model, input_ids, cache=cache)
        self.seconds: list[float] = []

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> None:
        start = time.perf_counter()
        self.model(token, past_key_values=self.cache, use_cache=True)
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return float(torch.tensor(self.seconds).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converted", required=True, help="a converted SmolLM2, as `mosa-convert` wrote it")
    parser.add_argument("--text", default="shakespeare", choices=sources.TEXT_NAMES)
    parser.add_argument("--tokens", type=int, default=32, help="steps that are timed at each length")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    directory = sources.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dense = AutoModelForCausalLM.from_pretrained(directory)
    mosa = AutoModelForCausalLM.from_pretrained(arguments.converted)
    window = max(LENGTHS) + arguments.tokens
    text = calibration_windows(tokenizer, sources.text(arguments.text), 1, window)
    medians = {}
    print(
        "| context | dense, ms | MoSA, ms | MoSA / dense | MoSA static / dense |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for length in LENGTHS:
        prompt, rest = text[:, :length], text[:, length : length + arguments.tokens]
        static = StaticCache(config=mosa.config, max_cache_len=length + arguments.tokens)
        decoders = [Decoder(dense, prompt), Decoder(mosa, prompt), Decoder(mosa, prompt, static)]
        for token in rest.split(1, dim=1):
            for decoder in decoders:
                decoder.step(token)
        medians[length] = [decoder.median for decoder in decoders]
        base, ours, fixed = medians[length]
        print(
            f"| {length} | {base * 1e3:.1f} | {ours * 1e3:.1f} | {ours / base:.2f} | {fixed / base:.2f} |", flush=True
        )
    growth = [late - early for early, late in zip(*medians.values(), strict=True)]
    print(
        f"\nGrowth from {LENGTHS[0]} to {LENGTHS[1]}: MoSA {growth[1] / growth[0]:.2f} of dense, static "
        f"{growth[2] / growth[0]:.2f}; torch {torch.__version__}, 1 thread."
    )


if __name__ == "__main__":
    main()
