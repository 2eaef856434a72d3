"""What the frontier asks of a method: texts to predict after a long context, and facts to find again in one."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mosa_hf.conversion.windows import NUM_WINDOWS, WINDOW_LENGTH
from mosa_hf.evaluation import Sample, retrieval, text_samples
from testing import corpora
from testing.passages import NUM_PASSAGES, Passage, passages

RUN_IN_COMMON = 12  # words in a row that a passage must not share with the calibration text
FACTS_IN = "documentation"  # the text that facts are strewn in


@dataclass(frozen=True)
class Size:
    """
    How much is read. Tokens: `prompt` before `scored` ones, `context` with facts, `window` of calibration text.

    texts: of `testing.passages`; so many `passages` of each.
    contexts: of each kind of facts.
    characters: of each text that is healed on, and that facts are strewn in; None: all.
    """

    prompt: int = 3072
    scored: int = 512
    texts: tuple[str, ...] = ("documentation", "code")
    passages: int = NUM_PASSAGES
    context: int = 3000
    contexts: int = 2
    windows: int = NUM_WINDOWS
    window: int = WINDOW_LENGTH
    characters: int | None = None


SMOKE = Size(prompt=192, scored=32, passages=1, context=500, contexts=1, windows=2, window=128, characters=200_000)


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
    text = corpora.text(FACTS_IN)[: size.characters]
    for make in (retrieval.needles, retrieval.key_values):
        samples = retrieval.several(make, tokenizer, text, size.context, size.contexts)
        found.append(Suite({"context": size.context, "contexts": size.contexts}, samples))
    return found


def continuations_of_texts(tokenizer: PreTrainedTokenizerBase, seen: torch.Tensor, size: Size) -> list[Suite]:
    """
    Perplexity of passages of each of the texts; see `suites`.

    Raises:
        ValueError: if the calibration text has part of a passage.
    """
    found = []
    for name in size.texts:
        chosen = some_of(passages(name), size.passages)
        check_unseen(chosen, tokenizer.batch_decode(seen))
        samples = [sample_of(tokenizer, each, size.prompt, size.scored) for each in chosen]
        settings = {"prompt": size.prompt, "scored": size.scored, "passages": [each.name for each in chosen]}
        found.append(Suite(settings, samples))
    return found


def some_of(passages: list[Passage], number: int) -> list[Passage]:
    """`number` of them, at even distances."""
    number = min(number, len(passages))
    return [passages[i * len(passages) // number] for i in range(number)]


def sample_of(tokenizer: PreTrainedTokenizerBase, passage: Passage, prompt: int, scored: int) -> Sample:
    """The beginning of a passage: `prompt` tokens, and `scored` after them, see `evaluation.text_samples`."""
    (sample,) = text_samples(tokenizer, passage.text, passage.content, prompt, scored, slices=1)
    return sample


def check_unseen(passages: list[Passage], seen: list[str]) -> None:
    """
    Raises:
        ValueError: naming the first passage that has a run of words in common with what was `seen`.
    """
    runs = set().union(*map(word_runs, seen))
    for each in passages:
        if not runs.isdisjoint(word_runs(each.content)):
            raise ValueError(
                f"Passage {each.name} of {each.text!r} has {RUN_IN_COMMON} words in a row in common with the "
                "calibration text: calibrate on another one."
            )


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `RUN_IN_COMMON` words of a text."""
    words = text.lower().split()
    return {tuple(words[i : i + RUN_IN_COMMON]) for i in range(len(words) - RUN_IN_COMMON + 1)}
