"""`import mosa_hf` makes Transformers and PEFT know the models."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from setuptools import find_packages
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import mosa_hf
from mosa_hf.compat import CACHE
from mosa_hf.modeling.family import family_of
from mosa_hf.registration import register
from testing.tiny import byte_tokenizer

from ..conftest import FORMS
from ..contract import random_ids
from ..public_names import STUB, stub


def test_every_package_is_installed():
    """By what pyproject.toml says, wheels hold every folder of modules, and nothing from beside the package."""
    root = Path(__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = find_packages(str(root), **setuptools["packages"]["find"])
    found = {".".join(path.parent.relative_to(root).parts) for path in root.glob("mosa_hf/**/*.py")}
    assert set(installed) == found


def test_type_checkers_see_the_public_names():
    """`python -m tests.public_names` writes the file anew."""
    text = STUB.read_text(encoding="utf-8")
    assert set(mosa_hf.__all__) <= set(re.findall(r"(?:^class | as )(\w+)", text, re.MULTILINE))
    if CACHE == "cache":  # a class may have other bases in earlier versions of Transformers
        assert text == stub()


def test_auto_classes(form):
    register()  # again: nothing changes and nothing is refused
    config = form.config()
    assert type(AutoConfig.for_model(config.model_type)) is form.config_class
    assert type(AutoModel.from_config(config)) is form.model_class
    assert type(AutoModelForCausalLM.from_config(config)) is form.causal_lm_class
    assert type(AutoModelForSequenceClassification.from_config(config)) is form.classifier_class
    for each in (form.config_class, form.model_class, form.causal_lm_class, form.classifier_class):
        assert getattr(transformers, each.__name__) is each  # where tools look them up
    assert {mosa_hf.MosaConfig, mosa_hf.MosaForCausalLM} <= {getattr(mosa_hf, name) for name in mosa_hf.__all__}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma2"])
def test_tokenizers_are_the_familys(family, tmp_path):
    """Also where upstream knows by model type not to believe the class that a folder names."""
    row, classes = family_of(family), []
    for config in (row.base_config_class(), row.config_class()):
        byte_tokenizer().save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
        config.save_pretrained(tmp_path)
        classes.append(type(AutoTokenizer.from_pretrained(tmp_path)))
    assert classes[0] is classes[1]


def test_nobody_is_asked_to_trust_code(form, tmp_path, monkeypatch):
    """Of a folder that names code: what is loaded is the imported package, and tokenizers need none."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    form.model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is form.config_class
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **trust)) is form.causal_lm_class
        for auto in (AutoTokenizer, AutoProcessor):
            assert auto.from_pretrained(tmp_path, **trust)("hello")["input_ids"] == byte_tokenizer()("hello").input_ids
        assert type(pipeline("text-generation", str(tmp_path), **trust).model) is form.causal_lm_class
    assert GenerationConfig.from_pretrained(tmp_path).bos_token_id == 1
    assert not questions


SCRIPT = """
import sys, torch, transformers, mosa_hf
from transformers import AutoModel, AutoModelForCausalLM
for each in (transformers, sys.modules["transformers"]):  # two, as upstream executes it again: tools hold either
    assert each.MosaForCausalLM is mosa_hf.MosaForCausalLM
    assert mosa_hf.MosaLlamaForSequenceClassification is each.MosaLlamaForSequenceClassification
for path in sys.argv[1:]:
    input_ids, logits = torch.arange(1, 31)[None], []
    for kwargs in ({}, *({"attn_implementation": name} for name in ("mosa", "sdpa", "eager"))):
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        hidden = AutoModel.from_pretrained(path, **kwargs)(input_ids).last_hidden_state
        logits.append(model(input_ids).logits)
        assert torch.allclose(model.lm_head(hidden), logits[-1], atol=1e-4)
        assert torch.allclose(logits[-1], logits[0], atol=1e-4), kwargs
    torch.save(logits[0], path + "/logits.pt")
"""


@pytest.mark.slow
def test_loading_in_a_fresh_process(tmp_path):
    models = {name: form.model() for name, form in FORMS.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    subprocess.run([sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in models)], check=True)
    for name, model in models.items():
        logits = torch.load(tmp_path / name / "logits.pt")
        assert torch.allclose(logits, model(torch.arange(1, 31)[None]).logits, atol=1e-4)


def test_label_smoothing_shifts_labels(form, tmp_path):
    """Trainer shifts labels for causal models, which it knows by a list of names."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=tmp_path, label_smoothing_factor=1e-9, report_to=[], use_cpu=True)
    model, input_ids = form.model(), random_ids(2, 20)
    trainer = Trainer(model=model, args=arguments)
    smoothed = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    assert abs(smoothed - model(input_ids, labels=input_ids).loss) < 1e-5


HEADS = {"target_modules": ["q_proj"], "target_parameters": ["mosa.q_proj", "mosa.v_proj"]}


@pytest.mark.parametrize(
    "name, targets", [("native", {}), ("native", HEADS), ("sparse", {})], ids=["native", "native heads", "sparse"]
)
def test_lora(name, targets, tmp_path):
    """LoRA trains, reloads and merges, on the default targets and on the native model's MoSA heads."""
    model, input_ids = FORMS[name].model(), random_ids(2, 20)
    before = model(input_ids).logits
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **targets)).train()
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        peft_model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    peft_model.eval()
    trained = peft_model(input_ids).logits
    assert not torch.allclose(trained, before, atol=1e-2)
    peft_model.save_pretrained(tmp_path)
    fresh = FORMS[name].model()  # frozen routers kept their thresholds: an adapter does not hold buffers
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(reloaded(input_ids).logits, trained, atol=1e-4)
    assert torch.allclose(reloaded.merge_and_unload()(input_ids).logits, trained, atol=1e-3)
