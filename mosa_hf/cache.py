"""The sparse KV cache (DESIGN section 4): what MoSA heads keep, beside the dense heads' ordinary cache layer.

A layer of whatever dynamic cache the user brings is upgraded in place to hold both. Memory is really not held: tokens
that no group selected, and that have left the window, are in no tensor.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .kernels.layout import KeyValues, RaggedKeyValues


class SelectedKeyValues:
    """
    Keys and values of the selected tokens of every row and group, without padding between them: row by row, group by
    group, in ascending position.
    """

    def __init__(self):
        self.key: torch.Tensor | None = None  # [N, d]
        self.value: torch.Tensor | None = None  # [N, d]
        self.position: torch.Tensor | None = None  # [N] int32
        self.count: torch.Tensor | None = None  # [B, G] int64, entries of each row and group; N is their sum

    def append(self, new: KeyValues, groups: torch.Tensor | None = None) -> None:
        """Keep the filled slots of `new`; its G axis lists `groups` of this store (all of them by default)."""
        batch_size, num_groups = new.position.shape[:2]
        filled = torch.ones_like(new.position, dtype=torch.bool) if new.valid is None else new.valid
        if self.count is None:
            if groups is not None:
                raise ValueError("the first tokens must come for every group")
            self.key, self.value = (states.new_zeros(0, states.shape[-1]) for states in (new.key, new.value))
            self.position = new.position.new_zeros(0, dtype=torch.int32)
            self.count = new.position.new_zeros(batch_size, num_groups)
        if not bool(filled.any()):
            return
        owner = torch.arange(self.count.numel(), device=filled.device).view_as(self.count)  # [B, G]
        new_owner = (owner if groups is None else owner[:, groups])[..., None].expand_as(filled)[filled]
        owners = torch.cat((owner.flatten().repeat_interleave(self.count.flatten()), new_owner))
        order = owners.argsort(stable=True)
        self.key = torch.cat((self.key, new.key[filled]))[order]
        self.value = torch.cat((self.value, new.value[filled]))[order]
        self.position = torch.cat((self.position, new.position[filled].to(torch.int32)))[order]
        self.count = owners.bincount(minlength=self.count.numel()).view_as(self.count)

    def read(self, groups: torch.Tensor | None = None) -> KeyValues | None:
        """The entries of `groups` (all by default) with empty slots at the end of each; None if there are none."""
        entries = self.entries()
        return None if entries is None else entries.pad(groups)

    def entries(self) -> RaggedKeyValues | None:
        """All entries, as they are held; None if there are none. Later calls do not change what was returned."""
        if self.key is None or len(self.key) == 0:
            return None
        return RaggedKeyValues(self.key, self.value, self.position, self.count)

    def crop(self, num_tokens: torch.Tensor) -> None:
        """Drop the entries whose position is not below `num_tokens` [B]."""
        if self.count is None:
            return
        limit = num_tokens[:, None].expand_as(self.count).flatten().repeat_interleave(self.count.flatten())
        keep = self.position < limit
        owner = torch.arange(self.count.numel(), device=keep.device).repeat_interleave(self.count.flatten())[keep]
        self.key, self.value, self.position = self.key[keep], self.value[keep], self.position[keep]
        self.count = owner.bincount(minlength=self.count.numel()).view_as(self.count)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.count is None:
            return
        start = self.count.flatten().cumsum(0).view_as(self.count) - self.count
        count, start = self.count[rows], start[rows]
        shift = start.flatten() - (count.flatten().cumsum(0) - count.flatten())  # old minus new place of each run
        entries = torch.arange(int(count.sum()), device=count.device) + shift.repeat_interleave(count.flatten())
        self.key, self.value, self.position = self.key[entries], self.value[entries], self.position[entries]
        self.count = count

    def tensors(self) -> list[torch.Tensor]:
        return [] if self.count is None else [self.key, self.value, self.position, self.count]


class SparseKeyValues:
    """
    What one layer's MoSA heads remember: the selected tokens and, for form "all", the last `window - 1` tokens, which
    the next token's window covers. Tokens join the selected ones when they leave the window.

    Args:
        window: `mosa_window`; 0 where there is no window (form "selected").
    """

    def __init__(self, window: int = 0):
        self.window = window
        self.record_past = False  # keep what leaves the window until `crop` says that it is final
        self.reset()

    def reset(self) -> None:
        self.kept = SelectedKeyValues()
        # The recent tokens [B, G, S, ...] are right-aligned: a row's newest token is in the last slot.
        self.recent_key: torch.Tensor | None = None
        self.recent_value: torch.Tensor | None = None
        self.recent_selected: torch.Tensor | None = None
        self.num_tokens: torch.Tensor | None = None  # [B] int64, real tokens seen
        # Padding of the calls so far, [B, T] bool or None, and their lengths; only of use to `crop`.
        self.masks: list[torch.Tensor | None] = []
        self.lengths: list[int] = []

    def advance(self, valid: torch.Tensor | None, batch_size: int, length: int, device: torch.device) -> None:
        """Count the tokens of a call; `valid` [B, length] is False on padding, None without."""
        if self.num_tokens is None:
            self.num_tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.num_tokens = self.num_tokens + (length if valid is None else valid.sum(1))
        if valid is None and self.masks and self.masks[-1] is None:
            self.lengths[-1] += length
        else:
            self.masks.append(valid)
            self.lengths.append(length)

    def append_selected(self, new: KeyValues, groups: torch.Tensor | None = None) -> None:
        """Form "selected": keep the filled slots of `new`, whose G axis lists `groups` (all by default)."""
        self.kept.append(new, groups)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, selected: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[KeyValues, RaggedKeyValues | None]:
        """
        Form "all": take in a call's tokens, which `advance` has counted.

        Args:
            key, value: `[B, G, T, d]`, padding on the left.
            selected: `[B, G, T]` bool.
            valid: `[B, T]` bool, or None without padding.

        Returns:
            (near, kept) as `all_attention` reads them.
        """
        kept = self.kept.entries()
        if self.recent_key is not None:
            num_recent = self.recent_key.shape[2]
            key = torch.cat((self.recent_key, key), dim=2)
            value = torch.cat((self.recent_value, value), dim=2)
            selected = torch.cat((self.recent_selected, selected), dim=2)
            if valid is not None:
                # Bring the recent tokens up to the call's own, over the padding between them.
                real = F.pad(valid, (num_recent, 0), value=True).to(torch.int8)
                order = real.argsort(dim=1, stable=True)[:, None].expand_as(selected)
                key, value = (states.gather(2, order[..., None].expand_as(states)) for states in (key, value))
                selected = selected.gather(2, order)
        self.recent_key, self.recent_value, self.recent_selected = key, value, selected
        position = self._recent_positions()
        filled = None if all(mask is None for mask in self.masks) else position >= 0
        near = KeyValues(key, value, position, filled, selected)
        if not self.record_past:
            self._leave_window()
        return near, kept

    def _recent_positions(self) -> torch.Tensor:
        """`[B, G, S]`: positions of the recent slots, negative on empty ones."""
        length = self.recent_key.shape[2]
        position = self.num_tokens[:, None, None] - length + torch.arange(length, device=self.num_tokens.device)
        return position.expand(self.recent_selected.shape)

    def _leave_window(self) -> None:
        """Move what the next token's window no longer covers from the recent tokens to the kept ones, or forget it."""
        if self.recent_key is None:
            return
        num_left = max(self.recent_key.shape[2] - max(self.window - 1, 0), 0)
        position = self._recent_positions()[:, :, :num_left]
        leaving = self.recent_selected[:, :, :num_left] & (position >= 0)
        left = (states[:, :, :num_left] for states in (self.recent_key, self.recent_value))
        self.kept.append(KeyValues(*left, position, leaving, None))
        # Copies, not views: a view would hold the whole call's keys in memory.
        self.recent_key = self.recent_key[:, :, num_left:].clone()
        self.recent_value = self.recent_value[:, :, num_left:].clone()
        self.recent_selected = self.recent_selected[:, :, num_left:].clone()

    def crop(self, num_removed: int) -> None:
        """
        Forget the last `num_removed` tokens of the cache, padding among them included.

        Raises:
            RuntimeError: if that needs tokens that have left the window and were not recorded.
        """
        if self.num_tokens is None:
            return
        if num_removed:
            self.check_crop(num_removed)
            num_recent = None if self.recent_key is None else self.recent_key.shape[2]
            removed = self._removed(num_removed)  # [B]
            self._forget_masks(num_removed)
            self.num_tokens = self.num_tokens - removed
            self.kept.crop(self.num_tokens)
            if num_recent is not None:
                # Rows may lose different numbers of real tokens: shift each to the right again.
                num_empty = max(
                    int(removed.min()), num_recent - int(self.num_tokens.max())
                )  # on the left of every row
                source = torch.arange(num_recent, device=removed.device) - removed[:, None]
                source = source[:, None, num_empty:]  # [B, 1, S]
                index = source.clamp(min=0).expand(-1, self.recent_selected.shape[1], -1)
                self.recent_key, self.recent_value = (
                    states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[-1]))
                    for states in (self.recent_key, self.recent_value)
                )
                self.recent_selected = self.recent_selected.gather(2, index) & (source >= 0)
        if self.record_past:
            self._leave_window()

    def check_crop(self, num_removed: int) -> None:
        """Raise what `crop` would, changing nothing."""
        if self.num_tokens is None or self.recent_key is None:
            return
        removed = self._removed(num_removed)
        remaining = (self.recent_key.shape[2] - removed).clamp(min=0)
        needed = (self.num_tokens - removed).clamp(max=max(self.window - 1, 0))
        if bool(((remaining < needed) & (removed > 0)).any()):
            raise RuntimeError(
                "`crop` cannot bring back tokens that have left `mosa_window`. Call "
                "`past_key_values.activate_past_recording()` before the tokens that may be cropped are added."
            )

    def _removed(self, num_removed: int) -> torch.Tensor:
        """How many real tokens [B] are among the last `num_removed`."""
        removed = torch.zeros_like(self.num_tokens)
        for mask, length in zip(reversed(self.masks), reversed(self.lengths), strict=True):
            cut = min(num_removed, length)
            removed = removed + (cut if mask is None else mask[:, length - cut :].sum(1))
            num_removed -= cut
        return removed

    def _forget_masks(self, num_removed: int) -> None:
        """Cut the log of calls by `num_removed` tokens."""
        while num_removed and self.lengths:
            cut = min(num_removed, self.lengths[-1])
            mask = self.masks[-1]
            self.lengths[-1] -= cut
            self.masks[-1] = None if mask is None else mask[:, : mask.shape[1] - cut]
            if self.lengths[-1] == 0:
                self.lengths.pop()
                self.masks.pop()
            num_removed -= cut

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was (beam search, batch repetition and selection)."""
        if self.num_tokens is None:
            return
        rows = rows.to(self.num_tokens.device)
        self.num_tokens = self.num_tokens[rows]
        self.masks = [None if mask is None else mask[rows] for mask in self.masks]
        self.kept.select_rows(rows)
        if self.recent_key is not None:
            self.recent_key, self.recent_value = self.recent_key[rows], self.recent_value[rows]
            self.recent_selected = self.recent_selected[rows]

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by kind."""
        recent = [] if self.recent_key is None else [self.recent_key, self.recent_value, self.recent_selected]
        return {"selected": self.kept.tensors(), "window": recent}


class SparseLayer(CacheLayerMixin):
    """Mixed into a cache layer's class by `upgrade_cache`: its own states are the dense heads', `sparse` is ours."""

    _layer_type = None  # not a layer type of its own: the class it is mixed with keeps its registration
    sparse: SparseKeyValues

    @property
    def record_past(self) -> bool:
        return self.sparse.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.sparse.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        # A layer without dense heads caches keys of shape [B, 0, T, d], which upstream takes for empty.
        if self.is_initialized and self.keys.ndim == 4 and self.keys.shape[1] == 0:
            length = max(length, self.keys.shape[-2])
        return length

    def reset(self) -> None:
        super().reset()
        self.sparse.reset()

    def __reduce__(self):
        # The class is made at run time, so pickle cannot find it by name.
        return _restore, (type(self).__bases__[1], self.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        self.sparse.check_crop(abs(tokens_to_remove))  # raises before anything has changed
        super().crop(tokens_to_remove)
        self.sparse.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.sparse.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.sparse.num_tokens is not None:
            rows = torch.arange(len(self.sparse.num_tokens), device=self.sparse.num_tokens.device)
            self.sparse.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.sparse.num_tokens is not None:
            rows = torch.arange(len(self.sparse.num_tokens), device=self.sparse.num_tokens.device)
            self.sparse.select_rows(rows[indices])


@lru_cache
def _sparse_class(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    return type(f"Sparse{layer_class.__name__}", (SparseLayer, layer_class), {})


def _restore(layer_class: type[CacheLayerMixin], state: dict) -> CacheLayerMixin:
    """A layer of a class that is not importable by name, unpickled."""
    layer = object.__new__(_sparse_class(layer_class))
    layer.__dict__.update(state)
    return layer


def upgrade_cache(cache: Cache, windows: dict[int, int]) -> None:
    """
    Give the layers that have MoSA heads their sparse part. Layers that have it already are left alone.

    Args:
        cache: any cache of dynamic layers, as `generate` or the user made it.
        windows: layer index → window of its MoSA heads (0 for form "selected").

    Raises:
        ValueError: for a cache that holds tokens of another model, has too few layers, or layers of a fixed size.
    """
    for layer_idx, window in windows.items():
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
        if layer_idx >= len(cache.layers):
            raise ValueError(
                f"`past_key_values` has {len(cache.layers)} layers, but layer {layer_idx} of this model needs one: "
                "make it with `DynamicCache(config=model.config)`."
            )
        layer = cache.layers[layer_idx]
        if isinstance(layer, SparseLayer):
            continue
        if not isinstance(layer, DynamicLayer):
            raise ValueError(
                f"MoSA heads cannot extend a cache layer of class {type(layer).__name__}: use a `DynamicCache` "
                "(`cache_implementation=None` or 'dynamic')."
            )
        if layer.get_seq_length():
            raise ValueError(
                f"`past_key_values` holds {layer.get_seq_length()} tokens that this model's MoSA heads have not seen. "
                "Pass an empty cache, or one that this model filled."
            )
        sparse = SparseKeyValues(window)
        sparse.record_past = layer.__dict__.pop("record_past", False)
        layer.sparse = sparse
        layer.__class__ = _sparse_class(type(layer))


def is_upgraded(cache: Cache) -> bool:
    """Whether `upgrade_cache` has seen this cache."""
    return any(isinstance(layer, SparseLayer) for layer in cache.layers)


def num_cached_tokens(cache: Cache | None) -> torch.Tensor | None:
    """`[B]`: the real (not padding) tokens that an upgraded cache has seen; None if none."""
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, SparseLayer):
            return layer.sparse.num_tokens
    return None


def cache_bytes(past_key_values: Cache) -> dict[str, int]:
    """
    Bytes that a cache holds, summed over its live tensors.

    Returns:
        `{"dense": ..., "selected": ..., "window": ...}`: the dense heads' keys and values; the selected tokens' keys,
        values, positions and counts; the window's keys, values and flags.
    """
    held = {"dense": [], "selected": [], "window": []}
    for layer in past_key_values.layers:
        held["dense"] += [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
        if isinstance(layer, SparseLayer):
            for kind, tensors in layer.sparse.tensors().items():
                held[kind] += tensors
    return {kind: sum(_storage_bytes(tensor) for tensor in tensors) for kind, tensors in held.items()}


def _storage_bytes(tensor: torch.Tensor) -> int:
    """Memory that a tensor keeps alive: of a view, the whole storage behind it."""
    return tensor.untyped_storage().nbytes()
