"""The native MoSA model: Llama's classes with the attention replaced (docs/design.md, section 2)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..cache import CacheInForward, SparseLayer, SparseSpec
from ..compat import CACHE, slice_logits_to_keep, takes_cache
from .auxiliary_loss import CarriedLoss, router_loss, share_of_items
from .configuration import PER_LAYER_FIELDS, ConfigView, MosaConfig
from .forward_context import ForwardContext, ForwardContextMixin, uncompiled_if_cache_grows
from .generation import MosaGenerationMixin
from .heads import MosaHeads
from .layers import attention_modules, check_number
from .loading import CheckedLoadingMixin
from .remote_code import InstalledCodeModelMixin
from .router import MosaRouter, active_module, init_router


class LayerConfig(ConfigView):
    """
    A model's config with the window of one layer, for masks. `config.per_layer_config[i]` is that too, but copies,
    which PyTorch 2.9 cannot compile.
    """

    def __init__(self, config: MosaConfig, sliding_window: int | None):
        super().__init__(config)
        self.sliding_window = sliding_window


class MosaAttention(LlamaAttention):
    """Dense heads (Llama's attention, fewer heads) and MoSA heads of one layer, summed. Either kind may be absent."""

    def __init__(self, config: MosaConfig, layer_idx: int):
        layer_config = cast(MosaConfig, config.per_layer_config[layer_idx])
        if layer_config.num_attention_heads:
            super().__init__(layer_config, layer_idx)
        else:
            nn.Module.__init__(self)
            self.layer_idx = layer_idx
            self.head_dim = layer_config.head_dim
        self.has_dense_heads = layer_config.num_attention_heads > 0
        self.mask_config = LayerConfig(config, layer_config.sliding_window)
        self.config = config  # the model's own: `set_attn_implementation` changes that one
        self.sliding_window = layer_config.sliding_window
        self.mosa = MosaHeads(layer_config) if layer_config.num_mosa_heads else None
        self.layer_fields = {name: getattr(layer_config, name) for name in PER_LAYER_FIELDS}

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mosa_context: ForwardContext,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin `[B or 1, T, rotary_dim]`.
            mosa_context: what the layers of this model call share.
            attention_mask: of the dense heads, as the attention implementation wants it.
            past_key_values: an upgraded cache.
            kwargs: of the attention implementation.

        Returns:
            output `[B, T, D]` and the dense heads' attention weights, where the implementation gives them.
        """
        attn_weights, cache = None, None
        held: Cache | CacheInForward | None = past_key_values
        if self.mosa is not None and past_key_values is not None:
            cache = cast(SparseLayer, past_key_values.layers[self.layer_idx])
            held = CacheInForward(past_key_values)
        if self.has_dense_heads:
            attn_output, attn_weights = super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE: held},
                sliding_window=self.sliding_window,  # flash attention takes the window as a number
                **kwargs,
            )
        elif held is not None:
            # No dense heads, but the cache layer still counts tokens.
            nothing = hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], self.head_dim)
            held.update(nothing, nothing, self.layer_idx)
        if self.mosa is not None:
            mosa_output = self.mosa(hidden_states, position_embeddings, mosa_context, cache)
            attn_output = attn_output + mosa_output if self.has_dense_heads else mosa_output
        return attn_output, attn_weights

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of this layer."""
        return SparseSpec(None, (), None) if self.mosa is None else active_module(self.mosa).cache_spec()


class MosaDecoderLayer(LlamaDecoderLayer):
    self_attn: MosaAttention

    def __init__(self, config: MosaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MosaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MosaPreTrainedModel(CheckedLoadingMixin, InstalledCodeModelMixin, LlamaPreTrainedModel):
    config: MosaConfig
    config_class = MosaConfig
    _no_split_modules = ["MosaDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": MosaDecoderLayer,
        "attentions": MosaAttention,
        "router_logits": OutputRecorder(MosaRouter, index=0),
    }
    # Selection compares logits with thresholds: half precision would make ties of them.
    _keep_in_fp32_modules_strict = ["router"]
    router_remedy = "start from it with `mosa_hf.conversion.convert_to_native`"
    _can_compile_fullgraph = True

    def save_pretrained(self, *args, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, with a config that says what the layers are now."""
        cast(ForwardContextMixin, self.base_model).update_config()
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MosaHeads):
            for parameter in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.normal_(parameter, mean=0.0, std=std)
            for bias in (module.q_bias, module.k_bias, module.v_bias, module.o_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, MosaRouter):
            init_router(module, std)


@dataclass
class MosaModelOutputWithPast(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast`, and the routers' auxiliary loss, a number."""

    aux_loss: torch.Tensor | None = None


class MosaModel(ForwardContextMixin, MosaPreTrainedModel):
    """
    Decoder of `MosaConfig.num_hidden_layers` layers; outputs hidden states.

    `aux_loss_scale`: what the auxiliary loss is multiplied by where others compute the loss, and do not say of how
    many tokens it is a mean: 1 if those are this call's, 1 / 4 if four calls are accumulated.
    """

    aux_loss_scale: float = 1.0

    config: MosaConfig
    attention_class: type[MosaAttention] = MosaAttention

    def __init__(self, config: MosaConfig):
        config.fit_layers()
        if config.output_attentions:
            config.check_attentions()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MosaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.built_layers = self._layer_fields()
        self.post_init()

    @uncompiled_if_cache_grows
    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names parameters of its own models, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MosaModelOutputWithPast:
        """
        As `LlamaModel.forward`; `output_attentions` is refused where a layer has no dense heads.

        Returns:
            As `LlamaModel.forward`, and with `config.mosa_router_aux_loss_coef` `aux_loss`: the mean of the layers'
            `router_loss`. In training any loss of the hidden states has its gradient, times the coefficient, unless
            the loss is made of `aux_loss` itself (docs/routing.md).
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            self.update_config()
            self.config.check_attentions()
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        call, past_key_values, positions = self.begin_forward(
            inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, kwargs
        )
        if self.config.mosa_router_aux_loss_coef and (call.has_grad or kwargs.get("output_router_logits")):
            call = call._replace(router_logits={})
        causal_masks = self._dense_masks(
            inputs_embeds, self.mask_of_dense_layers(attention_mask), past_key_values, positions
        )
        hidden_states = inputs_embeds
        # Kernels read angles row by row: of every row here, rather than copied in every layer.
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions.expand(hidden_states.shape[0], -1))
        past: dict[str, Any] = {CACHE: past_key_values}
        for decoder_layer in self._active_layers():
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_masks.get(decoder_layer.self_attn.sliding_window),
                position_embeddings=position_embeddings,
                position_ids=positions,
                **past,
                use_cache=use_cache,
                mosa_context=call,
                **kwargs,
            )
        hidden_states, aux_loss = self.norm(hidden_states), None
        if call.router_logits:
            hidden_states, aux_loss = self._carry_aux_loss(hidden_states, call, kwargs.get("num_items_in_batch"))
        return MosaModelOutputWithPast(last_hidden_state=hidden_states, **past, aux_loss=aux_loss)

    def _carry_aux_loss(
        self, hidden_states: torch.Tensor, call: ForwardContext, num_items: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden_states` [B, T, D], and the auxiliary loss, whose gradient they bring along in training."""
        assert call.router_logits is not None
        losses = [router_loss(logits, router, call.layout) for router, logits in call.router_logits.items()]
        loss = torch.stack([each.to(hidden_states.device) for each in losses]).mean()
        scale = self.config.mosa_router_aux_loss_coef if self.training else 0.0
        if num_items is None:
            scale *= self.aux_loss_scale
        return CarriedLoss.apply(hidden_states, loss, scale, num_items)

    def _layer_fields(self) -> list[dict[str, Any]]:
        """What layers may differ in, layer by layer."""
        return [module.layer_fields for module in attention_modules(self, self.attention_class).values()]

    def update_config(self) -> None:
        """
        Let `config.per_layer_config` say what each layer is, after layers were taken out, added or moved; saving and
        `generate` do it.

        Raises:
            ValueError: for fewer layers than `config.num_hidden_layers`.
        """
        config, fields = self.config, self._layer_fields()
        check_number(len(self.layers), config)
        config.fit_layers()
        if fields == self.built_layers:
            return
        running = fields[: config.num_hidden_layers]
        names = {name for name in PER_LAYER_FIELDS if any(own[name] != running[0][name] for own in running)}
        names |= config.per_layer_attributes or set()
        config.per_layer_config = None
        usual = {name: getattr(config, name) for name in names}
        own = {i: {name: own[name] for name in names if own[name] != usual[name]} for i, own in enumerate(running)}
        config.per_layer_config = {i: each for i, each in own.items() if each} or None
        self.built_layers = fields

    def _active_layers(self) -> Iterable[MosaDecoderLayer]:
        """The layers that run: all, except while `generate(assistant_early_exit=...)` drafts and lowers the number."""
        return cast(Iterable[MosaDecoderLayer], self.layers[: self.config.num_hidden_layers])

    def _dense_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[int | None, torch.Tensor | None]:
        """Upstream's masks, one for each sliding window (None: global) that some layer's dense heads have."""
        masks: dict[int | None, torch.Tensor | None] = {}
        for layer in self._active_layers():
            window, layer_idx = layer.self_attn.sliding_window, layer.self_attn.layer_idx
            if window in masks or not layer.self_attn.has_dense_heads:
                continue
            create_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
            masks[window] = create_mask(
                config=layer.self_attn.mask_config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE: past_key_values},
                position_ids=position_ids,
                layer_idx=layer_idx,
            )
        return masks


@dataclass
class MosaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and, behind what every model gives, the routers' auxiliary loss and their logits."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class MosaForCausalLM(MosaGenerationMixin, MosaPreTrainedModel, GenerationMixin):
    """`MosaModel` with a language-modeling head."""

    config: MosaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # Llama's own, annotated wrongly
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MosaConfig):
        super().__init__(config)
        self.model = MosaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names parameters of its own models, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MosaCausalLMOutputWithPast:
        """
        As `LlamaForCausalLM.forward`, and:

        Args:
            output_router_logits: also return `router_logits`, one `[B, T, G]` float32 tensor for each layer that has
                MoSA heads.

        Returns:
            As `LlamaForCausalLM.forward`, and `aux_loss`, see `MosaModel.forward`. `loss` includes it, times
            `config.mosa_router_aux_loss_coef` and times the part that this call has of `num_items_in_batch`.
        """
        # With gradients, the decoder computes the auxiliary loss anyway.
        asks = labels is not None and not torch.is_grad_enabled() and bool(self.config.mosa_router_aux_loss_coef)
        outputs: MosaModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=bool(output_router_logits or asks),
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss, aux_loss = None, outputs.aux_loss
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                share = share_of_items(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"))
                loss = loss + (self.config.mosa_router_aux_loss_coef * share * aux_loss).to(loss.device)
        return MosaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class MosaForSequenceClassification(GenericForSequenceClassification, MosaPreTrainedModel):
    """`MosaModel` with a classification head on the last token."""


__all__ = ["MosaPreTrainedModel", "MosaModel", "MosaForCausalLM", "MosaForSequenceClassification"]
