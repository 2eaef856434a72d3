"""
What a model that has read a context answers, and how probable it finds the right answer. Needs torch and a tokenizer
only: `baselines.py` asks the same in an environment that has no `mosa_hf`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """
    What is asked after a context.

    prompt: token ids, to the point where the answer begins.
    answer: token ids of a right answer, whose probability is measured.
    references: all of them are in a right answer; it is right in part if some are.
    max_new_tokens: that a model may answer with.
    """

    prompt: list[int]
    answer: list[int]
    references: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Question":
        """Makes one from `dataclasses.asdict`, or from JSON of it."""
        return cls(**{**content, "references": tuple(content["references"])})


@dataclass(frozen=True)
class Answer:
    """
    found: references that greedy decoding gives, `of` how many.
    log_probability: of the right answer's tokens, summed over `tokens`.
    """

    found: int
    of: int
    log_probability: float
    tokens: int


class Reader(Protocol):
    """A model that has read a context."""

    model: PreTrainedModel

    def read(self, ids: list[int], keep: int) -> torch.Tensor:
        """The last logits `[keep, V]` after tokens that it then has read, too."""

    def copy(self) -> "Reader":
        """One that goes on from here and leaves this one as it is."""


@torch.inference_mode()
def ask(reader: Reader, tokenizer: PreTrainedTokenizerBase, question: Question) -> Answer:
    """
    Greedy decoding after a context, and the probability of the right answer. RULER's score is the share of references
    that are in what is decoded (`string_match_all`). The reader stays as it is.
    """
    right = torch.tensor(question.answer)
    logits = reader.copy().read(question.prompt + question.answer, keep=len(right) + 1)[:-1].float().cpu()
    log_probability = -torch.nn.functional.cross_entropy(logits, right, reduction="sum").item()
    if bool((logits.argmax(-1) == right).all()):  # so that is what greedy decoding gives
        found = len(question.references)
    else:
        found = _num_found(reader.copy(), tokenizer, question)
    return Answer(found, len(question.references), log_probability, len(right))


def _num_found(reader: Reader, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """References in what is decoded."""
    generation = reader.model.generation_config
    ends = None if generation is None else generation.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    decoded: list[int] = []
    found, ids = 0, question.prompt
    while len(decoded) < question.max_new_tokens:
        token = int(reader.read(ids, keep=1)[-1].argmax())
        if token in stops:
            break
        decoded.append(token)
        text = tokenizer.decode(decoded)
        found, ids = sum(reference in text for reference in question.references), [token]
        if found == len(question.references):
            break
    return found
