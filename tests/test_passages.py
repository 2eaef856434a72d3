"""The texts that perplexity is measured on never change, or it is an error that says what did."""

import re

import pytest

from benchmarks.frontier.tasks import check_unseen
from mosa_hf.conversion import default_text
from testing import corpora
from testing import passages as pinned
from testing.packages import SourceUnavailable


def test_every_passage_has_a_name_of_its_own():
    assert len(pinned.NAMES) >= 4 and pinned.NAMES.keys() <= corpora.SHA256.keys() <= set(corpora.TEXT_NAMES)
    names = [name for text in pinned.NAMES.values() for name in text.split()]
    assert len(names) == len(set(names)) == len(pinned.NAMES) * pinned.NUM_PASSAGES >= len(pinned.NAMES) * 16
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in names)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in corpora.SHA256.values())


def test_passages_begin_lines_at_even_distances():
    text = "".join(f"line {i}\n" for i in range(1000))
    parts = pinned.cut(text, 4, 100)
    assert [len(part) for part in parts] == [100] * 4 and all(part.startswith("line") for part in parts)
    assert [abs(text.index(part) - len(text) * i / 4) < 10 for i, part in enumerate(parts)] == [True] * 4
    with pytest.raises(ValueError, match="has no 4 passages of 3000"):
        pinned.cut(text, 4, 3000)


def test_another_text_than_the_one_that_was_meant_is_refused(empty_cache):
    (empty_cache / "documentation.txt").write_text("Sphinx, as it never was.\n")
    with pytest.raises(ValueError, match=r"'documentation' in .*tation.txt has the sha256 [0-9a-f]{64}, not f9"):
        pinned.passages("documentation")
    with pytest.raises(ValueError, match="no passages of 'python_docs' are known"):
        pinned.passages("python_docs")


def test_a_passage_that_differs_is_named(monkeypatch):
    text = "".join(f"line {i}\n" for i in range(200_000))
    parts = [pinned.Passage("code", part) for part in pinned.cut(text)]
    monkeypatch.setitem(pinned.NAMES, "code", " ".join(part.name for part in parts))
    monkeypatch.setattr(corpora, "text", lambda name: text)
    assert pinned.passages("code") == parts
    line = parts[9].content.splitlines()[7]
    changed = text.replace(f"\n{line}\n", f"\n{line.upper()}\n")
    monkeypatch.setattr(corpora, "text", lambda name: changed)
    with pytest.raises(ValueError, match=rf"Of 'code', passages 9 are others .* not {parts[9].name}"):
        pinned.passages("code")


@pytest.mark.real
@pytest.mark.parametrize("name", pinned.NAMES)
def test_the_passages_are_those_of_every_machine_and_unseen(name):
    """Of the sources themselves; and the default calibration text has no run of words of them."""
    try:
        found = pinned.passages(name)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    assert len(found) == pinned.NUM_PASSAGES and {len(each.content) for each in found} == {pinned.CHARACTERS}
    check_unseen(found, list(default_text().documents))
