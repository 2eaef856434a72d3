"""Tiny base models of several families, which tests convert."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mosa_hf.modeling.families import FAMILIES

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large, so that what heads do shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Llama's names; others' names, and a layer with a sliding window; fused projections; experts tensor by tensor on disk.
FIELDS = {
    "llama": {"head_dim": 8},
    "gpt_neox": {"num_key_value_heads": None},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
}


def tiny_base(family: str = "llama", head: str | None = "ForCausalLM", seed: int = 0, **fields) -> PreTrainedModel:
    """A base model with random weights, float32."""
    shape = {name: value for name, value in {**SHAPE, **FIELDS[family], **fields}.items() if value is not None}
    row = FAMILIES[family]
    torch.manual_seed(seed)
    model = (row.base_head_classes[head] if head else row.base_model_class)(row.base_config_class(**shape))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 256, shape, generator=torch.Generator().manual_seed(seed))
