"""
Markdown of the pages: prose of lines that a terminal shows whole. `python -m testing.markdown FILES` wraps it.

Code blocks, tables, headings and HTML stay as they are, and so does a paragraph whose lines all fit.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH = 119
ITEM = re.compile(r"(?P<marker>\s*(?:[-*+]|\d+[.)])\s+)(?P<text>.*)")
UNTOUCHED = re.compile(r"\s*(?:\||#|<|$)")
WORD = re.compile(r"(?:`[^`]*`|\S)+")  # a code span is not broken
MARKUP = re.compile(r"(?:[-+*>|=]+|#+|\d+[.)])(?:\s|$)")  # would start something else at the start of a line


class Paragraph(NamedTuple):
    """Lines of prose that belong together, of one list item perhaps, or a single line that stays as it is."""

    lines: list[str]
    is_prose: bool


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Of cells, row by row: the head first, then how its columns are aligned."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def paragraphs(text: str) -> Iterator[Paragraph]:
    lines: list[str] = []
    in_code = False
    for line in text.split("\n"):
        is_fence = line.lstrip().startswith("```")
        if in_code or is_fence or UNTOUCHED.match(line):
            if lines:
                yield Paragraph(lines, True)
            lines = []
            yield Paragraph([line], False)
            in_code ^= is_fence
        elif ITEM.match(line) and lines:
            yield Paragraph(lines, True)
            lines = [line]
        else:
            lines.append(line)
    if lines:
        yield Paragraph(lines, True)


def wrapped(text: str) -> str:
    """The same page, paragraphs that are too wide filled anew."""
    return "\n".join(
        line
        for lines, is_prose in paragraphs(text)
        for line in (_filled(lines) if is_prose and any(len(line) > WIDTH for line in lines) else lines)
    )


def _filled(lines: list[str]) -> list[str]:
    item = ITEM.match(lines[0])
    marker = item["marker"] if item else re.match(r"\s*", lines[0])[0]
    words = WORD.findall(" ".join([lines[0][len(marker) :], *lines[1:]]))
    filled, current = [], marker + words[0]
    for word in words[1:]:
        if len(current) + 1 + len(word) > WIDTH and not MARKUP.match(word):
            filled.append(current)
            current = " " * len(marker) + word
        else:
            current += " " + word
    return [*filled, current]


def unwrapped(text: str) -> str:
    """The same page, each paragraph of prose on one line: to search in."""
    return "\n".join(
        " ".join([lines[0], *(line.strip() for line in lines[1:])]) if is_prose else lines[0]
        for lines, is_prose in paragraphs(text)
    )


def too_wide(text: str) -> list[str]:
    """Lines of prose, and rows of tables, that are wider, unless they cannot be broken (an address, a code span)."""
    found, in_code = [], False
    for line in text.split("\n"):
        is_fence = line.lstrip().startswith("```")
        if len(line) > WIDTH and not in_code and not is_fence:
            item = ITEM.match(line)
            if len(WORD.findall(item["text"] if item else line)) > 1:
                found.append(line)
        in_code ^= is_fence
    return found


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(wrapped(path.read_text(encoding="utf-8")), encoding="utf-8")
