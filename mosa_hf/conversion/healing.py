"""Healing: a short training that brings a converted model back to what the original predicts (docs/design.md, 6)."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..modeling.thresholds import mosa_routers
from .convert import to_dense

CHUNK = 256  # positions whose distributions are in memory in float32 at once


class TokenWindows(Dataset):
    """
    A text as training examples: windows of `length` tokens, one after the other; what is left at the end is dropped.

    Raises:
        ValueError: for a text of less than one window.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, length: int):
        input_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        if len(input_ids) < length:
            raise ValueError(f"The text has {len(input_ids)} tokens, fewer than a window of {length}: give more text.")
        self.windows = input_ids[: len(input_ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class HealingTrainer(Trainer):
    """
    `Trainer` whose loss is the KL divergence from the original model's next-token distribution to that of the model
    it trains, averaged over tokens. Whatever has `requires_grad` learns: adapters, all weights, or routers (with
    `mosa_gate_slope` > 0, which passes them a gradient). Selection is hard from the first step on, so with frozen
    routers what is trained is what `generate` runs. Logs the share of tokens that groups select as "selected".

    Args:
        model: with sparse groups, or PEFT's wrapper of one.
        teacher: the original; see `teacher_of`.
        top_k: compare the teacher's `top_k` most likely tokens, and all others as one; None: every token.
        args, kwargs: as `Trainer` takes them. Batches have `input_ids`, and perhaps `attention_mask`.

    Raises:
        ValueError: for a teacher of another vocabulary.
    """

    # The loss is a mean over tokens: `Trainer` averages it over the micro-batches of a step.
    model_accepts_loss_kwargs = False

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, *args, top_k: int | None = None, **kwargs):
        if model.config.vocab_size != teacher.config.vocab_size:
            raise ValueError(
                f"`teacher` has a vocabulary of {teacher.config.vocab_size} tokens, the model of "
                f"{model.config.vocab_size}: pass the model that it was converted from."
            )
        super().__init__(model, *args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.teacher, self.top_k = teacher.eval(), top_k
        self._rates: list[torch.Tensor] = []  # of the routers' calls since the last log
        for router in mosa_routers(model):
            router.register_forward_hook(lambda module, args, output: self._rates.append(output[1].float().mean()))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        inputs = {name: states for name, states in inputs.items() if name != "labels"}
        if next(self.teacher.parameters()).device != inputs["input_ids"].device:
            self.teacher.to(inputs["input_ids"].device)
        with torch.no_grad():
            expected = self.teacher(**inputs, use_cache=False).logits
        outputs = model(**inputs, use_cache=False)
        mask = inputs.get("attention_mask")
        actual, expected = outputs.logits.flatten(0, -2), expected.flatten(0, -2)
        if mask is not None:
            actual, expected = actual[mask.flatten().bool()], expected[mask.flatten().bool()]
        loss = mean_divergence(actual, expected, self.top_k)
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._rates:
            logs["selected"] = round(torch.stack(self._rates).mean().item(), 4)
            self._rates.clear()
        super().log(logs, *args, **kwargs)


def mean_divergence(actual: torch.Tensor, expected: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """
    KL(expected ‖ actual) in nats, averaged over N tokens; float32 copies are made of a few tokens at a time, and again
    in the backward pass.

    Args:
        actual, expected: logits `[N, V]`.
        top_k: see `HealingTrainer`.
    """
    total = actual.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(actual.split(CHUNK), expected.split(CHUNK), strict=True):
        total = total + checkpoint(_divergence, ours, theirs, top_k, use_reentrant=False)
    return total / len(actual)


def _divergence(actual: torch.Tensor, expected: torch.Tensor, top_k: int | None) -> torch.Tensor:
    actual, expected = (logits.float().log_softmax(-1) for logits in (actual, expected))
    if top_k is not None and top_k < expected.shape[-1]:
        best, index = expected.topk(top_k, dim=-1)
        actual, expected = (
            torch.cat((chosen, torch.log1p(-chosen.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))), dim=-1)
            for chosen in (actual.gather(-1, index), best)
        )
    return F.kl_div(actual, expected, reduction="sum", log_target=True)


def teacher_of(model: PreTrainedModel) -> PreTrainedModel:
    """
    The original of a converted model, to be taken before adapters are added. It shares the weights that do not learn,
    and has copies of those that do.

    Raises:
        ValueError: for a model without sparse groups, or with adapters.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("The model has adapters, which would be part of its teacher: take the teacher before them.")
    teacher = to_dense(model)
    memo = {id(tensor): tensor for tensor in teacher.parameters() if not tensor.requires_grad}
    memo |= {id(tensor): tensor for tensor in teacher.buffers()}
    return copy.deepcopy(teacher, memo).eval()
