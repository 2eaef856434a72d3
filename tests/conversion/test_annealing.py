"""Annealed rates: from all tokens to the plan's rates, and between steps the thresholds that the model had."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import TensorDataset
from transformers import TrainerCallback

from mosa_hf import ConversionConfig, convert_model
from mosa_hf.cli import heal
from mosa_hf.conversion.annealing import RateAnnealing
from mosa_hf.conversion.healing import HealingTrainer, teacher_of
from mosa_hf.modeling.router_files import ROUTERS_NAME
from testing.tiny import random_tokens, tiny_base

from .test_healing import arguments, collate, prepare

pytestmark = pytest.mark.slow  # models are healed

STEPS = 6
WINDOWS = random_tokens(8, 96)


@pytest.fixture
def model():
    return convert_model(tiny_base(), ConversionConfig(sparsity=16, window=4), WINDOWS).requires_grad_(False)


def thresholds(model) -> list[torch.Tensor]:
    return [router.threshold.clone() for router in model.mosa_routers().values()]


def test_rates_fall_to_the_plans(model, tmp_path):
    final, teacher = thresholds(model), teacher_of(model)
    annealing = RateAnnealing(model, WINDOWS.split(1), STEPS)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    options = arguments(tmp_path, STEPS + 2, logging_steps=1, learning_rate=1e-9, save_strategy="steps", save_steps=1)
    trainer = HealingTrainer(student, teacher, options, collate, TensorDataset(WINDOWS), callbacks=[annealing])
    seen = []
    trainer.add_callback(Between(model, seen))
    trainer.train()
    rates = [row["selected"] for row in trainer.state.log_history if "loss" in row]
    # A threshold on text that it was measured on, met in the training's order: the rates are those of the schedule.
    assert rates == pytest.approx([16 ** -min(step / STEPS, 1) for step in range(STEPS + 2)], rel=0.2)
    assert rates[0] == 1 and rates == sorted(rates, reverse=True)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0, abs=1e-5) and losses[1] > 0.1 and losses == sorted(losses)
    # What would be saved after any step, and at the end, has its own thresholds.
    assert len(seen) == STEPS + 2
    assert all(torch.equal(a, b) for each in [*seen, thresholds(model)] for a, b in zip(each, final, strict=True))


class Between(TrainerCallback):
    def __init__(self, model, seen: list):
        self.model, self.seen = model, seen

    def on_save(self, *args, **kwargs):
        self.seen.append(thresholds(self.model))


def test_groups_that_select_all_or_nothing_stay(model):
    first, *_ = model.mosa_routers().values()
    first.threshold[0], first.threshold[1] = torch.inf, -torch.inf
    annealing = RateAnnealing(model, WINDOWS.split(1), STEPS)
    for step in range(STEPS + 1):
        assert annealing.thresholds(step)[0].tolist() == [torch.inf, -torch.inf]
    for one, next_one in zip(range(STEPS), range(1, STEPS + 1), strict=True):
        pairs = zip(annealing.thresholds(one)[1:], annealing.thresholds(next_one)[1:], strict=True)
        assert all((lower < higher).all() for lower, higher in pairs)


def test_what_cannot_be_annealed(model, tmp_path):
    with pytest.raises(ValueError, match="over at least one"):
        RateAnnealing(model, WINDOWS.split(1), 0)
    annealing = RateAnnealing(model, WINDOWS.split(1), STEPS)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    trainer = HealingTrainer(
        student,
        teacher_of(convert_model(tiny_base(), ConversionConfig(sparsity=1))),
        arguments(tmp_path, STEPS - 1),
        collate,
        TensorDataset(WINDOWS),
        callbacks=[annealing],
    )
    with pytest.raises(ValueError, match="over 6 steps, but the training has 5"):
        trainer.train()
    for router in model.mosa_routers().values():
        router.requires_grad_(True)
        router.momentum = 0.99
    with pytest.raises(ValueError, match="anneal with frozen routers"):
        RateAnnealing(model, WINDOWS.split(1), STEPS)


@pytest.mark.parametrize("learn", ["lora", "full"])
def test_an_interrupted_run_goes_on(learn, tmp_path):
    """From amid the annealing, to what an unbroken run writes; with the thresholds of the conversion, to the bit."""
    common = f"{prepare(tmp_path)} --learn {learn} --per_device_train_batch_size 2 --anneal_steps 3 --max_steps 4"

    def run(name: str) -> None:
        options = f"--output_dir {tmp_path / name} --save_steps 2 --destination {tmp_path / f'{name}.healed'}"
        heal.main(f"{common} {options}".split())

    run("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    run("parts")
    weights = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[learn]
    whole, parts = (load_file(tmp_path / f"{name}.healed" / weights) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, each in whole.items():
        torch.testing.assert_close(parts[name], each, rtol=0, atol=1e-5, msg=name)
    expected = load_file(tmp_path / "converted" / "model.safetensors")
    found = load_file(tmp_path / "parts.healed" / (ROUTERS_NAME if learn == "lora" else weights))
    names = [name for name in expected if name.endswith("threshold")]
    assert len(names) == 3 and all(torch.equal(found[name], expected[name]) for name in names)
