"""The benchmark runs, on a model that takes no time; it goes on where it was stopped."""

import json
import re

import pytest

from benchmarks.serving import page, throughput
from testing.tiny import text_tokenizer

from .serving import PLAN, save_tiny

OPTIONS = "--memory 8 --max-len 256 --chunk 64 --original 64:2:32 128:1:64 --requests 2 --prompt 40 --new 8 --alone 2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, "llama", PLAN)
    text_tokenizer().save_pretrained(path)
    return path


def run(monkeypatch, models, results, *options: str) -> str:
    monkeypatch.setattr(
        "sys.argv", ["throughput", *map(str, models), *OPTIONS.split(), "--results", str(results), *options]
    )
    throughput.main()
    return (results / "serving.md").read_text(encoding="utf-8")


def test_throughput(tiny, tmp_path, monkeypatch, capsys):
    text = run(monkeypatch, [tiny, tiny], tmp_path, "--loads")
    assert text in capsys.readouterr().out
    lines = list(page.lines(tmp_path / "serving.jsonl").values())
    assert [line["task"] for line in lines] == ["alone"] * 6 + ["together"] * 3
    assert all(line["concurrency"] > 1 and line["bytes"] > 0 and line["work"]["time per token"] > 0 for line in lines)
    row = next(line for line in text.splitlines() if line.startswith("| tiny"))
    assert len(re.findall(r"\([\d.]+\)", row)) == len(page.MEASURES)
    assert (tmp_path / "serving.png").stat().st_size > 0
    # The last line is lost, and half of another.
    content = (tmp_path / "serving.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "serving.jsonl").write_text("".join(content[:-2]) + content[-2][:40])
    run(monkeypatch, [tiny, tiny], tmp_path, "--loads")
    again = (tmp_path / "serving.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == content[:-2]
    assert [page.key(json.loads(line)) for line in again] == [page.key(json.loads(line)) for line in content]


@pytest.mark.tools
def test_load(tiny, tmp_path, monkeypatch):
    """Over HTTP, asked by vLLM's own benchmark."""
    options = "--original 64:2:32 --max-len 1536 --memory 32 --alone 0 --rounds 0 --loads 7"
    text = run(monkeypatch, [tiny], tmp_path, *options.split())
    (line,) = page.lines(tmp_path / "serving.jsonl").values()
    assert line["task"] == "load" and all(value > 0 for value in line["clock"].values())
    assert "| 7 | original" in text
