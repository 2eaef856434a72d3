"""The models of `benchmarks.pretrain`: built, trained with checkpoints, and what is measured of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, get_cosine_schedule_with_warmup

from mosa_hf import MosaForCausalLM, cache_bytes, calibrate_thresholds
from mosa_hf.atomic_write import atomic_file
from mosa_hf.compat import CACHE
from mosa_hf.modeling.router import MosaRouter, named_routers

from .data import Corpus
from .runs import Run

AGREEMENT = 1e-4  # nats a token between reading a text at once and token by token
CHECKPOINT_SECONDS = 30
CALIBRATION_TOKENS = 16_384
SURE = 20.0  # a logit whose sigmoid is 1


class StrideRouter(MosaRouter):
    """Selects every ρ-th token by its position: nothing is learned, and heads are not gated."""

    def __init__(self, config, sparsity):
        super().__init__(config, sparsity)
        self.weight = None

    def forward(self, hidden_states, call, cache=None, follows=True):
        layout = call.layout.to(hidden_states.device)
        chosen = layout.position % int(self.sparsity[0]) == 0  # [B or 1, T]
        chosen = chosen.expand(hidden_states.shape[:2])
        if layout.valid is not None:
            chosen = chosen & layout.valid
        selected = chosen[..., None].expand(-1, -1, len(self.sparsity))
        return torch.where(selected, SURE, -SURE), selected


def build(run: Run) -> MosaForCausalLM:
    """The model of a run, with fresh weights."""
    torch.manual_seed(run.seed)
    config = run.config()
    model = MosaForCausalLM(config)
    if run.kind == "stride":
        for layer in model.model.layers:
            heads = layer.self_attn.mosa
            heads.router = StrideRouter(config, heads.router.sparsity)
    if run.zero_outputs:  # else more dense heads were worse: probably what they add at first drowns the token
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
    return model


class Slots:
    """How many tokens the groups of a model select, over its calls: means of them, of their squares, of the most."""

    def __init__(self):
        self.sums = [0.0, 0.0, 0.0]
        self.calls = 0

    def __call__(self, router: MosaRouter, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        counts = output[1].sum(1, dtype=torch.float32)  # [B, G]
        for i, value in enumerate((counts.mean(), counts.square().mean(), counts.max())):
            self.sums[i] += value.item()
        self.calls += 1

    def means(self) -> list[float] | None:
        return [each / self.calls for each in self.sums] if self.calls else None

    @contextmanager
    def counting(self, model: MosaForCausalLM) -> Iterator["Slots"]:
        hooks = [router.register_forward_hook(self) for _, router in named_routers(model)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


def train(run: Run, corpus: Corpus, checkpoint: Path) -> tuple[MosaForCausalLM, dict[str, Any]]:
    """
    A trained model, and how its training went. It goes on from `checkpoint` if there is one, and gives what it would
    have given without the interruption.
    """
    model = build(run).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(run.steps // 10, 1), run.steps)
    slots, losses, seconds = Slots(), [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses, seconds, slots.sums, slots.calls = (state[name] for name in ("losses", "seconds", "sums", "calls"))
    saved = time.monotonic()
    steps = range(len(losses), run.steps)
    with slots.counting(model):
        for step in tqdm(steps, initial=len(losses), total=run.steps, unit="step", leave=False, mininterval=2):
            started = time.process_time()
            input_ids = corpus.batch(run.seed, step, run.batch_size, run.length)
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - started)
            losses.append(loss.item())
            if time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < run.steps:
                with atomic_file(checkpoint) as unfinished:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"schedule": schedule.state_dict(), "losses": losses, "seconds": seconds}
                    torch.save(state | {"sums": slots.sums, "calls": slots.calls}, unfinished)
                saved = time.monotonic()
    tenth = max(run.steps // 10, 1)
    result = {
        "training_loss": [
            sum(part) / len(part) for i in range(0, run.steps, tenth) if (part := losses[i : i + tenth])
        ],
        "step_cpu_ms": median(seconds) * 1e3,
        "training_flops": run.training_flops(),
    }
    if slots.calls:
        mean, square, most = slots.means()
        sequences = 3 * run.batch_size * run.steps
        result["training_flops_of_selected"] = sequences * run.forward_flops(mean, square)
        result["training_flops_with_padding"] = sequences * run.forward_flops(most)
    return model, result


@contextmanager
def reading_by(model: MosaForCausalLM, rule: str) -> Iterator[None]:
    """Evaluation by a rule of routing."""
    routers = [router for _, router in named_routers(model)]
    before = [router.inference_routing for router in routers]
    for router in routers:
        router.inference_routing = rule
    try:
        yield
    finally:
        for router, own in zip(routers, before, strict=True):
            router.inference_routing = own


@torch.inference_mode()
def teacher_forced(model: MosaForCausalLM, windows: torch.Tensor) -> float:
    """Mean loss of the tokens of `windows` [N, T] but the first of each, nats, without any auxiliary loss."""
    total = 0.0
    for rows in windows.split(max(2048 // windows.shape[1], 1)):
        logits = model(rows, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


@torch.inference_mode()
def decoded(model: MosaForCausalLM, windows: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The same loss, token by token with a cache; and the bytes that this holds at the end, for one row, by kind."""
    cache, total = DynamicCache(config=model.config), 0.0
    for i, token in enumerate(windows[:, :-1].split(1, dim=1)):
        logits = model(token, use_cache=True, **{CACHE: cache}).logits[:, 0]
        total += F.cross_entropy(logits, windows[:, i + 1], reduction="sum").item()
    held = {kind: count / len(windows) for kind, count in cache_bytes(cache).items()}
    return total / windows[:, 1:].numel(), held


def evaluate(run: Run, model: MosaForCausalLM, corpus: Corpus) -> dict[str, Any]:
    """
    Losses on text of the kinds that were trained on and of another one. "expert_choice": what is published, which may
    read the future. "followed": by the thresholds that training left. "exact": by thresholds that were set on training
    text, which is what decoding gives.

    Raises:
        AssertionError: if decoding does not give it.
    """
    model.eval()
    texts = {
        "held out": corpus.windows(corpus.held_out, run.held_out_tokens, run.length),
        "unseen": corpus.windows(corpus.unseen, run.held_out_tokens, run.length),
    }
    loss: dict[str, dict[str, float]] = {name: {} for name in texts}

    def read(rule: str, label: str) -> None:
        with reading_by(model, rule):
            for name, windows in texts.items():
                loss[name][label] = teacher_forced(model, windows)

    if run.kind == "mosa":
        read("expert_choice", "expert_choice")
        read("threshold", "followed")
        calibrate_thresholds(model, corpus.windows(corpus.training, CALIBRATION_TOKENS, run.length).split(8))
    with Slots().counting(model) as slots:
        read("threshold", "exact")
    sample = texts["held out"][: run.decoded_windows]
    at_once, (step_by_step, held) = teacher_forced(model, sample), decoded(model, sample)
    if abs(at_once - step_by_step) > AGREEMENT:
        raise AssertionError(f"Decoding gives a loss of {step_by_step}, reading the same text at once {at_once}.")
    result = {
        "loss": loss,
        "sample": {"tokens": sample[:, 1:].numel(), "teacher_forced": at_once, "decoded": step_by_step},
        "kv_bytes": held,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if slots.calls:
        result["selected_share"] = slots.means()[0] / run.length
    return result
