"""Tiny models around decoders, each with a picture to read or a sound, which tests convert."""

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from mosa_hf.modeling.configuration import is_composite
from mosa_hf.modeling.family import PREFIX, family_of

from .tiny import LOCAL_LAYER, SHAPE, random_tokens, rope

IMAGE, START, END, VIDEO = 250, 248, 247, 249  # token ids
SPECIAL = list(range(241, 256))  # which no text has
TEXT = {**SHAPE, "head_dim": 8, **rope()}
MROPE = {**TEXT, **rope(mrope_section=[1, 1, 2])}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
}
QWEN_TOKENS = {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
QWEN3_VISION = {**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 16}
QWEN3_5_TEXT = {
    **TEXT,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
}
SAM = {
    **VISION,
    "output_channels": 16,
    "patch_size": 8,
    "image_size": 64,
    "window_size": 2,
    "global_attn_indexes": [1],
    "initializer_range": 0.02,
    "mlp_dim": 48,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SOUND = {"num_mel_bins": 8, "max_source_positions": 20}  # 40 columns of a spectrogram
GLM_TEXT = {**TEXT, **rope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0)}
GLM_TOKENS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 246,
    "video_end_token_id": 245,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}


def _llama(**fields) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, **fields}


def _qwen2(**fields) -> dict[str, Any]:
    return {"model_type": "qwen2", **TEXT, **fields}


# Fields of the config, by type.
FIELDS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": CLIP, "text_config": _llama(), "image_token_index": IMAGE},
    "vipllava": {
        "vision_config": CLIP,
        "text_config": _llama(),
        "image_token_index": IMAGE,
        "vision_feature_layers": [-1, -2],
    },
    "llava_next": {
        "vision_config": CLIP,
        "text_config": _llama(),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[28, 28]],
    },
    "llava_onevision": {
        "vision_config": SIGLIP,
        "text_config": _qwen2(),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[28, 28]],
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "qwen2_vl": {
        "vision_config": {
            **{name: QWEN_VISION[name] for name in ("depth", "num_heads", "patch_size", "hidden_size")},
            "embed_dim": 32,
            "mlp_ratio": 2,
        },
        "text_config": MROPE,
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
        "text_config": MROPE,
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        "text_config": MROPE,
        **QWEN_TOKENS,
    },
    "qwen3_5": {"vision_config": QWEN3_VISION, "text_config": QWEN3_5_TEXT, **QWEN_TOKENS},
    "mistral3": {
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
        "image_token_index": IMAGE,
        "spatial_merge_size": 1,
        "vision_feature_layer": -1,
    },
    "internvl": {
        "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        "text_config": _qwen2(),
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
    "glm4v": {
        "vision_config": {**QWEN_VISION, "image_size": 56},
        "text_config": GLM_TEXT,
        **GLM_TOKENS,
    },
    "gemma3": {
        "vision_config": SIGLIP,
        "text_config": {**TEXT, **LOCAL_LAYER, "rope_parameters": None, "query_pre_attn_scalar": 4},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "gemma4": {
        "vision_config": {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "text_config": {
            **{name: value for name, value in TEXT.items() if name != "rope_parameters"},
            **LOCAL_LAYER,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        "image_token_id": IMAGE,
        "boi_token_id": START,
        "eoi_token_id": END,
        "video_token_id": VIDEO,
        "audio_token_id": 245,
        "boa_token_id": 244,
        "eoa_token_id": 243,
    },
    "idefics3": {
        "vision_config": VISION,
        "text_config": _llama(),
        "image_token_id": IMAGE,
        "scale_factor": 1,
    },
    "smolvlm": {
        "vision_config": VISION,
        "text_config": _llama(),
        "image_token_id": IMAGE,
        "scale_factor": 1,
    },
    "aya_vision": {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "cohere2", **TEXT, **LOCAL_LAYER},
        "image_token_index": IMAGE,
        "downsample_factor": 1,
        "adapter_layer_norm_eps": 1e-6,
    },
    "cohere2_vision": {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "cohere2", **TEXT, **LOCAL_LAYER},
        "image_token_id": IMAGE,
        "downsample_factor": 1,
    },
    "lfm2_vl": {
        "vision_config": {
            "model_type": "siglip2_vision_model",
            **{name: value for name, value in VISION.items() if name != "image_size"},
            "num_patches": 16,
        },
        "text_config": {
            "model_type": "lfm2",
            **TEXT,
            "layer_types": ["full_attention", "conv", "full_attention"],
        },
        "image_token_id": IMAGE,
        "downsample_factor": 1,
    },
    "got_ocr2": {
        "vision_config": SAM,
        "text_config": _qwen2(),
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "deepseek_vl": {"vision_config": SIGLIP, "text_config": _llama(), "image_token_id": IMAGE},
    "deepseek_vl_hybrid": {
        "vision_config": SIGLIP,
        "high_res_vision_config": {"model_type": "sam_vision_model", **SAM},
        "text_config": _llama(),
        "image_token_id": IMAGE,
    },
    "ernie4_5_vl_moe": {
        "vision_config": {name: value for name, value in QWEN_VISION.items() if name != "out_hidden_size"},
        "text_config": {
            **MROPE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "moe_layer_start_index": 1,
        },
        **GLM_TOKENS,
    },
    "exaone4_5": {
        "vision_config": {
            **QWEN_VISION,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "num_key_value_heads": 2,
        },
        "text_config": {"model_type": "exaone4", **TEXT, **LOCAL_LAYER},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "glm46v": {"vision_config": {**QWEN_VISION, "image_size": 56}, "text_config": GLM_TEXT, **GLM_TOKENS},
    "glm_ocr": {"vision_config": {**QWEN_VISION, "image_size": 56}, "text_config": GLM_TEXT, **GLM_TOKENS},
    "glm4v_moe": {
        "vision_config": {**QWEN_VISION, "image_size": 56},
        "text_config": {
            **GLM_TEXT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        **GLM_TOKENS,
    },
    "idefics2": {
        "vision_config": VISION,
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
        "image_token_id": IMAGE,
    },
    "llava_next_video": {
        "vision_config": CLIP,
        "text_config": _llama(),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[28, 28]],
    },
    "qianfan_ocr": {
        "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        "text_config": {"model_type": "qwen3", **TEXT},
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
    "qwen3_5_moe": {
        "vision_config": QWEN3_VISION,
        "text_config": {**QWEN3_5_TEXT, **EXPERTS, "shared_expert_intermediate_size": 16},
        **QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        "text_config": {**MROPE, **EXPERTS},
        **QWEN_TOKENS,
    },
    "video_llama_3": {
        "vision_config": {name: value for name, value in VISION.items() if name != "image_size"},
        "text_config": _qwen2(),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "mllama": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        "text_config": {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1]},
        "image_token_index": IMAGE,
    },
    "paligemma": {
        "vision_config": {**SIGLIP, "projection_dim": 32},
        "text_config": {"model_type": "gemma", **TEXT},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "qwen2_audio": {
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            **SOUND,
        },
        "text_config": {"model_type": "qwen2", **TEXT},
        "audio_token_index": IMAGE,
    },
    "voxtral": {
        "audio_config": {**VISION, "model_type": "voxtral_encoder", "intermediate_size": 128, **SOUND},
        "text_config": {"model_type": "llama", **TEXT},
        "audio_token_id": IMAGE,
    },
    "granite_speech": {
        "text_config": {"model_type": "granite", **TEXT},
        "encoder_config": {
            "hidden_dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "dim_head": 8,
            "input_dim": 8,
            "output_dim": 12,
            "context_size": 10,
            "max_pos_emb": 16,
        },
        "projector_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
        },
        "audio_token_index": IMAGE,
        "has_lora_adapter": False,
    },
}
SOUNDS = ("qwen2_audio", "voxtral", "granite_speech")


def pixels(size: int = 28) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


def patches(side: int = 14) -> dict[str, torch.Tensor]:
    """A picture of 4 x 4 patches, four of which make a token."""
    values = torch.randn(16, 3 * 2 * side * side, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def sound() -> torch.Tensor:
    return torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(3))


def tiles() -> dict[str, torch.Tensor]:
    """A picture as a whole and in one part."""
    return {"pixel_values": pixels()[:, None].expand(1, 2, -1, -1, -1), "image_sizes": torch.tensor([[28, 28]])}


# What the model is given of a picture or a sound, by type; those that are missing: `pixels()`.
PICTURES: dict[str, Any] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "exaone4_5"), patches),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), lambda: patches(16)),
    "mistral3": lambda: {"pixel_values": pixels(), "image_sizes": torch.tensor([[28, 28]])},
    "internvl": lambda: {"pixel_values": pixels(56)},
    "qianfan_ocr": lambda: {"pixel_values": pixels(56)},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), tiles),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), lambda: {"pixel_values": pixels()[:, None]}),
    "deepseek_vl_hybrid": lambda: {"pixel_values": pixels(), "high_res_pixel_values": pixels(64)},
    "ernie4_5_vl_moe": lambda: {**patches(), "pixel_values": patches()["pixel_values"][:, :588]},
    "video_llama_3": lambda: {
        **patches(),
        "pixel_values": patches()["pixel_values"][:, :588],
        "image_merge_sizes": torch.tensor([2]),
    },
    "mllama": lambda: {
        "pixel_values": pixels()[:, None, None],
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 24, 1, 1, dtype=torch.long),
    },
    "got_ocr2": lambda: {"pixel_values": pixels(64)},
    "lfm2_vl": lambda: {
        "pixel_values": torch.randn(1, 4, 588, generator=torch.Generator().manual_seed(3)),
        "spatial_shapes": torch.tensor([[2, 2]]),
        "pixel_attention_mask": torch.ones(1, 4, dtype=torch.long),
    },
    "gemma4": lambda: {
        "pixel_values": torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(3)),
        "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None],
    },
    "qwen2_audio": lambda: {
        "input_features": sound(),
        "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
    },
    "voxtral": lambda: {"input_features": sound()},
    "granite_speech": lambda: {
        "input_features": 5 * sound().mT[:, :10],
        "input_features_mask": torch.ones(1, 3, dtype=torch.bool),
    },
}
# Those that can have sparse groups.
TYPES = tuple(model_type for model_type in FIELDS if model_type not in ("mllama", "paligemma"))
# How many tokens a picture or a sound is, where it is not 4.
NUM_IMAGE_TOKENS = {
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "qwen2_audio"), 10),
    "voxtral": 5,
    "granite_speech": 3,
}


# What of those types is refused.
REFUSED = {
    "gemma3": "text; pictures, which are read both ways, are refused",
    "mllama": "text; pictures, which layers of cross-attention read, are refused",
    "paligemma": "refused: a prefix-LM, which reads its prompt both ways",
}
END_TO_END = "a picture or a sound, and text, end to end"


def multimodal_types() -> dict[str, str]:
    """Every model type that `AutoModelForMultimodalLM` loads: what of it was tested, or why it was not."""
    found = {}
    for model_type in sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        if model_type.startswith(PREFIX):
            continue
        if model_type in FIELDS:
            found[model_type] = REFUSED.get(model_type, END_TO_END)
            continue
        try:
            is_around = is_composite(family_of(model_type).base_config_class)
        except ValueError as error:
            found[model_type] = f"refused: {str(error).split(': ', 1)[-1]}"
        else:
            found[model_type] = "not tested with a picture or a sound" if is_around else "text: it is a decoder"
    return found


def tiny_multimodal(model_type: str = "llava", head: str | None = "ForConditionalGeneration") -> PreTrainedModel:
    """A model around a decoder with random weights, biases and norms, float32."""
    family = family_of(model_type)
    torch.manual_seed(0)
    model_class = family.base_head_classes[head] if head else family.base_model_class
    model = model_class(family.base_config_class(**copy.deepcopy(FIELDS[model_type])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():  # which start at 0 or 1
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def prompt(model: PreTrainedModel, model_type: str, length: int = 24, picture: bool = True) -> dict[str, torch.Tensor]:
    """What a processor makes of a text of `length` tokens, with a picture or a sound in it or without, for a model."""
    ids = random_tokens(1, length).clamp_max(SPECIAL[0] - 1)
    if picture:
        first = 3
        ids[0, first] = START
        ids[0, first + 1 : first + 1 + NUM_IMAGE_TOKENS.get(model_type, 4)] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = inspect.signature(model.forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            inputs[name] = (ids == IMAGE).long()
    if picture:
        made = PICTURES.get(model_type)
        inputs |= made() if made is not None else {"pixel_values": pixels()}
    return inputs
