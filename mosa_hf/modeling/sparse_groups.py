"""
Sparse key/value groups in a family's own attention (docs/design.md, section 2).

A group's keys and values are projected for every token, as ever; what differs is which of them a query may read and a
cache keeps: the tokens that the group's router selects, and the last `window`. So the family's attention class stays
as it is. `SparseGroupsMixin` routes before it, the cache layer keeps what is selected, and the attention function
"mosa", which the family's code calls like any other, reads it.
"""

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..cache import GroupSet, Routed, SparseSpec
from ..compat import CACHE
from ..kernels import backend
from ..kernels.tensors import KeyValues, PackedKeyValues, take
from ..routing.budget import evicted_at
from ..routing.layout import CallLayout
from .call import ModelCall
from .configuration import SparseGroupsConfig
from .router import MosaRouter, in_force

logger = logging.get_logger(__name__)


class LayerGroups(NamedTuple):
    """The key/value groups of one layer, by index."""

    dense: tuple[int, ...]
    sets: tuple[GroupSet, ...]  # sparse groups of one window each
    columns: tuple[tuple[int, ...], ...]  # of each set's groups among the router's, which lists sparse groups in order

    @classmethod
    def of_layer(cls, config: SparseGroupsConfig, layer_idx: int) -> "LayerGroups":
        groups = config.groups_of_layer(layer_idx)
        sparse = [group for group, kind in enumerate(groups) if kind is not None]
        windows: dict[int, list[int]] = {}
        for group in sparse:
            windows.setdefault(groups[group].window, []).append(group)
        sets = tuple(
            GroupSet(tuple(members), window, min(groups[group].sparsity for group in members))
            for window, members in windows.items()
        )
        columns = tuple(tuple(sparse.index(group) for group in each.groups) for each in sets)
        return cls(tuple(group for group, kind in enumerate(groups) if kind is None), sets, columns)

    @property
    def num_groups(self) -> int:
        return len(self.dense) + sum(len(each.groups) for each in self.sets)

    def of_rank(self, rank: int, num_groups: int) -> "LayerGroups":
        """Those that one process of a tensor-parallel model holds, `num_groups` of them, counted from its first."""
        first = rank * num_groups

        def local(groups: tuple[int, ...]) -> list[int]:
            return [i for i, group in enumerate(groups) if first <= group < first + num_groups]

        sets, columns = [], []
        for each, own in zip(self.sets, self.columns, strict=True):
            if members := local(each.groups):
                sets.append(each._replace(groups=tuple(each.groups[i] - first for i in members)))
                columns.append(tuple(own[i] for i in members))
        dense = tuple(self.dense[i] - first for i in local(self.dense))
        return LayerGroups(dense, tuple(sets), tuple(columns))


class LayerCall(NamedTuple):
    """What `SparseGroupsMixin` hands to the attention function through the family's code."""

    layout: CallLayout
    routed: list[Routed]  # one for each set of groups
    gates: list[torch.Tensor | None]  # one for each set: [B, T, G], added to the scores of far keys; training only
    cache: Any  # the layer's, with the call's tokens; None without a cache


class DispatchingConfig:
    """A model's config that names "mosa" as the attention implementation, and is the model's own in all else."""

    _attn_implementation = "mosa"

    def __init__(self, config: PreTrainedConfig):
        self.model_config = config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


class SparseGroupsMixin:
    """
    Stands before a family's attention class: `class MosaQwen3Attention(SparseGroupsMixin, Qwen3Attention)`. Adds a
    submodule `mosa_router` and no other weight.
    """

    mosa_groups: LayerGroups
    mosa_router: MosaRouter

    def add_sparse_groups(self, config: SparseGroupsConfig) -> None:
        """Make an attention module of the family, already of this class, one with sparse groups."""
        self.config = DispatchingConfig(config)
        self.mosa_groups = LayerGroups.of_layer(config, self.layer_idx)
        self.mosa_budget = config.mosa_cache_budget
        self.mosa_gate_slope = config.mosa_gate_slope
        sparsity = [group.sparsity for group in config.groups_of_layer(self.layer_idx) if group is not None]
        self.mosa_router = MosaRouter(config, self.layer_idx, sparsity, config.mosa_router_hidden_size)
        if not config.mosa_gate_slope:  # nothing passes them a gradient
            self.mosa_router.requires_grad_(False)

    def forward(
        self, hidden_states: torch.Tensor, *args, mosa_call: ModelCall | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As the family's forward.

        Args:
            hidden_states: `[B, T, D]`.
            mosa_call: what the layers of this model call share.

        Raises:
            ValueError: outside of a model with sparse groups; for expert choice on top of cached tokens.
        """
        if mosa_call is None:
            raise ValueError(f"{type(self).__name__} runs within a MoSA model only: it lacks `mosa_call`.")
        past_key_values: Cache | None = kwargs.get(CACHE, kwargs.get("layer_past"))
        cache = None
        if past_key_values is not None and self.mosa_groups.sets:  # of a parallel process, all groups may be dense
            cache = past_key_values.layers[self.layer_idx]
        router = in_force(self.mosa_router)
        router.check_cache(cache)
        layout = mosa_call.layout
        trains_routers = bool(self.mosa_gate_slope)
        if self.training and mosa_call.has_grad and not trains_routers and not torch.compiler.is_compiling():
            warn_of_idle_routers(router)
        follows = trains_routers and past_key_values is None
        logits, selected = self.mosa_router(hidden_states, mosa_call, follows=follows)
        needs_score = self.mosa_budget is not None or (cache is not None and cache.needs_score)
        score = router.score(logits, layout) if needs_score else None
        gate = self._gate(logits, selected, mosa_call)

        def of_set(states, columns):
            return None if states is None else take(states, columns, dim=2)

        columns = self.mosa_groups.columns
        routed = [Routed(of_set(selected, own), of_set(score, own)) for own in columns]
        if cache is not None:
            cache.begin(layout, routed)
        gates = [of_set(gate, own) for own in columns]
        call = LayerCall(layout, routed, gates, cache)
        output, *others = super().forward(hidden_states, *args, mosa=call, **kwargs)
        if gate is not None and not routed:  # the other processes wait for this one's part of the router's gradient
            output = output + 0.0 * gate.sum()
        return output, *others

    def _gate(self, logits: torch.Tensor, selected: torch.Tensor, call: ModelCall) -> torch.Tensor | None:
        """
        The routers' gradient `[B, T, G]` (docs/design.md, section 6): a far key's score rises with its margin over the
        threshold. Hard selection has no gradient, and is what evaluation uses. Zero for keys that are not selected,
        which no query reads from afar: under an infinite threshold, theirs would not be finite.
        """
        if not (self.training and self.mosa_gate_slope and call.has_grad):
            return None
        router = in_force(self.mosa_router)
        threshold = call.thresholds.get(self.layer_idx, router.threshold)
        gate = F.logsigmoid(self.mosa_gate_slope * (logits - threshold)).masked_fill(~selected, 0.0)
        if router.include_first and call.layout.first is not None:  # selected in any case: it has no margin
            gate = gate.masked_fill(call.layout.first.to(gate.device)[..., None], 0.0)
        return gate

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of this layer."""
        return SparseSpec(
            self.mosa_groups.dense, self.mosa_groups.sets, self.mosa_budget, has_dense=bool(self.mosa_groups.dense)
        )


def warn_of_idle_routers(router: MosaRouter) -> None:
    """Say so if someone means to train routers that no gradient reaches."""
    if any(parameter.requires_grad for parameter in router.parameters()):
        logger.warning_once(
            "Routers are set to be trained, but `mosa_gate_slope` is 0, which passes them no gradient: they stay as "
            "they are. To train them, load the model with `from_pretrained(..., mosa_gate_slope=1.0)`."
        )


def mosa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    mosa: LayerCall | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention function "mosa". Dense groups go through the implementation that the user asked for, sparse groups
    through the MoSA kernels.

    Args:
        module: the attention module.
        query: `[B, H, T, d]`, rotated.
        key, value: `[B, G, T, d]` without a cache; with one, the dense groups' alone, `[B, G_dense, S, d]`.
        attention_mask: of the dense groups, as their implementation wants it.
        scaling: factor on the scores.
        dropout: of the dense groups' attention weights.
        softcap: c of c · tanh(score / c).
        s_aux: `[H]`, a sink's score for each query head.
        mosa: None for a layer without sparse groups.

    Returns:
        output `[B, T, H, d]`, and attention weights `[B, H, T, S]` where the dense groups' implementation gives them
        and every group is dense.

    Raises:
        ValueError: on a model that has neither sparse groups nor MoSA heads.
    """
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    if mosa is None:
        check_has_mosa(module)
        return dense_attention(module, query, key, value, attention_mask, **options)

    groups = module.mosa_groups
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_groups = groups.num_groups
    query = query.unflatten(1, (num_groups, -1))  # [B, G, R, T, d]
    sinks = None if s_aux is None else s_aux.view(num_groups, -1)
    outputs, order = [], []
    if groups.dense:
        if mosa.cache is None:
            key_dense, value_dense = take(key, groups.dense, dim=1), take(value, groups.dense, dim=1)
        else:
            key_dense, value_dense = key, value
        dense = module
        if sinks is not None:
            options["s_aux"] = take(sinks, groups.dense, dim=0).flatten()
            dense = DenseHeads(module, options["s_aux"])
        own, _ = dense_attention(
            dense, take(query, groups.dense, dim=1).flatten(1, 2), key_dense, value_dense, attention_mask, **options
        )  # [B, T, H_dense, d]
        outputs.append(own.unflatten(2, (len(groups.dense), -1)).permute(0, 2, 3, 1, 4))
        order += groups.dense
    reads = [None] * len(groups.sets) if mosa.cache is None else mosa.cache.readable()
    for each, routed, gate, read in zip(groups.sets, mosa.routed, mosa.gates, reads, strict=True):
        if read is None:
            new_key, new_value = take(key, each.groups, dim=1), take(value, each.groups, dim=1)
            read = uncached(new_key, new_value, routed, mosa.layout, module.mosa_budget), None
        own_sinks = None if sinks is None else take(sinks, each.groups, dim=0)
        heads = sparse_attention(
            take(query, each.groups, dim=1),
            read,
            mosa.layout,
            each.window,
            gate,
            scale=scaling,
            softcap=softcap,
            sinks=own_sinks,
        )
        outputs.append(heads)
        order += each.groups
    if mosa.cache is not None:
        mosa.cache.evict()
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if order != sorted(order):
        back = sorted(range(num_groups), key=order.__getitem__)
        output = output.index_select(1, torch.tensor(back, device=output.device))
    return output.flatten(1, 2).transpose(1, 2), None


def sparse_attention(
    query: torch.Tensor,
    read: PackedKeyValues | tuple[KeyValues, KeyValues | None],
    layout: CallLayout,
    window: int,
    gate: torch.Tensor | None,
    **options,
) -> torch.Tensor:
    """
    Attention of one set of sparse groups.

    Args:
        query: `[B, G, R, T, d]`.
        read: what may be read: packed entries of a cache, for one token a row; else (recent, cached).
        layout: of the call.
        window: of the set.
        gate: `[B, T, G]`, added to the scores of the call's keys beyond the window.
        options: scale, softcap and sinks, as `sparse_attention` of the kernels takes them.

    Returns:
        `[B, G, R, T, d]`.
    """
    kernels = backend(query)
    if isinstance(read, PackedKeyValues):
        return kernels.sparse_decode(query.squeeze(3), read, **options).unsqueeze(3)
    recent, cached = read
    layout = layout.to(query.device)
    far_bias = None
    if gate is not None:
        # Keys cached by earlier calls are read without a bias: no gradient could reach their routers.
        gate = layout.pad_left(gate.transpose(1, 2), dim=2)
        far_bias = F.pad(gate, (recent.key.shape[2] - gate.shape[2], 0))
    query, position = layout.pad_left(query, dim=3), layout.pad_left(layout.position, dim=1)
    segment = None if layout.segment is None else layout.pad_left(layout.segment, dim=1)
    heads = kernels.sparse_attention(query, recent, cached, position, segment, window, far_bias=far_bias, **options)
    if far_bias is not None:
        # A call no longer than the window reads no far key: keep the router in the graph, as DDP needs.
        heads = heads + 0.0 * far_bias.sum()
    return layout.pad_back(heads, dim=3)


def uncached(
    key: torch.Tensor, value: torch.Tensor, routed: Routed, layout: CallLayout, budget: int | None
) -> KeyValues:
    """The keys and values `[B, G, T, d]` of a call without a cache, with padding moved to the left."""
    layout = layout.to(key.device)
    key, value, selected, score = (
        None if states is None else layout.pad_left(states, dim=2)
        for states in (
            key,
            value,
            routed.selected.transpose(1, 2),
            None if routed.score is None else routed.score.transpose(1, 2),
        )
    )  # [B, G, T, ...]
    position, valid, segment = (
        None if states is None else layout.pad_left(states, dim=1)
        for states in (layout.position, layout.valid, layout.segment)
    )
    position = position[:, None].expand_as(selected)
    valid = None if valid is None else valid[:, None].expand_as(selected)
    evicted = None
    if budget is not None:
        evicted = evicted_at(score, position, selected, budget, None if segment is None else segment[:, None])
    return KeyValues(key, value, position, valid, selected, evicted)


def dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of dense heads through the implementation that the user asked for; "mosa" leaves the choice to us."""
    config = module.config
    name = getattr(config, "model_config", config)._attn_implementation
    eager = eager_attention_of(module.module if isinstance(module, DenseHeads) else module)
    if name == "mosa":
        name = "sdpa"
        if "softcap" in options or "s_aux" in options:  # PyTorch's fused attention has neither
            name, attention_mask = "eager", additive_mask(attention_mask, query, key)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, attention_mask, **options)


def eager_attention_of(module: nn.Module) -> Any:
    """The family's own `eager_attention_forward`, which knows its softcap and sinks."""
    for each in type(module).__mro__:
        if (function := getattr(sys.modules[each.__module__], "eager_attention_forward", None)) is not None:
            return function
    raise ValueError(f"The module of {type(module).__name__} has no `eager_attention_forward`.")


def additive_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask of "sdpa" (bool, or None for causal) as eager attention adds it to scores, `[B or 1, 1, T, S]`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


class DenseHeads:
    """An attention module whose per-head `sinks` are those of its dense heads, for implementations that read them."""

    def __init__(self, module: nn.Module, sinks: torch.Tensor):
        self.module = module
        self.sinks = sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def check_has_mosa(module: nn.Module) -> None:
    """
    Raises:
        ValueError: if an attention module belongs to a stock model, which "mosa" can do nothing for: an attention
            function cannot select tokens that no router has looked at.
    """
    if not hasattr(module.config, "mosa_sparsity"):
        raise ValueError(
            f"attn_implementation='mosa' needs a MoSA model, but {type(module).__name__} has no MoSA heads. Convert "
            "the model first: `mosa_hf.convert_model(model, ConversionConfig(...), calibration)` or the command "
            "`mosa-convert`."
        )
