"""Tiny base models of every family, each with the features on that set it apart, which tests convert."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mosa_hf.modeling.family import family_of
from mosa_hf.modeling.sparse_models import with_sparse_groups

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that what heads do shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# The middle layer has a sliding window.
LOCAL_LAYER = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16}


# A text in which every sentence is another one.
SENTENCES = " ".join(f"Boat number {i} left the harbour at {7 * i} and came back with nothing." for i in range(400))


# For tests of what users run: it warns of nothing, neither that what we call is deprecated nor in files of ours.
QUIET = pytest.mark.filterwarnings(
    "error::FutureWarning",
    "error:::mosa_hf",
    "error:::benchmarks",
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks for it
)


def rope(theta: float = 100.0, **fields) -> dict:
    """Rotary embeddings whose base is small enough that all frequencies show within a few dozen tokens."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **fields}}


# Heads that expand a latent, and mixtures of experts after the first layer.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}


# By family, what `SHAPE` lacks. A family without an entry is tested as its configuration is by default.
FIELDS = {
    "cohere2": {**LOCAL_LAYER, **rope(), "head_dim": 8, "logit_scale": 0.5, "attention_bias": True},
    "deepseek_v3": {**LATENT, **rope(), "first_k_dense_replace": 1},
    "gemma2": {
        **LOCAL_LAYER,
        **rope(),
        "head_dim": 16,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3_text": {
        **LOCAL_LAYER,
        "head_dim": 8,
        "query_pre_attn_scalar": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
    "glm4_moe_lite": {**LATENT, **rope(), "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gpt_neox": {"num_key_value_heads": None, **rope(partial_rotary_factor=0.5)},
    "gpt_oss": {**LOCAL_LAYER, **rope(), "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        **rope(),
        "attention_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "llama": {
        "head_dim": 8,
        "attention_bias": True,
        **rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    },
    "mistral": {**rope(), "head_dim": 16, "sliding_window": None},
    "mixtral": {**rope(), "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {**rope()},
    "olmoe": {**rope(), "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
    "phi3": {**rope(partial_rotary_factor=0.5)},
    "qwen2": {**LOCAL_LAYER, **rope(), "use_sliding_window": True},
    "qwen3": {**rope(), "head_dim": 16, "attention_bias": True},
    "qwen3_moe": {
        **rope(),
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "smollm3": {**rope(), "no_rope_layers": [1, 0, 1]},
    "starcoder2": {**rope()},
}


# Every kind of thing in which families differ, and the most used ones: `make test` has them, the others every night.
REPRESENTATIVES = (
    "deepseek_v3",
    "gemma3_text",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen3_moe",
    "smollm3",
)
FAMILIES = tuple(FIELDS)
# Of these, by default: latent attention; biases, half of a head rotated; sinks, experts; none of that.
QUICK = ("deepseek_v3", "gpt_neox", "gpt_oss", "llama")


def _marks(family: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if family in QUICK else (pytest.mark.slow if family in REPRESENTATIVES else pytest.mark.families,)


EVERY_FAMILY = pytest.mark.parametrize("family", [pytest.param(x, marks=_marks(x)) for x in FAMILIES])


def tiny_base(family: str = "llama", head: str | None = "ForCausalLM", seed: int = 0, **fields) -> PreTrainedModel:
    """A base model with random weights, biases, norms and sinks, float32."""
    row = family_of(family)
    torch.manual_seed(seed)
    model_class = row.base_head_classes[head] if head else row.base_model_class
    model = model_class(row.base_config_class(**{**SHAPE, **FIELDS.get(family, {}), **fields}))
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # what older versions do not choose by themselves has no softcap
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # which start at 0 or 1, or nearly
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def with_random_routers(base: PreTrainedModel, seed: int = 0, **fields) -> PreTrainedModel:
    """`base` with sparse groups; `fields` are its config's `mosa_*`."""
    config = family_of(base.config.model_type).config_class.from_base(base.config, **fields)
    torch.manual_seed(seed)
    return with_sparse_groups(base, config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """That gives the text back."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
