"""What the frontier asks of a method: texts to predict after a long context, and facts to find again in one."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mosa_hf.conversion import calibration_windows
from mosa_hf.evaluation import PERPLEXITY, Sample, following, retrieval
from testing import corpora

TEXTS = ("debian_handbook", "python_docs")  # the first has contexts for facts too
RUN_IN_COMMON = 12  # words in a row that a slice of text must not share with the calibration text


@dataclass(frozen=True)
class Size:
    """How much is read. Tokens: `prompt` before `scored` ones, `context` with facts, `window` of calibration text."""

    prompt: int = 3072
    scored: int = 512
    slices: int = 2  # of each text
    context: int = 3000
    contexts: int = 2  # of each kind of facts
    windows: int = 12
    window: int = 1024
    characters: int | None = None  # of each text that is measured on; None: all


SMOKE = Size(prompt=192, scored=32, slices=1, context=500, contexts=1, windows=2, window=128, characters=200_000)


@dataclass(frozen=True)
class Suite:
    """Readings that go together. A row for each of the tasks that their continuations belong to."""

    settings: dict[str, Any]
    samples: list[Sample]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(each.task for sample in self.samples for each in sample.continuations))

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """The settings with a digest of what is read, so that a row of other tokens is another row."""
        ids = json.dumps([sample.to_dict() for sample in self.samples])
        return {**self.settings, "digest": hashlib.sha256(ids.encode()).hexdigest()[:12]}


def suites(tokenizer: PreTrainedTokenizerBase, seen: torch.Tensor, size: Size) -> list[Suite]:
    """
    All that is asked of a method.

    Args:
        seen: token ids `[N, T]` of the calibration text.
    """
    found = continuations_of_texts(tokenizer, seen, size)
    text = corpora.text(TEXTS[0])[: size.characters]
    for make in (retrieval.needles, retrieval.key_values):
        samples = retrieval.several(make, tokenizer, text, size.context, size.contexts)
        found.append(Suite({"context": size.context, "contexts": size.contexts}, samples))
    return found


def continuations_of_texts(tokenizer: PreTrainedTokenizerBase, seen: torch.Tensor, size: Size) -> list[Suite]:
    """Perplexity of each of `TEXTS`; see `suites`."""
    found = []
    for name in TEXTS:
        slices = unseen_slices(tokenizer, corpora.text(name)[: size.characters], seen, size)
        settings = {"prompt": size.prompt, "scored": size.scored, "slices": len(slices)}
        found.append(Suite(settings, [following(row, size.prompt, f"{PERPLEXITY}, {name}") for row in slices]))
    return found


def unseen_slices(tokenizer: PreTrainedTokenizerBase, text: str, seen: torch.Tensor, size: Size) -> torch.Tensor:
    """Token ids `[slices, prompt + 1 + scored]`, spread over `text`, that share no run of words with `seen` [N, T]."""
    runs = set().union(*map(word_runs, tokenizer.batch_decode(seen)))
    windows = calibration_windows(tokenizer, text, 8 * size.slices, size.prompt + 1 + size.scored)
    texts = tokenizer.batch_decode(windows)
    unseen = [row for row, words in zip(windows, texts, strict=True) if runs.isdisjoint(word_runs(words))]
    if not unseen:
        raise ValueError("All of the text has passages in common with the calibration text: measure on another one.")
    num_slices = min(size.slices, len(unseen))
    return torch.stack([unseen[int((i + 0.5) * len(unseen) / num_slices)] for i in range(num_slices)])


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `RUN_IN_COMMON` words of a text."""
    words = text.lower().split()
    return {tuple(words[i : i + RUN_IN_COMMON]) for i in range(len(words) - RUN_IN_COMMON + 1)}
