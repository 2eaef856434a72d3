"""Healing: the loss is the divergence from the original, it brings quality back, resumes, and can be loaded."""

import copy
import gc
import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.multiprocessing import get_context, start_processes
from torch.utils.data import TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from mosa_hf import (
    ConversionConfig,
    GroupPlan,
    MosaLlamaForCausalLM,
    cache_bytes,
    convert_model,
    load_routers,
    save_routers,
    trace_routing,
)
from mosa_hf.cli import heal, run_heal
from mosa_hf.conversion.healing import HealingTrainer, TokenWindows, mean_divergence, teacher_of
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.kv_share import kv_share
from mosa_hf.modeling.router_files import ROUTERS_NAME
from testing.tiny import QUIET, byte_tokenizer, random_tokens, tiny_base
from testing.tiny_multimodal import tiny_multimodal
from testing.training_rows import collate

from ..modeling.test_training import windows_of_bytes

LENGTH = 128


def arguments(output_dir, steps: int, **options) -> TrainingArguments:
    defaults = {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8}
    return TrainingArguments(
        output_dir=output_dir, max_steps=steps, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": 10, **defaults, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return windows_of_bytes()


@pytest.fixture(scope="module")
def original(windows, tmp_path_factory) -> LlamaForCausalLM:
    """A small model that has learned something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    dataset = TensorDataset(windows[:1600])
    Trainer(model, arguments(tmp_path_factory.mktemp("train"), 200), collate, dataset).train()
    return model.eval()


@torch.no_grad()
def loss_of(model, windows: torch.Tensor) -> float:
    return model.eval()(windows, labels=windows, use_cache=False).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["lora", "full"])
def test_healing_recovers_what_conversion_lost(learn, original, windows, tmp_path):
    held_out, text = windows[-32:], TensorDataset(windows[:1600])
    base = LlamaForCausalLM(original.config)
    base.load_state_dict(original.state_dict())
    model = convert_model(base, ConversionConfig(sparsity=16, window=2), windows[:8])
    before, lost = loss_of(original, held_out), loss_of(model, held_out)
    assert math.exp(lost) > 1.1 * math.exp(before)
    thresholds = [router.threshold.clone() for router in model.mosa_routers().values()]
    model.requires_grad_(learn == "full")
    teacher = teacher_of(model)
    for router in model.mosa_routers().values():
        router.requires_grad_(False)
    student = model
    if learn == "lora":
        student = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trainer = HealingTrainer(student, teacher, arguments(tmp_path, 150), collate, text)
    trainer.train()
    healed = loss_of(student, held_out)
    assert math.exp(lost) - math.exp(healed) > 0.8 * (math.exp(lost) - math.exp(before))
    # The teacher is what it was, and routers too.
    assert loss_of(teacher, held_out) == pytest.approx(before, abs=1e-6)
    assert all(torch.equal(a, b.threshold) for a, b in zip(thresholds, model.mosa_routers().values(), strict=True))
    logged = [entry for entry in trainer.state.log_history if "selected" in entry]
    assert logged and all(0.03 < entry["selected"] < 0.2 for entry in logged)


@pytest.mark.parametrize("top_k", [None, 5])
def test_divergence(top_k):
    """Against the formula, at no distance, and its gradient through chunks."""
    torch.manual_seed(0)
    actual, expected = torch.randn(600, 20, requires_grad=True), torch.randn(600, 20)
    p, q = expected.double().softmax(-1), actual.double().softmax(-1)
    if top_k:
        index = p.topk(top_k, dim=-1).indices
        p, q = (torch.cat((x.gather(1, index), 1 - x.gather(1, index).sum(1, keepdim=True)), dim=1) for x in (p, q))
    reference = (p * (p / q).log()).sum(-1).mean()
    loss = mean_divergence(actual, expected, top_k)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, actual)
    (other,) = torch.autograd.grad(reference, actual)
    torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-7)
    assert mean_divergence(expected, expected, top_k).item() == pytest.approx(0, abs=1e-6)


def test_padding_counts_for_nothing(tmp_path):
    model = convert_model(tiny_base(), ConversionConfig(sparsity=1, window=2))
    teacher = teacher_of(tiny_base_converted())
    trainer = HealingTrainer(model, teacher, arguments(tmp_path, 1))
    text, mask = random_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    together = trainer.compute_loss(model, {"input_ids": text, "attention_mask": mask})
    alone = [
        trainer.compute_loss(model, {"input_ids": text[i : i + 1, mask[i].bool()]}) * mask[i].sum() for i in range(2)
    ]
    assert together.item() == pytest.approx((sum(alone) / mask.sum()).item(), rel=1e-4) and together > 0.01


def test_labels_say_what_is_learnt(tmp_path):
    """Predictions of tokens that are labelled -100 count for nothing, as in any training."""
    trainer = HealingTrainer(
        convert_model(tiny_base(), ConversionConfig(sparsity=1, window=2)),
        teacher_of(tiny_base_converted()),
        arguments(tmp_path, 1),
    )
    text, mask = random_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 10:] = 0
    labels = text.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    counts = mask.bool()
    counts[0, :3], counts[1, 5] = False, False  # which predict those
    with torch.no_grad():
        own, others = (
            each(text, attention_mask=mask).logits[counts].log_softmax(-1) for each in (trainer.model, trainer.teacher)
        )
    expected = (others.exp() * (others - own)).sum(-1).mean().item()
    inputs = {"input_ids": text, "attention_mask": mask, "labels": labels}
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
    same = [trainer.compute_loss(trainer.model, {"input_ids": text} | more) for more in ({}, {"labels": text})]
    assert torch.equal(*same)
    for nothing in ({"labels": torch.full_like(text, -100)}, {"attention_mask": mask * 0}):
        with pytest.raises(ValueError, match="no token to learn from"):
            trainer.compute_loss(trainer.model, inputs | nothing)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Also where micro-batches have unlike numbers of tokens that count."""
    text = random_tokens(8, 24, seed=1)
    mask, labels = torch.ones_like(text), text.clone()
    for row in range(8):
        labels[row, : 2 * row] = -100
        mask[row, 24 - row // 2 :] = 0
    rows = [{"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(text, mask, labels, strict=True)]
    weights, losses = [], []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        model = convert_model(tiny_base(), ConversionConfig(sparsity=1, window=2))
        options = arguments(
            tmp_path, 2, optim="sgd", learning_rate=0.5, logging_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer = HealingTrainer(model, teacher_of(tiny_base_converted()), options, train_dataset=rows)
        trainer.train()
        weights.append(model.model.layers[0].self_attn.q_proj.weight.detach().clone())
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    for own, loss in zip(weights[1:], losses[1:], strict=True):
        torch.testing.assert_close(own, weights[0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-3)


def tiny_base_converted():
    return convert_model(tiny_base(seed=1), ConversionConfig(sparsity=1))


@pytest.mark.slow
def test_evaluations_are_logged_apart(tmp_path):
    """Lines of the training say what they say without evaluations, which say what they say without a training."""

    def lines(name: str, steps: int = 5, **options) -> tuple[HealingTrainer, list[dict]]:
        model = convert_model(tiny_base(), ConversionConfig(sparsity=4, window=2), random_tokens(4, 64))
        teacher = teacher_of(model.requires_grad_(False))
        train, held_out = (TensorDataset(random_tokens(32, 24, seed=seed)) for seed in (1, 2))
        # The length of what is read differs, so that one kind of call is not taken for the other.
        sets = {"near": TensorDataset(random_tokens(8, 6, seed=3)), "far": held_out}
        options = {"logging_steps": 2, "optim": "sgd", "learning_rate": 0.1, **options}
        trainer = HealingTrainer(model, teacher, arguments(tmp_path / name, steps, **options), collate, train, sets)
        model.model.norm.weight.requires_grad_(True)
        trainer.train()
        return trainer, trainer.state.log_history

    trainer, alone = lines("alone")
    assert not any("selected" in row for row in alone if "loss" not in row)
    _, both = lines("both", eval_strategy="steps", eval_steps=1)
    shares = ("step", "loss", "selected", "kv_share_4096")
    trained = [[{name: row[name] for name in shares} for row in rows if "loss" in row] for rows in (alone, both)]
    assert trained[0] == trained[1] and len(trained[0]) == 2
    evaluated = [row for row in both if "eval_far_loss" in row]
    assert len(evaluated) == 5 and not any(name in row for row in evaluated for name in shares[1:])
    metrics = trainer.evaluate()
    assert "selected" not in metrics and metrics["eval_near_selected"] != metrics["eval_far_selected"]
    for name in ("near", "far"):
        for what in ("selected", "kv_share_4096"):
            key = f"eval_{name}_{what}"
            (last,) = (row[key] for row in both if key in row and row["step"] == 5)
            assert metrics[key] == last
    # A line is of its own training: five steps leave one that no line is of.
    trainer.train_dataset = TensorDataset(random_tokens(8, 6, seed=3))
    trainer.args.max_steps = 2
    trainer.train()
    again = [row["selected"] for row in trainer.state.log_history if "loss" in row]
    assert again == [pytest.approx(metrics["eval_near_selected"], abs=1e-4)]


def test_what_cannot_be_healed(tmp_path):
    model = convert_model(tiny_base(), ConversionConfig(sparsity=1))
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, the model of 256"):
        HealingTrainer(model, tiny_base(vocab_size=64), arguments(tmp_path, 1))
    for options in ({"top_k": 0}, {"cache_length": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be at least 1, got 0"):
            HealingTrainer(model, tiny_base(), arguments(tmp_path, 1), **options)
    with pytest.raises(ValueError, match="has no sparse groups"):
        teacher_of(tiny_base())
    with pytest.raises(ValueError, match="take the teacher before"):
        teacher_of(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match="fewer than one window of 100"):
        TokenWindows(byte_tokenizer(), "short", 100)


def prepare(folder: Path) -> str:
    """A base, its conversion and a text in `folder`; the arguments of the command for them."""
    base = tiny_base()
    byte_tokenizer().save_pretrained(folder / "converted")
    base.save_pretrained(folder / "base")
    converted = convert_model(base, ConversionConfig(sparsity=4, window=4), random_tokens(4, 64))
    converted.save_pretrained(folder / "converted")
    (folder / "text.txt").write_text("A text of some length, which says nothing of interest. " * 60)
    return (
        f"--model {folder / 'converted'} --text {folder / 'text.txt'} --window_length 64 --use_cpu --report_to none "
        "--learning_rate 1e-2 --lr_scheduler_type constant --disable_tqdm true"
    )


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("learn", ["lora", "full", "routers"])
def test_the_command(learn, tmp_path):
    """Interrupted and resumed it writes what an unbroken run writes, and that loads by one line."""
    common = f"{prepare(tmp_path)} --learn {learn} --per_device_train_batch_size 2 --save_steps 2"

    def run(name: str, steps: int, destination: str) -> None:
        options = f"--output_dir {tmp_path / name} --max_steps {steps} --destination {tmp_path / destination}"
        heal.main(f"{common} {options}".split())

    def load(name: str):
        if learn == "full":
            return AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model = MosaLlamaForCausalLM.from_pretrained(tmp_path / "base", routers=tmp_path / name)
        return PeftModel.from_pretrained(model, tmp_path / name) if learn == "lora" else model

    run("whole", 4, "whole.healed")
    run("parts", 2, "parts.first")
    run("parts", 4, "parts.healed")
    inputs = random_tokens(1, 50)
    with torch.no_grad():
        logits = {name: load(name).eval()(inputs).logits for name in ("whole.healed", "parts.first", "parts.healed")}
    torch.testing.assert_close(logits["parts.healed"], logits["whole.healed"], rtol=0, atol=1e-4)
    assert (logits["parts.first"] - logits["whole.healed"]).abs().max() > 1e-3
    if learn != "full":
        assert not (tmp_path / "whole.healed" / "model.safetensors").exists()
        assert json.loads((tmp_path / "whole.healed" / "mosa_config.json").read_text())["mosa_gate_slope"] == 0
    if learn == "lora":
        model = load("whole.healed").eval()
        with torch.no_grad():
            merged = model.merge_and_unload()(inputs).logits
        torch.testing.assert_close(merged, logits["whole.healed"], rtol=0, atol=1e-4)
        code = (tmp_path / "whole.healed" / "README.md").read_text().split("```")[1].removeprefix("python")
        names: dict = {}
        exec(code.replace("path of this folder", str(tmp_path / "whole.healed")), names)
        with torch.no_grad():
            found = names["model"].eval()(inputs).logits
        torch.testing.assert_close(found, logits["whole.healed"], rtol=0, atol=1e-4)
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole.healed").eval()  # names its base itself
        with torch.no_grad():
            assert torch.equal(alone(inputs).logits, logits["whole.healed"])
    card = (tmp_path / "whole.healed" / "README.md").read_text()
    assert f"`mosa-heal` (`--learn {learn}`) brought it back towards its original in 4 steps on this text: " in card
    with pytest.raises(SystemExit, match="exists: remove it"):
        run("parts", 4, "parts.healed")


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("learn", ["full", "routers"])
def test_the_command_on_pictures_and_text(learn, tmp_path):
    """What says how routers learn is the decoder's config; written, they are as conversion wrote them."""
    common = prepare(tmp_path)
    base = tiny_multimodal("llava")
    base.save_pretrained(tmp_path / "base")
    convert_model(base, ConversionConfig(sparsity=4, window=4), random_tokens(4, 64)).save_pretrained(
        tmp_path / "converted"
    )
    (tmp_path / "converted" / "processor_config.json").write_text("{}")
    options = f"--learn {learn} --max_steps 1 --save_steps 1 --logging_steps 1 --output_dir {tmp_path / 'runs'}"
    heal.main(f"{common} {options} --destination {tmp_path / 'healed'}".split())
    assert 0 < logged(tmp_path / "runs" / "checkpoint-1")[0]["kv_share_4096"] < 1
    if learn == "full":
        written = json.loads((tmp_path / "healed" / "config.json").read_text())
        assert not any(name.startswith("mosa_") for name in written)
        assert (tmp_path / "healed" / "processor_config.json").is_file()
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "healed")
    else:
        model = load_routers(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "healed")
    config = model.config.text_config
    assert (config.mosa_gate_slope, config.mosa_threshold_momentum) == (0, 1)
    ids = random_tokens(1, 60).clamp_max(200)
    with torch.no_grad():
        read = [each(input_ids=ids, use_cache=False).logits for each in (model.eval(), model.train())]
    assert torch.equal(*read)


@pytest.mark.slow  # models are healed
@pytest.mark.parametrize("learn", ["lora", "full"])
def test_an_interrupted_run_goes_on(learn, tmp_path):
    """To what an unbroken run writes; with the thresholds of the conversion, to the bit."""
    common = f"{prepare(tmp_path)} --learn {learn} --per_device_train_batch_size 2 --max_steps 4"

    def run(name: str) -> None:
        options = f"--output_dir {tmp_path / name} --save_steps 2 --destination {tmp_path / f'{name}.healed'}"
        heal.main(f"{common} {options}".split())

    run("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    with pytest.raises(SystemExit, match="parts/checkpoint-2 is not of `mosa-heal`.*another `--output_dir`"):
        run("parts")
    shutil.copy(tmp_path / "whole" / "healing.json", tmp_path / "parts")
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
    # What it wrote is gone: the last checkpoint is written, and no step more is taken.
    shutil.rmtree(tmp_path / "parts.healed")
    run("parts")
    again = load_file(tmp_path / "parts.healed" / weights)
    assert again.keys() == parts.keys() and all(torch.equal(again[name], each) for name, each in parts.items())
    # A checkpoint that was cut off is named, or left aside.
    shutil.rmtree(tmp_path / "parts.healed")
    file = tmp_path / "parts" / "checkpoint-4" / weights
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match="checkpoint-4 is damaged .*: remove it"):
        run("parts")
    (tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").unlink()
    run("parts")
    again = load_file(tmp_path / "parts.healed" / weights)
    for name, each in parts.items():
        torch.testing.assert_close(again[name], each, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@QUIET
def test_a_healed_model_is_healed_towards_its_original(tmp_path):
    """Its own weights are not the original's any more, which has to be named."""
    common = f"{prepare(tmp_path)} --max_steps 1 --learn full --save_strategy no --output_dir {tmp_path / 'runs'}"
    heal.main(f"{common} --destination {tmp_path / 'once'}".split())
    again = common.replace(f"{tmp_path / 'converted'}", f"{tmp_path / 'once'}")
    again = f"{again} --destination {tmp_path / 'twice'}"
    with pytest.raises(SystemExit, match="was healed before.*`mosa-heal --original`"):
        heal.main(again.split())
    teachers = []

    class Watched(HealingTrainer):
        def train(self, *args, **kwargs):
            teachers.append(self.teacher)
            return super().train(*args, **kwargs)

    with mock.patch.object(run_heal, "HealingTrainer", Watched):
        heal.main(f"{again} --original {tmp_path / 'base'}".split())
        # The converted model has the original's weights.
        other = again.replace(str(tmp_path / "twice"), str(tmp_path / "other")).replace("/runs", "/other_runs")
        heal.main(f"{other} --original {tmp_path / 'converted'}".split())
    for teacher in teachers:
        assert type(teacher) is LlamaForCausalLM
        for name, weight in tiny_base().state_dict().items():
            assert torch.equal(teacher.state_dict()[name], weight)
    assert len(teachers) == 2
    record = json.loads((tmp_path / "twice" / "config.json").read_text())["mosa_conversion"]["healing"]
    assert record["after"]["learn"] == record["learn"] == "full"


@pytest.mark.slow
@QUIET
def test_what_healing_writes_is_no_model(tmp_path):
    """A folder of routers, with an adapter or without, is refused by name; merged as the error says, it is healed."""
    common = f"{prepare(tmp_path)} --max_steps 1 --save_strategy no --output_dir {tmp_path / 'runs'}"
    heal.main(f"{common} --destination {tmp_path / 'adapter'}".split())
    save_routers(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"), tmp_path / "routers")
    common += f" --destination {tmp_path / 'again'}"
    for options in ("--model", f"--original {tmp_path / 'base'} --model", "--original"):
        with pytest.raises(SystemExit, match=r"has an adapter \(adapter_config.json\).*`merge_and_unload\(\)`"):
            heal.main(f"{common} {options} {tmp_path / 'adapter'}".split())
        with pytest.raises(SystemExit, match=r"routers has routers \(mosa_config.json\), without the model"):
            heal.main(f"{common} {options} {tmp_path / 'routers'}".split())
    names: dict = {}
    code = (tmp_path / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python")
    exec(code.replace("path of this folder", str(tmp_path / "adapter")), names)
    names["model"].merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    with pytest.raises(SystemExit, match="was healed before.*`mosa-heal --original`"):
        heal.main(f"{common} --model {tmp_path / 'merged'}".split())
    heal.main(f"{common} --model {tmp_path / 'merged'} --original {tmp_path / 'base'}".split())
    record = json.loads((tmp_path / "again" / "mosa_config.json").read_text())["mosa_conversion"]["healing"]
    assert record["after"]["learn"] == record["learn"] == "lora"


def test_no_step_and_too_long_examples_are_refused(tmp_path):
    common = f"{prepare(tmp_path)} --output_dir {tmp_path / 'runs'} --destination {tmp_path / 'healed'}"
    for options, message in (
        ("--num_train_epochs 0", "`--num_train_epochs` must be more than 0, got 0"),
        ("--num_train_epochs -1", "`--num_train_epochs` must be more than 0, got -1"),
        ("--max_steps 0", "`--max_steps` must be at least 1, got 0"),
        ("--max_steps -2", "`--max_steps` must be at least 1, got -2"),
        (
            "--dataloader_drop_last true --per_device_train_batch_size 60",
            "51 examples of .*than a batch of 60",
        ),
        ("--window_length 513", r"at most 512 tokens .*513 of an example \(`--window_length`\): set a smaller"),
    ):
        with pytest.raises(SystemExit, match=f"^mosa-heal: .*{message}"):
            heal.main(f"{common} {options}".split())
    assert not (tmp_path / "healed").exists()


@pytest.mark.slow
def test_checkpoints_of_another_healing_are_refused(tmp_path):
    common = f"{prepare(tmp_path)} --max_steps 1 --save_steps 1"

    def run(destination: str, options: str = "") -> None:
        folders = f" --output_dir {tmp_path / 'checkpoints'} --destination {tmp_path / destination} "
        heal.main((common + folders + options).split())

    run("first")
    with pytest.raises(
        SystemExit, match=r"checkpoint-1 is of a healing with another `--learn`, `--lora_rank`: set another"
    ):
        run("second", "--learn full --lora_rank 8")
    (tmp_path / "text.txt").write_text("Another text, which says no more. " * 60)
    with pytest.raises(SystemExit, match="with another `--text`:"):
        run("second")
    other = convert_model(tiny_base(), ConversionConfig(sparsity=4, window=5), random_tokens(4, 64))
    other.save_pretrained(tmp_path / "converted")
    with pytest.raises(SystemExit, match="with another `--model`, `plan`, `--text`:"):
        run("second")
    assert not (tmp_path / "second").exists()


def heal_on_rank(rank: int, folder: Path, arguments: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for learn in ("lora", "routers"):
            heal.main([*command_of(folder, learn, arguments, "two", batch_size=1), "--ddp_backend", "gloo"])
    finally:
        gc.collect()  # DDP's object goes before its process group: see `parallel_gradients` of test_aux_loss.py
        torch.distributed.destroy_process_group()


def command_of(folder: Path, learn: str, arguments: str, name: str, batch_size: int) -> list[str]:
    own = f"--learn {learn} --output_dir {folder / name / learn} --destination {folder / f'{learn}.{name}'}"
    own += f" --per_device_train_batch_size {batch_size} --max_steps 4 --save_steps 4 --logging_steps 1"
    return f"{arguments} {own}".split()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes share a CPU")
def test_two_processes_give_the_losses_of_one(tmp_path):
    """
    And nearly the same while routers learn: thresholds follow the mean of what the processes see, which is not quite
    what one sees of the whole batch.
    """
    arguments = prepare(tmp_path)
    for learn in ("lora", "routers"):
        heal.main(command_of(tmp_path, learn, arguments, "one", batch_size=2))
    get_context("forkserver").set_forkserver_preload([__name__])
    start_processes(heal_on_rank, (tmp_path, arguments), nprocs=2, start_method="forkserver")
    for learn in ("lora", "routers"):
        one, two = (logged(tmp_path / name / learn / "checkpoint-4") for name in ("one", "two"))
        for name in ("loss", "selected", "kv_share_4096"):
            tolerance = {"abs": 1e-4} if learn == "lora" else {"rel": 0.05}
            assert [row[name] for row in two] == pytest.approx([row[name] for row in one], **tolerance), (learn, name)
        if learn == "lora":  # routers that are good from the start only follow what each batch selects
            assert one[-1]["loss"] < one[0]["loss"]


def logged(checkpoint: Path) -> list[dict]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_and_checkpointing(dtype, original, windows, tmp_path):
    """The losses and the size of the gradients of float32, about."""

    def steps(name: str, halves: bool) -> list[dict]:
        model = convert_model(original, ConversionConfig(sparsity=16, window=2), windows[:8]).requires_grad_(False)
        torch.manual_seed(0)  # what is imported on the way, the first time, may have drawn numbers
        student = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
        options = {"bf16": halves and dtype == "bf16", "gradient_checkpointing": halves, "logging_steps": 1}
        # Without a scale on the loss, float16 loses small gradients, which Adam makes large: of the first step alone.
        options = arguments(tmp_path / name, 4 if dtype == "bf16" else 1, **options)
        trainer = HealingTrainer(student, teacher_of(model), options, collate, TensorDataset(windows[:64]))
        # `Trainer` has no float16 on a CPU, where it would do no more than this. (Nothing may be around its own: the
        # outermost context is where PyTorch forgets the weights that it has rounded, old ones after a step.)
        with torch.autocast("cpu", torch.float16) if halves and dtype == "fp16" else nullcontext():
            trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    for full, half in zip(steps("full", False), steps("half", True), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05) and half["loss"] != full["loss"]
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)


def test_share_of_keys_and_values():
    """What is logged is what a cache holds, of groups that differ and beside dense ones."""
    plan = GroupPlan(((SparseGroup(8, 4), None), (SparseGroup(16, 8), SparseGroup(8, 4)), (None, None)))
    model = convert_model(tiny_base(), ConversionConfig(plan=plan), random_tokens(4, 64))
    with trace_routing(model) as selected:
        cache = model(ids := random_tokens(1, 400), use_cache=True).past_key_values
    rates = {layer: call.float().mean((0, 1)) for layer, (call,) in selected.items()}
    dense = model.config.num_hidden_layers * model.config.num_key_value_heads * ids.shape[1] * 2 * 4
    held = sum(cache_bytes(cache).values()) / (dense * model.config.head_dim)
    assert kv_share(model.config, ids.shape[1], rates) == pytest.approx(held, rel=0.1)
    assert kv_share(model.config, 8, rates) == pytest.approx(1)
