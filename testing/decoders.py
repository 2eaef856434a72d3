"""
Tiny models of every decoder type that Transformers has, with random weights. No type is listed but those whose
configuration does not follow from the names of its fields.
"""

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mosa_hf.modeling.configuration import is_composite

WIDTH, HEADS, GROUPS, HEAD_DIM, LAYERS, FFN, VOCABULARY, LENGTH = 32, 4, 2, 8, 4, 48, 256, 512
WINDOW, EXPERTS, ACTIVE, EXPERT_FFN, STATE = 16, 4, 2, 16, 8
ROPE = {"rope_type": "default", "rope_theta": 100.0}

# What fields of a configuration are called, by what they say.
SIZES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (
        WIDTH,
        "hidden_size n_embd d_model emb_dim hidden_dim embed_dim word_embed_proj_dim embedding_size "
        "input_embedding_size output_embedding_size dim_model_base lru_width rel_extent conv_dim",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads index_n_heads "
        "linear_num_value_heads linear_num_heads",
    ),
    (
        GROUPS,
        "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads global_num_key_value_heads "
        "num_global_key_value_heads linear_num_key_heads n_mamba_heads",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (
        FFN,
        "intermediate_size n_inner ffn_dim dff dim_ff decoder_ffn_dim dense_intermediate_size "
        "intermediate_size_mlp ffn_hidden_size d_inner",
    ),
    (LENGTH, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length"),
    (
        HEAD_DIM,
        "head_dim dim_head kv_channels qk_nope_head_dim swa_head_dim global_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_head mamba_headdim index_head_dim",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (
        ACTIVE,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group zero_expert_num o_groups "
        "mamba_expand max_window_layers layer_group_size attn_layer_period expert_layer_period "
        "index_topk_blocks n_layers_per_attn_res_block",
    ),
    (
        EXPERT_FFN,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "router_hidden_size q_lora_rank",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size "
        "local_attention local_attention_window_len floor_scale log_scaling_n_floor block_multiple_of",
    ),
    (
        STATE,
        "mamba_d_state ssm_state_size state_size mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size "
        "adapter_rank hidden_size_per_layer_input laurel_rank d_rel gated_norm_rank hc_lowrank o_lora_rank "
        "loop_gate_rank index_topk",
    ),
    (64, "mamba_d_ssm"),
    (12, "kv_lora_rank"),
    (6, "v_head_dim"),
    (4, "qk_rope_head_dim rotary_dim query_pre_attn_scalar index_block_size mamba_dt_rank"),
    (
        1,
        "topk_group n_shared_experts moe_num_shared_experts mamba_n_groups n_groups first_k_dense_replace "
        "attn_layer_offset expert_layer_offset num_layers_per_block bos_token_id n_input_layers "
        "n_output_layers",
    ),
    (0, "pad_token_id num_kv_shared_layers"),
    (0.3, "initializer_range"),
    (
        0.0,
        "activation_dropout attention_dropout dropout hidden_dropout_prob attention_probs_dropout_prob "
        "resid_pdrop embd_pdrop attn_pdrop embedding_dropout hidden_dropout residual_dropout",
    ),
    (None, "eos_token_id"),
    (False, "use_mamba_kernels"),
]
SMALL = {name: value for value, names in SIZES for name in names.split()}

BOUNDED = ("sliding", "chunked", "linear", "conv", "mamba", "recurrent", "hybrid_sliding")  # layer types

SHARING = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 6,
    "layer_types": ["full_attention", "sliding_attention"] * 2 + ["sliding_attention", "full_attention"],
}
OWN: dict[str, dict[str, Any]] = {  # by type, what the names of fields do not say
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 100.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": FFN, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "gemma3n_text": {**SHARING, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": SHARING,
    "gemma4_unified_text": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "gpt_bigcode": {"multi_query": True},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 4, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Windows of their own in all layers, which their checkpoints mostly lack.
OWN |= dict.fromkeys(
    ("doge", "minimax", "ministral3", "mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "starcoder2"),
    {"sliding_window": None},
)
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}
OWN |= dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), {f"indexer_{name}": size for name, size in INDEXER.items()})
LATENT = "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite "
LATENT += "glm_moe_dsa hy_v4 kimi_linear minicpm3 mistral4 sarvam_mla youtu"
OWN |= dict.fromkeys(LATENT.split(), {"num_key_value_heads": HEADS})


# Those that tests put through everything that a model can do beside the stock model, besides those of `tiny`.
BESIDE_STOCK = tuple(
    "deepseek_v3 exaone4 falcon_h1 gemma4_text glm4_moe granitemoehybrid lfm2 llama4_text ministral3 qwen3_5_text "
    "qwen3_next seed_oss".split()
)
# Upstream's table, without what is ours.
CAUSAL_LMS = {
    model_type: name for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if "mosa" not in model_type
}


def decoder_types() -> list[str]:
    """The model types for which Transformers has a causal LM."""
    return list(CAUSAL_LMS)


def classes_of(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and causal LM of a type; the text model's configuration, where a larger one has several."""
    model_class = getattr(transformers, CAUSAL_LMS[model_type])
    config_class = CONFIG_MAPPING[model_type]
    parts = (getattr(config_class, "sub_configs", None) or {}).values()
    return (model_class.config_class if model_class.config_class in parts else config_class), model_class


def is_wrapper(model_type: str) -> bool:
    """Whether a type is a model around a language model."""
    return is_composite(classes_of(model_type)[0])


def small_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a few layers, one of which at least has global attention where the type knows such."""
    config_class = classes_of(model_type)[0]
    is_dataclass = dataclasses.is_dataclass(config_class)
    names = (
        {field.name for field in dataclasses.fields(config_class)}
        if is_dataclass
        else set(inspect.signature(config_class.__init__).parameters)
    )
    fields = {name: value for name, value in SMALL.items() if name in names} | OWN.get(model_type, {})
    config = config_class(**fields)
    types, count = getattr(config, "layer_types", None), config.num_hidden_layers
    if types is None or "layer_types" not in names:
        return config
    if all(kind.startswith(BOUNDED) for kind in types) and not {"full_attention", "hybrid"} & set(types):
        kinds = [types[0], "hybrid" if types[0].startswith("hybrid") else "full_attention"]
        return config_class(**fields | {"layer_types": (kinds * count)[:count]})
    if len(types) != count:
        return config_class(**fields | {"layer_types": (list(types) * count)[:count]})
    return config


def tiny_decoder(model_type: str) -> PreTrainedModel:
    """A causal LM of a type, with random weights, biases and norms."""
    config, model_class = small_config(model_type), classes_of(model_type)[1]
    torch.manual_seed(0)
    return shaken(model_class(config))


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with noise on its vectors, which start at 0 or 1, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()
