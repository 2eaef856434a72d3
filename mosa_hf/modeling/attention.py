"""
The attention function "mosa" (docs/design.md, section 2), which the code of a family's attention calls like any other:
dense groups go through the implementation that the user chose, sparse groups through the MoSA kernels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache import GroupSet, Routed
from ..kernels import backend, is_free
from ..kernels.entries import PackedKeyValues, Readable
from ..kernels.entry_codes import rounded, turned
from ..kernels.indexing import constant, take
from ..kernels.tensors import KeyValues
from ..routing.budget import evicted_at
from ..routing.layout import CallLayout
from ..routing.mask import POSSIBLE, added_to_scores
from .attention_options import KNOWN, check_options
from .group_plan import SparseGroup
from .layers import function_of_family


class LayerGroups(NamedTuple):
    """The key/value groups of one layer, by index."""

    dense: tuple[int, ...]
    sets: tuple[GroupSet, ...]  # sparse groups of one window each
    columns: tuple[tuple[int, ...], ...]  # of each set's groups among the router's, which lists sparse groups in order
    num_groups: int  # in all

    @classmethod
    def of_plan(cls, groups: Sequence[SparseGroup | None]) -> "LayerGroups":
        """Those of a layer of a `GroupPlan`."""
        sparse = {group: kind for group, kind in enumerate(groups) if kind is not None}
        windows: dict[int, list[int]] = {}
        for group, kind in sparse.items():
            windows.setdefault(kind.window, []).append(group)
        sets = tuple(
            GroupSet(tuple(members), window, min(sparse[group].sparsity for group in members))
            for window, members in windows.items()
        )
        columns = tuple(tuple(list(sparse).index(group) for group in each.groups) for each in sets)
        dense = tuple(group for group, kind in enumerate(groups) if kind is None)
        return cls(dense, sets, columns, len(groups))

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
        return LayerGroups(dense, tuple(sets), tuple(columns), num_groups)


class LayerContext(NamedTuple):
    """What `SparseGroupsMixin` hands to the attention function through the family's code."""

    layout: CallLayout
    routed: list[Routed]  # one for each set of groups
    gates: list[torch.Tensor | None]  # one for each set: [B, T, G], added to the scores of far keys; training only
    cache: Any  # the layer's, with the call's tokens; None without a cache


class AttentionModule(Protocol):
    """What the attention function "mosa" reads of the module that calls it; of a stock model's, the config alone."""

    config: Any
    mosa_groups: LayerGroups
    mosa_budget: int | None
    mosa_cache_dtype: str | None
    attend_latents: Any  # see `LatentAttentionMixin`; None: it has keys and values


def mosa_attention_forward(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # in upstream's order: other packages' wrappers pass it by place
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    mosa: LayerContext | None = None,
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
        dropout: of the dense groups' attention weights.
        scaling: factor on the scores.
        softcap: c of c · tanh(score / c).
        s_aux: `[H]`, a sink's score for each query head.
        mosa: None for a layer without sparse groups.
        kwargs: what else the family hands to its attention function.

    Returns:
        output `[B, T, H, d]`, and attention weights `[B, H, T, S]` where the dense groups' implementation gives them
        and every group is dense.

    Raises:
        ValueError: on a model that has neither sparse groups nor MoSA heads; for options that change scores in a way
            that sparse groups do not know.
    """
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    if mosa is None:
        mosa = getattr(module, "mosa_layer", None)
    if mosa is None:
        check_has_mosa(module)
        return dense_attention(module, query, key, value, attention_mask, **options)

    if (own_window := kwargs.get("sliding_window")) and own_window >= module.config.max_position_embeddings:
        kwargs["sliding_window"] = None  # of all positions that there are
    check_options(kwargs, KNOWN)
    if not getattr(module, "is_causal", True):
        raise ValueError(f"`is_causal` of {type(module).__name__} is False. {POSSIBLE}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    of_scores = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if module.attend_latents is not None:
        return module.attend_latents(query, key, value, mosa, module.mosa_groups.sets[0].window, **of_scores), None
    _check_whole_keys(module, mosa, softcap, s_aux)
    reads = [None] * len(module.mosa_groups.sets) if mosa.cache is None else mosa.cache.readable()
    if _is_plain(module, query, key, mosa, dropout):
        output = _attend_plainly(module, query, key, value, attention_mask, mosa.gates, options)
    else:
        output = _attend_by_groups(module, query, key, value, attention_mask, mosa, reads, of_scores, options)
    if mosa.cache is not None:
        mosa.cache.end_call()
    return output, None


def _check_whole_keys(
    module: AttentionModule, mosa: LayerContext, softcap: float | None, s_aux: torch.Tensor | None
) -> None:
    """Raise a RuntimeError if keys have lost what would change scores under a softcap, or beside a sink's."""
    if (softcap is not None or s_aux is not None) and any(each.center is not None for each in mosa.routed):
        raise RuntimeError(
            f"Keys of {type(module).__name__} have lost what their bias makes of nothing, which a softcap or a sink "
            "would notice: set `mosa_cache_dtype=None`, and report it, since `key_center` should have known."
        )


def _is_plain(
    module: AttentionModule, query: torch.Tensor, key: torch.Tensor, mosa: LayerContext, dropout: float
) -> bool:
    """
    Whether it is plain causal attention, whatever is selected: keys `[B, G, S, d]` of all groups are the call's own,
    and no query is farther from one than a window.
    """
    groups, num_tokens = module.mosa_groups, query.shape[2]
    # A cache that gives all groups' keys has found that out; only some of its call may be captured.
    if (mosa.cache is None and not is_free()) or module.mosa_cache_dtype is not None or (dropout and groups.dense):
        return False
    is_first = key.shape[1] == groups.num_groups and num_tokens == key.shape[2]
    return is_first and bool(groups.sets) and all(num_tokens <= each.window for each in groups.sets)


def _attend_plainly(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    gates: list[torch.Tensor | None],
    options: dict[str, Any],
) -> torch.Tensor:
    """Of all groups `[B, T, H, d]`, where nothing is out of a window."""
    options = options | {"dropout": 0.0}  # which sparse groups do not know
    output, _ = dense_attention(module, query, *_fitting(key, value, attention_mask), **options)
    for gate in gates:
        if gate is not None:  # no far key is read: keep the router in the graph, as DDP needs
            output = output + 0.0 * gate.sum()
    return output


def _attend_by_groups(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mosa: LayerContext,
    reads: Sequence[Readable | None],
    of_scores: dict[str, Any],
    options: dict[str, Any],
) -> torch.Tensor:
    """Of all groups `[B, T, H, d]`: the dense ones, and then each set of sparse ones, which reads of `reads`."""
    groups, is_coded = module.mosa_groups, module.mosa_cache_dtype is not None
    query = torch.unflatten(query, 1, (groups.num_groups, -1))  # [B, G, R, T, d]
    sinks = None if of_scores["sinks"] is None else of_scores["sinks"].view(groups.num_groups, -1)
    outputs: list[torch.Tensor] = []  # of each set of groups, [B, T, G, R, d]
    order: list[int] = []  # of the groups in them
    if groups.dense:
        outputs.append(_attend_densely(module, query, key, value, attention_mask, sinks, mosa.cache, options))
        order += groups.dense
    for each, routed, gate, read in zip(groups.sets, mosa.routed, mosa.gates, reads, strict=True):
        if read is None:
            own_key, own_value = take(key, each.groups, dim=1), take(value, each.groups, dim=1)
            if is_coded:
                own_key, own_value = rounded(turned(own_key, routed.center)), rounded(own_value)
            read = uncached(own_key, own_value, routed, mosa.layout, module.mosa_budget), None
        own_query = take(query, each.groups, dim=1)
        own_query = turned(own_query) if is_coded else own_query
        own_sinks = None if sinks is None else take(sinks, each.groups, dim=0)
        own_of_scores = of_scores | {"sinks": own_sinks}
        heads = sparse_attention(own_query, read, mosa.layout, each.window, gate, **own_of_scores)
        outputs.append(heads.permute(0, 3, 1, 2, 4))
        order += each.groups
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if order != sorted(order):
        back = sorted(range(groups.num_groups), key=order.__getitem__)
        output = output.index_select(2, constant(tuple(back), output.device))
    return output.flatten(2, 3).contiguous()  # some families take a view


def _fitting(
    key: torch.Tensor, value: torch.Tensor, attention_mask: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    A first call's key and value `[B, G, S, d]` and its mask, of as many columns as each other: that of a static cache
    has one for each token that there is room for.
    """
    num_more = 0 if attention_mask is None else attention_mask.shape[-1] - key.shape[2]
    if num_more > 0 and isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask[..., : key.shape[2]]
    elif num_more > 0:  # flex attention's, which cannot be cut: nobody reads what comes
        key, value = (F.pad(states, (0, 0, 0, num_more)) for states in (key, value))
    return key, value, attention_mask


def _attend_densely(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> torch.Tensor:
    """
    Of the dense groups `[B, T, G_dense, R, d]`. `query` [B, G, R, T, d] and `sinks` [G, R] are of all groups, and so
    are `key` and `value` [B, G, S, d] unless a cache has picked the dense groups'.
    """
    groups = module.mosa_groups
    query = take(query, groups.dense, dim=1)
    if key.shape[1] == groups.num_groups:
        key, value = (take(states, groups.dense, dim=1) for states in (key, value))
        if cache is not None:
            key, value, attention_mask = _fitting(key, value, attention_mask)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.shape[1] > 1:
        attention_mask = attention_mask[:, :1]  # of all heads; where they differ, the model has refused it
    heads: AttentionModule | DenseHeads = module
    if sinks is not None:
        options = options | {"s_aux": take(sinks, groups.dense, dim=0).flatten()}
        heads = DenseHeads(module, options["s_aux"])
    output, _ = dense_attention(heads, query.flatten(1, 2), key, value, attention_mask, **options)  # [B, T, H, d]
    return output.unflatten(2, (query.shape[1], -1))


def sparse_attention(
    query: torch.Tensor,
    read: Readable,
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
    entries = read if isinstance(read, PackedKeyValues) else read[0]
    kernels = backend(query, query.shape[-1], entries.value.shape[-1])
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
    selected = routed.selected.transpose(1, 2)
    key, value, selected = (layout.pad_left(states, dim=2) for states in (key, value, selected))  # [B, G, T, ...]
    position = layout.pad_left(layout.position, dim=1)[:, None].expand_as(selected)
    valid, segment = (
        None if states is None else layout.pad_left(states, dim=1)[:, None]
        for states in (layout.valid, layout.segment)
    )  # [B, 1, T]
    valid = None if valid is None else valid.expand_as(selected)
    evicted = None
    if budget is not None:
        assert routed.score is not None
        score = layout.pad_left(routed.score.transpose(1, 2), dim=2)
        evicted = evicted_at(score, position, selected, budget, segment)
    return KeyValues(key, value, position, valid, selected, evicted)


def dense_attention(
    module: "AttentionModule | DenseHeads",
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


def eager_attention_of(module: object) -> Any:
    """The family's own `eager_attention_forward`, which knows its softcap and sinks."""
    if (function := function_of_family(type(module), "eager_attention_forward")) is not None:
        return function
    raise ValueError(f"The module of {type(module).__name__} has no `eager_attention_forward`.")


def additive_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask of "sdpa" (bool, or None for causal) as eager attention adds it to scores, `[B or 1, 1, T, S]`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)[None, None]
    return added_to_scores(mask, query.dtype)


class DenseHeads:
    """An attention module whose per-head `sinks` are those of its dense heads, for implementations that read them."""

    config: Any

    def __init__(self, module: AttentionModule, sinks: torch.Tensor):
        self.module = module
        self.sinks = sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def check_has_mosa(module: AttentionModule) -> None:
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
