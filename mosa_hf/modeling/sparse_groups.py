"""
Sparse key/value groups in a family's own attention (docs/design.md, section 2).

A group's keys and values are projected for every token, as ever; what differs is which of them a query may read and a
cache keeps: the tokens that the group's router selects, and the last `window`. So the family's attention class stays
as it is. `SparseGroupsMixin` routes before it, the cache layer keeps what is selected, and the attention function
"mosa" (`attention`) reads it.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from ..cache import CacheInForward, Routed, SparseLayer, SparseSpec
from ..compat import CACHE
from ..kernels.indexing import take
from .attention import LayerContext, LayerGroups
from .configuration import ConfigView, SparseGroupsConfig
from .devices import is_distributed
from .forward_context import ForwardContext, context_of_place
from .group_plan import SparseGroup
from .key_center import key_center
from .latent_attention import LatentAttentionMixin
from .layers import passes_keywords
from .router import MosaRouter, active_module

logger = logging.get_logger(__name__)


class DispatchingConfig(ConfigView):
    """A model's config that names "mosa" as the attention implementation."""

    _attn_implementation = "mosa"


if TYPE_CHECKING:

    class FamilyAttention(nn.Module):
        """What the mixin relies on: what the attention class of every family has."""

        config: Any
        layer_idx: int

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...

else:
    FamilyAttention = object


class SparseGroupsMixin(FamilyAttention):
    """
    Stands before a family's attention class, see `sparse_attention_class`. Adds a
    submodule `mosa_router` and no other weight.
    """

    mosa_plan: tuple[SparseGroup | None, ...]  # what the layer's groups are, wherever in the model it is
    mosa_groups: LayerGroups  # the same by index, in a parallel process of its own groups alone
    mosa_router: MosaRouter
    passes_on: ClassVar[bool]  # whether the family's code hands the attention function what it does not know
    cache_in_forward: type[CacheInForward] = CacheInForward
    attend_latents = None  # of `LatentAttentionMixin`
    mosa_layer: LayerContext | None = None  # while a family's code runs that hands the attention function nothing

    def __reduce__(self) -> tuple:
        # By the family's class, which any process finds: ours may not have been made there.
        return _blank_attention, (type(self).__bases__[-1],), self.__getstate__()

    def add_sparse_groups(self, config: SparseGroupsConfig, plan: tuple[SparseGroup | None, ...]) -> None:
        """Make an attention module of the family, already of this class, one with the sparse groups of `plan`."""
        self.config = DispatchingConfig(config)
        self.mosa_plan = plan
        self.mosa_groups = LayerGroups.of_plan(plan)
        self.mosa_budget, self.mosa_cache_dtype = config.mosa_cache_budget, config.mosa_cache_dtype
        self.mosa_gate_slope = config.mosa_gate_slope
        sparsity = [group.sparsity for group in plan if group is not None]
        self.mosa_router = MosaRouter(config, sparsity, config.mosa_router_hidden_size)
        if not config.mosa_gate_slope:  # nothing passes them a gradient
            self.mosa_router.requires_grad_(False)

    def forward(
        self, hidden_states: torch.Tensor, *args, mosa_context: ForwardContext | None = None, **kwargs
    ) -> tuple[Any, ...]:
        """
        Does what the family's forward does.

        Args:
            hidden_states: `[B, T, D]`.
            args, kwargs: as the family's forward takes them.
            mosa_context: what the layers of this model call share.

        Raises:
            ValueError: outside of a model with sparse groups; for expert choice on top of cached tokens.
        """
        if mosa_context is None and (mosa_context := context_of_place()) is None:
            raise ValueError(f"{type(self).__name__} runs within a MoSA model only: it lacks `mosa_context`.")
        name = CACHE if CACHE in kwargs else "layer_past"
        past_key_values: Any = kwargs.get(name)
        cache: SparseLayer | None = None
        if past_key_values is not None and self.mosa_groups.sets:  # of a parallel process, all groups may be dense
            cache = past_key_values.layers[self.layer_idx]
        outer = self.mosa_router
        router = outer if type(outer) is MosaRouter else active_module(outer)
        layout = mosa_context.layout
        learns = mosa_context.has_grad and self._learns()
        follows = bool(self.mosa_gate_slope) and past_key_values is None
        logits, selected = outer(hidden_states, mosa_context, cache, follows)
        needs_score = self.mosa_budget is not None or (cache is not None and cache.needs_score)
        score = router.score(logits, layout.first) if needs_score else None
        is_biased = self.training and self.mosa_gate_slope and mosa_context.has_grad
        gate = self._gate(logits, selected, mosa_context) if is_biased else None
        columns = self.mosa_groups.columns
        center = None
        if self.mosa_cache_dtype is not None:
            center = key_center(self, mosa_context.mean_rotation, self.mosa_groups.num_groups)
        routed = [
            Routed(
                take(selected, own, dim=2),
                None if score is None else take(score, own, dim=2),
                None if center is None else take(center, each.groups, dim=0),
            )
            for own, each in zip(columns, self.mosa_groups.sets, strict=True)
        ]
        if cache is not None:
            cache.begin(layout, routed)
            kwargs[name] = self.cache_in_forward(past_key_values)
        gates = [None if gate is None else take(gate, own, dim=2) for own in columns]
        call = LayerContext(layout, routed, gates, cache)
        if self.passes_on:
            output, *others = super().forward(hidden_states, *args, mosa=call, **kwargs)
        else:
            self.mosa_layer = call
            try:
                output, *others = super().forward(hidden_states, *args, **kwargs)
            finally:
                self.mosa_layer = None
        # Other processes wait for this one's part of a router's gradient, be there any or none. The gradient of no
        # logits is 0, and of no number that may be infinite.
        if gate is not None or (learns and is_distributed()):
            output = output + logits[..., :0].sum()
        return output, *others

    def _learns(self) -> bool:
        """Whether routers want the gradients that this forward records; warns if none will reach them."""
        learns = any(each.requires_grad for each in self.mosa_router.parameters())
        if self.training and learns and not self.mosa_gate_slope and not torch.compiler.is_compiling():
            warn_of_idle_routers()
        return learns

    def _gate(self, logits: torch.Tensor, selected: torch.Tensor, call: ForwardContext) -> torch.Tensor:
        """
        The routers' gradient `[B, T, G]` (docs/design.md, section 6): a far key's score rises with its margin over the
        threshold. Hard selection has no gradient, and is what evaluation uses. Zero for keys that are not selected,
        which no query reads from afar (under an infinite threshold, theirs would not be finite), and in groups that
        keep everything, whose threshold decides nothing.
        """
        router = active_module(self.mosa_router)
        threshold = router.all_kept(call.thresholds.get(router, router.threshold))
        gate = F.logsigmoid(self.mosa_gate_slope * (logits - threshold)).masked_fill(~selected, 0.0)
        if router.include_first and call.layout.first is not None:  # selected in any case: it has no margin
            gate = gate.masked_fill(call.layout.first.to(gate.device)[..., None], 0.0)
        return gate

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of this layer."""
        dense = self.mosa_groups.dense
        return SparseSpec(dense, self.mosa_groups.sets, self.mosa_budget, len(dense), self.mosa_cache_dtype)


@cache
def sparse_attention_class(base_class: Any) -> type[nn.Module]:
    """An attention class of Transformers with sparse groups: `MosaQwen3Attention` of `Qwen3Attention`."""
    mixins = (LatentAttentionMixin, SparseGroupsMixin) if hasattr(base_class, "expand_kv") else (SparseGroupsMixin,)
    passes_on = passes_keywords(cast(Any, base_class).forward, "attention_interface")
    attributes = {"__module__": __name__, "passes_on": passes_on}
    return type(f"Mosa{base_class.__name__}", (*mixins, base_class), attributes)


def _blank_attention(base_class: type[nn.Module]) -> nn.Module:
    """An object of a class that `sparse_attention_class` makes, for pickle to fill."""
    return object.__new__(sparse_attention_class(cast(Any, base_class)))


def warn_of_idle_routers() -> None:
    """Say so if someone means to train routers that no gradient reaches."""
    logger.warning_once(
        "Routers are set to be trained, but `mosa_gate_slope` is 0, which passes them no gradient: they stay as they "
        "are. To train them, load the model with `from_pretrained(..., mosa_gate_slope=1.0)`. In several processes "
        "their gradient is 0, and a weight decay would shrink them: freeze them by `router.requires_grad_(False)`."
    )
