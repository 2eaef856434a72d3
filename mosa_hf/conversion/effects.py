"""
What a plan does to what a model predicts, measured: the divergence of the original's predictions from those of the
model with the plan's sparse groups; and its derivative with respect to every group's choice, from one backward pass.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..cache import Routed
from ..kernels.tensors import take
from ..modeling.attention import LayerContext, LayerGroups, mosa_attention_forward
from ..modeling.configuration import SparseGroupsConfig
from ..modeling.devices import input_device
from ..modeling.family import family_of
from ..modeling.group_plan import GroupPlan, sparse_among
from ..modeling.layers import layer_of
from ..modeling.router import MosaRouter
from ..modeling.sparse_groups import SparseGroupsMixin
from ..modeling.sparse_models import with_sparse_groups
from ..modeling.thresholds import highest_share
from ..routing.selection import select_by_threshold
from .calibration import RouterFit, frozen
from .divergence import divergence_of_likely

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # query, key, value, mask
PROBED = "mosa_probed"  # the attention function of models whose choices are probed
MOST_LIKELY = 256  # tokens whose probabilities are compared one by one; all others as one


class Predictions(NamedTuple):
    """What the original predicts after P tokens of a text."""

    position: torch.Tensor  # [P] int64, of these tokens
    token: torch.Tensor  # [P, K] int64, the most likely next tokens
    log_probability: torch.Tensor  # [P, K] float32


def divergence(logits: torch.Tensor, expected: Predictions) -> torch.Tensor:
    """KL(expected ‖ predicted) in nats, mean over P positions, of logits `[P, V]`; what is unlikely counts as one."""
    return divergence_of_likely(logits, expected.token, expected.log_probability) / len(logits)


class Effects:
    """
    Measures plans of one model on some texts.

    Memory: besides the model, what attention and head need for one text; a hidden state for each layer and token of it
    while derivatives are taken; 12 K bytes for each position that is compared.

    Args:
        model: the original, with a language-modelling head. It is left as it was.
        fits: of routers for all groups that a plan may make sparse.
        candidates: the plan that `fits` are of.
        texts: token ids `[N, T]`.
        positions: how many are compared in each text, spread over its second half, where windows do not reach back to
            the beginning.
        include_first: whether the first token is always selected.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fits: list[RouterFit | None],
        candidates: GroupPlan,
        texts: torch.Tensor,
        positions: int = 512,
        include_first: bool = True,
    ):
        self.model, self.fits, self.candidates, self.texts = model, fits, candidates, texts
        self.include_first = include_first
        length = texts.shape[1]
        self.position = torch.linspace(length // 2, length - 1, min(positions, length - length // 2)).long()
        self._expected: dict[int, Predictions] = {}

    def expected(self, row: int) -> Predictions:
        """What the original predicts in text `row`."""
        if row not in self._expected:
            with frozen(self.model):
                logits = self._logits(self.model, row)
            best, token = logits.float().log_softmax(-1).topk(min(MOST_LIKELY, logits.shape[-1]), dim=-1)
            self._expected[row] = Predictions(self.position, token, best)
        return self._expected[row]

    def _logits(self, model: PreTrainedModel, row: int) -> torch.Tensor:
        """Logits [P, V]."""
        device = input_device(model)
        input_ids = self.texts[row : row + 1].to(device)
        return model(input_ids, use_cache=False, logits_to_keep=self.position.to(device)).logits[0]

    @torch.no_grad()
    def with_plan(self, plan: GroupPlan) -> PreTrainedModel:
        """The model with a plan's groups, the fitted routers, and the thresholds that select at the plan's rates."""
        sparse = with_sparse_groups(self.model, self._config(plan)).eval()
        for layer, router in sparse.mosa_routers().items():
            fitted = self._fitted(layer, sparse_among(plan.layers[layer]))
            router.weight.copy_(self.fits[layer].weight[fitted])
            router.threshold.copy_(self._thresholds(layer, plan))
        return sparse

    def _config(self, plan: GroupPlan) -> SparseGroupsConfig:
        return family_of(self.model.config.model_type).config_class.from_base(
            self.model.config,
            mosa_plan=plan.to_list(),
            mosa_include_first=self.include_first,
            mosa_routing="threshold",
            mosa_gate_slope=0.0,
        )

    def _fitted(self, layer: int, groups: Sequence[int]) -> list[int]:
        """Where `groups` of a layer are among those that have fits."""
        own = sparse_among(self.candidates.layers[layer])
        return [own.index(group) for group in groups]

    def _thresholds(self, layer: int, plan: GroupPlan) -> torch.Tensor:
        """The thresholds of the sparse groups of a layer `[G]`, for logits without bias, which routers lack."""
        groups = {group: kind for group, kind in enumerate(plan.layers[layer]) if kind is not None}
        fitted, fit = self._fitted(layer, list(groups)), self.fits[layer]
        assert fit is not None
        predicted = fit.predicted[:, int(self.include_first) :, fitted].flatten(0, 1)
        rates = [kind.sparsity for kind in groups.values()]
        keeps_all = torch.tensor([rate == 1 for rate in rates])
        return (highest_share(predicted, rates) - fit.bias[fitted]).masked_fill(keeps_all, -torch.inf)

    @torch.no_grad()
    def of(self, plan: GroupPlan, first: int = 0) -> Iterator[float]:
        """The divergence of a plan on each text from the `first` on."""
        model = self.with_plan(plan)
        for row in range(first, len(self.texts)):
            expected = self.expected(row)
            yield float(divergence(self._logits(model, row), expected))

    def of_moves(self, plan: GroupPlan, moves: Sequence[GroupPlan], first: int = 0) -> Iterator[torch.Tensor]:
        """
        The derivative `[M, L, G]` of the divergence, for each text from the `first` on, with respect to each group's
        move from `plan` to each of M other plans, at the plan: what the move alone would change the divergence by,
        were that linear. Zero for groups that are dense, and for those that a layer with fewer than G lacks.

        Args:
            moves: plans that have the same sparse groups as `plan`.
        """
        model = self.with_plan(plan).requires_grad_(False)
        probes = {}
        for name, module in model.named_modules():
            if isinstance(module, SparseGroupsMixin):
                layer = layer_of(name, model)
                others = [
                    Choice(LayerGroups.of_plan(other.layers[layer]), self._thresholds(layer, other)) for other in moves
                ]
                cast(Probed, module).mosa_probe = probes[layer] = Probe(module.mosa_router, others)
                module.config._attn_implementation = PROBED
            elif isinstance(module, GradientCheckpointingLayer):
                _recompute(module)
        model.enable_input_require_grads()
        size = (len(moves), len(plan.layers), max(map(len, plan.layers)))
        for row in range(first, len(self.texts)):
            expected = self.expected(row)
            with torch.enable_grad():
                divergence(self._logits(model, row), expected).backward()
            effects = torch.zeros(size)
            for layer, probe in probes.items():
                own = probe.take_effects()
                effects[:, layer, : own.shape[1]] = own
            yield effects


class Choice(NamedTuple):
    """What the groups of a layer might be."""

    groups: LayerGroups
    threshold: torch.Tensor  # [G], of its sparse groups


class Probe:
    """
    Tells of one attention module what it would give for other choices of its groups, against the gradient of what it
    gives.

    Args:
        router: of the module, whose logits decide what the choices select.
        choices: with the same sparse groups as the module's own.
    """

    def __init__(self, router: MosaRouter, choices: list[Choice]):
        self.choices = choices
        self.logits: torch.Tensor | None = None  # [B, T, G] of the last call
        self._effects: list[Any] = [0.0] * len(choices)  # [G] each, once a gradient has come by
        router.register_forward_hook(self._see)

    def _see(self, router: MosaRouter, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.logits = output[0].detach()

    @torch.no_grad()
    def watch(
        self, module: SparseGroupsMixin, output: torch.Tensor, states: States, call: LayerContext, options: dict
    ) -> None:
        """
        Add up the effects of a call when the gradient of its output comes by.

        Args:
            output: `[B, T, H, d]`.
            states: query, key, value and mask, as `mosa_attention_forward` takes them.
        """
        assert self.logits is not None  # the router has been called
        first = call.layout.first if module.mosa_router.include_first else None
        changes = []
        for choice in self.choices:
            threshold = choice.threshold.to(self.logits.device)
            selected = select_by_threshold(self.logits, threshold, call.layout.valid, first)
            routed = [Routed(take(selected, columns, dim=2)) for columns in choice.groups.columns]
            other = call._replace(routed=routed, gates=[None] * len(routed))
            changed, _ = mosa_attention_forward(Regrouped(module, choice.groups), *states, mosa=other, **options)
            changes.append(changed - output)

        def add(gradient: torch.Tensor) -> None:
            for i, change in enumerate(changes):
                heads = (gradient * change).sum((0, 1, 3), dtype=torch.float32)  # [H]
                self._effects[i] += heads.unflatten(0, (module.mosa_groups.num_groups, -1)).sum(-1).cpu()

        output.register_hook(add)

    def take_effects(self) -> torch.Tensor:
        """`[M, G]` of all groups of the layer, of the calls since the last time."""
        effects, self._effects = torch.stack(self._effects), [0.0] * len(self.choices)
        return effects


class Probed(SparseGroupsMixin):
    """An attention module with a probe, as types have it: none is made."""

    mosa_probe: Probe


class Regrouped:
    """An attention module as the attention function "mosa" sees it, but with other groups."""

    config: Any
    mosa_budget: int | None

    def __init__(self, module: SparseGroupsMixin, groups: LayerGroups):
        self.module, self.mosa_groups = module, groups

    def __getattr__(self, name: str):
        return getattr(self.module, name)


def probed_attention(
    module: "Probed",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mosa: LayerContext | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function "mosa", watched by the module's `mosa_probe` when gradients are recorded."""
    states = (query, key, value, attention_mask)
    output, weights = mosa_attention_forward(module, *states, mosa=mosa, **options)
    if mosa is not None and output.requires_grad:
        module.mosa_probe.watch(module, output, states, mosa, options)
    return output, weights


ALL_ATTENTION_FUNCTIONS.register(PROBED, probed_attention)


def _recompute(layer: nn.Module) -> None:
    """
    Let a layer forget its activations, and compute them again when its gradient is due. The first time it records
    nothing, so that nothing is probed twice.
    """
    forward = layer.forward

    def recomputed(hidden_states, *args, **kwargs):
        return checkpoint(
            partial(forward, **kwargs), hidden_states, *args, use_reentrant=True, preserve_rng_state=False
        )

    layer.forward = recomputed
