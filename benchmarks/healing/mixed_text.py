"""
A text to heal a model on that is asked for what it has read: documentation and code, and facts that come up again.

    python -m benchmarks.healing.mixed_text text.jsonl
    mosa-convert MODEL converted --window 256 --sparsity 14
    mosa-heal --model converted --text text.jsonl --destination healed --output_dir checkpoints
    python -m benchmarks.frontier --model MODEL --ours 256/14 healed

It has no run of words in common with the passages of `testing/passages.py`, nor the words of `frontier/ruler.py`'s
questions. Rows are generated ones and real ones in turns, the same on every machine.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from mosa_hf.atomic_write import atomic_file
from mosa_hf.conversion.default_text import FIELDS, NOTES, PLACES, SUBJECTS, VERBS, Source
from testing import corpora
from testing.passages import NAMES, passages

from ..frontier.tasks import word_runs
from .recipe import unseen_pieces

TEXTS = ("documentation", "code")  # two of the four kinds that perplexity is measured of
CHARACTERS = 6000  # of a row, at least
PIECES = 4  # of a real row: small, since one with a run of words that is held is left out
ROWS = 160
FACTS_BETWEEN = 12  # between a fact and its question, at least
QUESTIONS = (
    "What is the {field} of {name}? {value}",
    "Q: {name}, {field}?\nA: {value}",
    "{field} of {name} = {value}",
    "As noted above, the {field} of {name} is {value}.",
    '>>> notes["{name}"]["{field}"]\n{value}',
)


def rows(number: int = ROWS) -> Iterator[str]:
    """So many, of which every other one is generated."""
    source, real = Source(seed=1), real_rows()
    for i in range(number):
        yield next(real) if i % 2 else generated_row(source)


def real_rows() -> Iterator[str]:
    """Pieces of `TEXTS` in turns, from all over them, until the longer one has no more."""
    held = set().union(*(word_runs(each.content) for name in NAMES for each in passages(name)))
    texts = []
    for name in TEXTS:
        pieces = list(unseen_pieces(corpora.text(name), held, CHARACTERS // PIECES))
        texts.append(spread(["\n\n".join(pieces[i : i + PIECES]) for i in range(0, len(pieces), PIECES)]))
    for each in zip_longest(*texts):
        yield from filter(None, each)


def spread(items: Sequence[str]) -> list[str]:
    """All of them, such that the first ones are from everywhere."""
    step = 7
    return [item for start in range(step) for item in items[start::step]]


def generated_row(source: Source) -> str:
    """Facts, with sentences that repeat between them or without, and questions about facts that are long past."""
    filler = [f"The {source.pick(SUBJECTS)} {source.pick(VERBS)} {source.pick(PLACES)}." for _ in range(5)]
    fillers, asks = source.pick((0, 0, 2, 6)), source.pick(QUESTIONS)
    note = source.pick(NOTES)
    facts: list[dict[str, object]] = []
    lines: list[str] = []
    length = 0
    while length < CHARACTERS:
        field = source.pick(FIELDS)
        fact = {"field": field, "name": f"{source.word()}_{source.number(1, 99)}", "value": source.value(field)}
        facts.append(fact)
        own = [note.format(**fact), *(source.pick(filler) for _ in range(fillers))]
        if len(facts) > FACTS_BETWEEN:
            own.append(asks.format(**facts[source.number(0, len(facts) - FACTS_BETWEEN - 1)]))
        lines += own
        length += sum(map(len, own))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healing.mixed_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="of JSON lines, to write")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of {CHARACTERS} characters (default: {ROWS})")
    options = parser.parse_args(arguments)
    with atomic_file(options.file) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for text in rows(options.rows):
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
