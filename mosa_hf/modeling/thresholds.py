"""Thresholds from text: sets every group's θ so that it selects one token in its ρ (docs/design.md, section 3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..arguments import checked
from .decoder_inputs import decoder_inputs, has_pictures
from .devices import input_device
from .forward_context import ForwardContext
from .layers import check_uncompiled, decoder_of, layer_of
from .modes import evaluating
from .router import MosaRouter, named_routers, routers_of
from .token_ids import check_no_padding, check_token_ids, padding_token

ROUNDING = 1e-5  # of the largest logit: by how much logits of equal inputs may differ


@checked()
@torch.no_grad()
def calibrate_thresholds(
    model: PreTrainedModel, batches: Iterable[torch.Tensor | Sequence[int] | Mapping[str, torch.Tensor]]
) -> None:
    """
    Set the `threshold` of every group of `model`, in place, to the (1 - 1/ρ) quantile of its logits on some text, ρ
    being the group's own.

    The model routes by expert choice meanwhile, so that each layer sees inputs made at the right selection rate,
    whatever the thresholds were before.

    Args:
        model: any MoSA model.
        batches: token ids `[B, T]`, or `[T]` of one document, as tensors or lists; or mappings with `input_ids` and
            perhaps `attention_mask`; or, of a model of pictures and text, what its processor makes of one picture and
            text. One pass is made.

    Raises:
        ValueError: if the model has no MoSA heads, `batches` are none or hold no tokens of its vocabulary, or logits
            are not finite.
    """
    routers = routers_of(model)
    thresholds = [
        highest_share(seen, router.sparsity) for router, seen in zip(routers, seen_logits(model, batches), strict=True)
    ]
    for router, threshold in zip(routers, thresholds, strict=True):
        router.threshold.copy_(threshold)


@torch.no_grad()
def seen_logits(
    model: PreTrainedModel, batches: Iterable[torch.Tensor | Sequence[int] | Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """
    The logits `[N, G]` of every router of `model` on the N tokens of some text that it has a choice of, on the CPU.
    Args and errors are those of `calibrate_thresholds`, and so is the routing meanwhile.
    """
    routers = routers_of(model)
    check_uncompiled(model, "set thresholds before it is compiled")
    logits: dict[MosaRouter, list[torch.Tensor]] = {router: [] for router in routers}

    def record(router: MosaRouter, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        call: ForwardContext = args[1]
        layout = call.layout.to(output[0].device)
        seen = torch.ones_like(layout.position, dtype=torch.bool) if layout.valid is None else layout.valid
        # The first token is selected in any case: its logit has no part in the rate.
        if router.include_first and layout.first is not None:
            seen = seen & ~layout.first
        logits[router].append(output[0][seen].cpu())

    device = input_device(model)
    routing = [router.inference_routing for router in routers]
    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        for router in routers:
            router.inference_routing = "expert_choice"
        with evaluating(model):
            for batch in batches:
                if has_pictures(batch):
                    inputs = decoder_inputs(model, cast(Mapping, batch))
                else:
                    inputs = read_batch(batch, model.config.get_text_config(decoder=True))
                    inputs = {name: states.to(device) for name, states in inputs.items()}
                decoder_of(model)(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for router, rule in zip(routers, routing, strict=True):
            router.inference_routing = rule

    collected = [torch.cat(logits.pop(router) or [torch.empty(0, len(router.sparsity))]) for router in routers]
    for (name, _), seen in zip(named_routers(model), collected, strict=True):
        if len(seen) == 0:
            raise ValueError(
                "`batches` holds no tokens to calibrate on: pass at least one batch of two or more tokens."
            )
        if not seen.isfinite().all():
            raise ValueError(f"The router of layer {layer_of(name, model)} gives logits that are not finite.")
    return collected


def read_batch(
    batch: torch.Tensor | Sequence[int] | Mapping[str, torch.Tensor], config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """
    `input_ids` `[B, T]`, and `attention_mask` where it is given.

    Raises:
        ValueError: for what is no batch, or no token id, and for padding without a mask.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    try:
        names = [name for name in ("input_ids", "attention_mask") if inputs.get(name) is not None]
        inputs = {name: torch.as_tensor(inputs[name]) for name in names}
    except (TypeError, ValueError, RuntimeError):  # texts, rows of several lengths
        inputs = {}
    if "input_ids" not in inputs or inputs["input_ids"].ndim not in (1, 2):
        raise ValueError(
            "`batches` must be several of token ids [B, T] or [T], or of mappings with such `input_ids`: pass a list "
            "of them. `mosa_hf.conversion.calibration_windows(tokenizer, texts)` makes them of texts and chats."
        )
    check_token_ids(inputs["input_ids"], config.vocab_size, "batches")
    if not inputs["input_ids"].numel():
        raise ValueError("`batches` has one that holds no tokens: leave it out.")
    read = {name: torch.atleast_2d(torch.as_tensor(states)) for name, states in inputs.items()}
    read["input_ids"] = read["input_ids"].long()
    if "attention_mask" not in read:
        check_no_padding(read["input_ids"], padding_token(config), "batches")
    return read


def highest_share(logits: torch.Tensor, sparsity: Sequence[float]) -> torch.Tensor:
    """
    `[G]`: the value that one in `sparsity[g]` of `logits[:, g]` [N, G] reaches, group by group. Half-way between two
    logits: at one itself, rounding would decide whether its token is selected. That may have the logits of many
    tokens, since a router of the first layer knows nothing of a token but which it is; then the value lies above or
    below all of them, whichever gives the share more nearly.
    """
    values = logits.new_empty(len(sparsity))
    for group, rate in enumerate(sparsity):
        own = logits[:, group]
        rank = max(round(len(own) / rate), 1)
        # kthvalue counts from the lowest; torch.quantile would refuse more than 16 M values.
        value = own.kthvalue(len(own) - rank + 1).values
        rounding = ROUNDING * own.abs().max()
        above, reaches = own > value + rounding, own >= value - rounding
        num_above, num_reaching = int(above.sum()), int(reaches.sum())
        # None above: then nothing would be selected.
        if num_above and rank - num_above < num_reaching - rank:
            values[group] = (own[above].min() + own[~above].max()) / 2
        elif num_reaching < len(own):
            values[group] = (own[reaches].min() + own[~reaches].max()) / 2
        else:
            values[group] = own.min()
    return values
