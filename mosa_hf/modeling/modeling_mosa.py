"""The native MoSA model: Llama's classes with the attention replaced (docs/design.md, section 2)."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
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

from ..cache import SparseSpec
from ..compat import CACHE, takes_cache
from ..routing import select_by_expert_choice, valid_tokens
from ..safetensors_files import tensor_shapes
from .call import ModelCall, MosaCallMixin
from .configuration import PER_LAYER_FIELDS, MosaConfig
from .generation import MosaGenerationMixin
from .heads import MosaHeads
from .layers import attention_modules, check_number
from .remote_code import InstalledCodeModelMixin
from .router import MosaRouter, in_force
from .sparse_models import init_router
from .thresholds import mosa_routers


class LayerConfig:
    """
    A model's config with the window of one layer, for masks. `config.per_layer_config[i]` is that too, but copies,
    which PyTorch 2.9 cannot compile.
    """

    def __init__(self, config: MosaConfig, sliding_window: int | None):
        self.model_config = config
        self.sliding_window = sliding_window

    def __getattr__(self, name: str):
        if name == "model_config":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


class MosaAttention(LlamaAttention):
    """Dense heads (Llama's attention, fewer heads) and MoSA heads of one layer, summed. Either kind may be absent."""

    def __init__(self, config: MosaConfig, layer_idx: int):
        layer_config = config.per_layer_config[layer_idx]
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
        mosa_call: ModelCall,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cos and sin `[B or 1, T, rotary_dim]`.
            mosa_call: what the layers of this model call share.
            attention_mask: of the dense heads, as the attention implementation wants it.
            past_key_values: an upgraded cache.

        Returns:
            output `[B, T, D]` and the dense heads' attention weights, where the implementation gives them.
        """
        attn_weights = None
        if self.has_dense_heads:
            attn_output, attn_weights = super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE: past_key_values},
                sliding_window=self.sliding_window,  # flash attention takes the window as a number
                **kwargs,
            )
        elif past_key_values is not None:
            # No dense heads, but the cache layer still counts tokens.
            nothing = hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], self.head_dim)
            past_key_values.update(nothing, nothing, self.layer_idx)
        if self.mosa is not None:
            cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            mosa_output = self.mosa(hidden_states, position_embeddings, mosa_call, cache)
            attn_output = attn_output + mosa_output if self.has_dense_heads else mosa_output
        return attn_output, attn_weights

    def cache_spec(self) -> SparseSpec:
        """What a cache has to know of this layer."""
        return SparseSpec(None, (), None) if self.mosa is None else in_force(self.mosa).cache_spec()


class MosaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MosaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MosaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MosaPreTrainedModel(InstalledCodeModelMixin, LlamaPreTrainedModel):
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
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: for a local checkpoint with a missing or a truncated weight file, by name.
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            tensor_shapes(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, with a config that says what the layers are now."""
        self.base_model.update_config()
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MosaHeads):
            for parameter in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.normal_(parameter, mean=0.0, std=std)
            for parameter in (module.q_bias, module.k_bias, module.v_bias, module.o_bias):
                if parameter is not None:
                    init.zeros_(parameter)
        elif isinstance(module, MosaRouter):
            init_router(module, std)


class MosaModel(MosaCallMixin, MosaPreTrainedModel):
    """Decoder of `MosaConfig.num_hidden_layers` layers; outputs hidden states."""

    attention_class = MosaAttention

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

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """As `LlamaModel.forward`; `output_attentions` is refused where a layer has no dense heads."""
        if kwargs.get("output_attentions", self.config.output_attentions):
            self.update_config()
            self.config.check_attentions()
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        call, past_key_values, position_ids = self.begin_call(
            inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        causal_masks = self._dense_masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self._active_layers():
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_masks.get(decoder_layer.self_attn.sliding_window),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **{CACHE: past_key_values},
                use_cache=use_cache,
                mosa_call=call,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: past_key_values})

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

    def _active_layers(self) -> nn.ModuleList:
        """The layers that run: all, except while `generate(assistant_early_exit=...)` drafts and lowers the number."""
        return self.layers[: self.config.num_hidden_layers]

    def _dense_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[int | None, torch.Tensor | None]:
        """Upstream's masks, one for each sliding window (None: global) that some layer's dense heads have."""
        masks = {}
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


class MosaForCausalLM(MosaGenerationMixin, MosaPreTrainedModel, GenerationMixin):
    """`MosaModel` with a language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MosaConfig):
        super().__init__(config)
        self.model = MosaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
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
    ) -> MoeCausalLMOutputWithPast:
        """
        As `LlamaForCausalLM.forward`, and:

        Args:
            output_router_logits: also return `router_logits`, one `[B, T, G]` float32 tensor for each layer that has
                MoSA heads. They are computed anyway when `config.mosa_router_aux_loss_coef` is not 0 and labels are
                given; the auxiliary loss is then part of `loss`.
        """
        coefficient = self.config.mosa_router_aux_loss_coef if labels is not None else 0.0
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=bool(output_router_logits or coefficient),
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if coefficient:
            segment = None
            if attention_mask is None and outputs.get(CACHE) is None and position_ids is not None:
                segment = find_packed_sequence_indices(position_ids.expand(len(logits), -1))
            aux_loss = self._router_aux_loss(outputs.router_logits, attention_mask, segment)
            loss = loss + coefficient * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _router_aux_loss(
        self,
        router_logits: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None,
        segment: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Binary cross-entropy between sigmoid(z) and "among the K highest of its sequence", averaged over tokens, groups
        and layers (the auxiliary loss of Mixture-of-Depths).
        """
        losses = []
        for logits, router in zip(router_logits, mosa_routers(self), strict=True):
            if torch.is_grad_enabled() and router.weight.requires_grad and not logits.requires_grad:
                raise ValueError(
                    "`mosa_router_aux_loss_coef` has no effect under reentrant gradient checkpointing: use "
                    "`use_reentrant=False`, or set it to 0."
                )
            valid = valid_tokens(attention_mask, logits.shape[1])
            valid = None if valid is None else valid.to(logits.device)
            target, _ = select_by_expert_choice(
                logits.detach(), router.sparsity[0], router.min_tokens, valid, segment=segment
            )
            weight = torch.ones_like(logits) if valid is None else valid[..., None].expand_as(logits).to(logits.dtype)
            loss = nn.functional.binary_cross_entropy_with_logits(
                logits, target.to(logits.dtype), weight, reduction="sum"
            )
            losses.append((loss / weight.sum()).to(self.device))
        return torch.stack(losses).mean()


class MosaForSequenceClassification(GenericForSequenceClassification, MosaPreTrainedModel):
    """`MosaModel` with a classification head on the last token."""


__all__ = ["MosaPreTrainedModel", "MosaModel", "MosaForCausalLM", "MosaForSequenceClassification"]
