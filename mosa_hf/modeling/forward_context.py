"""The beginning of a model call, the same for every MoSA model: cache, positions, layout."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..cache import (
    SparseSpec,
    check_lengths,
    has_budget,
    is_upgraded,
    made_for,
    note_seen,
    num_cached_tokens,
    seen_tokens,
    static_length,
    upgrade_cache,
)
from ..kernels.capture import is_captured, is_exported
from ..kernels.derivatives import is_vmapped
from ..routing.layout import CallLayout
from ..routing.mask import POSSIBLE, TokenMask, added_to_scores, check_same_padding, columns_of_mask, read_mask
from .attention_options import check_options, check_sequence_lengths, warn_of_own_implementation
from .configuration import RoutingConfig
from .key_center import MeanRotation
from .layers import attention_modules, check_numbered, check_windows

if TYPE_CHECKING:
    from .router import MosaRouter

logger = logging.get_logger(__name__)


class ForwardContext(NamedTuple):
    """
    What the layers of one model call share.

    `thresholds`: router → the thresholds `[G]` that this call routes with in training, so that gradient checkpointing
    recomputes the same selection after the moving average went on.
    `has_grad`: whether the call records gradients. Layers cannot tell: reentrant checkpointing runs them without.
    `router_logits`: router → logits `[B, T, G]`, if something is to be made of them.
    `mean_rotation`: of the keys' rotary embedding, where keys are stored as codes.
    """

    layout: CallLayout
    thresholds: dict["MosaRouter", torch.Tensor]
    has_grad: bool
    router_logits: dict["MosaRouter", torch.Tensor] | None = None
    mean_rotation: MeanRotation | None = None


class _Place(threading.local):
    """Where layers find what they share if a family's code hands them nothing; each thread has its own."""

    context: ForwardContext | None = None


_PLACE = _Place()


@contextmanager
def shared_by_place(context: ForwardContext) -> Iterator[None]:
    """Let layers that run meanwhile find `context`, see `context_of_place`."""
    outer, _PLACE.context = _PLACE.context, context
    try:
        yield
    finally:
        _PLACE.context = outer


def context_of_place() -> ForwardContext | None:
    """What the layers of the forward that runs share; None outside of one of a family that hands them nothing."""
    return _PLACE.context


class CachingAttention(Protocol):
    """An attention module of which a cache has to know something."""

    layer_idx: int

    def cache_spec(self) -> SparseSpec: ...


if TYPE_CHECKING:

    class Decoder(PreTrainedModel):
        """What the mixin relies on: what the base model of every family, and the native one, has."""

        config: RoutingConfig
        layers: nn.ModuleList

        def update_config(self) -> None: ...

else:
    Decoder = object


class ForwardContextMixin(Decoder):
    """For the decoder (base model) of any MoSA model, whose attention modules' `cache_spec` says what they keep."""

    attention_class: type[nn.Module] | None = None  # of its layers, dense ones included; None: a family's own

    packs_by_positions = True  # whether the family's forward takes positions that restart for packed sequences
    # `made_for` of the last cache that `upgrade_cache` looked at.
    _cache_made_for: list[tuple[int, tuple[Any, ...]] | None] | None = None

    @property
    def takes_masks_by_layer_type(self) -> bool:
        """Whether the family's forward takes a dict of prepared masks."""
        return False

    def mask_of_dense_layers(self, attention_mask: Any) -> Any:
        """
        The mask as dense heads read it: eager attention adds it to scores, so that a 4-D one of bools, which it would
        add as ones, becomes one of numbers.
        """
        if isinstance(attention_mask, Mapping):
            return {name: self.mask_of_dense_layers(mask) for name, mask in attention_mask.items()}
        is_pairs = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
        if is_pairs and self.config._attn_implementation == "eager":
            return added_to_scores(attention_mask, self.dtype)
        return attention_mask

    def begin_forward(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        options: Mapping[str, Any],
    ) -> tuple[ForwardContext, Cache | None, torch.Tensor]:
        """
        Args:
            tokens: `[B, T]` or `[B, T, D]`, of which only shape and device matter.
            attention_mask, position_ids, past_key_values, use_cache: as the decoder's forward takes them; positions
                `[B or 1, T]`, or multimodal ones `[3 or 4, B, T]`.
            options: its other keyword arguments, which go on to attention functions.

        Returns:
            What layers share; the cache, upgraded, and made if there has to be one; position ids, `[B or 1, T]` by
            default.

        Raises:
            ValueError: for a cache that is not of this model, or of other rows; a static one that is too short; what
                cannot be exported; a mask that says more than padding and packing, and whatever else would make
                attention another than causal.
        """
        self._check_arguments(attention_mask, past_key_values, use_cache, options)
        batch_size, num_tokens = tokens.shape[:2]
        masks, attention_mask = attention_mask, self._mask_of_sparse_layers(attention_mask)
        may_be_packed = masks is None and past_key_values is None and not use_cache and self.packs_by_positions
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # A static cache counts in place, and its masks cover all of it.
        is_static, past_length = False, 0
        if past_key_values is not None:
            self._look_at_cache(past_key_values, tokens)
            is_static, past_length = past_key_values.is_compileable, past_key_values.get_seq_length()
        if isinstance(past_length, torch.Tensor):
            past_length = past_length.clone()
        # Elsewhere than on a CPU it costs a synchronisation to look.
        may_look = not is_captured() and (not is_static or tokens.device.type == "cpu")
        num_past = int(past_length) if may_look else past_length
        if is_static and past_key_values is not None:
            check_capacity(past_key_values, num_past + num_tokens)
        # Where nothing routes, a mask may say what the original's may.
        routes = self.is_sparse() if past_key_values is None else is_upgraded(past_key_values)
        may_look, mask = may_look and routes, TokenMask()
        if may_look:
            mask = self._read_mask(attention_mask, batch_size, num_tokens, int(num_past), past_key_values)
            if isinstance(masks, Mapping):
                check_same_padding(masks, mask.valid, num_tokens, int(num_past))
        elif routes:
            mask = columns_of_mask(attention_mask, batch_size, num_tokens, past_length if is_static else None)
        if position_ids is None:
            position_ids = (torch.arange(num_tokens, device=tokens.device) + past_length).unsqueeze(0)
        of_text = position_ids
        if position_ids.ndim == 3:  # multimodal: of text, time, height and width; or without those of the text
            of_text, may_be_packed = position_ids[0], may_be_packed and len(position_ids) == 4
        has_begun = may_look and isinstance(past_length, int) and past_length > 0 and mask.seen is None
        num_cached, is_eager = num_cached_tokens(past_key_values), not is_captured()
        counts = past_key_values is not None and is_eager
        layout = CallLayout.build(tokens, mask, of_text, num_cached, may_be_packed, is_eager, not has_begun, counts)
        if may_look:
            check_sequence_lengths(options, layout)
            if past_key_values is not None:
                note_seen(past_key_values, mask.seen)
        elif past_key_values is not None and not is_static and attention_mask is not None and not is_exported():
            if attention_mask.ndim == 2:  # which is taken at its word, and calls that are not captured compare theirs
                note_seen(past_key_values, attention_mask.bool())
        return ForwardContext(layout, {}, torch.is_grad_enabled()), past_key_values, position_ids

    def _check_arguments(
        self,
        attention_mask: torch.Tensor | dict | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        options: Mapping[str, Any],
    ) -> None:
        """What can be refused before anything is computed of it."""
        if not getattr(self.config, "is_causal", True):
            raise ValueError(f"`is_causal` is False, of the config or of this call. {POSSIBLE}")
        check_options(options)
        if not is_captured():
            warn_of_own_implementation(self.config._attn_implementation or "sdpa")
        check_mapped(attention_mask, bool(use_cache) or past_key_values is not None)
        if is_exported() and self.is_sparse():
            check_export(past_key_values, use_cache)

    def _mask_of_sparse_layers(self, attention_mask: torch.Tensor | Mapping | None) -> torch.Tensor | None:
        """The mask that layers with sparse groups or MoSA heads read, which have global attention."""
        if not isinstance(attention_mask, Mapping):
            return attention_mask
        if not self.takes_masks_by_layer_type or "full_attention" not in attention_mask:
            wanted = "one with 'full_attention'" if self.takes_masks_by_layer_type else "one mask for all layers"
            raise ValueError(
                f"`attention_mask` is a dict of {', '.join(map(repr, attention_mask))}, but {type(self).__name__} "
                f"takes {wanted}."
            )
        return attention_mask["full_attention"]

    def _read_mask(
        self,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        num_tokens: int,
        past_length: int,
        past_key_values: Cache | None,
    ) -> TokenMask:
        """What a mask says of the call's tokens."""
        if past_key_values is None:
            return read_mask(attention_mask, batch_size, num_tokens)
        seen = seen_tokens(past_key_values, past_length)
        mask = read_mask(attention_mask, batch_size, num_tokens, past_length, seen, is_cached=True)
        if mask.segment is not None and has_budget(past_key_values):
            raise ValueError(
                "`attention_mask` keeps packed sequences apart, which static caches and `mosa_cache_budget` do not "
                "know of: pass `use_cache=False`."
            )
        return mask

    def _look_at_cache(self, past_key_values: Cache, tokens: torch.Tensor) -> None:
        """Have it upgraded; refuse what the call's tokens `[B, T, ...]` cannot be added to before anything changes."""
        expected = self._cache_made_for
        is_single = tokens.shape[1] == 1 and not is_captured()  # single tokens continue what was looked at
        if not is_single or expected is None or made_for(past_key_values, len(expected)) != expected:
            self.upgrade_cache(past_key_values)
        elif not past_key_values.is_compileable:  # a call that failed leaves the first layers a token ahead
            check_lengths([past_key_values.layers[layer_idx] for layer_idx in (0, len(expected) - 1)])
        num_cached = None if is_captured() else num_cached_tokens(past_key_values)
        if num_cached is not None and len(num_cached) != len(tokens):
            raise ValueError(
                f"This call has a batch of {len(tokens)}, but `past_key_values` holds one of {len(num_cached)}: the "
                "rows of a `DynamicCache` can be repeated (`batch_repeat_interleave`) or chosen "
                "(`batch_select_indices`); for other rows, make a new cache."
            )

    def upgrade_cache(self, past_key_values: Cache, max_cache_len: int | None = None) -> None:
        """
        Let a cache hold what MoSA heads select; `cache.upgrade_cache` says what it takes and raises.

        Raises:
            ValueError: also for what is no cache of one list of layers, and for an offloading cache of a model on the
                CPU.
        """
        if not isinstance(getattr(past_key_values, "layers", None), list):
            raise ValueError(
                "`past_key_values` must be a `DynamicCache` or a `StaticCache`, not an object of class "
                f"{type(past_key_values).__name__}: of an `EncoderDecoderCache` pass its `self_attention_cache`; keys "
                "and values alone, in tuples, lack what the routers selected."
            )
        if is_upgraded(past_key_values):
            if is_captured():  # it was looked at when it was made
                return
        elif is_captured() and not self.is_sparse():  # upstream's, which the family's own code compiles with
            return
        elif past_key_values.offloading and self.device.type == "cpu":
            raise ValueError(
                "Offloaded caches keep in the CPU's memory what a GPU is not reading, but this model is on the "
                "CPU: leave `cache_implementation` out, or set it to 'static'."
            )
        self._upgrade_cache(past_key_values, max_cache_len)

    @torch.compiler.disable(
        reason="What a new cache has to hold is no part of a graph: call `model.base_model.upgrade_cache(cache)` "
        "before a call that is compiled with `fullgraph=True`."
    )
    def _upgrade_cache(self, past_key_values: Cache, max_cache_len: int | None) -> None:
        modules = self.running_attention()
        check_numbered(modules, self.config.num_hidden_layers)
        check_windows(modules, past_key_values.is_sliding)
        specs = self._specs_of(modules)
        length = max_cache_len or self.config.max_position_embeddings
        upgrade_cache(past_key_values, specs, length, type(self).__name__)
        if not is_captured():
            self._cache_made_for = made_for(past_key_values, len(specs))

    def cache_specs(self) -> dict[int, SparseSpec | None]:
        """What a cache has to know of each layer that runs; None: the layer has no sparse groups or MoSA heads."""
        return self._specs_of(self.running_attention())

    def _specs_of(self, modules: dict[int, nn.Module]) -> dict[int, SparseSpec | None]:
        """`cache_specs`, of `running_attention`, which looks through all modules of the model."""
        specs: dict[int, SparseSpec | None] = dict.fromkeys(range(self.config.num_hidden_layers))
        for module in modules.values():
            if hasattr(module, "cache_spec"):
                caching = cast(CachingAttention, module)
                if (spec := caching.cache_spec()).sets:
                    specs[caching.layer_idx] = spec
        return specs

    def is_sparse(self) -> bool:
        """Whether any layer has sparse groups or MoSA heads, by which a cache has to hold more than upstream's."""
        return any(cast(CachingAttention, x).cache_spec().sets for x in self.modules() if hasattr(x, "cache_spec"))

    def running_attention(self) -> dict[int, nn.Module]:
        """Place → attention module of the layers that run: fewer, while `assistant_early_exit` drafts."""
        modules = attention_modules(self, self.attention_class)
        return {place: module for place, module in modules.items() if place < self.config.num_hidden_layers}


GROWS = (
    "How much a growing cache holds depends on what is selected, which no graph can tell: in `torch.compile`, pass "
    "`use_cache=False`, or a static cache."
)


def uncompiled_if_cache_grows(forward: Callable) -> Callable:
    """
    Let the forward of a decoder with sparse layers run as it is, within `torch.compile`, if it has a cache that grows:
    it would break into many small graphs. What is around it, such as the head, is compiled. With `fullgraph=True` it
    is an error.
    """

    @torch.compiler.disable(reason=GROWS)
    @wraps(forward)
    def uncompiled(*args, **kwargs):
        logger.warning_once(f"{GROWS} This call's layers run uncompiled.")
        return forward(*args, **kwargs)

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if torch.compiler.is_compiling() and not is_exported():
            caches = [each for each in (*args, *kwargs.values()) if isinstance(each, Cache)]
            use_cache = kwargs.get("use_cache")
            makes_one = not caches and (getattr(self.config, "use_cache", False) if use_cache is None else use_cache)
            if self.training and torch.is_grad_enabled() and getattr(self, "gradient_checkpointing", False):
                makes_one = False  # upstream's
            if (makes_one or any(not each.is_compileable for each in caches)) and self.is_sparse():
                return uncompiled(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return wrapper


def check_mapped(attention_mask: Any, has_cache: bool) -> None:
    """
    Raises:
        ValueError: for what `torch.func.vmap` cannot map: a mask, which has to be looked at, and a cache.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    is_mapped = isinstance(attention_mask, torch.Tensor) and torch._C._functorch.is_batchedtensor(attention_mask)
    if is_mapped or (has_cache and is_vmapped()):
        raise ValueError(
            "Under `torch.func.vmap` pass `use_cache=False`, and an attention mask that is the same for all that is "
            "mapped: how much a cache holds, and what a mask says, has to be looked at."
        )


def check_capacity(past_key_values: Cache, needed: int | torch.Tensor) -> None:
    """
    Raises:
        ValueError: if a static cache lacks capacity for `needed` tokens.
        RuntimeError: the same, when the device gets there, if only that knows how many they are.
    """
    if all(past_key_values.is_sliding):
        return
    capacity = static_length(past_key_values)
    advice = f"The static cache has a capacity of {capacity} tokens, not {{}}: raise `max_cache_len`."
    if isinstance(needed, torch.Tensor):  # upstream's own write fails only in layers that have dense groups
        torch._assert_async(needed <= capacity, advice.format("as many as the call needs"))
    elif needed > capacity:
        raise ValueError(advice.format(needed))


def check_export(past_key_values: Cache | None, use_cache: bool | None) -> None:
    """
    Raises:
        ValueError: for an exporter, or a cache, with which the program would compute something else on other inputs.
    """
    if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():
        raise ValueError(
            "`torch.onnx.export(dynamo=False)` translates some operations of MoSA wrongly: pass `dynamo=True`."
        )
    if past_key_values is None and not use_cache:
        return
    if torch.jit.is_tracing() or past_key_values is None or not past_key_values.is_compileable:
        raise ValueError(
            "How much the growing cache of a MoSA model holds depends on what is selected, which no exported program "
            "can tell: pass `use_cache=False`, or export with a static cache (`torch.jit.trace` takes none)."
        )
    if not is_upgraded(past_key_values):
        raise ValueError(
            "A static cache needs its sparse part before a model is exported with it. `DynamoExporter` and "
            "`OnnxExporter` of `transformers.exporters` do that: `export_for_generation` with "
            "`GenerationConfig(cache_implementation='static', max_cache_len=...)`."
        )
