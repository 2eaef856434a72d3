"""Contexts and what is asked after them, made of a user's texts."""

import torch
from transformers import PreTrainedTokenizerBase

from ..arguments import checked
from ..conversion.windows import cut, spread
from . import retrieval
from .report import PERPLEXITY
from .scoring import Sample, following


@checked()
def text_samples(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, context: int, scored: int, slices: int
) -> list[Sample]:
    """
    At most `slices` samples, spread evenly over `text`: `context` tokens, and `scored` after them (a token between
    the two is read only, see `following`).

    Raises:
        ValueError: for a text that is too short, and for numbers below 1.
    """
    if min(context, scored, slices) < 1:
        raise ValueError(f"`context`, `scored` and `slices` must be at least 1, got {context}, {scored}, {slices}.")
    start = start_of(tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = context + 1 + scored - len(start)
    if len(ids) < length:
        raise ValueError(
            f"{name} has {len(ids)} tokens, fewer than the {length} of a context and what is scored after it: give "
            "more text, or a shorter context."
        )
    windows = spread(cut(ids, length), slices)
    rows = torch.cat([torch.tensor(start, dtype=torch.long).expand(len(windows), -1), windows], dim=1)
    return [following(row, context, f"{PERPLEXITY}, {name}") for row in rows]


@checked()
def fact_samples(tokenizer: PreTrainedTokenizerBase, text: str, context: int, contexts: int) -> list[Sample]:
    """
    Stretches of `text` of about `context` tokens with facts in them, and the questions: `contexts` of each kind of
    `retrieval`.

    Raises:
        ValueError: for a text that is too short, and for contexts with no room for it beside the facts.
    """
    if contexts < 1:
        raise ValueError(f"`contexts` must be at least 1, got {contexts}.")
    start = start_of(tokenizer)
    return [
        Sample(start + sample.context, sample.continuations)
        for make in (retrieval.needles, retrieval.key_values)
        for sample in retrieval.several(make, tokenizer, text, context - len(start), contexts)
    ]


def start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: some models are lost without it."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []
