"""The commands on models of pictures or sound, and text: they read text, and the language model is what changes."""

import json

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from mosa_hf import load_routers
from mosa_hf.cli import convert, evaluate, heal, trace
from testing.tiny import SENTENCES, text_tokenizer
from testing.tiny_multimodal import tiny_multimodal

pytestmark = pytest.mark.slow  # every command runs, on models of two types


@pytest.mark.parametrize(
    "model_type, auto_class", [("llava", "AutoModelForImageTextToText"), ("qwen2_audio", "AutoModelForSeq2SeqLM")]
)
def test_every_command_takes_it(model_type, auto_class, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_multimodal(model_type).save_pretrained("base")
    text_tokenizer().save_pretrained("base")
    (tmp_path / "a.txt").write_text(SENTENCES[:8000])
    small = ["--windows", "2", "--window-length", "128"]
    convert.main(["base", "converted", *small, "--window", "32", "--calibration", "a.txt"])
    assert f"`{auto_class}.from_pretrained`" in capsys.readouterr().out
    assert f"{auto_class}.from_pretrained" in (tmp_path / "converted" / "README.md").read_text()
    scored = ["--text", "a.txt", "--context", "200", "--scored", "32", "--slices", "1"]
    evaluate.main(["converted", *scored, "--output", "result.json"])
    dense, sparse = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert dense["share"] == 1 and 0 < sparse["share"] < 0.5
    training = ["--max_steps", "1", "--window_length", "48", "--report_to", "none", "--use_cpu"]
    heal.main(
        ["--model", "converted", "--text", "a.txt", "--destination", "healed", "--output_dir", "runs", *training]
    )
    model = load_routers(AutoModelForMultimodalLM.from_pretrained("base"), "healed")
    converted = AutoModelForMultimodalLM.from_pretrained("converted")
    for name, router in model.mosa_routers().items():
        assert torch.equal(router.weight, converted.mosa_routers()[name].weight)
    trace.main(["converted", "--text", "a.txt", "--tokens", "48", "--html", "trace.html"])
    assert (tmp_path / "trace.html").stat().st_size > 1000
