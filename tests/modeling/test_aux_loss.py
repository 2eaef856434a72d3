"""The native model's auxiliary loss, whoever computes the loss: its gradient, its share of a step, its refusals."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from mosa_hf import MosaForCausalLM, MosaForSequenceClassification, RoutingCallback

from ..conftest import slow_but, tiny_config, tiny_model
from ..contract import random_ids

IDS = random_ids(4, 12)
LABELS = IDS.masked_fill(torch.arange(12) < 3, -100)  # a prompt is not learned
COEFFICIENT = 5.0  # so that it shows


def model_of(coefficient: float = COEFFICIENT, **fields) -> MosaForCausalLM:
    return tiny_model(mosa_router_aux_loss_coef=coefficient, mosa_threshold_momentum=1.0, **fields).train()


def gradients_of(model, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    if loss is not None:
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor = LABELS, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def expected_aux_loss(router_logits: tuple[torch.Tensor, ...], sparsity: int = 4) -> torch.Tensor:
    """The formula, of whole rows: which tokens are among the K highest is what a router learns to say."""
    losses = []
    for logits in router_logits:
        lowest = logits.detach().topk(max(logits.shape[1] // sparsity, 2), dim=1).values[:, -1:]
        losses.append(F.binary_cross_entropy_with_logits(logits, (logits.detach() >= lowest).float()))
    return torch.stack(losses).mean()


def reference(factor: float = COEFFICIENT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a model that knows of no auxiliary loss, to which it is added by hand."""
    model = model_of(0.0)
    outputs = model(IDS, use_cache=False, output_router_logits=True)
    loss = cross_entropy(outputs.logits) + factor * expected_aux_loss(outputs.router_logits)
    return loss.detach(), gradients_of(model, loss)


def check_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


# --- whoever computes the loss ---


def its_own(model):
    return model(IDS, labels=LABELS, use_cache=False).loss


def of_its_logits(model):
    return cross_entropy(model(IDS, use_cache=False).logits)


def of_its_logits_beside_labels(model):
    return cross_entropy(model(IDS, labels=LABELS, use_cache=False).logits)


def of_the_decoder(model):
    """As TRL's `SFTTrainer`: it projects what a step learns, in pieces."""
    states = model.base_model(IDS, use_cache=False).last_hidden_state[:, :-1]
    is_learned = LABELS[:, 1:] != -100
    pieces = zip(states[is_learned].split(5), LABELS[:, 1:][is_learned].split(5), strict=True)
    head = model.get_output_embeddings().weight
    return sum(F.cross_entropy(x @ head.T, y, reduction="sum") for x, y in pieces) / is_learned.sum()


def smoothed(model):
    return LabelSmoother(epsilon=0.0)(model(IDS, use_cache=False), LABELS, shift_labels=True)


def of_its_output(model):
    outputs = model(IDS, use_cache=False)
    return cross_entropy(outputs.logits) + COEFFICIENT * outputs.aux_loss


LOSSES = [its_own, of_its_logits, of_its_logits_beside_labels, of_the_decoder, smoothed, of_its_output]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_any_loss_carries_it_once(loss_of, checkpointing):
    model, (loss, gradients) = model_of(), reference()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = loss_of(model)
    if loss_of in (its_own, of_its_output):
        torch.testing.assert_close(own, loss)
    check_gradients(gradients_of(model, own), gradients)


def test_a_factor_on_the_loss_is_one_on_all_of_it():
    """Of a loss that includes it: mixed precision multiplies, accumulation divides."""
    for loss_of in (its_own, of_its_output):
        model = model_of()
        gradients = gradients_of(model, 8 * loss_of(model))
        check_gradients({name: each / 8 for name, each in gradients.items()}, reference()[1])
    model = model_of()  # of another, it is said
    model.model.aux_loss_scale = 8.0
    gradients = gradients_of(model, 8 * of_the_decoder(model))
    check_gradients({name: each / 8 for name, each in gradients.items()}, reference()[1])


def test_padding_and_packing():
    """Rows with padding, packed ones, and each row alone have the same mean over tokens."""
    model, lengths = model_of(), (12, 7)
    rows = [random_ids(1, length, seed=length) for length in lengths]
    alone = [model(row, use_cache=False).aux_loss.item() for row in rows]
    expected = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    assert model(padded, attention_mask=mask, use_cache=False).aux_loss.item() == pytest.approx(expected, rel=1e-4)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(torch.cat(rows, dim=1), position_ids=position_ids, use_cache=False)
    assert packed.aux_loss.item() == pytest.approx(expected, rel=1e-4)


def test_where_nothing_is_trained_nothing_is_added():
    """Attributions in evaluation mode; a loss that is not of the hidden states; generation computes none."""
    plain, model = model_of(0.0).eval(), model_of().eval()
    check_gradients(gradients_of(model, of_the_decoder(model)), gradients_of(plain, of_the_decoder(plain)))
    with torch.no_grad():
        assert model(IDS, use_cache=False).aux_loss is None
        outputs = model(IDS, labels=LABELS, use_cache=False)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits) + COEFFICIENT * outputs.aux_loss)
    model = model_of()
    outputs = model(IDS, use_cache=False, output_router_logits=True)
    sum(each.sum() for each in outputs.router_logits).backward()
    other = model_of(0.0)
    sum(each.sum() for each in other(IDS, use_cache=False, output_router_logits=True).router_logits).backward()
    check_gradients(
        {name: each for name, each in gradients_of(model).items() if each is not None},
        {name: each for name, each in gradients_of(other).items() if each is not None},
    )


def test_classification_carries_it():
    def router_gradient(coefficient: float) -> torch.Tensor:
        torch.manual_seed(0)
        config = tiny_config(mosa_router_aux_loss_coef=coefficient, num_labels=3, mosa_threshold_momentum=1.0)
        model = MosaForSequenceClassification(config).train()
        model(IDS, labels=torch.tensor([0, 1, 2, 0]), use_cache=False).loss.backward()
        return model.model.layers[2].self_attn.mosa.router.weight.grad

    alone, carried, twice = (router_gradient(each) for each in (0.0, 0.5, 1.0))
    assert (carried - alone).abs().max() > 1e-3
    torch.testing.assert_close(twice - alone, 2 * (carried - alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_of", [its_own, of_the_decoder])
def test_reentrant_checkpointing_is_refused(loss_of):
    """It hands out router logits without a graph: their loss would train nothing."""
    model = model_of()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        loss_of(model)


def test_outputs_are_in_the_order_of_every_model(tmp_path):
    model = model_of()
    outputs = model(IDS, labels=LABELS, use_cache=False)
    assert outputs.aux_loss is not None and outputs[0] is outputs.loss and outputs[1] is outputs.logits
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    dataset = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS, strict=True)]
    predictions = Trainer(model, arguments).predict(dataset).predictions
    torch.testing.assert_close(torch.from_numpy(predictions), model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


# --- steps of several micro-batches ---


def after_a_step(accumulation: int, directory, coefficient: float = COEFFICIENT, **options) -> dict[str, torch.Tensor]:
    """How far a step of `Trainer` over the four rows takes each weight, with gradients as they are."""
    model = model_of(coefficient)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        directory, max_steps=1, per_device_train_batch_size=len(IDS) // accumulation, optim="sgd", learning_rate=0.1,
        gradient_accumulation_steps=accumulation, max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", label_smoothing_factor=options.pop("smoothing", 0.0),
    )  # fmt: skip

    def collate(rows):
        return {"input_ids": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}

    Trainer(model, arguments, collate, TensorDataset(IDS, LABELS), **options).train()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def mean_of_step(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


STEPS = {"own loss": {}, "smoothed": {"smoothing": 1e-9}, "compute_loss_func": {"compute_loss_func": mean_of_step}}
STEPS["watched"] = {**STEPS["smoothed"], "callbacks": [RoutingCallback()]}  # which tells models that are not told


@pytest.mark.parametrize("name", slow_but(["own loss"], STEPS))
def test_accumulated_steps_are_whole_ones(name, tmp_path):
    """Of the loss and of what it carries: to a thousandth, where it was 3.9 times as much, or nothing."""
    expected = {key: -0.1 * gradient for key, gradient in reference()[1].items()}
    without = {key: -0.1 * gradient for key, gradient in reference(0.0)[1].items()}
    key = "model.layers.0.self_attn.mosa.router.weight"
    assert (expected[key] - without[key]).norm() > 0.1 * without[key].norm()
    for accumulation in (1, 4):
        moved = after_a_step(accumulation, tmp_path, **STEPS[name])
        for each in (key, "model.layers.1.self_attn.mosa.q_proj", "model.embed_tokens.weight"):
            assert (moved[each] - expected[each]).norm() < 1e-3 * expected[each].norm(), each


def gradients_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name in ("own", "other"):
            torch.save(parallel_gradients(rank, name), f"{folder}/{name}_{rank}.pt")
    finally:
        dist.destroy_process_group()


def parallel_gradients(rank: int, name: str) -> dict[str, torch.Tensor]:
    # DDP's object goes before its process group: as the last one that holds it, it may wait for gloo's thread forever.
    ids, labels = IDS[2 * rank : 2 * rank + 2], LABELS[2 * rank : 2 * rank + 2]
    num_items = (LABELS[:, 1:] != -100).sum()  # of both processes; `Trainer` multiplies by their number
    model = model_of()
    parallel = DistributedDataParallel(model)
    given = {"labels": labels} if name == "own" else {}
    outputs = parallel(input_ids=ids, use_cache=False, num_items_in_batch=num_items, **given)
    loss = outputs.loss if name == "own" else mean_of_step(outputs, labels, num_items)
    (2 * loss).backward()
    return gradients_of(model)


@pytest.mark.slow  # two processes
@pytest.mark.skipif(not dist.is_available() or torch.accelerator.is_available(), reason="the processes share a CPU")
def test_two_processes(tmp_path: Path):
    torch.multiprocessing.start_processes(gradients_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for name in ("own", "other"):
        check_gradients(torch.load(tmp_path / f"{name}_0.pt"), reference()[1])
