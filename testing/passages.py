"""
The passages that perplexity is measured on: of each of four texts sixteen, the same on every machine and for every
tokenizer. A passage is named by its content, the first digits of its sha256, and so are the rows of results on it.
"""

import hashlib
from dataclasses import dataclass

from . import corpora

CHARACTERS = 40_000  # of a passage; whoever needs fewer reads its beginning
NUM_PASSAGES = 16  # of each text
DIGITS = 12  # of a name


@dataclass(frozen=True)
class Passage:
    """Part of one of `corpora.SHA256`'s texts, from the beginning of a line."""

    text: str
    content: str

    @property
    def name(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()[:DIGITS]


def passages(text: str) -> list[Passage]:
    """
    The passages of one of the texts of `NAMES`, spread evenly over it; no two overlap.

    Raises:
        SourceUnavailable: if the text cannot be fetched.
        ValueError: for a text that has none, and for passages that are not those of `NAMES`; it says which differ.
    """
    if text not in NAMES:
        raise ValueError(f"no passages of {text!r} are known, only of {', '.join(NAMES)}")
    found = [Passage(text, content) for content in cut(corpora.text(text))]
    expected = NAMES[text].split()
    differing = [i for i, (each, name) in enumerate(zip(found, expected, strict=True)) if each.name != name]
    if differing:
        raise ValueError(
            f"Of {text!r}, passages {', '.join(map(str, differing))} are others than those that figures elsewhere are "
            f"of: the first of these is {found[differing[0]].name}, not {expected[differing[0]]}."
        )
    return found


def cut(text: str, number: int = NUM_PASSAGES, characters: int = CHARACTERS) -> list[str]:
    """
    `number` parts of `text`, of `characters` each, that begin where a line does and at even distances.

    Raises:
        ValueError: if the text is too short for them not to overlap.
    """
    starts = [text.rfind("\n", 0, len(text) * i // number) + 1 for i in range(number)]
    ends = [*starts[1:], len(text)]
    if any(end - start < characters for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"a text of {len(text)} characters has no {number} passages of {characters}")
    return [text[start : start + characters] for start in starts]


NAMES = {
    "documentation": """
        957de88486fa c3f5f2f53f7c 5572ce917945 fc1c41a67de6 d469c2b256f1 59a291b1f73e 244a9c9889e6 46468d312e71
        3506095f7752 3a317429df07 798ac5ef1779 fd8d567683ec d566db3191a3 9042a788470c ab0e9536da20 f9571f4e6939
    """,
    "shakespeare": """
        8576fee9f277 0759bf8fe04f f856279b62c6 2b1fabe067ca ec357721b2d0 3cf3676d428a 5dbb5e7ced5f b0e1de0d7889
        59da9b957272 1af4a09df615 75f360213f48 bae9c3da2f31 c942fe74a136 ce69ffcfe49d 267f456b1e46 99bf1ae4ffa5
    """,
    "code": """
        c8fd05cd9ef4 67331ae4eec9 bad6dff5e4ce 5a2d7066a00a e69cef9bc2d2 b290e587f8ac 81673074eac5 ae26b0775dbb
        76ca3dafe7da 64045e180ea4 131b78b8778b e0bec9f55218 d8b7fc03a921 f2a2fbd62e22 04c8b01e4ec7 56905f032380
    """,
    "data": """
        03d60a85d780 634f58fd2eb8 648bc32f0a4d 08bbf708323e b8a00f8941b5 66dc2593c73d 2c9df5db50b1 0633898211b1
        4ebc322cb287 cee590dfbdc1 fc34e1269373 91901b770f1e 32b64ea427ad 79965c9d1c30 b0cf2f56fd33 86ce09fef99e
    """,
}
