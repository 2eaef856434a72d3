"""Pretraining a small model with Trainer on real text: it learns, its thresholds hold, it resumes."""

from pydoc_data.topics import topics

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from mosa_hf import calibrate_thresholds, trace_routing
from testing.training_rows import collate

from ..conftest import native_form, sparse_form

LENGTH = 128
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.02, "mosa_threshold_momentum": 0.9,
}  # fmt: skip
PLAN = [[{"window": 5, "sparsity": 4}, None], [{"window": 8, "sparsity": 4}, {"window": 2, "sparsity": 4}]]
SMALL_FORMS = {
    "native": native_form(**SMALL, num_mosa_heads=6, num_mosa_key_value_heads=6),
    "sparse": sparse_form(**SMALL, mosa_plan=PLAN),
}


def windows_of_bytes() -> torch.Tensor:
    """The standard library's language reference as bytes, windows in random order: `[N, LENGTH]`."""
    text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    windows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def train(model, output_dir, resume: str | None = None) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=output_dir, max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3,
        lr_scheduler_type="cosine", logging_steps=5, save_steps=30, report_to=[], use_cpu=True, seed=0,
        disable_tqdm=True,
    )  # fmt: skip
    dataset = TensorDataset(windows_of_bytes()[:1000])
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@torch.no_grad()
def selection_rates(model, input_ids: torch.Tensor) -> torch.Tensor:
    """The share of tokens that every group of every layer selects."""
    with trace_routing(model.eval()) as selected:
        model(input_ids, use_cache=False)
    return torch.cat([calls[0].float().mean((0, 1)) for calls in selected.values()])


@pytest.mark.parametrize(
    "name, routing",
    [
        pytest.param("native", "expert_choice", marks=pytest.mark.slow),
        pytest.param("native", "threshold", marks=pytest.mark.slow),
        ("sparse", "threshold"),
    ],
)
def test_trainer(name, routing, tmp_path):
    """Resumed from what it saved at step 30, training ends at the model that it ended at before."""
    form = SMALL_FORMS[name]
    model = form.model(mosa_routing=routing)
    trainer = train(model, tmp_path / "run")
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0] - 1.3

    held_out = windows_of_bytes()[-64:]
    rates = selection_rates(model, held_out)
    assert (rates.mean() * 4 - 1).abs() < 0.2, rates
    logits = model(held_out).logits
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(form.causal_lm_class.from_pretrained(tmp_path / "saved")(held_out).logits, logits)

    resumed = form.model(mosa_routing=routing)
    train(resumed, tmp_path / "other", resume=str(tmp_path / "run" / "checkpoint-30"))
    assert torch.equal(resumed.eval()(held_out).logits, logits)


def test_calibration_sets_the_selection_rate():
    """Wrong thresholds, on purpose; one pass over text puts every group's rate right."""
    model = SMALL_FORMS["native"].model(mosa_routing="threshold")
    text = torch.randint(256, (128, LENGTH), generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        layer.self_attn.mosa.router.threshold.fill_(3.0)
    assert selection_rates(model, text[-64:]).max() < 0.05
    calibrate_thresholds(model, text[:64].split(16))
    assert not model.training
    assert (selection_rates(model, text[-64:]) * 4 - 1).abs().max() < 0.2
    thresholds = [layer.self_attn.mosa.router.threshold.clone() for layer in model.model.layers]
    mask = torch.ones_like(text[:16])
    # As a loader of batches to train on gives them.
    calibrate_thresholds(
        model, [{"input_ids": rows, "attention_mask": mask, "labels": rows} for rows in text[:64].split(16)]
    )
    for layer, threshold in zip(model.model.layers, thresholds, strict=True):  # a mask that hides nothing is no mask
        assert torch.equal(layer.self_attn.mosa.router.threshold, threshold)
    mask[:, 100:] = 0
    calibrate_thresholds(model.train(), [{"input_ids": text[:16], "attention_mask": mask}])
    assert model.training
    model.lm_head.eval()  # every module's own mode comes back
    calibrate_thresholds(model, [text[:16]])
    assert model.training and not model.lm_head.training
    with pytest.raises(ValueError, match="holds no tokens"):
        calibrate_thresholds(model, [])
    with pytest.raises(ValueError, match="`batches` must be several .*pass a list of them"):
        calibrate_thresholds(model, {"input_ids": text[:16]})  # not several
    with pytest.raises(ValueError, match="`model` must be a model with a config"):
        calibrate_thresholds(torch.nn.Linear(2, 2), [])
