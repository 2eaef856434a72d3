"""
Contexts and questions after the templates of RULER (arXiv 2404.06654), by a generator of our own, of its six tasks
that need no download. What differs from the paper: a context is read once and asked several things, so it hides
several needles and chains where the paper's hides one; keys are made-up words; there are no examples in context and no
chat template; and an answer may be few tokens longer than the right one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mosa_hf.conversion.default_text import Source
from mosa_hf.evaluation.samples import start_of

from .asking import Question

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LONGER = 8  # tokens that an answer may be longer than the right one
HOPS = 4  # of a chain of variables
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3  # words, and how often they are in the list
CODED, MOST_FREQUENT = 50, 3  # words of the coded text, and how many are asked for
ZIPF = 2.0


@dataclass(frozen=True)
class Reading:
    """A context, as token ids, and the questions, each of which is asked after it and nothing else."""

    context: list[int]
    questions: list[Question]


def reading(tokenizer: PreTrainedTokenizerBase, task: str, length: int, index: int, questions: int) -> Reading:
    """
    The same for the same tokenizer, on every machine.

    Args:
        task: one of `TASKS`.
        length: tokens of context, question and answer together, at most; the context has nearly as many.
        index: tells contexts of a task and a length apart.
        questions: at most so many; "cwe" and "fwe" have one.

    Raises:
        ValueError: for a length that has no room for what is asked.
    """
    seed = [*TASKS].index(task) + len(TASKS) * (length + 1_000_003 * index)
    return fitted(tokenizer, TASKS[task], task, length, seed, questions)


Made = tuple[str, list[tuple[str, str, tuple[str, ...]]]]  # a context; prompts, answers, references
Make = Callable[[Source, int, int], Made]  # of a source of randomness, a size, and a number of questions


def fitted(
    tokenizer: PreTrainedTokenizerBase, make: Make, task: str, length: int, seed: int, questions: int
) -> Reading:
    """What `make` makes of a `seed`, of the largest size that fits into `length` tokens. Raises as `reading`."""
    start = start_of(tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def made(size: int) -> Reading:
        text, asked = make(Source(seed), size, questions)
        found = []
        for prompt, answer, references in asked:
            answer_ids = ids(answer)
            found.append(Question(ids(prompt), answer_ids, references, len(answer_ids) + LONGER))
        return Reading(start + ids(text), found)

    def fits(size: int) -> bool:
        each = made(size)
        return len(each.context) + max(len(own.prompt) + own.max_new_tokens for own in each.questions) <= length

    # As much of it as fits: tokens grow with the size.
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        raise ValueError(f"{length} tokens have no room for what {task} asks: ask for a longer context.")
    return made(low)


def _niah(source: Source, facts: list[tuple[str, str]], kind: str, hidden_in: list[str], questions: int) -> Made:
    """`facts` (key, value) at random places of `hidden_in`, or nothing but them; some are asked for."""
    needles = [f"One of the special magic {kind}s for {key} is: {value}." for key, value in facts]
    sentences = list(hidden_in)
    for place, needle in zip(_places(source, len(sentences), len(needles)), reversed(needles), strict=True):
        sentences.insert(place, needle)
    text = (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind}s afterwards.\n" + "\n".join(sentences)
    )
    asked = []
    for key, value in source.several(facts, min(questions, len(facts))):
        named = f"special magic {kind} for {key} mentioned in the provided text"
        asked.append((f"\nWhat is the {named}? The {named} is", f" {value}", (value,)))
    return text, asked


def _places(source: Source, most: int, number: int) -> list[int]:
    """From the last to the first, so that an insertion leaves the others where they are."""
    return sorted((source.number(0, most) for _ in range(number)), reverse=True)


def niah_single_1(source: Source, size: int, questions: int) -> Made:
    """Numbers in noise."""
    facts = list(zip(made_up_words(source, questions), made_up_numbers(source, questions), strict=True))
    return _niah(source, facts, "number", [NOISE] * size, questions)


def niah_multikey_2(source: Source, size: int, questions: int) -> Made:
    """Numbers, in nothing but such."""
    facts = list(zip(made_up_words(source, size), made_up_numbers(source, size), strict=True))
    return _niah(source, facts, "number", [], questions)


def niah_multikey_3(source: Source, size: int, questions: int) -> Made:
    """The same with random identifiers."""
    facts = [(_uuid(source), _uuid(source)) for _ in range(size)]
    return _niah(source, facts, "uuid", [], questions)


def vt(source: Source, size: int, questions: int) -> Made:
    """Chains of variables in noise: which have a value?"""
    names = _distinct(source, questions * (HOPS + 1), lambda: "".join(source.pick(_CAPITALS) for _ in range(5)))
    values = made_up_numbers(source, questions, digits=5)
    sentences, asked = [NOISE] * size, []
    for i, value in enumerate(values):
        chain = names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)]
        lines = [f"VAR {chain[0]} = {value}"]
        lines += [f"VAR {own} = VAR {before}" for before, own in zip(chain, chain[1:], strict=False)]
        for place, line in zip(_places(source, len(sentences), len(lines)), reversed(lines), strict=True):
            sentences.insert(place, line)
        question = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
            f"to the chain(s) of variable assignment in the text above, {len(chain)} variables are assigned the value "
            f"{value}, they are:"
        )
        asked.append((question, f" {', '.join(chain)}", tuple(chain)))
    text = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return text + "\n".join(sentences), asked


def cwe(source: Source, size: int, questions: int) -> Made:
    """The most common words of a list."""
    words = made_up_words(source, COMMON + size)
    common = words[:COMMON]
    listed = _shuffled(source, common * COMMON_TIMES + words[COMMON:] * RARE_TIMES)
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n" + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    )
    question = (
        f"\nQuestion: What are the {COMMON} most common words in the above list? Answer: The top {COMMON} words that "
        "appear most often in the list are:"
    )
    first = list(dict.fromkeys(word for word in listed if word in common))
    return text, [(question, " " + " ".join(f"{i}. {word}" for i, word in enumerate(first, 1)), tuple(first))]


def fwe(source: Source, size: int, questions: int) -> Made:
    """The most frequent words of a coded text, in which dots are the most frequent of all."""
    words = _distinct(source, CODED, lambda: "".join(source.pick(_LETTERS) for _ in range(6)))
    ranked = ["...."] + words
    times = [max(round(8 * size / rank**ZIPF), 1) for rank in range(1, len(ranked) + 1)]
    for rank in reversed(range(MOST_FREQUENT)):  # no two of those that are asked for as frequent as each other
        times[rank + 1] = max(times[rank + 1], times[rank + 2] + 1)
    times[0] = max(times[0], times[1] + 1)
    coded = _shuffled(source, [word for word, number in zip(ranked, times, strict=True) for _ in range(number)])
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. " + " ".join(coded)
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text? Answer: According to the coded text above, the three most "
        "frequently appeared words are:"
    )
    most = words[:MOST_FREQUENT]
    return text, [(question, " " + ", ".join(most), tuple(most))]


TASKS: dict[str, Make] = {
    "niah_single_1": niah_single_1,
    "niah_multikey_2": niah_multikey_2,
    "niah_multikey_3": niah_multikey_3,
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CAPITALS = _LETTERS.upper()


def _distinct(source: Source, number: int, make: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[make()] = None
    return list(found)


def made_up_words(source: Source, number: int) -> list[str]:
    """Made up, none part of another: all have as many letters."""
    return _distinct(
        source, number, lambda: "".join(source.pick("bdfgklmnprstvz") + source.pick("aeiou") for _ in range(4))
    )


def made_up_numbers(source: Source, number: int, digits: int = 7) -> list[str]:
    return _distinct(source, number, lambda: str(source.number(10 ** (digits - 1), 10**digits - 1)))


def _uuid(source: Source) -> str:
    return "-".join("".join(source.pick("0123456789abcdef") for _ in range(size)) for size in (8, 4, 4, 4, 12))


def _shuffled(source: Source, items: list[str]) -> list[str]:
    items = list(items)
    for i in reversed(range(1, len(items))):
        j = source.number(0, i)
        items[i], items[j] = items[j], items[i]
    return items
