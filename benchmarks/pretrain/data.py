"""Token ids for `benchmarks.pretrain`: what models train on, text of the same kinds that they do not, other text."""

import hashlib
from functools import cache
from pathlib import Path

import numpy
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from testing import corpora
from testing.packages import cached

BLOCK = 20_000  # characters: every `HELD_OUT`-th such block of a text is held out
HELD_OUT = 20


def blocks_of(name: str, characters: int) -> list[str]:
    """Blocks of one text, spread over it: together about `characters` of it, or all."""
    text = corpora.text(name)
    every = max(len(text) // characters, 1)
    return [text[start : start + BLOCK] for start in range(0, len(text), BLOCK * every)]


def small_tokenizer(vocab_size: int, names: tuple[str, ...]) -> Path:
    """The file of a byte-level BPE of `tokenizers` for small models, trained on the texts `names`."""

    def train(scratch: Path) -> Path:
        tokenizer = ByteLevelBPETokenizer()
        texts = [corpora.text(name)[:2_000_000] for name in names]
        tokenizer.train_from_iterator(texts, vocab_size, show_progress=False)
        tokenizer.save(str(scratch / "tokenizer.json"))
        return scratch / "tokenizer.json"

    return cached(f"bpe-{vocab_size}-{'-'.join(names)}.json", train)


class Corpus:
    """
    Args:
        texts: names of the texts to train on.
        unseen: name of a text of another kind, to read only.
        vocab_size: of a tokenizer that knows `texts`.
        characters: of each text that are read, about; of the unseen one a tenth.

    Raises:
        ValueError: if that is too little to hold out a part of it.
    """

    def __init__(self, texts: tuple[str, ...], unseen: str, vocab_size: int, characters: int):
        tokenizer = Tokenizer.from_file(str(small_tokenizer(vocab_size, texts)))
        training, held_out = [], []
        for name in texts:
            blocks = blocks_of(name, characters)
            training += [block for i, block in enumerate(blocks) if i % HELD_OUT != HELD_OUT - 1]
            held_out += blocks[HELD_OUT - 1 :: HELD_OUT]
        if not held_out:
            raise ValueError(
                f"No text has {HELD_OUT * BLOCK} characters, one part of which to hold out: raise `characters`."
            )
        self.training, self.held_out, self.unseen = (
            torch.from_numpy(
                numpy.concatenate([numpy.array(part.ids, dtype=numpy.int16) for part in tokenizer.encode_batch(parts)])
            )
            for parts in (training, held_out, blocks_of(unseen, characters // 10))
        )
        digest = hashlib.sha256()
        for ids in (self.training, self.held_out, self.unseen):
            digest.update(ids.numpy().tobytes())
        self.digest = digest.hexdigest()[:12]

    def batch(self, seed: int, step: int, size: int, length: int) -> torch.Tensor:
        """`[size, length]` of the training text: the same for a seed and a step, whatever was drawn before."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - length, (size,), generator=generator)
        return self.training[starts[:, None] + torch.arange(length)].long()

    @staticmethod
    def windows(ids: torch.Tensor, num_tokens: int, length: int) -> torch.Tensor:
        """`[N, length]`: windows of together about `num_tokens` (at least one window), spread over `ids` [T]."""
        count = max(min(num_tokens, len(ids)) // length, 1)
        starts = torch.linspace(0, len(ids) - length, count).long()
        return ids[starts[:, None] + torch.arange(length)].long()


@cache
def corpus(texts: tuple[str, ...], unseen: str, vocab_size: int, characters: int) -> Corpus:
    """`Corpus`, made once in a process."""
    return Corpus(texts, unseen, vocab_size, characters)
