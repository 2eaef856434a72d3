"""`import mosa_hf` makes Transformers and PEFT know the models, in a process of its own."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import mosa_hf
from mosa_hf.registration import register

from .conftest import tiny_config, tiny_model


def test_auto_classes():
    register()  # again: nothing changes and nothing is refused
    config = tiny_config()
    assert isinstance(AutoConfig.for_model("mosa"), mosa_hf.MosaConfig)
    assert type(AutoModel.from_config(config)) is mosa_hf.MosaModel
    assert type(AutoModelForCausalLM.from_config(config)) is mosa_hf.MosaForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is mosa_hf.MosaForSequenceClassification


SCRIPT = """
import sys, torch, mosa_hf
from transformers import AutoModel, AutoModelForCausalLM
path = sys.argv[1]
input_ids = torch.arange(1, 31)[None]
logits = []
for kwargs in ({}, *({"attn_implementation": name} for name in ("mosa", "sdpa", "eager"))):
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    hidden = AutoModel.from_pretrained(path, **kwargs)(input_ids).last_hidden_state
    logits.append(model(input_ids).logits)
    assert torch.allclose(model.lm_head(hidden), logits[-1], atol=1e-4)
    assert torch.allclose(logits[-1], logits[0], atol=1e-4), kwargs
torch.save(logits[0], sys.argv[2])
"""


def test_loading_in_a_fresh_process(form, tmp_path):
    model = tiny_model(**form)
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, tmp_path / "logits.pt"], check=True)
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(logits, model(torch.arange(1, 31)[None]).logits, atol=1e-4)


def test_label_smoothing_shifts_labels(form, tmp_path):
    """Trainer shifts labels for causal models, which it knows by a list of names."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=tmp_path, label_smoothing_factor=1e-9, report_to=[], use_cpu=True)
    model = tiny_model(**form)
    input_ids = torch.randint(1, 97, (2, 20))
    trainer = Trainer(model=model, args=arguments)
    smoothed = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    assert abs(smoothed - model(input_ids, labels=input_ids).loss) < 1e-5


@pytest.mark.parametrize(
    "targets",
    [{}, {"target_modules": ["q_proj"], "target_parameters": ["mosa.q_proj", "mosa.v_proj"]}],
    ids=["default", "heads"],
)
def test_lora(form, targets, tmp_path):
    """LoRA trains, reloads and merges, on the default targets and on the MoSA heads' projections."""
    model = tiny_model(**form)
    input_ids = torch.randint(1, 97, (2, 20))
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
    fresh = tiny_model(**form)  # frozen routers kept their thresholds: an adapter does not hold buffers
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(reloaded(input_ids).logits, trained, atol=1e-4)
    assert torch.allclose(reloaded.merge_and_unload()(input_ids).logits, trained, atol=1e-3)
