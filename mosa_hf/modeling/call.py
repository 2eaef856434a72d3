"""The beginning of a model call, the same for every MoSA model: cache, positions, layout."""

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..cache import is_upgraded, num_cached_tokens, upgrade_cache
from ..kernels.capture import is_captured, is_exported
from ..routing.layout import CallLayout


class ModelCall(NamedTuple):
    """
    What the layers of one model call share.

    `thresholds`: layer index → the thresholds `[G]` that this call routes with in training, so that gradient
    checkpointing recomputes the same selection after the moving average went on.
    `has_grad`: whether the call records gradients. Layers cannot tell: reentrant checkpointing runs them without.
    """

    layout: CallLayout
    thresholds: dict[int, torch.Tensor]
    has_grad: bool


class MosaCallMixin:
    """For the decoder (base model) of any MoSA model, whose layers' modules `cache_spec` say what they keep."""

    def begin_call(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
    ) -> tuple[ModelCall, Cache | None, torch.Tensor]:
        """
        Args:
            tokens: `[B, T]` or `[B, T, D]`, of which only shape and device matter.
            attention_mask, position_ids, past_key_values, use_cache: as the decoder's forward takes them.

        Returns:
            What layers share; the cache, upgraded, and made if there has to be one; position ids `[B or 1, T]`.

        Raises:
            ValueError: for a static cache that is too short, or what cannot be exported.
        """
        if is_exported():
            check_export(past_key_values, use_cache)
        num_tokens = tokens.shape[1]
        may_be_packed = attention_mask is None and past_key_values is None and not use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # A static cache counts in place, and its masks cover all of it.
        is_static, past_length = False, 0
        if past_key_values is not None:
            if num_tokens > 1 or not is_upgraded(past_key_values):  # single tokens continue what was looked at
                self.upgrade_cache(past_key_values)
            is_static, past_length = past_key_values.is_compileable, past_key_values.get_seq_length()
        if isinstance(past_length, torch.Tensor):
            past_length = past_length.clone()
        if is_static and not torch.compiler.is_compiling() and tokens.device.type == "cpu":
            # Elsewhere it costs a synchronisation to look, and upstream's own write fails.
            needed, capacity = int(past_length) + num_tokens, past_key_values.get_max_length()
            if needed > capacity and not all(past_key_values.is_sliding):
                raise ValueError(
                    f"The static cache has a capacity of {capacity} tokens, not {needed}: raise `max_cache_len`."
                )
        if position_ids is None:
            position_ids = (torch.arange(num_tokens, device=tokens.device) + past_length).unsqueeze(0)
        if isinstance(attention_mask, dict):  # prepared masks by layer type
            attention_mask = attention_mask.get("full_attention")
        layout = CallLayout.build(
            tokens,
            attention_mask,
            position_ids,
            num_cached_tokens(past_key_values),
            may_be_packed,
            past_length if is_static else None,
        )
        return ModelCall(layout, {}, torch.is_grad_enabled()), past_key_values, position_ids

    def upgrade_cache(self, past_key_values: Cache, max_cache_len: int | None = None) -> None:
        """
        Let a cache hold what MoSA heads select; `cache.upgrade_cache` says what it takes and raises.

        Raises:
            ValueError: also for an offloading cache of a model on the CPU.
        """
        if is_upgraded(past_key_values):
            if is_captured():  # it was looked at when it was made
                return
        elif past_key_values.offloading and self.device.type == "cpu":
            raise ValueError(
                "Offloaded caches keep in the CPU's memory what a GPU is not reading, but this model is on the "
                "CPU: leave `cache_implementation` out, or set it to 'static'."
            )
        # Fewer layers run while `generate(assistant_early_exit=...)` drafts.
        specs = {
            module.layer_idx: module.cache_spec()
            for module in self.modules()
            if hasattr(module, "cache_spec") and module.layer_idx < self.config.num_hidden_layers
        }
        specs = {layer_idx: spec for layer_idx, spec in specs.items() if spec.sets}
        upgrade_cache(past_key_values, specs, max_cache_len or self.config.max_position_embeddings)


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
