"""Contexts with facts in them that nothing but memory of the right tokens can answer, and the questions."""

import random
import re
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .scoring import Continuation, Sample

PLACES = (
    "red house",
    "old mill",
    "stone bridge",
    "green boat",
    "north tower",
    "quiet garden",
    "iron gate",
    "blue lamp",
)
NUM_TOGETHER = 3  # needles that one question asks for
NUM_PAIRS, NUM_ASKED = 16, 8


def needles(tokenizer: PreTrainedTokenizerBase, text: str, length: int, seed: int) -> Sample:
    """
    About `length` tokens of `text` with a five-digit code at each of eight depths. Continuations: "needle" asks for
    one of them, "needles together" for several at once.
    """
    chance = random.Random(seed)
    codes = dict(zip(chance.sample(PLACES, len(PLACES)), chance.sample(range(10_000, 100_000), 8), strict=True))
    facts = [f"The code of the {place} is {code}." for place, code in codes.items()]
    context = _strewn(tokenizer, text, facts, length)
    continuations = [
        _question(tokenizer, "needle", f"\nThe code of the {place} is", f" {code}", [f" {code}"])
        for place, code in codes.items()
    ]
    places = chance.sample(PLACES, len(PLACES))
    for i in range(0, len(places) - NUM_TOGETHER + 1, NUM_TOGETHER):
        *firsts, last = places[i : i + NUM_TOGETHER]
        question = f"\nThe codes of the {', the '.join(firsts)} and the {last} are"
        *firsts, last = answers = [f" {codes[place]}" for place in places[i : i + NUM_TOGETHER]]
        continuations.append(
            _question(tokenizer, "needles together", question, f"{','.join(firsts)} and{last}", answers)
        )
    return Sample(context, continuations)


def key_values(tokenizer: PreTrainedTokenizerBase, text: str, length: int, seed: int) -> Sample:
    """
    About `length` tokens of `text` with a list of made-up words and their values in the middle. Continuations: "key"
    gives one of the words again, its value is the answer.
    """
    chance = random.Random(seed)
    made_up: set[str] = set()
    while len(made_up) < 2 * NUM_PAIRS:
        made_up.add("".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(3)))
    words = chance.sample(sorted(made_up), 2 * NUM_PAIRS)
    pairs = dict(zip(words[:NUM_PAIRS], words[NUM_PAIRS:], strict=True))
    listing = "\nThe dictionary:\n" + "".join(f"{key}: {value}\n" for key, value in pairs.items())
    context = _strewn(tokenizer, text, [listing], length)
    continuations = [
        _question(tokenizer, "key", f"\nFrom the dictionary:\n{key}:", f" {pairs[key]}", [f" {pairs[key]}"])
        for key in chance.sample(list(pairs), NUM_ASKED)
    ]
    return Sample(context, continuations)


def several(
    make: Callable[[PreTrainedTokenizerBase, str, int, int], Sample],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    contexts: int,
) -> list[Sample]:
    """What `make`, `needles` or `key_values`, gives of `contexts` stretches of `text`, each with facts of its own."""
    return [make(tokenizer, text[len(text) * seed // contexts :], length, seed) for seed in range(contexts)]


def _strewn(tokenizer: PreTrainedTokenizerBase, text: str, facts: list[str], length: int) -> list[int]:
    """
    Token ids of sentences of `text`, with `facts` between them at even distances; about `length` of them.

    Raises:
        ValueError: for a text that is too short, and for a length with no room for a sentence beside the facts.
    """
    room = length - sum(len(_ids(tokenizer, fact)) for fact in facts)
    sentences, held = [], 0
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        held += len(_ids(tokenizer, f" {sentence}"))
        if held > room:
            break
        sentences.append(sentence)
    else:
        raise ValueError(
            f"The text has fewer than the {room} tokens that are to surround the facts: pass a longer one, or ask for "
            "a shorter context."
        )
    if not sentences:
        raise ValueError(
            f"{length} tokens have no room for a sentence of the text beside the facts: ask for a longer context."
        )
    step = len(sentences) / len(facts)
    for i in reversed(range(len(facts))):  # from the end: what lies before it keeps its place
        sentences.insert(round((i + 0.5) * step), facts[i])
    return _ids(tokenizer, " ".join(sentences))


def _question(
    tokenizer: PreTrainedTokenizerBase, task: str, question: str, reply: str, answers: list[str]
) -> Continuation:
    """`question` and the right reply to it, of which `answers` are scored."""
    encoded = tokenizer(question + reply, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for answer in answers:
        start = len(question) + reply.index(answer)
        stop = start + len(answer)
        tokens = [i for i, (left, right) in enumerate(encoded["offset_mapping"]) if left < stop and right > start]
        spans.append((tokens[0], tokens[-1] + 1))
    return Continuation(task, encoded["input_ids"], spans)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
