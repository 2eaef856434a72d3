"""The routers of a layer's groups: logits, selection, and thresholds that follow (docs/design.md, section 3)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.adaption_prompt import AdaptedAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from ..cache import SparseLayer
from ..kernels.capture import is_exported
from ..kernels.indexing import constant
from ..routing.selection import select_by_expert_choice, select_by_threshold
from .configuration import RoutingConfig
from .devices import is_distributed
from .forward_context import ForwardContext

logger = logging.get_logger(__name__)

PRECISE = (torch.float32, torch.float64)
TOLERANCE = 0.25  # how far off its rate a group is, as a part of it, when its threshold moves most towards a call's
SHARE_MOMENTUM = 0.9  # of the share of tokens that groups select in training
SHARE_INTERVAL = 16  # calls between two looks at it
Wrapped = TypeVar("Wrapped", bound=nn.Module)


class MosaRouter(nn.Module):
    """
    Routers, one a group: linear, or an MLP whose hidden layer the groups share. No `nn.Linear`s, since tools that
    quantise or adapt linear layers must leave routers as they are: selection compares logits with thresholds, in
    float32 (float64 for a float64 model), whatever the model's dtype or autocast, and so parameters and buffers keep
    float32 in `model.to(torch.bfloat16)`. The buffer `threshold` [G] follows the groups' K-th highest logit while the
    weights train, and `share` [G] is the moving average of the part of the tokens that reach it.

    Args:
        config: of the model.
        sparsity: ρ of each group.
        hidden_size: units of the hidden layer, H: logits are weight [G, H] · GELU(hidden_weight [H, D] · x +
            hidden_bias). None: weight [G, D] · x.
    """

    threshold: torch.Tensor
    share: torch.Tensor

    def __init__(self, config: RoutingConfig, sparsity: Sequence[float], hidden_size: int | None = None):
        super().__init__()
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
        self.register_buffer("share", 1 / self.sparsity_of_groups(), persistent=False)
        self.num_followed = 0  # calls

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and `model.half()` go through here: they move routers, and round nothing of them.
        return super()._apply(partial(unrounded, fn), recurse)

    def extra_repr(self) -> str:
        hidden = "" if self.hidden_weight is None else f"hidden_features={len(self.hidden_weight)}, "
        return f"in_features={self.in_features}, {hidden}groups={len(self.sparsity)}"

    @property
    def routing(self) -> str:
        """The rule in force: "expert_choice" or "threshold"."""
        return self.training_routing if self.training else self.inference_routing

    def sparsity_of_groups(self, device: torch.device | None = None) -> torch.Tensor:
        """`[G]` float32, whatever the default dtype is: ρ of each group."""
        return torch.tensor(self.sparsity, dtype=torch.float32, device=device)

    def groups_by_sparsity(self) -> dict[float, list[int]]:
        """ρ → the groups that have it."""
        groups: dict[float, list[int]] = {}
        for group, sparsity in enumerate(self.sparsity):
            groups.setdefault(sparsity, []).append(group)
        return groups

    def forward(
        self, hidden_states: torch.Tensor, call: ForwardContext, cache: SparseLayer | None = None, follows: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[B, T, D]`.
            call: of the model.
            cache: the layer's, before it takes in the call's tokens.
            follows: whether thresholds may follow this call's logits: they do in training, of whole sequences, which
                calls without a cache have.

        Returns:
            logits `[B, T, G]` and selected `[B, T, G]` bool.

        Raises:
            ValueError: for expert choice on top of cached tokens, or in an export; in one, for what is only there to
                train.
        """
        routing = self.routing
        if routing == "expert_choice" and cache is not None and cache.has_tokens():
            raise ValueError(
                "'expert_choice' routing selects from a whole sequence at once and cannot continue from a cache. Use "
                "`model.eval()` of a model that was loaded with `mosa_inference_routing='threshold'`, or pass "
                "`use_cache=False`."
            )
        logits = self.logits(hidden_states)
        layout = call.layout.to(logits.device)
        valid, segment, first = layout.valid, layout.segment, layout.first if self.include_first else None
        if all(self.keeps_all):  # nothing to choose, whatever the thresholds are
            selected = torch.ones_like(logits, dtype=torch.bool)
            return logits, selected if valid is None else selected & valid[..., None]
        # Gradients mark training: reinforcement learning also generates, and evaluates, in training mode.
        learns = self.training and self._learns() and torch.is_grad_enabled()
        if learns and self.momentum < 1 and not follows and not torch.compiler.is_compiling():
            logger.warning_once(
                "Routers learn, but their thresholds stay as they are: they follow in calls without a cache alone. To "
                "train, pass `use_cache=False` or set `model.config.use_cache = False`, as `Trainer` does."
            )
        follows = follows and learns and not (is_exported() and self.momentum == 1)
        moves = follows and self.momentum < 1
        if moves or routing == "expert_choice":
            selected, _ = choice = self._choose(logits.detach(), valid, first, segment)
        if follows:
            self._follow(logits.detach(), choice if moves else None, call)
        if routing == "threshold":
            threshold = self.all_kept(call.thresholds.get(self, self.threshold))
            selected = select_by_threshold(logits, threshold, valid, first)
        return logits, selected

    def all_kept(self, threshold: torch.Tensor) -> torch.Tensor:
        """`threshold` [G], which every logit reaches in groups that select all tokens."""
        if not any(self.keeps_all):
            return threshold
        return threshold.masked_fill(constant(self.keeps_all, threshold.device), -torch.inf)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., G]` of `hidden_states` `[..., D]`, in float32 at least."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self.logits(hidden_states)
        weight = self.weight
        if weight.dtype not in PRECISE and not torch.compiler.is_compiling():
            logger.warning_once(
                f"Routers have been rounded to {weight.dtype}, past `model.to`: tokens whose score is close to a "
                "threshold may be selected otherwise than the checkpoint says. Load with "
                "`from_pretrained(..., dtype=...)`, which leaves them in float32, and leave them out of the mixed "
                "precision of FSDP."
            )
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        states = hidden_states.to(dtype)
        if self.hidden_weight is not None:
            assert self.hidden_bias is not None
            states = F.gelu(F.linear(states, self.hidden_weight.to(dtype), self.hidden_bias.to(dtype)))
        return F.linear(states, weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

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
        """`select_by_expert_choice` for groups of several sparsities; raises in an export."""
        if is_exported():  # how many tokens are chosen is a number, and would be the samples'
            raise ValueError(
                "An exported program selects by thresholds: call `model.eval()`, with "
                "`mosa_inference_routing='threshold'`, before the export."
            )
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
    def _follow(
        self, logits: torch.Tensor, choice: tuple[torch.Tensor, torch.Tensor] | None, call: ForwardContext
    ) -> None:
        """
        Note what share of the tokens the thresholds select, and move them if there is a `choice`; once a model call,
        which goes on routing by those that it began with.

        They move towards the last logit chosen, by 1 - momentum while they select about as many tokens as were chosen,
        and by more the further they are off: logits that training moves leave a slow average behind.

        Args:
            logits: `[B, T, G]`.
            choice: by expert choice: chosen `[B, T, G]` bool, and `[G]` the logit that as many tokens reach; NaN if no
                token was free to be chosen.
        """
        if self in call.thresholds:
            return
        call.thresholds[self] = self.threshold.clone()
        layout = call.layout.to(logits.device)
        free = torch.ones_like(layout.position, dtype=torch.bool) if layout.valid is None else layout.valid
        if self.include_first and layout.first is not None:
            free = free & ~layout.first
        counted = [free[..., None].expand_as(logits), free[..., None] & (logits >= self.threshold)]
        if choice is not None:
            counted.append(free[..., None] & choice[0])
        seen = [each.sum((0, 1)).to(logits.dtype) for each in counted]
        if choice is not None:
            seen += [choice[1].nan_to_num(), choice[1].isfinite().to(logits.dtype)]
        counts = torch.stack(seen)
        if is_distributed():
            torch.distributed.all_reduce(counts)
        num_free, num_selected, *others = counts
        share = torch.lerp(self.share, (num_selected / num_free).to(self.share.dtype), 1 - SHARE_MOMENTUM)
        self.share.copy_(torch.where(num_free > 0, share, self.share))
        if others:
            num_chosen, last, num_seen = others
            # Never all the way: of a threshold that is a logit itself, rounding decides whether its token is selected.
            follow = ((num_selected - num_chosen).abs() / num_chosen / TOLERANCE).clamp(max=0.9)
            follow = follow.clamp(min=1 - self.momentum)
            moved = self.threshold * (1 - follow) + last / num_seen * follow
            self.threshold.copy_(torch.where((num_chosen > 0) & (num_seen > 0), moved, self.threshold))
        if not torch.compiler.is_compiling():
            self.num_followed += 1
            self._warn_of_share()

    def _warn_of_share(self) -> None:
        """Now and then, since to look costs a synchronisation on a GPU."""
        if self.num_followed % SHARE_INTERVAL:
            return
        limit = 2 / self.sparsity_of_groups(self.share.device)
        if (self.share > limit).any():
            logger.warning_once(
                "While routers learn, some group has come to select more than twice the share of the tokens that its "
                "sparsity asks for. Let thresholds follow (`mosa_threshold_momentum=0.99`), lower the learning rate, "
                "or set thresholds anew after training (`mosa_hf.calibrate_thresholds`). `mosa_hf.RoutingCallback` "
                "logs the shares."
            )

    def score(self, logits: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
        """
        What a cache budget compares, `[..., G]` like `logits`: these, inf for a token that is never evicted. `first`:
        `[...]` bool, the first tokens of sequences; None: none is among these.

        Rounded to bfloat16: a repeated token has the same logit, and float32's last bits, which differ between a
        prefill and a single step, must not decide which of the two is evicted.
        """
        score = logits.detach().bfloat16().float()
        if self.include_first and first is not None:
            score = score.masked_fill(first.to(score.device)[..., None], torch.inf)
        return score


def unrounded(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """`fn(tensor)`, what `nn.Module._apply` does to a tensor, but in float32 where that would take digits from it."""
    applied = fn(tensor)
    if tensor.dtype not in PRECISE or applied.dtype in PRECISE:
        return applied
    return tensor.to(applied.device, torch.float32)


@torch.no_grad()
def init_router(router: MosaRouter, std: float) -> None:
    """Weights of N(0, std²), biases of 0, and thresholds that select one token in ρ of normalised inputs."""
    init.copy_(router.share, 1 / router.sparsity_of_groups(router.share.device))
    if all(getattr(x, "_is_hf_initialized", False) for x in (router.weight, router.threshold)):  # loaded
        return
    if router.weight.is_meta:  # under Accelerate's `init_empty_weights`, buffers have a device, and weights have none
        return
    init.normal_(router.weight, mean=0.0, std=std)
    if router.bias is not None:
        init.zeros_(router.bias)
    # Fresh logits of a normalised input are about N(0, D std²): start at their (1 - 1/ρ) quantile.
    rate = 1 - 1 / torch.tensor(router.sparsity, dtype=torch.float64)
    quantile = torch.special.ndtri(rate).clamp(min=-4.0)  # ρ = 1 selects everything
    scale: float | torch.Tensor = std * router.in_features**0.5
    shift: float | torch.Tensor = 0.0
    if router.hidden_weight is not None:
        assert router.hidden_bias is not None
        init.normal_(router.hidden_weight, mean=0.0, std=std)
        init.zeros_(router.hidden_bias)
        # Hidden units are GELU(N(0, D std²)), whose mean shifts all logits of a group alike.
        ranks = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
        units = nn.functional.gelu(scale * torch.special.ndtri(ranks))
        scale = std * (router.weight.shape[1] * units.var()) ** 0.5
        shift = units.mean().to(router.weight) * router.weight.sum(1)
    init.copy_(router.threshold, (quantile * scale).to(router.threshold) + shift)


def active_module(module: Wrapped) -> Wrapped:
    """
    What computes when `module` is called: itself, or what lies within it if FSDP or an adapter of PEFT is around it,
    such as the router of `modules_to_save=["mosa_router"]`, or the original one while that adapter is disabled.
    """
    found: Any = module  # what is within is what the model declares; the adapter around it is not
    if (wrapped := module._modules.get("_fsdp_wrapped_module")) is not None:  # of FSDP1
        found = wrapped
    elif isinstance(module, AdaptedAttention):
        found = module.model
    elif isinstance(module, ModulesToSaveWrapper):
        active = () if module.disable_adapters else module.active_adapters
        own = [name for name in active if name in module.modules_to_save]
        found = module.modules_to_save[own[0]] if own else module.original_module
    elif isinstance(module, BaseTunerLayer):
        found = module.get_base_layer()
    return found if found is module else active_module(found)


def named_routers(module: nn.Module, name: str = "") -> Iterator[tuple[str, MosaRouter]]:
    """The routers of a model that are in force, in layer order, each with the name that it has without adapters."""
    module = active_module(module)
    if isinstance(module, MosaRouter):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from named_routers(child, f"{name}.{child_name}" if name else child_name)


def routers_of(model: nn.Module) -> list[MosaRouter]:
    """
    The routers of a model that are in force, in layer order.

    Raises:
        ValueError: if it has none.
    """
    routers = [router for _, router in named_routers(model)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no MoSA heads. Convert it first: `mosa_hf.convert_model`.")
    return routers
