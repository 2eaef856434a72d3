"""The routers that sparse groups start from, fitted to the frozen model (docs/design.md, section 6).

The model reads a text twice. What the second reading takes from a token of the first one, relative to what else there
is, is the token's importance (`importance.py`); a router is fitted by ridge regression to predict it, from what the
attention layer sees when the token comes by. Importance is put on a scale that groups of all layers share
(`layer_offsets`), so one threshold can serve them all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..compat import CACHE
from ..modeling.decoder_inputs import continued, decoder_inputs, has_pictures
from ..modeling.devices import input_device
from ..modeling.group_plan import GroupPlan, sparse_among
from ..modeling.layers import (
    attention_modules,
    check_numbered,
    decoder_of,
    layers_of,
    num_places,
    output_projection_of,
)
from ..modeling.modes import evaluating
from .importance import output_gram, received, second_readings
from .windows import calibration_ids

# Least importance before the logarithm. A token below it is as good as never read; without the floor its logarithm,
# arbitrarily far down, would dominate the squared error.
FLOOR = 1e-9
# By how much a layer's importance may gain on that of the median layer, before the exponential: see `layer_offsets`.
MOST_OFFSET = 1.0


@dataclass(frozen=True)
class RouterFit:
    """The routers of one decoder layer with G sparse groups and hidden size D. All tensors: float32, on the CPU.

    weight: [G, D]. hidden_states @ weight.T + bias, of what the layer's attention module receives, predicts the
        logarithm of a token's importance.
    bias: [G].
    predicted: [N, T, G], what the routers say of the calibration text.
    importance: [N, T, G], what they should have said, before the logarithm.
    offset: what of `layer_offsets` is in the logarithms of all these.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    predicted: torch.Tensor
    importance: torch.Tensor
    offset: torch.Tensor


class _Regression:
    """What the sparse groups of one layer add up while the model reads.

    All of it is allocated once: small tensors that outlive each call would settle between large ones, keep malloc from
    joining what those leave, and fragment the heap.
    """

    def __init__(self, groups: list[int], lengths: list[int], num_skipped: int):
        self.groups, self.lengths, self.num_skipped = groups, lengths, num_skipped
        self.done = 0  # tokens so far
        self.count = 0  # rows of the regression so far
        self.shift: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.importance = torch.empty(sum(lengths), len(groups), dtype=torch.float32)

    def add(self, hidden_states: torch.Tensor, importance: torch.Tensor) -> None:
        """hidden_states [T, D], importance [T, G] of all the layer's groups, of one window of text."""
        importance = importance[:, self.groups].float()
        self.importance[self.done : self.done + len(importance)] = importance
        self.done += len(importance)
        rows = torch.cat([hidden_states.float(), importance.clamp_min(FLOOR).log()], dim=1)[self.num_skipped :]
        if self.gram is None:
            # Any constant near the mean will do. Without it, float32 sums would lose what centring leaves.
            self.shift = rows.mean(0)
            self.total = torch.zeros_like(self.shift)
            self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        assert self.shift is not None and self.total is not None
        rows -= self.shift
        self.gram.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.count += len(rows)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [G, D] and bias [G]. `ridge` is in units of the mean variance of a hidden channel."""
        assert self.shift is not None and self.total is not None and self.gram is not None
        mean = (self.total / self.count).cpu().double()
        covariance = self.gram.cpu().double() / self.count - mean.outer(mean)
        mean += self.shift.cpu().double()
        size = covariance.shape[0] - len(self.groups)
        covariance, cross = covariance[:size, :size], covariance[:size, size:]
        # What is left of equal rows is rounding.
        if not covariance.diagonal().mean() > 1e-12 * mean[:size].square().mean():
            raise ValueError(
                f"The calibration text has {self.count} tokens to learn from, which all look alike to the model: pass "
                "more text, and such as it will read."
            )
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        weight = torch.linalg.solve(covariance, cross).T
        return weight.float(), (mean[size:] - weight @ mean[:size]).float()


def layer_offsets(log_ratios: torch.Tensor) -> torch.Tensor:
    """
    What is added to the logarithm of importance before groups of different layers are compared, `[L]`.

    KVzip+ divides by the norm of what the attention module receives, which is normalised: what a layer adds to a
    residual that has grown counts as much as if it had not. The ratio of the two norms says how much less it is. No
    ratio counts below the median layer's: the last layers, whose residual is by far the largest, would keep next to
    nothing, which costs perplexity and wins no retrieval. And none counts more than `MOST_OFFSET` above it: the first
    layer reads embeddings, which are tiny in some models, and would take what all others need.

    Args:
        log_ratios: `[L]`, mean of log(‖attention input‖ / ‖layer input‖) over the tokens, of each layer.
    """
    median = log_ratios.quantile(0.5)
    return log_ratios.clamp(median, median + MOST_OFFSET)


@contextmanager
def _layer_ratios(decoder: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """
    Place of a layer → mean of log(‖attention input‖ / ‖layer input‖) over all tokens that are read meanwhile, of every
    layer with attention, sparse or not. It is there at the end.
    """
    layers, modules = layers_of(decoder), attention_modules(decoder)
    assert layers is not None
    in_each = num_places(decoder) // len(layers)
    total, count = {place: torch.zeros(2, dtype=torch.float32) for place in modules}, dict.fromkeys(modules, 0)

    def hook(place, row):
        def call(module, args, kwargs):
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            norm = states.detach().float().norm(dim=-1)
            norm = norm.masked_fill(norm == 0, 1)  # padding's embedding
            total[place][row] += norm.log().mean().cpu() * norm.shape[-1]
            count[place] += row * norm.shape[-1]

        return call

    handles = []
    for place, module in modules.items():
        for row, each in enumerate((layers[place // in_each], module)):
            handles.append(each.register_forward_pre_hook(hook(place, row), with_kwargs=True))
    ratios: dict[int, torch.Tensor] = {}
    try:
        yield ratios
    finally:
        for handle in handles:
            handle.remove()
    ratios |= {place: (own[1] - own[0]) / max(count[place], 1) for place, own in total.items()}


def _attention_modules(model: PreTrainedModel, layers: list[int]) -> list[nn.Module]:
    """The attention modules of some layers."""
    modules = attention_modules(decoder_of(model))
    check_numbered(modules, model.config.get_text_config(decoder=True).num_hidden_layers)
    if lacking := sorted(set(layers) - modules.keys()):
        raise ValueError(
            f"`model` ({type(model).__name__}) has no attention of Transformers' own in layer {lacking[0]}: "
            "pass a model as Transformers loads it, without replaced attention modules."
        )
    return [modules[layer] for layer in layers]


def _values(module: nn.Module, layer: CacheLayerMixin, num_tokens: int) -> torch.Tensor:
    """
    Values `[G, T, d]` of the first T tokens of a cache: of each group, or, where a latent is what is cached, of each
    head that expands it (one group has as many then).
    """
    assert layer.keys is not None and layer.values is not None
    key, value = layer.keys[:, :, :num_tokens], layer.values[:, :, :num_tokens]
    expand = getattr(module, "expand_kv", None)
    return (value if expand is None else expand(key, value)[1])[0]


def check_read_twice(name: str, length: int, most: int) -> None:
    """
    Raises:
        ValueError: for windows of `length` tokens, given by the argument `name`, of which a model that reads `most`
            cannot read two.
    """
    if 2 * length > most:
        raise ValueError(
            f"`{name}` asks for windows of {length} tokens, which the model reads twice: pass windows of at "
            f"most {most // 2} tokens, half of `max_position_embeddings`."
        )


def fit_routers(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[Any],
    plan: GroupPlan,
    *,
    include_first: bool = True,
    ridge: float = 0.1,
) -> list[RouterFit | None]:
    """Fit a router to every sparse group of a plan for a pretrained model; see `importance` for what it predicts.

    Args:
        model: of a family in `families`, weights quantised or not. It is left as found: mode, attention
            implementation, hooks.
        input_ids: [N, T], N windows of T tokens of text like that which the model will read, without padding; or a
            list of the token ids of each document, see `calibration_ids`; or, of a model of pictures and text, a list
            of what its processor makes of pictures and text, one by one.
            8 k tokens of several kinds are enough for a 135 M model.
        plan: which groups are sparse; it fits the model.
        include_first: the first token is always selected, and therefore no example for the regression.
        ridge: strength of the regularisation, in units of the mean variance of a hidden channel.

    Returns:
        One RouterFit per decoder layer, in order, of its sparse groups; None for a layer without.

    Memory: the covariances take 4 * D * D bytes for each layer; what attention receives T * D numbers for each;
    everything else is 8 bytes per token and group, and a cache of 2 * T tokens. Attention weights are not kept.

    Raises:
        ValueError: an argument out of range, a model without the expected attention modules, or activations that are
            not finite.
    """
    layers = [layer for layer, groups in enumerate(plan.layers) if any(groups)]
    config = model.config.get_text_config(decoder=True)
    readings = _readings(model, input_ids)
    lengths = [num_tokens_of(reading) for reading in readings]
    if ridge <= 0:
        raise ValueError(f"`ridge` is {ridge}; pass a positive number, for channels can be collinear.")
    check_read_twice("input_ids", max(lengths), config.max_position_embeddings)
    modules = _attention_modules(model, layers)
    decoder = decoder_of(model)
    regressions = [_Regression(sparse_among(plan.layers[layer]), lengths, int(include_first)) for layer in layers]
    grams: dict[int, torch.Tensor] = {}
    states: dict[int, torch.Tensor] = {}  # layer → what its attention received at the first reading
    predicted: list[torch.Tensor] = []  # of each layer: [tokens, G]

    def read(reading: dict[str, Any], num_tokens: int) -> None:
        cache = DynamicCache(config=config)
        with received(modules, lambda index, hidden_states: states.update({index: hidden_states[0]})):
            decoder(**reading, use_cache=True, **{CACHE: cache})
        with second_readings(decoder, modules) as seconds:
            decoder(**continued(reading, num_tokens), use_cache=True, **{CACHE: cache})
        for index, second in enumerate(seconds):
            module: Any = modules[index]
            layer: Any = cache.layers[module.layer_idx]
            value = _values(module, layer, num_tokens)
            if index not in grams:
                num_heads = len(second.strongest)
                gram = output_gram(output_projection_of(module), num_heads, value.shape[-1], states[index])
                grams[index] = gram.unflatten(0, (len(value), -1))
            scores = second.importance(value, grams[index])
            num_groups = len(plan.layers[layers[index]])
            regressions[index].add(states.pop(index), scores.unflatten(1, (num_groups, -1)).amax(-1))

    def route(index, hidden_states):
        weight, bias = solved[index]
        hidden_states = hidden_states[0].float()
        predicted[index][done : done + num_tokens] = nn.functional.linear(
            hidden_states, weight.to(hidden_states.device), bias.to(hidden_states.device)
        )

    progress = logging.tqdm(total=2 * len(readings), desc="Fitting routers", unit="window")
    with progress, evaluating(decoder), torch.no_grad():
        with _layer_ratios(decoder) as ratios:
            for reading, num_tokens in zip(readings, lengths, strict=True):
                read(reading, num_tokens)
                progress.update()
        solved = []
        for layer, own in zip(layers, regressions, strict=True):
            assert own.gram is not None
            if not own.gram.isfinite().all():
                raise ValueError(
                    f"`model` gives activations that are not finite in layer {layer}; load it with "
                    "dtype=torch.float32 or torch.bfloat16, and check its weights."
                )
            solved.append(own.solve(ridge))
            own.gram = None
            predicted.append(torch.empty_like(own.importance))
        with received(modules, route):
            done = 0  # read by `route`
            for reading, num_tokens in zip(readings, lengths, strict=True):
                decoder(**reading, use_cache=False)
                done += num_tokens
                progress.update()

    fits: list[RouterFit | None] = [None] * len(plan.layers)
    offsets = layer_offsets(torch.stack(list(ratios.values())))
    offset_of = dict(zip(ratios, offsets, strict=True))
    for layer, (weight, bias), own, z in zip(layers, solved, regressions, predicted, strict=True):
        offset = offset_of[layer]
        measured = _by_window(own.importance * offset.exp(), lengths)
        fits[layer] = RouterFit(weight, bias + offset, _by_window(z + offset, lengths), measured, offset)
    return fits


def _readings(model: PreTrainedModel, calibration: torch.Tensor | Sequence[Any]) -> list[dict[str, Any]]:
    """What the decoder is called with, for each window of a text, or for each text with pictures."""
    if is_of_pictures(calibration):
        return [decoder_inputs(model, each) for each in calibration]
    input_ids = calibration_ids(calibration, model.config.get_text_config(decoder=True))
    return [{"input_ids": ids[None]} for ids in input_ids.to(input_device(model))]


def num_tokens_of(reading: dict[str, Any]) -> int:
    tokens = reading["input_ids"] if reading.get("inputs_embeds") is None else reading["inputs_embeds"]
    return tokens.shape[1]


def is_of_pictures(calibration: Any) -> bool:
    """Whether a calibration is a list of what a processor makes of pictures and text."""
    is_list = isinstance(calibration, list | tuple) and len(calibration) > 0
    return is_list and any(map(has_pictures, calibration))


def _by_window(states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """
    `states` [tokens, G] as `[N, T, G]`. Windows of several lengths become one, which lacks the first tokens of all but
    the first: those count for nothing.
    """
    if len(set(lengths)) == 1:
        return states.view(len(lengths), lengths[0], -1)
    windows = states.split(lengths)
    return torch.cat([windows[0], *(each[1:] for each in windows[1:])])[None]
