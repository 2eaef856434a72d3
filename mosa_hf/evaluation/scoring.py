"""
What is asked of every method of keeping fewer keys and values: how probable it finds the right tokens after a context
that it has read, and what its cache holds then. Needs torch only: `benchmarks/frontier/baselines.py` loads this file
alone, in an environment that has no `mosa_hf`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Continuation:
    """
    Tokens that are read after a context.

    task: what it is scored as.
    ids: its tokens.
    answers: `(start, stop)` of the spans of `ids` that are scored. start > 0: what is scored is never predicted by the
        last logits of the context, which a method may have read in full.
    """

    task: str
    ids: list[int]
    answers: list[tuple[int, int]]

    def __post_init__(self) -> None:
        if not all(0 < start < stop <= len(self.ids) for start, stop in self.answers):
            raise ValueError(
                f"`answers` must be spans of the {len(self.ids)} `ids`, behind the first of them, got {self.answers}."
            )


@dataclass(frozen=True)
class Sample:
    """A context, read once, and the continuations, each of which is read after it and nothing else."""

    context: list[int]
    continuations: list[Continuation]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Sample":
        """
        Makes one from `to_dict`, or from JSON of it.

        Raises:
            ValueError: for anything else.
        """
        try:
            continuations = [
                Continuation(each["task"], each["ids"], [tuple(span) for span in each["answers"]])
                for each in content["continuations"]
            ]
            return cls(content["context"], continuations)
        except (KeyError, TypeError) as error:
            raise ValueError(f"`content` must be what `Sample.to_dict` gave ({error!r}).") from error


@dataclass(frozen=True)
class Score:
    """
    What one continuation gets.

    log_probability: of the answers' tokens, summed.
    tokens: how many these are.
    right: how many answers greedy decoding gives, each after what precedes it in the continuation.
    answers: out of how many.
    length: tokens read in all.
    kv_bytes: what the keys and values of these take then.
    """

    task: str
    log_probability: float
    tokens: int
    right: int
    answers: int
    length: int
    kv_bytes: float


def following(ids: torch.Tensor, context: int, task: str) -> Sample:
    """
    The first `context` of `ids` [T] as a context, and all but one of the others scored. That one is read only, so that
    what is scored was predicted with what the method has left of the context.

    Raises:
        ValueError: for a context that leaves nothing to score.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
        raise ValueError(f"`ids` must be a tensor of token ids [T], got {ids!r}: pass the row of one text.")
    if not isinstance(context, int) or not 0 < context < len(ids) - 1:
        raise ValueError(f"`context` must be at least 1, and leave two of the {len(ids)} `ids`, got {context!r}.")
    before, rest = ids[:context].tolist(), ids[context:].tolist()
    return Sample(before, [Continuation(task, rest, [(1, len(rest))])])


class Memory(Protocol):
    """What a method remembers of a context."""

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The logits `[T, V]` of tokens `[1, T]` that follow the context, and the bytes held after them. The memory
        itself stays as it was."""


def score(memory: Memory, sample: Sample) -> list[Score]:
    """
    The scores of each continuation, after `memory` of the sample's context.

    Raises:
        ValueError: for what is no memory, or no sample.
    """
    if not hasattr(memory, "read") or not isinstance(sample, Sample):
        raise ValueError(
            "`memory` must have a method `read`, as a `CacheMemory` has, and `sample` be a `Sample`, got objects of "
            f"class {type(memory).__name__} and {type(sample).__name__}: call `score(memory, sample)`."
        )
    return [_score(memory, len(sample.context), each) for each in sample.continuations]


def _score(memory: Memory, num_before: int, continuation: Continuation) -> Score:
    ids = torch.tensor(continuation.ids)
    logits, kv_bytes = memory.read(ids[None])
    log_probability, num_tokens, right = 0.0, 0, 0
    for start, stop in continuation.answers:
        predictions, answer = logits[start - 1 : stop - 1].float(), ids[start:stop].to(logits.device)
        log_probability -= torch.nn.functional.cross_entropy(predictions, answer, reduction="sum").item()
        num_tokens += stop - start
        right += int((predictions.argmax(-1) == answer).all())
    length = num_before + len(ids)
    return Score(
        continuation.task, log_probability, num_tokens, right, len(continuation.answers), length, float(kv_bytes)
    )
