"""TRL's trainers, by path and by model object, on a tiny dense model and on the same one converted."""

import math
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf import MosaLlamaForCausalLM, trace_routing

from ..conftest import tiny_model
from .conftest import TEXT, Folders, plain_shell, states_of

pytestmark = pytest.mark.tools
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LENGTHS = (12, 30, 47, 25)  # of texts; some longer than the window, so that selection counts
TEXTS = [TEXT[start : start + length] for start, length in enumerate(LENGTHS)]
PROMPTS = [{"prompt": text} for text in TEXTS]
PAIRS = [{"prompt": text, "chosen": " at noon", "rejected": " by the red buoy"} for text in TEXTS]


def arguments(config_class: type, directory, **fields):
    """Of a trainer: two steps of two examples on the CPU, with gradient checkpointing, as is TRL's default."""
    usual = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return config_class(str(directory), **{**usual, **quiet, **fields})


def reward(completions: list[str], **kwargs) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def sft(model, directory, peft_config=None, **fields):
    return trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, directory, **{"max_length": 64, **fields}),
        peft_config=peft_config,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer_of(model),
    )


def dpo(model, directory, ref_model=None, peft_config=None, **fields):
    return trl.DPOTrainer(
        model,
        ref_model,
        peft_config=peft_config,
        args=arguments(trl.DPOConfig, directory, max_length=64, **fields),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer_of(model),
    )


def rewarded(trainer_class, config_class, model, directory, peft_config=None, **fields):
    config = arguments(config_class, directory, num_generations=2, max_completion_length=8, beta=0.1, **fields)
    return trainer_class(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(PROMPTS),
        processing_class=tokenizer_of(model),
        peft_config=peft_config,
    )


grpo = partial(rewarded, trl.GRPOTrainer, trl.GRPOConfig)
rloo = partial(rewarded, trl.RLOOTrainer, trl.RLOOConfig)


def tokenizer_of(model):
    return AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config.name_or_path)


def changed(before: dict[str, torch.Tensor], model) -> set[str]:
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    input_ids = tokenizer_of(model)(TEXT[:96], return_tensors="pt")["input_ids"]
    return model.eval()(input_ids).logits


def selection_of(model) -> dict[int, torch.Tensor]:
    with trace_routing(model) as selected:
        logits_of(model)
    return {layer: calls[0] for layer, calls in selected.items()}


TRAINERS = {
    "sft": sft,
    "sft, packed": lambda *args: sft(*args, packing=True),
    "sft, padding-free": lambda *args: sft(*args, padding_free=True, max_length=None),
    "dpo": dpo,
    "grpo": grpo,
    "rloo": rloo,
}


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("by", ["path", "model"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name, by, folders: Folders, tmp_path):
    for folder in folders:
        model = str(folder) if by == "path" else AutoModelForCausalLM.from_pretrained(folder)
        trainer = TRAINERS[name](model, tmp_path / folder.name)
        before = states_of(trainer.model)
        losses = losses_of(trainer)
        assert len(losses) == 2 and all(map(math.isfinite, losses)), losses
        # Routers are frozen until they are asked for (`mosa_gate_slope`); everything else trains.
        assert changed(before, trainer.model) == {key for key in before if "mosa_router" not in key}
        if folder == folders.converted:
            assert type(trainer.model) is MosaLlamaForCausalLM
            assert sum("mosa_router" in key for key in before) == 2 * 3  # weight and threshold of three layers


def test_packed_and_padding_free_batches_have_the_loss_of_padded_ones(folders: Folders, tmp_path):
    """Without flash attention, of which TRL speaks: the sequences of a row do not see each other all the same."""
    for folder in folders:
        losses = []
        for fields in ({}, {"padding_free": True, "max_length": None}, {"packing": True}):
            trainer = sft(str(folder), tmp_path, **{"max_length": 128, **fields})
            batch = trainer.data_collator(list(trainer.train_dataset))
            assert len(batch["input_ids"]) == (1 if fields else len(TEXTS))
            with torch.no_grad():
                losses.append(float(trainer.compute_loss(trainer.model.eval(), dict(batch))))
        assert max(losses) - min(losses) < 1e-5, (folder, losses)


SCRIPT = """
import datasets, sys, trl
for name in sys.argv[2:]:
    config = trl.SFTConfig(sys.argv[1], max_steps=1, per_device_train_batch_size=1, use_cpu=True, bf16=False,
                           report_to=[], save_strategy="no", trust_remote_code=True)
    rows = datasets.Dataset.from_list([{"text": "The tide came in before noon."}])
    trainer = trl.SFTTrainer(name, args=config, train_dataset=rows)
    trainer.train()
    print(type(trainer.model).__name__)
"""


def test_by_path_where_nothing_imported_the_package(folders: Folders, tmp_path):
    result = plain_shell(sys.executable, "-c", SCRIPT, tmp_path, *folders)
    assert [line for line in result.stdout.splitlines() if "Llama" in line] == [
        "LlamaForCausalLM",
        "MosaLlamaForCausalLM",
    ]


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["routers frozen", "routers trained"])
def test_policy_optimisation_at_rate_zero_changes_nothing(slope, folders: Folders, tmp_path):
    """No weight, no buffer and no token's selection, bit for bit, though routers get gradients and it samples."""
    for folder in folders:
        is_converted = folder == folders.converted
        model = AutoModelForCausalLM.from_pretrained(folder, **({"mosa_gate_slope": slope} if is_converted else {}))
        trainer = grpo(model, tmp_path / folder.name, learning_rate=0.0)
        before, logits, selected = states_of(model), logits_of(model), selection_of(model) if is_converted else None
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(gradients.__setitem__, name))
        trainer.train()
        assert any(gradient.any() for name, gradient in gradients.items() if "mosa_router" not in name)
        with_routers = any(gradient.any() for name, gradient in gradients.items() if "mosa_router" in name)
        assert with_routers == (is_converted and slope > 0)
        assert changed(before, model) == set()
        # From the reference, which no gate biases (docs/tools.md).
        divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert len(divergences) == 2
        assert max(map(abs, divergences)) < 1e-6 if not with_routers else min(divergences) > 1e-4
        assert torch.equal(logits_of(model), logits)
        if is_converted:
            again = selection_of(model)
            assert all(torch.equal(selected[layer], again[layer]) for layer in selected)
            assert 0 < torch.stack(list(selected.values())).float().mean() < 1


def test_preferences_of_equal_models_are_log_2(folders: Folders, tmp_path):
    """The policy in training mode and the reference in evaluation mode compute the same function."""
    for folder in folders:
        assert abs(first_loss(str(folder), tmp_path) - math.log(2)) < 1e-6


def test_where_training_and_evaluation_differ(folders: Folders, tmp_path):
    """The gate that trains routers is no part of what evaluation computes, except for keys within the window."""
    gated = partial(AutoModelForCausalLM.from_pretrained, folders.converted, mosa_gate_slope=1.0)
    assert abs(first_loss(gated(), tmp_path) - math.log(2)) > 1e-4
    plan = [[{**group, "window": 64} for group in layer] for layer in gated().config.mosa_plan]
    wide = partial(gated, mosa_plan=plan)
    assert abs(first_loss(wide(), tmp_path, ref_model=wide()) - math.log(2)) < 1e-6


@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
def test_preferences_of_native_models(routing, folders: Folders, tmp_path):
    model = tiny_model(vocab_size=260, pad_token_id=256, mosa_routing=routing, mosa_threshold_momentum=1.0)
    model.save_pretrained(tmp_path / "native")
    AutoTokenizer.from_pretrained(folders.original).save_pretrained(tmp_path / "native")
    difference = abs(first_loss(str(tmp_path / "native"), tmp_path) - math.log(2))
    assert difference < 1e-6 if routing == "threshold" else difference > 1e-4


def first_loss(model, directory, ref_model=None) -> float:
    """Of preference optimisation from a model, against itself."""
    trainer = dpo(model, directory, learning_rate=0.0, ref_model=ref_model)
    modes = {trainer.model.base_model: set(), trainer.ref_model.base_model: set()}
    for each in modes:
        each.register_forward_hook(lambda module, args, output: modes[module].add(module.training))
    losses = losses_of(trainer)
    assert list(modes.values()) == [{True}, {False}]
    return losses[0]


def test_adapters_and_routers_in_one_configuration(folders: Folders, tmp_path):
    """`peft_config` as docs/tools.md has it, in every trainer: the reference is the model without the adapter."""
    for folder in folders:
        is_converted = folder == folders.converted
        for name in ("sft", "dpo", "grpo"):
            model = AutoModelForCausalLM.from_pretrained(folder, **({"mosa_gate_slope": 1.0} if is_converted else {}))
            config = LoraConfig(
                task_type="CAUSAL_LM", r=4, target_modules="all-linear",
                modules_to_save=["mosa_router"] if is_converted else None,
            )  # fmt: skip
            trainer = TRAINERS[name](model, tmp_path / folder.name, peft_config=config)
            before = states_of(trainer.model)
            losses = losses_of(trainer)
            assert all(map(math.isfinite, losses)), losses
            trained = {key for key in before if "lora_" in key or key.endswith("modules_to_save.default.weight")}
            assert changed(before, trainer.model) == trained
            assert any("mosa_router" in key for key in trained) == is_converted
