"""The Transformers cache layer of a layer with sparse groups or MoSA heads: upstream's for dense groups, stores for
the others. A layer of whatever cache the user brings is upgraded in place."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from ..compat import QuantizedLayer
from ..kernels import is_free
from ..kernels.entries import Readable
from ..kernels.entry_codes import turned
from ..kernels.indexing import take
from ..kernels.tensors import NEVER
from ..routing.layout import CallLayout
from .calls import fetch_counts
from .dense import PreallocatedDynamicLayer
from .fixed_memory import FixedSize, static_capacity
from .store import SparseStore
from .undo import MAX_UNDO


class GroupSet(NamedTuple):
    """Groups of one layer that have the same window, and share a store."""

    groups: tuple[int, ...]  # indices among the layer's key/value groups
    window: int
    sparsity: float  # the lowest of theirs


class SparseSpec(NamedTuple):
    """What a cache has to know of a layer."""

    dense: tuple[int, ...] | None  # its dense groups; None: `update` is given dense heads alone (native model)
    sets: tuple[GroupSet, ...]
    budget: int | None = None
    num_dense: int | None = None  # key/value heads of its dense groups or heads; None: as many as come
    dtype: str | None = None  # `mosa_cache_dtype`

    def plain(self) -> tuple[Any, ...]:
        """The same without names, for what exporters take apart: they rebuild tuples, and fail on those with names."""
        return tuple(self._replace(sets=tuple(tuple(each) for each in self.sets)))  # type: ignore[misc]


class Routed(NamedTuple):
    """What the routers said of a call's tokens, for one set of groups."""

    selected: torch.Tensor  # [B, T, G] bool, False on padding
    score: torch.Tensor | None = None  # [B, T, G], what a budget compares, inf for tokens that are never evicted
    center: torch.Tensor | None = None  # [G, 1, d], what keys are stored as codes without, see `entry_codes.turned`


if TYPE_CHECKING:
    Mixable = DynamicLayer
else:  # whatever the class it is mixed with
    Mixable = CacheLayerMixin


class MixedLayer(Mixable):
    """Mixed into the class of a cache layer at run time, so that pickle does not find the result by name."""

    _layer_type = None  # not a layer type of its own: the class it is mixed with keeps its registration

    def __reduce__(self) -> tuple:
        return _blank, type(self).__bases__, self.__dict__

    def __copy__(self) -> CacheLayerMixin:
        """
        A copy that goes its own way, as one of upstream's layers does, which never change a tensor: what is written to
        in place is copied.
        """
        # Not a first layer, which would go on asking the layers behind the original one.
        copied: Any = _blank(*(base for base in type(self).__bases__ if base is not FirstLayer))
        copied.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "others"}
        if isinstance(self, SparseLayer):
            copied.stores = copy.deepcopy(self.stores)
        if isinstance(self, PreallocatedDynamicLayer | StaticLayer) and self.is_initialized:
            assert self.keys is not None and self.values is not None
            copied.keys, copied.values = self.keys.clone(), self.values.clone()
            if isinstance(self, StaticLayer):
                copied.cumulative_length = self.cumulative_length.clone()
        if isinstance(self, LinearAttentionCacheLayerMixin):
            copied.conv_states, copied.recurrent_states = (
                {i: None if each is None else each.clone() for i, each in states.items()}
                for states in (self.conv_states, self.recurrent_states)
            )
        return copied


class SeenMask:
    """
    `TokenMask.seen` of a cache. Not in its `__dict__`, so that exporters pass it over: it grows with every call, which
    a program's inputs must not.
    """

    __slots__ = ("__dict__", "mask")

    def __init__(self, mask: torch.Tensor | None = None):
        self.mask = mask


class SparseLayer(MixedLayer):
    """
    Mixed into a cache layer's class by `upgrade_cache`: its own states are the dense groups'.

    Of a forward: `begin`, then `update` as any cache layer, but through `CacheInForward`, `readable` (what the sparse
    groups' queries may read) and `end_call` when they have.
    """

    owner: str  # class of the model that it was made for
    made_for: tuple[int, tuple[Any, ...]]  # which of its layers, and `SparseSpec.plain`
    # Plain tuples: exporters take a cache apart, and would build named ones wrongly.
    dense_groups: tuple[int, ...] | None  # as in `SparseSpec`
    sparse_groups: tuple[tuple[int, ...], ...]  # of each set
    stores: tuple[SparseStore, ...]  # one for each set of groups
    num_dense: int | None  # as in `SparseSpec`
    _seen: SeenMask  # of a cache's first such layer: see `seen_tokens`
    # Between `begin` and `end_call`: how the call's tokens stand, and what their queries may read.
    _layout: Any
    _centers: Any  # `Routed.center` of each set
    _read: Any

    @property
    def seen(self) -> torch.Tensor | None:
        return getattr(self._seen, "mask", None)  # exporters build one without

    @seen.setter
    def seen(self, mask: torch.Tensor | None) -> None:
        self._seen = SeenMask(mask)  # copies of the layer share the old one

    @property
    def num_tokens(self) -> torch.Tensor | None:
        """`[B]` int64, real (not padding) tokens seen; None before the first call."""
        return self.stores[0].num_tokens

    @property
    def needs_score(self) -> bool:
        """Whether `begin` needs scores."""
        return self.stores[0].needs_score

    def fits(self, spec: SparseSpec) -> bool:
        """Whether this is what `upgrade_cache` would make for `spec`, capacities aside."""
        own, wanted = (
            (dense, [(groups, window) for groups, window, _ in sets], others)  # all but sparsities
            for dense, sets, *others in (self.made_for[1], spec.plain())
        )
        return own == wanted

    def has_tokens(self) -> bool:
        return self.stores[0].has_tokens()

    def lazy_initialization(self, *states: torch.Tensor, **recurrent: Any) -> None:
        # `early_initialization` by who does not know the dense groups gives all heads. Hybrid layers have others, too.
        super().lazy_initialization(*(each[:, : self.num_dense] for each in states), **recurrent)

    def begin(self, layout: CallLayout, routed: list[Routed]) -> None:
        """A call begins, whose tokens stand as `layout` says and were `routed`, a set of groups each."""
        layout = layout.to(routed[0].selected.device)
        # For `update`, until `end_call`.
        self._layout, self._centers = None if self.dense_groups is None else layout, [each.center for each in routed]
        valid = None if layout.valid is None else layout.pad_left(layout.valid, dim=1)
        for store, (selected, score, _) in zip(self.stores, routed, strict=True):
            selected = layout.pad_left(selected.transpose(1, 2), dim=2)
            score = None if score is None else layout.pad_left(score.transpose(1, 2), dim=2)
            store.begin(selected, score, valid, layout.valid, layout.num_tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, in_forward: bool = False, **kwargs: Any
    ) -> Any:
        """
        As upstream's, for `[B, G, T, d]` of all groups.

        Args:
            key_states, value_states: of the call's tokens, rotated.
            args, kwargs: as upstream's layer takes them.
            in_forward: what `CacheInForward` says and no other caller knows of.

        Returns:
            keys and values of the dense groups `[B, G_dense, S, d]`; of all groups in a first call within all windows.

        Raises:
            ValueError: for the keys and values of another model, whose tokens no router has looked at.
        """
        if not in_forward:
            raise ValueError(
                f"This cache is {self.owner}'s, which keeps in it what its routers select: only that model can add to "
                "it or read it, and what calls `update` here is another one, or no model. Give every model a cache "
                "of its own (`DynamicCache(config=model.config)`); copy a filled one by `copy.deepcopy`."
            )
        if self.dense_groups is None:
            return super().update(key_states, value_states, *args, **kwargs)
        layout, pending, reads = self._layout, [], []
        for store, groups, center in zip(self.stores, self.sparse_groups, self._centers, strict=True):
            key, value = take(key_states, groups, dim=1), take(value_states, groups, dim=1)
            if store.is_coded:
                key = turned(key, center)
            counts, read = store.extend(layout.pad_left(key, dim=2), layout.pad_left(value, dim=2))
            pending.append(counts)
            reads.append(read)
        self._read = [read(counts) for read, counts in zip(reads, fetch_counts(pending), strict=True)]
        key, value = take(key_states, self.dense_groups, dim=1), take(value_states, self.dense_groups, dim=1)
        held = super().update(key, value, *args, **kwargs)
        # A first call within all windows is plain attention of all groups, which any implementation computes.
        is_first = key_states.shape[2] > 1 and all(store.holds_only(key_states.shape[2]) for store in self.stores)
        return (key_states, value_states) if is_first and is_free() else held

    def readable(self) -> list[Readable]:
        """What the call's queries may read, of each set of groups; see `SparseStore.extend`."""
        read, self._read = self._read, None
        return read

    def end_call(self) -> None:
        """The call's queries have read."""
        self._layout = self._centers = None
        for store in self.stores:
            store.end_call()

    @property
    def record_past(self) -> bool:
        return self.stores[0].record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if value and any(store.is_fixed for store in self.stores):
            raise ValueError("A static cache cannot be cropped, and keeps no past for it: use a `DynamicCache`.")
        for store in self.stores:
            store.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        length, keys = super().get_seq_length(), self.keys
        # A layer without dense groups caches keys of shape [B, 0, T, d], which upstream takes for empty.
        if isinstance(self, DynamicLayer) and keys is not None and keys.ndim == 4 and keys.shape[1] == 0:
            length = max(length, keys.shape[-2])
        return length

    def reset(self) -> None:
        super().reset()
        self.seen = None
        for store in self.stores:
            store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """
        Upstream's. Raises before anything has changed; `FirstLayer` asks all layers of a cache.

        Raises:
            RuntimeError: if that needs tokens that are no longer held.
        """
        _check_croppable([self], tokens_to_remove)
        super().crop(tokens_to_remove)
        if self.seen is not None and tokens_to_remove:
            self.seen = self.seen[:, :tokens_to_remove]
        for store in self.stores:
            store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if (held := self.num_tokens) is not None:
            self._select_rows(torch.arange(len(held), device=held.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if (held := self.num_tokens) is not None:
            self._select_rows(torch.arange(len(held), device=held.device)[indices])

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen[rows.to(self.seen.device)]
        for store in self.stores:
            store.select_rows(rows)


class FirstLayer(MixedLayer):
    """
    Mixed into the class of a growing cache's first layer by `upgrade_cache`. `Cache.crop` goes from layer to layer:
    what any of them refuses is refused here, before the first has forgotten anything.
    """

    others: tuple[object, ...]  # behind it, of whatever kind; without itself, since a circle would outlive its cache

    def crop(self, tokens_to_remove: int) -> None:
        _check_croppable([self, *self.others], tokens_to_remove)
        for layer in self.others:
            if isinstance(layer, DynamicSlidingWindowLayer | LinearAttentionCacheLayerMixin):  # upstream's that refuse
                trial: Any = object.__new__(type(layer))
                trial.__dict__ |= {x: dict(y) if isinstance(y, dict) else y for x, y in layer.__dict__.items()}
                trial = super(SparseLayer, trial) if isinstance(layer, SparseLayer) else trial
                trial.crop(tokens_to_remove)
        super().crop(tokens_to_remove)


def _check_croppable(layers: Sequence[object], tokens_to_remove: int) -> None:
    """Raise a RuntimeError if any of `layers` cannot forget so many tokens, a ValueError for a positive number."""
    if tokens_to_remove > 0:  # which older versions take for the length that is to be left
        raise ValueError("`crop` with a positive value is not possible: pass minus the number of tokens to take back.")
    stores = [store for layer in layers if isinstance(layer, SparseLayer) for store in layer.stores]
    if any(store.is_fixed for store in stores):
        raise RuntimeError("A static cache cannot be cropped: use a `DynamicCache`.")
    num_removed = -tokens_to_remove
    if num_removed == 0:
        return
    sliding = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized]
    possible = min(
        *(store.num_croppable(num_removed) for store in stores),
        *(_num_croppable(layer, num_removed) for layer in sliding),
        num_removed,
    )
    if possible < num_removed:
        raise RuntimeError(
            f"`crop` can take back {possible} tokens here, not {num_removed}: what it needs has left `mosa_window` or "
            f"`sliding_window`, or was evicted by `mosa_cache_budget`. Up to {MAX_UNDO} tokens that were fed one at a "
            "time, as `generate` does, can be taken back of sparse groups without more ado. For more, for a prompt, or"
            " for layers with a `sliding_window`, call `model.record_past(past_key_values)` before the tokens that may"
            " be cropped are added."
        )


def _num_croppable(layer: DynamicSlidingWindowLayer, num_removed: int) -> int:
    """How many of the last tokens upstream's `crop` can take back, which does not ask whether it has those before."""
    num_held = cast(torch.Tensor, layer.keys).shape[-2]
    if num_held == layer.cumulative_length or num_removed >= layer.cumulative_length:
        return num_removed
    return min(num_removed, num_held - layer.sliding_window + 1)


@lru_cache
def _mixed(*bases: type) -> type[CacheLayerMixin]:
    """A cache layer's class, the last of `bases`, with what is mixed into it."""
    return type(f"{'Sparse' if SparseLayer in bases else ''}{bases[-1].__name__}", bases, {"__module__": __name__})


def _blank(*bases: type) -> CacheLayerMixin:
    return object.__new__(_mixed(*bases))


def __getattr__(name: str) -> type[CacheLayerMixin]:
    """The class of upgraded layers of Transformers' own, by name: exported programs look for them here."""
    own = {"SparsePreallocatedDynamicLayer": PreallocatedDynamicLayer}
    layer_class = own.get(name, getattr(cache_utils, name.removeprefix("Sparse"), None))
    if (
        not name.startswith("Sparse")
        or not isinstance(layer_class, type)
        or not issubclass(layer_class, CacheLayerMixin)
    ):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _mixed(SparseLayer, layer_class)


class CacheInForward:
    """
    A cache as a module of a MoSA model hands it to its family's code, once the call has begun. So its layers tell that
    call from the stock model's on the same cache, also after a call that failed half-way.
    """

    def __init__(self, cache: Cache):
        self.cache = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> Any:
        return self.cache.update(key_states, value_states, layer_idx, *args, in_forward=True, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def upgrade_cache(
    cache: Cache, specs: dict[int, SparseSpec | None], max_cache_len: int | None = None, owner: str = "a MoSA model"
) -> None:
    """
    Give the layers that have sparse groups or MoSA heads their stores. Layers that have the same already are left
    alone.

    Args:
        cache: any cache of dynamic or static layers, as `generate` or the user made it.
        specs: layer index → what it has to hold; None: no sparse groups, and nothing to do.
        max_cache_len: tokens that a static cache will see, which it does not know if all its layers have a window.
        owner: class of the model, for what its layers say to others.

    Raises:
        ValueError: for a cache that holds tokens of another model, or is made for other groups, has too few layers,
            layers of another kind or out of order, or layers that hold different tokens.
    """
    for layer_idx, spec in specs.items():
        _check_layer(cache, layer_idx, spec)
    check_lengths([cache.layers[layer_idx] for layer_idx in specs if layer_idx < len(cache.layers)])
    for layer_idx, spec in specs.items():
        if spec is not None and not isinstance(cache.layers[layer_idx], SparseLayer):
            _upgrade_layer(cache, layer_idx, spec, max_cache_len, owner)
    first: Any = cache.layers[0] if cache.layers else None
    if isinstance(first, FirstLayer):
        first.others = tuple(cache.layers[1:])  # which may be others than they were
    elif isinstance(first, CacheLayerMixin) and not isinstance(first, StaticLayer) and any(specs.values()):
        bases = type(first).__bases__ if isinstance(first, SparseLayer) else (type(first),)
        first.__class__ = _mixed(FirstLayer, *bases)
        cast(FirstLayer, first).others = tuple(cache.layers[1:])


def _check_layer(cache: Cache, layer_idx: int, spec: SparseSpec | None) -> None:
    """Raise what `upgrade_cache` raises for a layer, which is made if the cache makes layers as they are needed."""
    if spec is None:
        if layer_idx < len(cache.layers) and isinstance(layer := cache.layers[layer_idx], SparseLayer):
            raise ValueError(_of_other_groups(layer, layer_idx))
        return
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers, but layer {layer_idx} of this model needs one: "
            "make it with `DynamicCache(config=model.config)`."
        )
    layer = cache.layers[layer_idx]
    if isinstance(layer, SparseLayer):
        if not layer.fits(spec):
            raise ValueError(_of_other_groups(layer, layer_idx))
        if layer.made_for[0] != layer_idx:
            raise ValueError(
                f"Layer {layer_idx} of `past_key_values` was filled as layer {layer.made_for[0]}: put its "
                "`layers` in order again, or make a new cache."
            )
        layer.made_for = (layer_idx, spec.plain())  # the same groups, maybe of another sparsity
        return
    if not isinstance(layer, DynamicLayer | StaticLayer):
        raise ValueError(
            f"Sparse groups cannot extend a cache layer of class {type(layer).__name__}: use a `DynamicCache` or "
            "a `StaticCache`."
        )
    if length := _held(layer):
        raise ValueError(
            f"`past_key_values` holds {length} tokens that this model's routers have not seen, or has lost what "
            f"they selected of them (layer {layer_idx}). Pass an empty cache, or one that this model filled: keys "
            "and values alone do not make one. Copy one by `copy.deepcopy`, keep it on disk by "
            "`mosa_hf.save_cache`. PEFT's prefix tuning and cartridges learn such keys and values: learn a prompt "
            "instead (`PromptTuningConfig`, `PromptEncoderConfig`), or adapters."
        )


def _of_other_groups(layer: SparseLayer, layer_idx: int) -> str:
    return (
        f"Layer {layer_idx} of `past_key_values` is made for a model whose groups differ from this one's in kind, "
        f"`mosa_window`, `mosa_cache_budget` or `mosa_cache_dtype` ({layer.owner}): make a new cache."
    )


def _held(layer: DynamicLayer | StaticLayer) -> int:
    """Tokens of one of upstream's layers, those whose keys have no heads, `[B, 0, T, d]`, included."""
    length = int(layer.get_seq_length())
    if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.ndim == 4:
        length = max(length, layer.keys.shape[-2])
    return length


def check_lengths(layers: Sequence[object]) -> None:
    """Raise a ValueError for layers of one cache that do not hold the same tokens, if that asks no device."""
    if any(isinstance(layer, SparseLayer) and layer.stores[0].routed is not None for layer in layers):
        raise ValueError(
            "An earlier call failed half-way, and some layers of `past_key_values` hold its tokens: `reset()` it, "
            "make a new cache, or go on with a copy (`copy.deepcopy`) that was made before that call."
        )
    held = [layer.get_seq_length() for layer in layers if isinstance(layer, CacheLayerMixin)]
    lengths = {int(x) for x in held if isinstance(x, int) or x.device.type == "cpu"}
    counted = {
        layer.has_tokens() == bool(layer.get_seq_length())
        for layer in layers
        if isinstance(layer, SparseLayer) and isinstance(layer, DynamicLayer)
    }
    if len(lengths) > 1 or False in counted:
        raise ValueError(
            f"The layers of `past_key_values` hold different numbers of tokens ({sorted(lengths)}): some were "
            "emptied, exchanged or filled by hand, another model has added to them, or a call failed half-way. "
            "`reset()` it, make a new cache, or go on with a copy (`copy.deepcopy`) that was made before that."
        )


def _upgrade_layer(cache: Cache, layer_idx: int, spec: SparseSpec, max_cache_len: int | None, owner: str) -> None:
    layer: Any = cache.layers[layer_idx]
    layer_class: type[CacheLayerMixin] = type(layer)
    sizes: list[FixedSize | None] = [None] * len(spec.sets)
    if isinstance(layer, StaticLayer):
        length = max_cache_len if (slides := all(cache.is_sliding)) else static_length(cache)
        if length is None:
            raise ValueError("`max_cache_len` is needed for a static cache whose layers all have a window.")
        # Layers that slide go on without the first tokens; of others, a call of more tokens is refused.
        most = NEVER if slides else length
        sizes = [FixedSize(static_capacity(length, each.sparsity), most) for each in spec.sets]
    else:
        if isinstance(layer, QuantizedLayer) and spec.num_dense == 0:
            layer_class = DynamicLayer  # it only counts tokens, and there is nothing to quantise
        if layer_class is DynamicLayer:
            layer_class = PreallocatedDynamicLayer
    layer.made_for, layer.owner, layer.num_dense = (layer_idx, spec.plain()), owner, spec.num_dense
    layer.dense_groups, layer.sparse_groups = spec.dense, tuple(each.groups for each in spec.sets)
    layer.stores = tuple(
        SparseStore(each.window, spec.budget, size, spec.dtype is not None)
        for each, size in zip(spec.sets, sizes, strict=True)
    )
    layer._seen = SeenMask()
    record_past = layer.__dict__.pop("record_past", False)
    layer.__class__ = _mixed(SparseLayer, layer_class)
    layer.record_past = record_past
    if isinstance(layer, StaticLayer) and layer.is_initialized and spec.num_dense is not None:
        assert layer.keys is not None and layer.values is not None
        if layer.keys.shape[1] != spec.num_dense:  # initialised early, by who did not know the dense groups
            layer.lazy_initialization(layer.keys, layer.values)


def made_for(cache: Cache, num_layers: int) -> list[tuple[int, tuple[Any, ...]] | None]:
    """What `upgrade_cache` made the first layers of a cache for, each: which layer, and what it has to hold."""
    return [getattr(layer, "made_for", None) for layer in getattr(cache, "layers", ())[:num_layers]]


def upstream_class(layer: object) -> type:
    """The class of Transformers that a layer was made of."""
    layer_class = type(layer).__bases__[-1] if isinstance(layer, MixedLayer) else type(layer)
    return DynamicLayer if layer_class is PreallocatedDynamicLayer else layer_class


def sparse_layers(cache: Cache | None) -> list[SparseLayer]:
    """The layers of a cache that `upgrade_cache` has given stores."""
    return [] if cache is None else [layer for layer in cache.layers if isinstance(layer, SparseLayer)]


def _first_sparse_layer(cache: Cache) -> SparseLayer | None:
    """The first of `sparse_layers`, which knows of all of them what is asked in every call."""
    return next((layer for layer in cache.layers if isinstance(layer, SparseLayer)), None)


def is_upgraded(cache: Cache) -> bool:
    """Whether `upgrade_cache` has seen this cache."""
    return _first_sparse_layer(cache) is not None


def static_length(cache: Cache) -> int:
    """Tokens that a static cache has room for; -1 if it grows. Upstream answers -1 for one of hybrid layers, too."""
    return max([-1, *(layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer))])


def num_cached_tokens(cache: Cache | None) -> torch.Tensor | None:
    """`[B]`: the real (not padding) tokens that an upgraded cache has seen; None if none."""
    layer = None if cache is None else _first_sparse_layer(cache)
    return None if layer is None else layer.num_tokens


def seen_tokens(cache: Cache, length: int) -> torch.Tensor | None:
    """`TokenMask.seen` of the `length` tokens that an upgraded cache has; a call that failed may have noted more."""
    layer = _first_sparse_layer(cache)
    seen = None if layer is None else layer.seen
    return seen if seen is None or seen.shape[1] <= length else seen[:, :length]


def note_seen(cache: Cache, seen: torch.Tensor | None) -> None:
    """An upgraded cache is about to see more tokens, and `TokenMask.seen` of all of them is `seen`."""
    if (layer := _first_sparse_layer(cache)) is not None:
        layer.seen = seen


def has_budget(cache: Cache) -> bool:
    """Whether an upgraded cache may have to evict selected tokens: one of a model with a budget, and a static one."""
    return any(layer.needs_score for layer in sparse_layers(cache))


def num_overflowed(cache: Cache) -> int:
    """Selected tokens for which a static cache lacked capacity, over all layers, rows and groups."""
    return sum(store.num_overflowed() for layer in sparse_layers(cache) for store in layer.stores)
