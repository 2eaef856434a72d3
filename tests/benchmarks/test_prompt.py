"""The benchmark of prompts: a line for each length, and memory of processes that read one."""

import sys

import pytest

from benchmarks.speed import prompt
from mosa_hf import ConversionConfig, convert_model
from testing import corpora, pretrained
from testing.tiny import SENTENCES, byte_tokenizer, random_tokens, tiny_base


@pytest.mark.slow  # processes
def test_prompts_of_both_models(tmp_path, monkeypatch, capsys):
    original = tiny_base(vocab_size=256, max_position_embeddings=512)
    conversion = ConversionConfig(window=32, sparsity=4)
    converted = convert_model(original, conversion, random_tokens(2, 64))
    for name, model in (("original", original), ("converted", converted)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda: tmp_path / "original")
    monkeypatch.setattr(corpora, "text", lambda name: SENTENCES)
    options = ["--converted", str(tmp_path / "converted"), "--lengths", "16", "400", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["prompt", *options, "--processes", "1"])
    prompt.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [["16", "ms"], ["400", "ms"], ["400", "peak bytes"]]
    *times, memory = ([float(cell.replace(",", "")) for cell in row[2:]] for row in rows)
    assert all(cell > 0 for row in times for cell in row)
    assert min(memory) > 0 and memory[2] == pytest.approx(memory[1] / memory[0], abs=0.01)
