"""Texts by name: files of every kind, data sets, chats; and the one that is there without any."""

import hashlib
import inspect
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from mosa_hf.cli import convert
from mosa_hf.conversion import ConversionConfig, Text, calibration_windows, convert_checkpoint, default_text, read_text
from mosa_hf.conversion.default_text import KINDS, Source, generated_text, notes_in_filler
from mosa_hf.conversion.windows import NUM_WINDOWS, WINDOW_LENGTH
from testing.tiny import SENTENCES, byte_tokenizer, text_tokenizer, tiny_base

CHAT = [{"role": "user", "content": "What is a boat?"}, {"role": "assistant", "content": "What floats."}]
ROWS = [{"text": "The first row."}, {"text": None, "messages": CHAT}, {"text": "The last row.", "other": 3}]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "plain.txt").write_text("Ahoj, světe.", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(lines_of(ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files(folder):
    text = read_text(["plain.txt", folder / "rows.jsonl"])
    assert text.documents == ["Ahoj, světe.", "The first row.", CHAT, "The last row."]
    assert text.name == "plain.txt, rows.jsonl"
    assert text.num_characters == 12 + 14 + 15 + 12 + 13
    assert text.sha256 == hashlib.sha256(json.dumps(text.documents).encode()).hexdigest()
    assert read_text("plain.txt").documents == ["Ahoj, světe."]


def test_as_much_as_is_wanted_of_rows(folder):
    assert read_text("rows.jsonl", most_characters=15).documents == ["The first row.", CHAT]
    assert read_text("plain.txt", most_characters=3).documents == ["Ahoj, světe."]


def test_parquet_and_data_sets(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": None, "messages": None, **row} for row in ROWS])
    rows.to_parquet(folder / "rows.parquet")
    expected = ["The first row.", CHAT, "The last row."]
    assert read_text("rows.parquet").documents == expected
    (folder / "set").mkdir()
    for split in ("train", "test"):
        (folder / "set" / f"{split}.jsonl").write_text(lines_of([{"text": f"Of {split}."}]))
    for name in ("set", "set:default", "set:default:train", f"{folder / 'set'}::train"):
        assert read_text(name).documents == ["Of train."]
    assert read_text(["plain.txt", "set:default:test"]).documents == ["Ahoj, světe.", "Of test."]
    with pytest.raises(FileNotFoundError, match="set:default:no is neither a file nor a data set that can be read"):
        read_text("set:default:no")
    (folder / "broken.parquet").write_text("no")
    with pytest.raises(ValueError, match="broken.parquet is no Parquet file"):
        read_text("broken.parquet")


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("no.txt", None, FileNotFoundError, "no.txt does not exist"),
        ("deep/er/folder", None, FileNotFoundError, "deep/er/folder does not exist"),
        ("empty.txt", " \n", ValueError, "empty.txt has no text"),
        ("empty.jsonl", "", ValueError, "empty.jsonl has no text"),
        ("latin.txt", "\xe9".encode("latin-1"), ValueError, "latin.txt is no UTF-8 text"),
        ("broken.jsonl", '{"text": "a"}\n{', ValueError, "broken.jsonl, line 2, is no JSON"),
        ("other.jsonl", '{"content": "a"}', ValueError, "row 0 has content; each must have `text`, or `messages`"),
        ("list.jsonl", "[1]", ValueError, "row 0 has list; each must have `text`"),
        ("chat.jsonl", '{"messages": ["a"]}', ValueError, "row 0 has messages; .* with `role` and `content`"),
        ("a:b:c:d", None, ValueError, "a data set is `name`, `name:configuration` or"),
    ],
)
def test_what_is_no_text(name, content, error, message, folder):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.startswith("a:"):
        pytest.importorskip("datasets")
    with pytest.raises(error, match=message):
        read_text(name)


@pytest.mark.parametrize("name", ["rows.parquet", "someone/data"])
def test_without_the_extra(name, folder, monkeypatch):
    (folder / "rows.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=rf"{name}: .*`pip install 'mosa-hf\[datasets\]'`, or name a file of text"):
        read_text(name)


def test_chats_as_one_string():
    tokenizer, text = text_tokenizer(), Text(["Before.", CHAT], "a chat")
    with pytest.raises(ValueError, match="a chat has chats, but the tokenizer has no `chat_template`"):
        text.as_string(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert text.as_string(tokenizer) == "Before.\n\n[user] What is a boat?\n[assistant] What floats.\n"


def test_the_default_text_has_three_parts_and_is_always_the_same():
    text, again = default_text(), default_text()
    assert text == again and text.sha256 == again.sha256
    documentation, records, notes = text.documents
    # The same on every machine: prose that is never edited, and what takes nothing but `random()` from the standard
    # library's generator.
    digests = ("a770b87f9cb92772", "ff02f0d77303105a", "f12bafcd61fd341a")
    for own, digest in zip((documentation, records, notes), digests, strict=True):
        assert hashlib.sha256(own.encode()).hexdigest().startswith(digest)
    assert hashlib.sha256(generated_text(210_000).encode()).hexdigest().startswith("0b728ef1d65e875a")
    state = random.getstate()
    assert generated_text(1000) != generated_text(1000, seed=1) and random.getstate() == state
    for make in KINDS:
        assert len(set(make(Source(0)).split())) > 20
    windows = [text_tokenizer().decode(row) for row in calibration_windows(text_tokenizer(), text.documents)]
    assert len(windows) == NUM_WINDOWS
    assert all(3 <= sum(window in own for window in windows) <= 8 for own in text.documents)  # of characters


def test_as_many_windows_are_read_wherever_nothing_else_is_said(capsys):
    defaults = inspect.signature(calibration_windows).parameters
    assert (defaults["num_windows"].default, defaults["window_length"].default) == (NUM_WINDOWS, WINDOW_LENGTH)
    assert f"None: {NUM_WINDOWS} of {WINDOW_LENGTH:,}," in convert_checkpoint.__doc__
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"calibration windows (default: {NUM_WINDOWS})" in shown
    assert f"tokens of a window (default: {WINDOW_LENGTH}, or half of what the model reads)" in shown


def test_notes_are_written_once_among_sentences_that_repeat():
    for seed in range(20):
        sentences = Counter(re.split(r"(?<=\.) (?=[A-Z])", notes_in_filler(Source(seed))))
        once = [sentence for sentence, times in sentences.items() if times == 1]
        assert 4 <= len(once) <= 7 and len(sentences) <= len(once) + 8


def test_paths_and_texts_of_names_calibrate(folder):
    tiny_base().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    (folder / "boats.txt").write_text(SENTENCES)
    conversion, sizes = ConversionConfig(window=8), {"num_windows": 2, "window_length": 64}
    for number, given in enumerate(([Path("boats.txt")], read_text("boats.txt"), [SENTENCES], None)):
        convert_checkpoint("base", f"converted{number}", conversion, given, **sizes)
    weights = [(folder / f"converted{i}" / "mosa_routers.safetensors").read_bytes() for i in range(4)]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    records = [json.loads((folder / f"converted{i}" / "config.json").read_text())["mosa_conversion"] for i in range(4)]
    calibrations = [record["calibration"] for record in records]
    assert calibrations[0] == calibrations[1] | {"text": "boats.txt", "sha256": read_text("boats.txt").sha256}
    assert calibrations[2]["text"] == "a text of one's own" and calibrations[2]["sha256"] == calibrations[0]["sha256"]
    assert calibrations[3]["text"] == default_text().name
    with pytest.raises(TypeError, match="device: no such argument; there are .*device_map"):
        convert_checkpoint("base", "new", conversion, device="cpu")
