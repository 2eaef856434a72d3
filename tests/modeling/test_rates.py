"""While routers learn, groups keep their rates: thresholds follow, shares are logged, and twice the rate is told."""

import logging
from functools import partial

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mosa_hf import RoutingCallback, load_routers, save_routers, to_dense
from testing.training_rows import collate

from ..cache.test_cache import propagating
from ..conftest import native_form, sparse_form
from .test_training import SMALL, selection_rates

TOKENS = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(0))
FIELDS = {**SMALL, "num_hidden_layers": 1, "mosa_threshold_momentum": 0.99}


def model_of(name: str, sparsity: int, **fields):
    if name == "native":
        form = native_form(**FIELDS, num_mosa_heads=4, num_mosa_key_value_heads=4, mosa_sparsity=sparsity)
    else:
        form = sparse_form(**FIELDS, mosa_plan=[[{"window": 4, "sparsity": sparsity}] * 2])
    return form.model(**fields).requires_grad_(True).train()


def train(model, learning_rate: float, steps: int = 40) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        ids = TOKENS[16 * (step % 2) : 16 * (step % 2) + 16]
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name, sparsity, routing", [("sparse", 4, "threshold"), ("native", 8, "expert_choice")])
def test_thresholds_hold_the_rate(name, sparsity, routing):
    """Read by threshold afterwards, however they were trained: every group, within a quarter."""
    model = model_of(name, sparsity, mosa_routing=routing, mosa_include_first=False)
    train(model, 3e-3)
    rates = selection_rates(model, TOKENS[:32]) * sparsity
    assert (rates - 1).abs().max() < 0.25, rates
    fixed = model_of(name, sparsity, mosa_routing=routing, mosa_include_first=False, mosa_threshold_momentum=1.0)
    train(fixed, 3e-3)
    assert (selection_rates(fixed, TOKENS[:32]) * sparsity - 1).abs().max() > 0.25


@pytest.mark.parametrize("momentum", [0.99, 1.0])
def test_twice_the_rate_is_told_once(momentum, caplog):
    logging.Logger.warning_once.cache_clear()
    model = model_of("sparse", 4, mosa_threshold_momentum=momentum)
    with caplog.at_level(logging.WARNING), propagating("mosa_hf.modeling.router"):
        train(model, 0.0, steps=16)
        assert "twice the share" not in caplog.text
        for router in model.mosa_routers().values():
            router.momentum = 1.0
            router.threshold.fill_(-1e9)
        train(model, 0.0, steps=32)
    assert caplog.text.count("twice the share") == 1


@pytest.mark.parametrize("name", ["sparse", "native", "routers"])
def test_another_sparsity_of_loaded_thresholds_is_told(name, tmp_path, caplog):
    """They are what selects. Without a threshold (ρ = 1, expert choice), with the same ρ: nothing to be told."""
    logging.Logger.warning_once.cache_clear()
    model = model_of("native" if name == "native" else "sparse", 4)

    def fields_of(sparsity: int) -> dict:
        group = {"window": 8, "sparsity": sparsity}
        return {"mosa_sparsity": sparsity} if name == "native" else {"mosa_plan": [[group] * 2]}

    if name == "routers":
        base = to_dense(model)
        save_routers(model, tmp_path / "routers")
        load = partial(load_routers, base, tmp_path / "routers")
    else:
        model.save_pretrained(tmp_path)
        load = partial(AutoModelForCausalLM.from_pretrained, tmp_path)
    with caplog.at_level(logging.WARNING), propagating("mosa_hf.modeling.configuration"):
        load()
        load(**fields_of(1))
        load(**fields_of(4))
        load(**fields_of(2), mosa_inference_routing="expert_choice")
        assert "asks for a sparsity" not in caplog.text
        load(**fields_of(2))
    assert "asks for a sparsity of 2 in place of 4, but" in caplog.text and "calibrate_thresholds" in caplog.text


def test_loaded_models_begin_at_their_rates(tmp_path):
    """Shares are not saved, and nothing is left of the memory that they are put into."""
    model = model_of("sparse", 4)
    train(model, 0.0, steps=2)
    model.save_pretrained(tmp_path)
    assert "share" not in " ".join(model.state_dict())
    loaded = type(model).from_pretrained(tmp_path)
    assert all((router.share == 0.25).all() for router in loaded.mosa_routers().values())


@pytest.mark.parametrize("name", ["sparse", "native"])
def test_trainer_logs_shares(name, tmp_path):
    model = model_of(name, 4, mosa_routing="threshold")
    arguments = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, TensorDataset(TOKENS), callbacks=[RoutingCallback()])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "selected" in entry]
    assert len(logged) == 2 and all("loss" in entry for entry in logged)
    shares = torch.cat([each.share for each in model.modules() if hasattr(each, "share")])
    assert logged[-1]["selected"] == pytest.approx(shares.mean().item(), abs=1e-4)
    assert logged[-1]["selected_least"] <= 4 * logged[-1]["selected"] <= logged[-1]["selected_most"]
