"""Healing: a short training that brings a converted model back to what the original predicts (docs/design.md, 6)."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from ..arguments import checked
from ..modeling.configuration import SparseGroupsConfig, sparse_config_of
from ..modeling.kv_share import kv_share
from ..modeling.layers import layer_of
from ..modeling.router import MosaRouter, named_routers, routers_of
from ..modeling.routing_callback import selected_shares
from .convert import to_dense
from .divergence import mean_divergence
from .windows import Chat, token_windows

IGNORED = -100  # as of PyTorch's `cross_entropy`


class TokenWindows(Dataset):
    """A text, several, or chats, as training examples: their `token_windows`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str | Chat], length: int):
        self.windows = token_windows(tokenizer, text, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def counted_tokens(attention_mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
    """
    After which tokens predictions are compared.

    Args:
        attention_mask: `[B, T]`, 0 of padding.
        labels: `[B, T]` as for language modelling: -100 of tokens that the model should not learn to predict, such as
            those of prompts. What they are else does not matter.

    Returns:
        `[B, T]` bool; None: after all of them.
    """
    counts = None if attention_mask is None else attention_mask.bool()
    if labels is not None and (labels == IGNORED).any():
        learnt = torch.cat((labels[:, 1:], labels[:, -1:]), dim=1) != IGNORED  # after the last, if that is itself
        counts = learnt if counts is None else counts & learnt
    return counts


def num_counted(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | int:
    """How many tokens of a batch `counted_tokens` says."""
    counts = counted_tokens(batch.get("attention_mask"), batch.get("labels"))
    return batch["input_ids"].numel() if counts is None else counts.sum()


class HealingTrainer(Trainer):
    """
    `Trainer` whose loss is the KL divergence from the original model's next-token distribution to that of the model
    it trains, averaged over the tokens of a step. Whatever has `requires_grad` learns: adapters, all weights, or
    routers (with `mosa_gate_slope` > 0, which passes them a gradient). Selection is hard from the first step on, so
    with frozen routers what is trained is what `generate` runs. Beside the divergence, "loss", it logs the share of
    tokens that groups select, "selected" (and what `RoutingCallback` does, while routers learn), and what share of the
    keys and values a cache would then keep of `cache_length` tokens, "kv_share_4096"; an evaluation has both of its
    own calls alone, "eval_selected" and "eval_kv_share_4096".

    Args:
        model: with sparse groups, or PEFT's wrapper of one.
        teacher: the original; see `teacher_of`.
        top_k: compare the teacher's `top_k` most likely tokens, and all others as one; None: every token.
        cache_length: see above.
        args, kwargs: as `Trainer` takes them. Batches have `input_ids`, and perhaps `attention_mask` and `labels`,
            see `counted_tokens`.

    Raises:
        ValueError: for a teacher of another vocabulary, and for a `top_k` or `cache_length` below 1.
    """

    @checked()
    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        *args,
        top_k: int | None = None,
        cache_length: int = 4096,
        **kwargs,
    ):
        own, others = (each.config.get_text_config(decoder=True).vocab_size for each in (model, teacher))
        if own != others:
            raise ValueError(
                f"`teacher` has a vocabulary of {others} tokens, the model of {own}: pass the model that it was "
                "converted from."
            )
        for name, number in (("top_k", 1 if top_k is None else top_k), ("cache_length", cache_length)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        super().__init__(model, *args, **kwargs)
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, True  # what is counted is counted here
        self.teacher, self.top_k, self.cache_length = teacher.eval(), top_k, cache_length
        self._rates: dict[int, torch.Tensor] = {}  # layer -> [G], summed over its calls since the last log
        self._calls: dict[int, int] = {}
        routers_of(model)  # that there are any
        for name, router in named_routers(model):
            router.register_forward_hook(partial(self._note_rates, layer_of(name, model)))

    def _note_rates(
        self, layer: int, router: MosaRouter, args: tuple, output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        selected, valid = output[1], args[1].layout.valid
        tokens = selected[..., 0].numel() if valid is None else valid.sum().clamp(min=1).to(selected.device)
        self._rates[layer] = self._rates.get(layer, 0) + selected.sum((0, 1)) / tokens
        self._calls[layer] = self._calls.get(layer, 0) + 1

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        inputs, labels = {name: states for name, states in inputs.items() if name != "labels"}, inputs.get("labels")
        device = inputs["input_ids"].device
        own = (*self.teacher.parameters(), *self.teacher.buffers())  # some shared with the model, some copies
        if getattr(self.teacher, "hf_device_map", None) is None and any(each.device != device for each in own):
            self.teacher.to(device)
        with torch.no_grad(), self.accelerator.autocast():  # the model has it within its forward
            expected = self.teacher(**inputs, use_cache=False).logits
        outputs = model(**inputs, use_cache=False)
        actual, expected = outputs.logits.flatten(0, -2), expected.flatten(0, -2)
        counts = counted_tokens(inputs.get("attention_mask"), labels)
        if counts is not None:
            actual, expected = actual[counts.flatten()], expected[counts.flatten()]
        if not len(actual):
            raise ValueError(
                "A batch has no token to learn from: `attention_mask` is 0, or `labels` -100, everywhere."
            )
        loss = mean_divergence(actual, expected, self.top_k)
        if num_items_in_batch is not None:
            loss = loss * (len(actual) / num_items_in_batch)
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | None]:
        """
        As `Trainer.get_batch_samples`: the micro-batches of a step, and how many tokens count in all of them, on
        average over processes with `average_tokens_across_devices`.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        total = torch.as_tensor(sum(map(num_counted, batches)), dtype=torch.float32, device=self.args.device)
        if self.args.average_tokens_across_devices:
            total = cast(torch.Tensor, self.accelerator.reduce(total, "mean"))
        return batches, total

    def train(self, *args, **kwargs):
        """As `Trainer.train`."""
        self._rates, self._calls = {}, {}  # an earlier training may have ended between two lines
        return super().train(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; its metrics have shares of their own calls alone, under the same prefix."""
        training, self._rates, self._calls = (self._rates, self._calls), {}, {}
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            shares = {f"{metric_key_prefix}_{name}": share for name, share in self._shares().items()}
        finally:
            self._rates, self._calls = training
        return output._replace(metrics={**(output.metrics or {}), **shares})

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # else of an evaluation, or a summary
            assert self.model is not None
            logs.update({**selected_shares(self.model), **self._shares()})  # the former of routers that learn
            self._rates, self._calls = {}, {}
        super().log(logs, *args, **kwargs)

    def _shares(self) -> dict[str, float]:
        """What is logged of the calls since the last log."""
        if not self._rates:
            return {}
        own = {layer: total / self._calls[layer] for layer, total in self._rates.items()}
        rates = {layer: self.accelerator.reduce(each, "mean").cpu() for layer, each in own.items()}
        shares = {"selected": round(torch.cat(list(rates.values())).mean().item(), 4)}
        config = sparse_config_of(cast(PreTrainedModel, self.model).config)
        if isinstance(config, SparseGroupsConfig):
            shares[f"kv_share_{self.cache_length}"] = round(kv_share(config, self.cache_length, rates), 4)
        return shares


@checked()
def teacher_of(model: PreTrainedModel) -> PreTrainedModel:
    """
    The original of a converted model, to be taken before adapters are added. It shares the weights that do not learn,
    and has copies of those that do.

    Raises:
        ValueError: for a model without sparse groups, with adapters, or whose weights were healed.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("The model has adapters, which would be part of its teacher: take the teacher before them.")
    healed = (getattr(sparse_config_of(model.config), "mosa_conversion", None) or {}).get("healing")
    if healed is not None and healed["learn"] != "routers":
        raise ValueError(
            "The model was healed before, so that its weights are not those of its original any more: load that, and "
            "take it for the `teacher` (`mosa-heal --original`)."
        )
    teacher, own = to_dense(model), dict(model.named_parameters())
    # The very parameters, not only their memory: they go to a device together.
    memo: dict[int, torch.Tensor] = {
        id(each): own[name] for name, each in teacher.named_parameters() if not each.requires_grad
    }
    memo |= {id(tensor): tensor for tensor in teacher.buffers()}
    return copy.deepcopy(teacher, memo).eval()
