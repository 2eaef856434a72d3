"""
Time of one decoding step against the length of the context: the original model, its conversion, and the conversion on
a static cache.

    python -m benchmarks.decode --converted path/to/converted

All of them, at both lengths, take turns of several tokens in one process, so that a slow minute of the machine hits
all alike; the figure is the median step of each, and their ratio.
"""

import argparse
import time

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, StaticCache

import mosa_hf  # noqa: F401  (registers the model)
from mosa_hf.conversion import calibration_windows

from . import measure, sources

LENGTHS = (1024, 8192)
TURN = 8  # tokens that one decodes before the next does, as it would alone: steps of others leave its memory cold


class Decoder:
    """A model with a filled cache, ready to read one token after another."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache | None = None):
        self.model = model
        self.cache = measure.filled_cache(model, input_ids, cache=cache)
        self.seconds: list[float] = []

    @torch.inference_mode()
    def take_turn(self, tokens: torch.Tensor) -> None:
        """Read `tokens` [1, T], one a step."""
        for token in tokens.split(1, dim=1):
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
    parser.add_argument("--tokens", type=int, default=64, help="steps that are timed at each length")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    directory = sources.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dense = AutoModelForCausalLM.from_pretrained(directory)
    mosa = AutoModelForCausalLM.from_pretrained(arguments.converted)
    window = max(LENGTHS) + arguments.tokens
    text = calibration_windows(tokenizer, sources.text(arguments.text), 1, window)
    decoders = {}
    for length in LENGTHS:
        static = StaticCache(config=mosa.config, max_cache_len=length + arguments.tokens)
        models = {"dense": (dense, None), "MoSA": (mosa, None), "MoSA static": (mosa, static)}
        for name, (model, cache) in models.items():
            decoders[length, name] = Decoder(model, text[:, :length], cache)
    for start in tqdm(range(0, arguments.tokens, TURN), desc="Decoding", unit="turn"):
        for (length, _), decoder in decoders.items():
            decoder.take_turn(text[:, length + start : length + start + TURN])

    milliseconds = {key: 1e3 * decoder.median for key, decoder in decoders.items()}
    print("| context | dense, ms | MoSA, ms | MoSA / dense | MoSA static / dense |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for length in LENGTHS:
        base, ours, fixed = (milliseconds[length, name] for name in models)
        print(f"| {length} | {base:.1f} | {ours:.1f} | {ours / base:.2f} | {fixed / base:.2f} |")
    first, last = LENGTHS
    base, ours, fixed = (milliseconds[last, name] - milliseconds[first, name] for name in models)
    print(
        f"\nGrowth from {first} to {last}: MoSA {ours / base:.2f} of dense, static {fixed / base:.2f}; "
        f"torch {torch.__version__}, 1 thread."
    )


if __name__ == "__main__":
    main()
