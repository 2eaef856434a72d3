"""The Transformers cache layer of a layer with sparse groups or MoSA heads: upstream's for dense groups, stores for
the others. A layer of whatever cache the user brings is upgraded in place."""

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from ..kernels.tensors import KeyValues, PackedKeyValues, take
from ..routing.layout import CallLayout
from .dense import PreallocatedDynamicLayer
from .growth import static_capacity
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
    has_dense: bool = True  # whether the layer has dense groups or heads


class Routed(NamedTuple):
    """What the routers said of a call's tokens, for one set of groups."""

    selected: torch.Tensor  # [B, T, G] bool, False on padding
    score: torch.Tensor | None = None  # [B, T, G], what a budget compares, inf for tokens that are never evicted


if TYPE_CHECKING:
    Mixable = DynamicLayer
else:  # whatever the class it is mixed with
    Mixable = CacheLayerMixin


class MixedLayer(Mixable):
    """Mixed into the class of a cache layer at run time, so that pickle does not find the result by name."""

    _layer_type = None  # not a layer type of its own: the class it is mixed with keeps its registration

    def __reduce__(self) -> tuple:
        return _blank, type(self).__bases__, self.__dict__


class SparseLayer(MixedLayer):
    """
    Mixed into a cache layer's class by `upgrade_cache`: its own states are the dense groups'.

    Of a model call: `begin`, then `update` as any cache layer, `readable` (what the sparse groups' queries may read)
    and `evict` when they have.
    """

    # Plain tuples: exporters take a cache apart, and would build named ones wrongly.
    dense_groups: tuple[int, ...] | None  # as in `SparseSpec`
    sparse_groups: tuple[tuple[int, ...], ...]  # of each set
    stores: tuple[SparseStore, ...]  # one for each set of groups
    # Between `begin` and `evict`: how the call's tokens stand, and what their queries may read.
    _layout: Any
    _read: Any

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
        own = self.dense_groups, self.sparse_groups, [store.window for store in self.stores]
        budgets = {store.budget for store in self.stores if not store.is_fixed}
        wanted = spec.dense, tuple(each.groups for each in spec.sets), [each.window for each in spec.sets]
        return own == wanted and budgets <= {spec.budget}

    def has_tokens(self) -> bool:
        return self.stores[0].has_tokens()

    def begin(self, layout: CallLayout, routed: list[Routed]) -> None:
        """A call begins, whose tokens stand as `layout` says and were `routed`, a set of groups each."""
        layout = layout.to(routed[0].selected.device)
        self._layout = None if self.dense_groups is None else layout  # for `update`, until `evict`
        valid = None if layout.valid is None else layout.pad_left(layout.valid, dim=1)
        for store, (selected, score) in zip(self.stores, routed, strict=True):
            selected = layout.pad_left(selected.transpose(1, 2), dim=2)
            score = None if score is None else layout.pad_left(score.transpose(1, 2), dim=2)
            store.begin(selected, score, valid, layout.valid)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        As upstream's, for `[B, G, T, d]` of all groups.

        Returns:
            keys and values of the dense groups `[B, G_dense, S, d]`.
        """
        if self.dense_groups is None:
            return super().update(key_states, value_states, *args, **kwargs)
        layout, self._read = self._layout, []
        for store, groups in zip(self.stores, self.sparse_groups, strict=True):
            key, value = (layout.pad_left(take(states, groups, dim=1), dim=2) for states in (key_states, value_states))
            self._read.append(store.extend(key, value))
        key_states, value_states = (take(states, self.dense_groups, dim=1) for states in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)

    def readable(self) -> list[PackedKeyValues | tuple[KeyValues, PackedKeyValues | None]]:
        """What the call's queries may read, of each set of groups; see `SparseStore.extend`."""
        read, self._read = self._read, None
        return read

    def evict(self) -> None:
        """The call's queries have read."""
        self._layout = None
        for store in self.stores:
            store.evict()

    @property
    def record_past(self) -> bool:
        return self.stores[0].record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
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
        for store in self.stores:
            store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """
        Upstream's. Raises before anything has changed; `FirstLayer` asks all layers of a cache.

        Raises:
            RuntimeError: if that needs tokens that are no longer held.
        """
        _check_stores([self], tokens_to_remove)
        super().crop(tokens_to_remove)
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
        for store in self.stores:
            store.select_rows(rows)


class FirstLayer(MixedLayer):
    """
    Mixed into the class of a growing cache's first layer by `upgrade_cache`. `Cache.crop` goes from layer to layer:
    what any of them refuses is refused here, before the first has forgotten anything.
    """

    others: tuple[CacheLayerMixin, ...]  # behind it; without itself, since a circle would outlive its cache

    def crop(self, tokens_to_remove: int) -> None:
        _check_stores([self, *self.others], tokens_to_remove)
        for layer in self.others:
            if isinstance(layer, DynamicSlidingWindowLayer):  # the one of upstream's that refuses: try it on a copy
                trial: Any = copy.copy(layer)
                trial = super(SparseLayer, trial) if isinstance(layer, SparseLayer) else trial
                trial.crop(tokens_to_remove)
        super().crop(tokens_to_remove)


def _check_stores(layers: list[CacheLayerMixin], tokens_to_remove: int) -> None:
    """Raise a RuntimeError if a store of `layers` cannot forget so many tokens; upstream refuses positive numbers."""
    stores = [store for layer in layers if isinstance(layer, SparseLayer) for store in layer.stores]
    if any(store.is_fixed for store in stores):
        raise RuntimeError("A static cache cannot be cropped: use a `DynamicCache`.")
    num_removed = -tokens_to_remove
    if num_removed > 0 and (possible := min(store.num_croppable(num_removed) for store in stores)) < num_removed:
        raise RuntimeError(
            f"`crop` can take back {possible} tokens here, not {num_removed}: what it needs has left `mosa_window` or "
            f"was evicted by `mosa_cache_budget`. Up to {MAX_UNDO} tokens that were fed one at a time, as `generate` "
            "does, can be taken back without more ado. For more, or a prompt, call "
            "`model.record_past(past_key_values)` before the tokens that may be cropped are added."
        )


@lru_cache
def _mixed(*bases: type) -> type[CacheLayerMixin]:
    """A cache layer's class, the last of `bases`, with what is mixed into it."""
    return type(f"{'Sparse' if SparseLayer in bases else ''}{bases[-1].__name__}", bases, {"__module__": __name__})


def _blank(*bases: type) -> CacheLayerMixin:
    return object.__new__(_mixed(*bases))


def __getattr__(name: str) -> type[CacheLayerMixin]:
    """The class of upgraded layers of Transformers' own, by name: exported programs look for them here."""
    layer_class = getattr(cache_utils, name.removeprefix("Sparse"), None)
    if (
        not name.startswith("Sparse")
        or not isinstance(layer_class, type)
        or not issubclass(layer_class, CacheLayerMixin)
    ):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _mixed(SparseLayer, layer_class)


def upgrade_cache(cache: Cache, specs: dict[int, SparseSpec], max_cache_len: int | None = None) -> None:
    """
    Give the layers that have sparse groups or MoSA heads their stores. Layers that have the same already are left
    alone.

    Args:
        cache: any cache of dynamic or static layers, as `generate` or the user made it.
        specs: layer index → what it has to hold.
        max_cache_len: tokens that a static cache will see, which it does not know if all its layers have a window.

    Raises:
        ValueError: for a cache that holds tokens of another model, or is made for other groups, has too few layers, or
            layers of another kind.
    """
    for layer_idx, spec in specs.items():
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
                raise ValueError(
                    f"Layer {layer_idx} of `past_key_values` is made for a model whose groups differ from this one's "
                    "in kind, `mosa_window` or `mosa_cache_budget`: make a new cache."
                )
            continue
        if not isinstance(layer, DynamicLayer | StaticLayer):
            raise ValueError(
                f"Sparse groups cannot extend a cache layer of class {type(layer).__name__}: use a `DynamicCache` or "
                "a `StaticCache`."
            )
        if layer.get_seq_length():
            raise ValueError(
                f"`past_key_values` holds {int(layer.get_seq_length())} tokens that this model's routers have not "
                "seen. Pass an empty cache, or one that this model filled."
            )
        length = None
        if isinstance(layer, StaticLayer):
            length = max_cache_len if all(cache.is_sliding) else cache.get_max_length()
            if length is None:
                raise ValueError("`max_cache_len` is needed for a static cache whose layers all have a window.")
        _give_stores(layer, spec, length)
    first: Any = cache.layers[0] if cache.layers else None
    upgraded: Any = first
    if isinstance(first, CacheLayerMixin) and not isinstance(first, FirstLayer | StaticLayer) and specs:
        bases = type(first).__bases__ if isinstance(first, SparseLayer) else (type(first),)
        first.__class__, upgraded.others = _mixed(FirstLayer, *bases), tuple(cache.layers[1:])


def _give_stores(layer: Any, spec: SparseSpec, max_length: int | None) -> None:
    """Make `layer` a sparse one, with fixed memory for `max_length` tokens; None: with memory that grows."""
    layer_class: type[CacheLayerMixin] = type(layer)
    if isinstance(layer, BaseQuantizedLayer) and not spec.has_dense:
        layer_class = DynamicLayer  # it only counts tokens, and there is nothing to quantise
    if layer_class is DynamicLayer:
        layer_class = PreallocatedDynamicLayer
    layer.dense_groups, layer.sparse_groups = spec.dense, tuple(each.groups for each in spec.sets)
    capacities = [None if max_length is None else static_capacity(max_length, each.sparsity) for each in spec.sets]
    layer.stores = tuple(
        SparseStore(each.window, spec.budget, capacity) for each, capacity in zip(spec.sets, capacities, strict=True)
    )
    record_past = layer.__dict__.pop("record_past", False)
    layer.__class__ = _mixed(SparseLayer, layer_class)
    layer.record_past = record_past


def is_upgraded(cache: Cache) -> bool:
    """Whether `upgrade_cache` has seen this cache."""
    return any(isinstance(layer, SparseLayer) for layer in cache.layers)


def num_cached_tokens(cache: Cache | None) -> torch.Tensor | None:
    """`[B]`: the real (not padding) tokens that an upgraded cache has seen; None if none."""
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, SparseLayer):
            return layer.num_tokens
    return None


def num_overflowed(cache: Cache) -> int:
    """Selected tokens for which a static cache lacked capacity, over all layers, rows and groups."""
    stores = [store for layer in cache.layers if isinstance(layer, SparseLayer) for store in layer.stores]
    return sum(store.num_overflowed() for store in stores)
