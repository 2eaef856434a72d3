"""
Time of one decoding step against the length of the context: the original SmolLM2, its conversion, and the conversion
on a static cache; and bytes of their caches.

    python -m benchmarks.speed.decode                             # converts it first, with the converter's defaults
    python -m benchmarks.speed.decode --converted DIRECTORY --busy

All of them, at all lengths, take turns of several tokens in one process, so that a slow minute of the machine hits all
alike; the figure is the median step of each. With `--busy`, every other turn has a second process beside it, which
multiplies matrices with as many threads, and the figure is by how much that slows each. `OMP_NUM_THREADS` sets the
number of threads.
"""

import argparse
import contextlib
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, StaticCache

from mosa_hf import ConversionConfig, GroupPlan, cache_bytes, convert_model
from mosa_hf.compat import CACHE
from mosa_hf.conversion import calibration_windows
from testing import corpora, pretrained

from .. import metrics
from ..provenance import about, origin_of

TURN = 8  # tokens that one decodes before the next does, as it would alone: steps of others leave its memory cold
CONTENDERS = ("original", "converted", "converted, static")
BUSY_LOOP = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
matrix = torch.rand(1024, 1024)
print("ready", flush=True)
while True:
    matrix @ matrix
"""


class Decoder:
    """A model with a filled cache, ready to read one token after another."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache | None = None):
        self.model = model
        self.cache = metrics.filled_cache(model, input_ids, cache=cache)
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # of steps, by whether another process was busy

    @torch.inference_mode()
    def take_turn(self, tokens: torch.Tensor, is_busy: bool) -> None:
        """Read `tokens` [1, T], one a step."""
        for token in tokens.split(1, dim=1):
            start = time.perf_counter()
            self.model(token, use_cache=True, **{CACHE: self.cache})
            self.seconds[is_busy].append(time.perf_counter() - start)

    def milliseconds(self, is_busy: bool = False) -> float:
        """The time of the median step."""
        return 1e3 * statistics.median(self.seconds[is_busy])


class Neighbour:
    """A process that multiplies matrices with as many threads as this one uses, while it is let to."""

    def __init__(self):
        command = [sys.executable, "-c", BUSY_LOOP, str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.process.stdout.readline()
        self.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()


def decode(decoders: dict[tuple[int, str], Decoder], text: torch.Tensor, num_turns: int, with_busy: bool) -> None:
    """Let `decoders`, by the length that each has read and its name, read on in `text` [1, T] in turns."""
    with Neighbour() if with_busy else contextlib.nullcontext() as neighbour:
        for turn in tqdm(range(num_turns), desc="Decoding", unit="turn"):
            is_busy = with_busy and turn % 2 == 1
            with neighbour.busy() if is_busy else contextlib.nullcontext():
                for (length, _), decoder in decoders.items():
                    start = length + turn * TURN
                    decoder.take_turn(text[:, start : start + TURN], is_busy)


def print_table(decoders: dict[tuple[int, str], Decoder], lengths: list[int], with_busy: bool) -> None:
    """Each contender at each length."""
    head = ["context", "contender", "ms", "of the original's", "cache bytes", "of the original's"]
    head += ["ms beside a busy process", "slowed by", "more than the original"] if with_busy else []
    print("| " + " | ".join(head) + " |\n| ---: | --- |" + " ---: |" * (len(head) - 2))
    for length, name in itertools.product(lengths, CONTENDERS):
        decoder, original = decoders[length, name], decoders[length, "original"]
        own, base = decoder.milliseconds(), original.milliseconds()
        held, base_held = (sum(cache_bytes(each.cache).values()) for each in (decoder, original))
        cells = [str(length), name, f"{own:.1f}", f"{own / base:.2f}", f"{held:,}", f"{held / base_held:.3f}"]
        if with_busy:
            slowed, base_slowed = (each.milliseconds(True) / each.milliseconds() for each in (decoder, original))
            cells += [f"{decoder.milliseconds(True):.1f}", f"{slowed:.2f}x", f"{slowed / base_slowed:.2f}x"]
        print("| " + " | ".join(cells) + " |")
    if len(lengths) > 1:
        first, last = lengths[0], lengths[-1]
        base, *others = (
            decoders[last, name].milliseconds() - decoders[first, name].milliseconds() for name in CONTENDERS
        )
        growth = ", ".join(f"{name} {own / base:.2f}" for name, own in zip(CONTENDERS[1:], others, strict=True))
        print(f"\nGrowth from {first} to {last}, of the original's: {growth}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converted", help="a converted SmolLM2, as `mosa-convert` wrote it")
    parser.add_argument("--text", default="shakespeare", choices=corpora.TEXT_NAMES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192], help="tokens before the first step")
    parser.add_argument(
        "--tokens", type=int, default=64, help=f"steps that are timed at each length, a multiple of {TURN}"
    )
    parser.add_argument("--busy", action="store_true", help="time as many steps beside a busy process")
    arguments = parser.parse_args()

    directory = pretrained.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    original = AutoModelForCausalLM.from_pretrained(directory)
    if arguments.converted:
        converted = AutoModelForCausalLM.from_pretrained(arguments.converted)
    else:
        converted = convert_model(original, ConversionConfig(), metrics.calibration(tokenizer))
    num_turns = -(-arguments.tokens // TURN) * (2 if arguments.busy else 1)
    room = num_turns * TURN
    text = calibration_windows(tokenizer, corpora.text(arguments.text), 1, max(arguments.lengths) + room)
    decoders = {}
    for length in arguments.lengths:
        static = StaticCache(config=converted.config, max_cache_len=length + room)
        contenders = ((original, None), (converted, None), (converted, static))
        for name, (model, cache) in zip(CONTENDERS, contenders, strict=True):
            decoders[length, name] = Decoder(model, text[:, :length], cache)
    decode(decoders, text, num_turns, arguments.busy)
    print_table(decoders, arguments.lengths, arguments.busy)
    num_sparse = len(GroupPlan.of_config(converted.config).sparse_pairs())
    print(f"\n{num_sparse} groups are sparse.\n\n{about([origin_of('benchmarks.speed.decode', sys.argv[1:])])}")


if __name__ == "__main__":
    main()
