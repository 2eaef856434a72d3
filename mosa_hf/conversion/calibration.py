"""Which key/value groups of a dense model can live with few keys, and the routers they start from.

A router is fitted by ridge regression on the frozen model (DESIGN sections 2 and 6): from the input of an
attention layer it predicts, for every token, how much attention the token will get from queries that no longer see it
through the window. Two passes over the calibration text: one with eager attention, which shows the attention weights,
for the regression; one without them, for the routers' logits, from which the thresholds and the kept mass follow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from ..modeling.families import family_of
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.thresholds import highest_share

# Smallest regression target before the logarithm, in units of uniform attention. A key below it is as good as never
# read; without the floor its logarithm, arbitrarily far down, would dominate the squared error.
FLOOR = 1e-6


@dataclass(frozen=True)
class RouterFit:
    """The routers of one decoder layer with G sparse groups and hidden size D. All tensors: float32, on the CPU.

    weight: [G, D]. The router logits are z = hidden_states @ weight.T, where hidden_states is what the layer's
        attention module receives. There is no bias: only the order of the logits and the threshold matter.
    threshold: [G], in units of z. The quantile 1 - 1/sparsity of z on the calibration text.
    kept_mass: [G], between 0 and 1. The share of attention that the queries past the window give to keys they would
        still see, averaged over queries and the group's heads.
    """

    weight: torch.Tensor
    threshold: torch.Tensor
    kept_mass: torch.Tensor


class _Statistics:
    """What the groups of one layer that have the same window add up during the eager pass.

    All of it is allocated once: small tensors that outlive each call would settle between the attention matrices, keep
    malloc from joining what those leave, and cost 300 MB of fragmented heap a window of 1024 tokens.
    """

    def __init__(self, windows: int, groups: list[int], window: int, include_first: bool):
        self.windows, self.groups, self.window, self.include_first = windows, groups, window, include_first
        self.done = 0  # windows of text so far
        self.count = 0  # rows of the regression so far
        self.shift = self.total = self.gram = None
        self.far = None  # [N, G, T - window]: the mean attention that each key gets from the queries past the window

    def add(self, hidden_states: torch.Tensor, attention: torch.Tensor) -> None:
        """hidden_states [T, D], attention [G, R, T, T] (groups, their heads, queries, keys) of one window of text."""
        length = len(hidden_states)
        if len(self.groups) < len(attention):
            attention = attention[self.groups]
        # Row i is query window + i and column j is key j, so that "far", t - j >= window, is the lower triangle.
        attention = attention[:, :, self.window :, : length - self.window]
        strongest = attention.amax(1).float().tril_()
        if self.far is None:
            self.far = torch.zeros(self.windows, len(attention), length - self.window)
        self.far[self.done] = attention.mean(1, dtype=torch.float32).tril_().sum(1) / (length - self.window)
        self.done += 1

        # A query at position t spreads its attention over t + 1 keys: times (t + 1), early and late queries count
        # alike.
        keys = torch.arange(int(self.include_first), length - self.window - max(self.window, 1) + 1)
        queries = torch.arange(self.window + 1, length + 1, dtype=torch.float32, device=strongest.device)
        importance = (queries @ strongest)[:, keys] / (length - self.window - keys).to(strongest.device)

        rows = torch.cat([hidden_states[keys].float(), importance.clamp_min_(FLOOR).log_().T], dim=1)
        if self.gram is None:
            # Any constant near the mean will do. Without it, float32 sums would lose what centring leaves.
            self.shift = rows.mean(0)
            self.total = torch.zeros_like(self.shift)
            self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows -= self.shift
        self.gram.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.count += len(rows)

    def fit(self, ridge: float) -> torch.Tensor:
        """The regression weights, [G, D]. `ridge` is in units of the mean variance of a hidden channel."""
        mean = (self.total / self.count).double().cpu()
        covariance = self.gram.double().cpu() / self.count - mean.outer(mean)
        size = covariance.shape[0] - self.far.shape[1]
        covariance, cross = covariance[:size, :size], covariance[:size, size:]
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        return torch.linalg.solve(covariance, cross).T.float()

    def kept_mass(self, hidden: torch.Tensor) -> torch.Tensor:
        """[G]: the share of attention on keys that are not both far and `hidden` [N, T, G]."""
        hidden = hidden.transpose(1, 2)[:, :, : -self.window or None].clone()
        hidden[:, :, 0] &= not self.include_first
        lost = (self.far * hidden).sum(2).mean(0)
        return (1 - lost).clamp_(0, 1)


@contextmanager
def _hooks(modules: list[nn.Module], function: Callable[[int, torch.Tensor, tuple], None]) -> Iterator[None]:
    """Call function(layer index, hidden_states, output) after each attention module, for the duration."""

    def hook(index):
        def call(module, args, kwargs, output):
            function(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output)

        return call

    handles = [module.register_forward_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and attention implementation are put back whatever happens."""
    modes = [(module, module.training) for module in decoder.modules()]
    implementation = decoder.config._attn_implementation
    decoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if decoder.config._attn_implementation != implementation:
            decoder.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training


def _attention_modules(model: nn.Module, layers: list[int]) -> list[nn.Module]:
    """The attention modules of some layers."""
    attention_class = family_of(model.config.model_type).base_attention_class
    modules = {each.layer_idx: each for each in model.modules() if type(each) is attention_class}
    if lacking := sorted(set(layers) - modules.keys()):
        raise ValueError(
            f"`model` ({type(model).__name__}) has no {attention_class.__name__} in layer {lacking[0]}: pass a model "
            "as Transformers loads it, without replaced attention modules."
        )
    return [modules[layer] for layer in layers]


def _check_text(input_ids: torch.Tensor, window: int, ridge: float) -> None:
    if ridge <= 0:
        raise ValueError(f"`ridge` is {ridge}; pass a positive number, for channels can be collinear.")
    if input_ids.ndim != 2 or len(input_ids) < 1:
        raise ValueError(
            f"`input_ids` has shape {list(input_ids.shape)}; pass [N, T], at least one window (N >= 1) of T tokens."
        )
    if input_ids.shape[1] <= 2 * window:
        raise ValueError(
            f"`input_ids` has windows of {input_ids.shape[1]} tokens, too short to see which keys are read from "
            f"beyond `window` = {window}; pass more than {2 * window} tokens a window, or a smaller `window`."
        )


def fit_routers(
    model: nn.Module, input_ids: torch.Tensor, plan: GroupPlan, *, include_first: bool = True, ridge: float = 0.1
) -> list[RouterFit | None]:
    """Fit a router to every sparse group of a plan for a pretrained model (DESIGN sections 2 and 6).

    The regression target of key j and group g is the logarithm of the mean, over its far queries t (t - j >= window),
    of the largest attention weight A[t, j] among the group's heads, times t + 1. Keys with fewer than `window` far
    queries are left out. Weights may be quantised: only activations are read.

    Args:
        model: of a family in `families`. It is left as found: mode, attention implementation, hooks.
        input_ids: [N, T], N windows of T tokens of text like that which the model will read, without padding.
            20 windows of 1024 tokens are enough for a 135 M model.
        plan: which groups are sparse, with their windows and sparsities; it fits the model.
        include_first: the first token is always selected, and therefore no example for the regression.
        ridge: strength of the regularisation, in units of the mean variance of a hidden channel.

    Returns:
        One RouterFit per decoder layer, in order, of its sparse groups; None for a layer without.

    Memory: eager attention holds a few times heads * T * T numbers for one layer at a time; the covariances take
    4 * D * D bytes for each layer and window; everything else is 8 bytes per token and group.

    Raises:
        ValueError: an argument out of range, a model without the expected attention modules, or activations that are
            not finite.
    """
    layers = [layer for layer, groups in enumerate(plan.layers) if any(groups)]
    _check_text(input_ids, max((plan.layers[i][j].window for i, j in plan.sparse_pairs()), default=0), ridge)
    modules = _attention_modules(model, layers)
    decoder = model.base_model
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # offloaded: hooks move inputs
    num_groups = len(plan.layers[0])
    statistics = [_layer_statistics(plan.layers[layer], len(input_ids), include_first) for layer in layers]
    weights: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []  # per layer: [N, T, G], groups in the order of its statistics

    def add(index, hidden_states, output):
        if output[1] is None:
            raise ValueError(
                f"`model` ({type(model).__name__}) does not show its attention weights; it must support "
                "`attn_implementation='eager'`."
            )
        for each in statistics[index]:
            each.add(hidden_states[0], output[1][0].unflatten(0, (num_groups, -1)))

    def route(index, hidden_states, output):
        logits[index][row] = hidden_states[0].float() @ weights[index].to(hidden_states.device).T

    progress = logging.tqdm(total=2 * len(input_ids), desc="Fitting routers", unit="window")
    with progress, _frozen(decoder):
        implementation = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")
        with _hooks(modules, add):
            for ids in input_ids:
                decoder(input_ids=ids[None].to(device), use_cache=False)
                progress.update()
        for layer, own in zip(layers, statistics, strict=True):
            if not all(each.gram.isfinite().all() for each in own):
                raise ValueError(
                    f"`model` gives activations that are not finite in layer {layer}; load it with "
                    "dtype=torch.float32 or torch.bfloat16, and check its weights."
                )
            weights.append(torch.cat([each.fit(ridge) for each in own]))
            logits.append(torch.empty(*input_ids.shape, len(weights[-1])))
            for each in own:
                each.gram = None
        decoder.set_attn_implementation(implementation)
        with _hooks(modules, route):
            for row in range(len(input_ids)):  # read by `route`
                decoder(input_ids=input_ids[row : row + 1].to(device), use_cache=False)
                progress.update()

    fits: list[RouterFit | None] = [None] * len(plan.layers)
    for layer, weight, own, z in zip(layers, weights, statistics, logits, strict=True):
        groups = [group for each in own for group in each.groups]
        threshold = highest_share(z.flatten(0, 1), [plan.layers[layer][group].sparsity for group in groups])
        kept_mass = torch.cat([each.kept_mass(part) for each, part in _split(own, z < threshold)])
        order = sorted(range(len(groups)), key=groups.__getitem__)
        fits[layer] = RouterFit(weight[order], threshold[order], kept_mass[order])
    return fits


def _layer_statistics(groups: tuple[SparseGroup | None, ...], windows: int, include_first: bool) -> list[_Statistics]:
    """One for each window that a layer's sparse groups have."""
    by_window: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        if group is not None:
            by_window.setdefault(group.window, []).append(index)
    return [_Statistics(windows, members, window, include_first) for window, members in by_window.items()]


def _split(own: list[_Statistics], hidden: torch.Tensor) -> Iterator[tuple[_Statistics, torch.Tensor]]:
    """Each of a layer's statistics with its groups' part of `hidden` [N, T, G]."""
    return zip(own, hidden.split([len(each.groups) for each in own], dim=2), strict=True)
