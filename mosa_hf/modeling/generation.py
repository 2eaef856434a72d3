"""What `generate` needs to know of models that select tokens."""

from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..cache import num_overflowed, static_length
from ..compat import CACHE, takes_cache
from .configuration import RoutingConfig
from .forward_context import CachingAttention, ForwardContextMixin
from .layers import decoder_of, num_places
from .router import MosaRouter

logger = logging.get_logger(__name__)

LEARNED_CACHES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


if TYPE_CHECKING:

    class CausalLM(PreTrainedModel, GenerationMixin):
        """What the mixin relies on."""

        config: RoutingConfig

else:
    CausalLM = object


class MosaGenerationMixin(CausalLM):
    """Before a causal LM whose decoder is a `ForwardContextMixin`."""

    _generation_cache: Cache | None = None  # of the `generate` call that goes on
    _unrecorded: tuple[Any, ...] = ()  # its layers that did not keep their past before that call

    @property
    def mosa_decoder(self) -> ForwardContextMixin:
        """The part of the model that runs the layers."""
        return cast(ForwardContextMixin, decoder_of(self))

    def generate(self, *args, **kwargs):
        """
        As `GenerationMixin.generate`.

        Raises:
            ValueError: if the model would route by expert choice, which cannot be computed token by token; for PEFT's
                prefix tuning.
        """
        # PEFT calls this method of the model within; of its caches, Transformers 5.24 ignores what a prefix learned.
        caller = getattr(self.prepare_inputs_for_generation, "__self__", None)
        if isinstance(caller, PeftModel) and caller.active_peft_config.peft_type in LEARNED_CACHES:
            raise ValueError(
                "PEFT's prefix tuning and cartridges learn keys and values of no token, which no router can select: "
                "learn a prompt instead (`PromptTuningConfig`, `PromptEncoderConfig`), or adapters."
            )
        for router in self.modules():
            if isinstance(router, MosaRouter) and router.routing == "expert_choice":
                field = "mosa_routing" if self.training else "mosa_inference_routing"
                raise ValueError(
                    f"`generate` needs threshold routing, but `{field}='expert_choice'` is in force: which tokens it "
                    f"selects depends on tokens that are not generated yet. Load the model with `{field}='threshold'`"
                    + (", or call `model.eval()`" if router.inference_routing == "threshold" else "")
                    + " (thresholds: `mosa_hf.calibrate_thresholds`)."
                )
        decoder = self.mosa_decoder
        if num_places(decoder) == decoder.config.num_hidden_layers:  # drafting lowers it
            decoder.update_config()  # of which caches are made
        outer = self._generation_cache, self._unrecorded  # of a call within which this one drafts
        try:
            output = super().generate(*args, **kwargs)
            cache = self._generation_cache
            if cache is not None and any(layer.record_past for layer in self._unrecorded):  # assisted generation has
                cache.crop(0)
            if cache is not None and (overflow := num_overflowed(cache)):
                logger.warning(
                    f"The static cache lacked capacity for {overflow} selected tokens (over all layers, rows and "
                    "groups) and evicted those with the lowest logits, so the result may differ from that of a "
                    "dynamic cache. Raise `max_cache_len`, use a dynamic cache, or make the limit the model's own "
                    "with `mosa_cache_budget`."
                )
        finally:
            for layer in self._unrecorded:
                layer.record_past = False
            self._generation_cache, self._unrecorded = outer
        return output

    def record_past(self, past_key_values: Cache) -> None:
        """
        From here on a cache keeps all tokens that it is given since its last `crop`, so that the next one can take
        back any number of them; `crop(0)` lets go of what a cache would not hold otherwise.
        `past_key_values.activate_past_recording()` does that of a cache that this model has seen; a fresh one does not
        know yet that there is anything to record. `generate` ends what it has begun itself, to roll back drafts.
        """
        self.mosa_decoder.upgrade_cache(past_key_values)
        past_key_values.activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        """
        Refused: Transformers packs the requests into one row and keeps their keys and values in pages, which hold no
        selections. Without this, routers would take the other requests for padding.

        Raises:
            NotImplementedError: always.
        """
        from transformers.cli.serving.utils import CBWorkerDeadError  # which takes a moment, and servers alone need

        class ContinuousBatchingNotSupported(NotImplementedError, CBWorkerDeadError):
            """Also the one error whose message `transformers serve` passes on to its client, with status 503."""

        raise ContinuousBatchingNotSupported(
            f"{type(self).__name__} does not support continuous batching (`generate_batch`, "
            "`cache_implementation='paged'`, `transformers serve --continuous-batching`): its pages cannot hold a "
            "sparse cache. Call `generate` with a padded batch; serve without `--continuous-batching`."
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # upstream's protocol of `self` has no properties
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get(CACHE)
        self._generation_cache, self._unrecorded = cache, ()
        if cache is None:
            return
        if cache.is_compileable and 0 <= static_length(cache) < max_cache_length and not all(cache.is_sliding):
            raise ValueError(
                f"The static cache has a capacity of {static_length(cache)} tokens, but this call may need "
                f"{max_cache_length}: raise `max_cache_len`, or lower `max_new_tokens`."
            )
        # Before assisted generation asks the cache to record what it may have to roll back.
        self.mosa_decoder.upgrade_cache(cache, max_cache_length)
        if generation_config.is_assistant:  # whose drafts are rolled back between its calls
            self.record_past(cache)
        else:
            self._unrecorded = tuple(each for each in cache.layers if getattr(each, "record_past", True) is False)

    def _get_static_cache_init_shape(self):
        """Upstream's, with each layer's dense groups in place of all its groups."""
        shape = super()._get_static_cache_init_shape()  # type: ignore[misc]  # as above
        if shape is None:
            return None
        num_heads, head_dim = shape
        num_layers = self.mosa_decoder.config.num_hidden_layers
        num_heads = [num_heads] * num_layers if isinstance(num_heads, int) else list(num_heads)
        for module in self.mosa_decoder.running_attention().values():
            if hasattr(module, "cache_spec"):
                caching = cast(CachingAttention, module)
                if (dense := caching.cache_spec().dense) is not None:
                    num_heads[caching.layer_idx] = len(dense)
        return num_heads, head_dim

    @staticmethod
    @takes_cache
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> torch.Tensor | None:
        """
        For static caches: the 2-D mask, for single tokens as long as the cache, so that graphs see one shape. The 4-D
        masks that upstream would make here differ by layer, and do not say which tokens are padding once a layer has a
        window. Of several tokens recurrent layers read its end as theirs.
        """
        if attention_mask is None or past_key_values is None or inputs_embeds.shape[1] > 1:
            return attention_mask
        missing = static_length(past_key_values) - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(missing, 0)), value=1)
