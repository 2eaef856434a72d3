"""The routers of a layer's groups: logits, selection, and thresholds that follow (docs/design.md, section 3)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.utils import logging

from ..cache import SparseLayer
from ..kernels.capture import is_exported
from ..routing.layout import CallLayout
from ..routing.selection import select_by_expert_choice, select_by_threshold
from .call import ModelCall
from .configuration import RoutingConfig

logger = logging.get_logger(__name__)


class MosaRouter(nn.Module):
    """
    Routers, one a group: linear, or an MLP whose hidden layer the groups share. No `nn.Linear`s, since tools that
    quantise or adapt linear layers must leave routers as they are: selection compares logits with thresholds, in
    float32 (float64 for a float64 model), whatever the model's dtype or autocast. The buffer `threshold` [G] follows
    the groups' K-th highest logit while the weights train.

    Args:
        config: of the model.
        layer_idx: index of the layer.
        sparsity: ρ of each group.
        hidden_size: units of the hidden layer, H: logits are weight [G, H] · GELU(hidden_weight [H, D] · x +
            hidden_bias). None: weight [G, D] · x.
    """

    def __init__(
        self, config: RoutingConfig, layer_idx: int, sparsity: Sequence[float], hidden_size: int | None = None
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.sparsity = tuple(sparsity)
        self.keeps_all = tuple(each == 1 for each in self.sparsity)  # groups that select every token
        self.min_tokens = config.mosa_min_tokens
        self.include_first = config.mosa_include_first
        self.training_routing = config.mosa_routing
        self.inference_routing = config.mosa_inference_routing
        self.momentum = config.mosa_threshold_momentum
        num_groups = len(self.sparsity)
        self.in_features, width = config.hidden_size, hidden_size or config.hidden_size
        self.hidden_weight = self.hidden_bias = None
        if hidden_size is not None:
            self.hidden_weight = nn.Parameter(torch.empty(hidden_size, self.in_features, dtype=torch.float32))
            self.hidden_bias = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.weight = nn.Parameter(torch.empty(num_groups, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_groups, dtype=torch.float32)) if config.mosa_router_bias else None
        self.register_buffer("threshold", torch.zeros(num_groups, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` must not round the threshold: a moving average would stall between two values.
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = threshold.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        hidden = "" if self.hidden_weight is None else f"hidden_features={len(self.hidden_weight)}, "
        return f"in_features={self.in_features}, {hidden}groups={len(self.sparsity)}"

    @property
    def routing(self) -> str:
        """The rule in force: "expert_choice" or "threshold"."""
        return self.training_routing if self.training else self.inference_routing

    def check_cache(self, cache: SparseLayer | None) -> None:
        """
        Raises:
            ValueError: for expert choice on top of cached tokens.
        """
        if cache is not None and self.routing == "expert_choice" and cache.has_tokens():
            raise ValueError(
                "'expert_choice' routing selects from a whole sequence at once and cannot continue from a cache. Use "
                "`model.eval()` with `mosa_inference_routing='threshold'`, or pass `use_cache=False`."
            )

    def groups_by_sparsity(self) -> dict[float, list[int]]:
        """ρ → the groups that have it."""
        groups: dict[float, list[int]] = {}
        for group, sparsity in enumerate(self.sparsity):
            groups.setdefault(sparsity, []).append(group)
        return groups

    def forward(
        self, hidden_states: torch.Tensor, call: ModelCall, follows: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[B, T, D]`.
            call: of the model.
            follows: whether thresholds may follow this call's logits: they do in training, of whole sequences, which
                calls without a cache have.

        Returns:
            logits `[B, T, G]` and selected `[B, T, G]` bool.

        Raises:
            ValueError: in an export, for what is only there to train, or for expert choice.
        """
        logits = self._logits(hidden_states)
        layout = call.layout.to(logits.device)
        valid, segment, first = layout.valid, layout.segment, layout.first if self.include_first else None
        if all(self.keeps_all):  # nothing to choose, whatever the thresholds are
            selected = torch.ones_like(logits, dtype=torch.bool)
            return logits, selected if valid is None else selected & valid[..., None]
        # Gradients mark training: reinforcement learning also generates, and evaluates, in training mode.
        learns = self.momentum < 1 and self.training and self._learns() and torch.is_grad_enabled()
        if learns and not follows and not torch.compiler.is_compiling():
            logger.warning_once(
                "Routers learn, but their thresholds stay as they are: they follow in calls without a cache alone. To "
                "train, pass `use_cache=False` or set `model.config.use_cache = False`, as `Trainer` does."
            )
        follows = follows and learns
        if follows or self.routing == "expert_choice":
            if is_exported():  # how many tokens are chosen is a number, and would be the samples'
                raise ValueError(
                    "An exported program selects by thresholds: call `model.eval()`, with "
                    "`mosa_inference_routing='threshold'`, before the export."
                )
            selected, last = self._choose(logits.detach(), valid, first, segment)
        threshold = self._follow(last, call) if follows else call.thresholds.get(self.layer_idx, self.threshold)
        if self.routing == "threshold":
            if any(self.keeps_all):
                keeps_all = torch.tensor(self.keeps_all, device=logits.device)
                threshold = threshold.masked_fill(keeps_all, -torch.inf)
            selected = select_by_threshold(logits.detach(), threshold, valid, first)
        return logits, selected

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self._logits(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        states = hidden_states.to(dtype)
        if self.hidden_weight is not None:
            states = F.gelu(F.linear(states, self.hidden_weight.to(dtype), self.hidden_bias.to(dtype)))
        return F.linear(states, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def _learns(self) -> bool:
        weights = (self.weight, self.hidden_weight)
        return any(weight is not None and weight.requires_grad for weight in weights)

    def _choose(
        self,
        logits: torch.Tensor,
        valid: torch.Tensor | None,
        first: torch.Tensor | None,
        segment: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`select_by_expert_choice` for groups of several sparsities."""
        rates = self.groups_by_sparsity()
        if len(rates) == 1:
            return select_by_expert_choice(logits, self.sparsity[0], self.min_tokens, valid, first, segment)
        selected, last = torch.empty_like(logits, dtype=torch.bool), logits.new_empty(len(self.sparsity))
        for sparsity, groups in rates.items():
            selected[..., groups], last[groups] = select_by_expert_choice(
                logits[..., groups], sparsity, self.min_tokens, valid, first, segment
            )
        return selected, last

    @torch.no_grad()
    def _follow(self, last: torch.Tensor, call: ModelCall) -> torch.Tensor:
        """Move `threshold` towards `last` [G], once a model call; returns the threshold that the call routes with."""
        if self.layer_idx not in call.thresholds:
            call.thresholds[self.layer_idx] = self.threshold.clone()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                seen = last.isfinite().float()
                last = torch.stack((last.nan_to_num(), seen))
                torch.distributed.all_reduce(last)
                last = last[0] / last[1]
            moved = self.threshold * self.momentum + last * (1 - self.momentum)
            self.threshold.copy_(torch.where(last.isfinite(), moved, self.threshold))
        return call.thresholds[self.layer_idx]

    def score(self, logits: torch.Tensor, layout: CallLayout) -> torch.Tensor:
        """
        What a cache budget compares, `[B, T, G]`: logits, inf for a token that is never evicted.

        Rounded to bfloat16: a repeated token has the same logit, and float32's last bits, which differ between a
        prefill and a single step, must not decide which of the two is evicted.
        """
        score = logits.detach().bfloat16().float()
        if self.include_first and layout.first is not None:
            score = score.masked_fill(layout.first.to(score.device)[..., None], torch.inf)
        return score


def in_force(module: nn.Module) -> nn.Module:
    """
    What computes when `module` is called: itself, or what lies within it if an adapter of PEFT is around it, such as
    the router of `modules_to_save=["mosa_router"]`, or the original one while that adapter is disabled.
    """
    if isinstance(module, ModulesToSaveWrapper):
        active = () if module.disable_adapters else module.active_adapters
        own = [name for name in active if name in module.modules_to_save]
        return module.modules_to_save[own[0]] if own else module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def named_routers(module: nn.Module, name: str = "") -> Iterator[tuple[str, MosaRouter]]:
    """The routers of a model that are in force, in layer order, each with the name that it has without adapters."""
    module = in_force(module)
    if isinstance(module, MosaRouter):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from named_routers(child, f"{name}.{child_name}" if name else child_name)
