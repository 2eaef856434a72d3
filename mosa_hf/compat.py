"""What differs between the versions of Transformers that this package supports, 5.19 to 5.24."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers
from transformers import cache_utils, modeling_utils
from transformers.distributed import tensor_parallel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

# The name of a cache among the arguments of models and layers: "past_key_values" until Transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# What quantised layers of a cache have in common: until 5.21 there was but one kind.
QuantizedLayer: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
# What a cache has for a layer without keys of its own; where it is missing, caches have fewer layers.
EMPTY_LAYERS: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))

# Until upstream refused it, "sdpa" attention left a softcap out in silence.
SDPA_IGNORES_SOFTCAP = "softcap" not in sdpa_attention_forward.__code__.co_consts


def takes_cache(function: Callable) -> Callable:
    """Let a function that takes `past_key_values` take `cache` as well."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return function(*args, **kwargs)

    return wrapper


def supports_sdpa(model_class: type[modeling_utils.PreTrainedModel]) -> bool:
    """Whether "sdpa" computes a family's attention: not that of Gemma 2, whatever its class says in older versions."""
    softcap = getattr(model_class.config_class, "attn_logit_softcapping", None)  # a dataclass's default
    return model_class._supports_sdpa and not (SDPA_IGNORES_SOFTCAP and softcap is not None)


def exact_attention(model_class: type[modeling_utils.PreTrainedModel]) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model whose attention is computed whole: newer versions nothing."""
    left_out = model_class._supports_sdpa and not supports_sdpa(model_class)
    return {"attn_implementation": "eager"} if left_out else {}


def dequantized_gguf() -> dict[str, Any]:
    """What `from_pretrained(..., gguf_file=...)` needs to load weights that can be saved: older versions nothing."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def shards_heads(plan: dict[str, str]) -> bool:
    """Whether the tensor-parallel plan of a decoder splits its key/value heads."""
    if hasattr(tensor_parallel, "get_kv_heads_per_rank"):
        return tensor_parallel.get_kv_heads_per_rank(plan, 2, 2) != 2
    keys = ("k_proj", "qkv_proj", "query_key_value")
    return any(name.rsplit(".", 1)[-1] in keys and style == "colwise" for name, style in plan.items())


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states `[B, T, D]` of the tokens whose logits are wanted, as the installed version understands it."""
    if hasattr(modeling_utils, "slice_logits_to_keep"):
        return modeling_utils.slice_logits_to_keep(hidden_states, logits_to_keep)
    kept: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept, :]
