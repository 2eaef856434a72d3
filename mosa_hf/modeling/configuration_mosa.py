"""Configuration of the native MoSA model (DESIGN sections 2, 3 and 6)."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

# What `per_layer_config` may set: the rest is the whole model's.
PER_LAYER_FIELDS = (
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "num_mosa_heads",
    "num_mosa_key_value_heads",
    "mosa_sparsity",
    "mosa_query_tokens",
    "mosa_window",
    "mosa_include_first",
    "mosa_min_tokens",
    "mosa_threshold_momentum",
    "mosa_cache_budget",
    "mosa_router_bias",
)


@strict
class MosaConfig(LlamaConfig):
    r"""
    Configuration of a Llama-shaped decoder whose layers mix ordinary (dense) attention heads with MoSA heads.

    Every `LlamaConfig` field keeps its name and meaning; `num_attention_heads`, `num_key_value_heads` and
    `sliding_window` describe the dense heads only, and `attention_dropout` acts on them only. `head_dim` is shared by
    both kinds of heads.

    Args:
        num_mosa_heads (`int`, defaults to 28):
            MoSA query heads per layer.
        num_mosa_key_value_heads (`int`, *optional*):
            MoSA groups per layer: one router, one key head and one value head each. Defaults to `num_mosa_heads`.
        mosa_sparsity (`float`, defaults to 16):
            ρ ≥ 1: a group selects one token in ρ.
        mosa_query_tokens (`str`, defaults to `"selected"`):
            Which tokens a MoSA head produces an output for. `"selected"`: the selected tokens attend to each other
            (the paper's head, for models trained from scratch). `"all"`: every token queries the selected tokens and
            the last `mosa_window` tokens (what pretrained heads convert to).
        mosa_window (`int`, defaults to 0):
            Form `"all"` only: a query also reads the keys at most `mosa_window - 1` tokens behind it, selected or not.
        mosa_include_first (`bool`, defaults to `True`):
            Always select the first token of a sequence (the attention sink).
        mosa_min_tokens (`int`, defaults to 2):
            `"expert_choice"` selects at least this many tokens of a sequence.
        mosa_routing (`str`, defaults to `"expert_choice"`):
            How `model.train()` selects. `"expert_choice"`: the highest logits of the whole sequence (not causal).
            `"threshold"`: the logits at or above the group's learned threshold (causal).
        mosa_inference_routing (`str`, defaults to `"threshold"`):
            How `model.eval()` selects. `"expert_choice"` reproduces the paper's teacher-forced figures; `generate`
            refuses it.
        mosa_threshold_momentum (`float`, defaults to 0.99):
            Momentum of the moving average of a group's K-th largest logit, which becomes its threshold.
        mosa_router_bias (`bool`, defaults to `False`):
            Whether routers have a bias.
        mosa_router_aux_loss_coef (`float`, defaults to 0.0):
            Weight of a binary cross-entropy that pushes the score of selected tokens above 0.5 and of others below.
        mosa_cache_budget (`int`, *optional*):
            Hard cap on the selected tokens that each row and group remembers, those in the window included: beyond
            it, the lowest router logit is forgotten first (the first token never is, under `mosa_include_first`).
            It is part of the function that the model computes, with a cache or without, in training too.
        sliding_window (`int`, *optional*):
            Window of the dense heads; `None` means global attention. May differ by layer through `per_layer_config`.
        mosa_conversion (`dict`, *optional*):
            What a converted checkpoint was made from. Informative; never read by the model.

    Per-layer differences go through Transformers' `per_layer_config`, e.g.
    `per_layer_config={0: {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0}}`.

    Raises:
        `StrictDataclassClassValidationError`, `StrictDataclassFieldValidationError` or `ValueError` when the config is
        built, naming the offending field.

    ```python
    >>> from mosa_hf import MosaConfig, MosaForCausalLM

    >>> config = MosaConfig(hidden_size=512, num_attention_heads=4, head_dim=64, num_mosa_heads=32, mosa_sparsity=32)
    >>> model = MosaForCausalLM(config)
    ```
    """

    model_type = "mosa"

    num_attention_heads: int = 4
    head_dim: int | None = 128
    sliding_window: int | None = None
    num_mosa_heads: int = 28
    num_mosa_key_value_heads: int | None = None
    mosa_sparsity: int | float = 16
    mosa_query_tokens: Literal["selected", "all"] = "selected"
    mosa_window: int = 0
    mosa_include_first: bool = True
    mosa_min_tokens: int = 2
    mosa_routing: Literal["expert_choice", "threshold"] = "expert_choice"
    mosa_inference_routing: Literal["expert_choice", "threshold"] = "threshold"
    mosa_threshold_momentum: int | float = 0.99
    mosa_router_bias: bool = False
    mosa_router_aux_loss_coef: int | float = 0.0
    mosa_cache_budget: int | None = None
    mosa_conversion: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.num_mosa_key_value_heads is None:
            self.num_mosa_key_value_heads = self.num_mosa_heads
        if self.head_dim is None and self.num_attention_heads == 0:
            raise ValueError("`head_dim` must be given when `num_attention_heads` is 0: it cannot be derived.")
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: refuses impossible combinations, layer by layer."""
        if self.is_heterogeneous:
            for layer_idx, layer_config in enumerate(self.per_layer_config):
                try:
                    layer_config.validate_architecture()
                except ValueError as error:
                    raise ValueError(f"`per_layer_config`, layer {layer_idx}: {error}") from error
            if shared := sorted(self.per_layer_attributes.difference(PER_LAYER_FIELDS)):
                raise ValueError(
                    f"`per_layer_config` sets {shared}, which all layers share. Set it for the whole model; only "
                    f"{', '.join(PER_LAYER_FIELDS)} may differ by layer."
                )
            return

        _validate_groups(self, "num_attention_heads", "num_key_value_heads")
        _validate_groups(self, "num_mosa_heads", "num_mosa_key_value_heads")
        if self.num_attention_heads == 0 and self.num_mosa_heads == 0:
            raise ValueError(
                "`num_attention_heads` and `num_mosa_heads` are both 0: a layer needs a head of either kind."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be a positive even number (rotary embeddings pair it), got {self.head_dim}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"`sliding_window` must be at least 1, or None for global attention, got {self.sliding_window}."
            )
        if not 1 <= self.mosa_sparsity < math.inf:
            raise ValueError(
                f"`mosa_sparsity` must be finite and at least 1 (select every token), got {self.mosa_sparsity}."
            )
        if self.mosa_min_tokens < 1:
            raise ValueError(f"`mosa_min_tokens` must be at least 1, got {self.mosa_min_tokens}.")
        if self.mosa_window < 0:
            raise ValueError(f"`mosa_window` must not be negative, got {self.mosa_window}.")
        if self.mosa_window and self.mosa_query_tokens == "selected":
            raise ValueError(
                f"`mosa_window={self.mosa_window}` needs `mosa_query_tokens='all'`: heads of the 'selected' form read "
                "selected tokens only. Set `mosa_window=0` or change `mosa_query_tokens`."
            )
        if not 0 <= self.mosa_threshold_momentum < 1:
            raise ValueError(f"`mosa_threshold_momentum` must be in [0, 1), got {self.mosa_threshold_momentum}.")
        if not 0 <= self.mosa_router_aux_loss_coef < math.inf:
            raise ValueError(
                f"`mosa_router_aux_loss_coef` must be finite and not negative, got {self.mosa_router_aux_loss_coef}."
            )
        if self.mosa_cache_budget is not None and self.mosa_cache_budget < 1:
            raise ValueError(
                f"`mosa_cache_budget` must be at least 1, or None to keep every selected token, got "
                f"{self.mosa_cache_budget}."
            )


def _validate_groups(config: MosaConfig, heads: str, key_value_heads: str) -> None:
    """Query heads must divide evenly over key/value heads, and both may only be 0 together."""
    num_heads, num_key_value_heads = getattr(config, heads), getattr(config, key_value_heads)
    if num_heads < 0 or num_key_value_heads < 0:
        raise ValueError(
            f"`{heads}` and `{key_value_heads}` must not be negative, got {num_heads}, {num_key_value_heads}."
        )
    if (num_heads == 0) != (num_key_value_heads == 0) or (num_heads and num_heads % num_key_value_heads):
        raise ValueError(
            f"`{heads}` ({num_heads}) must be a multiple of `{key_value_heads}` ({num_key_value_heads}); "
            "set both where a layer differs."
        )


__all__ = ["MosaConfig"]
