"""The benchmark runs, on a model that takes no time."""

import re

from benchmarks.serving import throughput
from testing.tiny import text_tokenizer

from .serving import PLAN, save_tiny


def test_throughput(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path / "tiny", "llama", PLAN)
    text_tokenizer().save_pretrained(tmp_path / "tiny")
    options = "--memory 8 --max-len 128 --chunk 64 --requests 2 --prompt 40 --new 4"
    page = tmp_path / "page.md"
    arguments = ["throughput", str(tmp_path / "tiny"), *options.split(), "--output", str(page)]
    monkeypatch.setattr("sys.argv", arguments)
    throughput.main()
    assert page.read_text(encoding="utf-8") in capsys.readouterr().out
    row = next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| tiny"))
    assert len(re.findall(r"\(1\.00\)", row)) == 4  # of itself
