"""
What sets a family's attention apart survives sparse groups. Every case has two halves: with everything selected the
model equals the original, and the original without the feature does not, by far; so a feature that the sparse path
drops fails its case. Below ρ = 1, where there is no original to compare with, kernels equal their reference.
"""

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from mosa_hf import use_backend
from mosa_hf.modeling import attention
from mosa_hf.modeling.layers import is_attention
from testing.difference import difference
from testing.tiny import FAMILIES, FIELDS, random_tokens, rope, tiny_base, with_random_routers

IDS = random_tokens(2, 30)
PREFILL = 22
CLOSE, FAR = 1e-4, 1e-2


def setting(**fields) -> Callable[[PreTrainedModel, str], PreTrainedModel]:
    """The model with other fields of its configuration, and the same weights."""

    def change(model: PreTrainedModel, family: str) -> PreTrainedModel:
        other = tiny_base(family, **fields)
        other.load_state_dict(model.state_dict())
        return other

    return change


def filled(name: str, value: float) -> Callable[[PreTrainedModel, str], PreTrainedModel]:
    """The model with a constant in place of the attention's parameters whose name ends on `name`."""

    def change(model: PreTrainedModel, family: str) -> PreTrainedModel:
        parameters = [
            p for key, p in model.named_parameters() if "attention." in key or "attn." in key if key.endswith(name)
        ]
        assert parameters
        for parameter in parameters:
            nn.init.constant_(parameter, value)
        return model

    return change


def without_norm(name: str) -> Callable[[PreTrainedModel, str], PreTrainedModel]:
    """The model without a norm of its attention."""

    def change(model: PreTrainedModel, family: str) -> PreTrainedModel:
        for module in attentions(model, family):
            assert hasattr(module, name)
            setattr(module, name, nn.Identity())
        return model

    return change


def attentions(model: PreTrainedModel, family: str) -> list[nn.Module]:
    return [module for module in model.modules() if is_attention(module)]


def one_after_the_other(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """Cohere's layers with the MLP behind the attention, not beside it."""
    for layer in model.model.layers:

        def begin(layer, args):
            layer.states = args[0]

        def attended(layer, module, args, output):
            layer.states = layer.states + output[0]

        def feed(layer, module, args):
            return (layer.input_layernorm(layer.states),)

        layer.register_forward_pre_hook(begin)
        layer.self_attn.register_forward_hook(partial(attended, layer))
        layer.mlp.register_forward_pre_hook(partial(feed, layer))
    return model


def rotated_everywhere(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """Cohere's global layers with rotary embeddings, which only its sliding ones have."""
    for module in attentions(model, family):
        module.sliding_window = module.sliding_window or model.config.max_position_embeddings
    return model


NO_SLIDING = setting(sliding_window=512)
ONE_EXPERT = setting(num_experts_per_tok=1)
FEATURES: dict[str, dict[str, Callable[[PreTrainedModel, str], PreTrainedModel]]] = {
    "cohere2": {
        "biases": filled(".bias", 0.0),
        "logit multiplier": setting(logit_scale=1.0),
        "global layers without RoPE": rotated_everywhere,
        "parallel residual": one_after_the_other,
        "sliding layer": NO_SLIDING,
    },
    "gemma2": {
        "softcap": setting(attn_logit_softcapping=None),
        "scale": setting(query_pre_attn_scalar=16),
        "final softcap": setting(final_logit_softcapping=None),
        "sliding layer": NO_SLIDING,
    },
    "gemma3_text": {
        "q norm": without_norm("q_norm"),
        "k norm": without_norm("k_norm"),
        "scale": setting(query_pre_attn_scalar=8),
        "per-layer RoPE": setting(
            rope_parameters={
                kind: FIELDS["gemma3_text"]["rope_parameters"]["sliding_attention"]
                for kind in FIELDS["gemma3_text"]["layer_types"]
            }
        ),
        "sliding layer": NO_SLIDING,
    },
    "gpt_neox": {
        "biases": filled(".bias", 0.0),
        "partial rotary": setting(**rope(partial_rotary_factor=1.0)),
        "parallel residual": setting(use_parallel_residual=False),
    },
    "gpt_oss": {
        "biases": filled(".bias", 0.0),
        "sinks": filled("sinks", -100.0),
        "experts": ONE_EXPERT,
        "sliding layer": NO_SLIDING,
    },
    "granite": {
        "attention multiplier": setting(attention_multiplier=8**-0.5),
        "embedding multiplier": setting(embedding_multiplier=1.0),
        "residual multiplier": setting(residual_multiplier=1.0),
        "logit multiplier": setting(logits_scaling=1.0),
    },
    "llama": {"biases": filled(".bias", 0.0), "Llama-3 RoPE": setting(**rope())},
    "mistral": {"RoPE base": setting(**rope(10000.0))},
    "mixtral": {"experts": ONE_EXPERT},
    "olmo2": {"q norm": without_norm("q_norm"), "k norm": without_norm("k_norm")},
    "olmoe": {
        "q norm": without_norm("q_norm"),
        "k norm": without_norm("k_norm"),
        "clipped q, k, v": setting(clip_qkv=None),
        "experts": ONE_EXPERT,
    },
    "phi3": {"partial rotary": setting(**rope(partial_rotary_factor=1.0))},
    "qwen2": {"biases": filled(".bias", 0.0), "sliding layer": NO_SLIDING},
    "qwen3": {"q norm": without_norm("q_norm"), "k norm": without_norm("k_norm"), "biases": filled(".bias", 0.0)},
    "qwen3_moe": {"q norm": without_norm("q_norm"), "k norm": without_norm("k_norm"), "experts": ONE_EXPERT},
    "smollm3": {"layer without RoPE": setting(no_rope_layers=[1, 1, 1])},
    "starcoder2": {"biases": filled(".bias", 0.0)},
}
CASES = [(family, feature) for family, features in FEATURES.items() for feature in features]


@lru_cache(1)
def original(family: str) -> PreTrainedModel:
    return tiny_base(family)


def sparse(base: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """`base` with sparse groups that select one token in `sparsity`, by routers that do not depend on the base."""
    model = with_random_routers(base, seed=1, mosa_sparsity=sparsity, mosa_window=4)
    for router in model.mosa_routers().values():
        nn.init.normal_(router.weight)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Of a prompt, then of tokens one by one."""
    cache = DynamicCache(config=model.config)
    calls = [model(IDS[:, :PREFILL], past_key_values=cache)]
    calls += [model(IDS[:, i : i + 1], past_key_values=cache) for i in range(PREFILL, IDS.shape[1])]
    return torch.cat([call.logits for call in calls], dim=1)


@lru_cache(1)
def logits_with_everything(family: str) -> dict[str, torch.Tensor]:
    base = original(family)
    some = sparse(base, 3)
    logits = {"original": logits_of(base), "all": logits_of(sparse(base, 1)), "some": logits_of(some)}
    with use_backend("reference"):
        logits["some by reference"] = logits_of(some)
    return logits


def test_every_family_has_cases():
    latent = {"deepseek_v3", "glm4_moe_lite"}  # whose features `test_latent_attention` shows
    assert FEATURES.keys() == set(FAMILIES) - latent


@pytest.mark.parametrize(("family", "feature"), CASES)
def test_feature(family, feature):
    logits = logits_with_everything(family)
    without = FEATURES[family][feature](copy.deepcopy(original(family)), family)
    # It does something, and with everything selected it is there.
    assert difference(logits_of(without), logits["original"]) > FAR
    assert difference(logits["all"], logits["original"]) < CLOSE
    # With less selected it does something still, and the kernels agree with their reference.
    assert difference(logits["some"], logits["original"]) > FAR
    assert difference(logits_of(sparse(without, 3)), logits["some"]) > FAR
    assert difference(logits["some"], logits["some by reference"]) < CLOSE


@pytest.mark.parametrize("operation", ["sparse_attention", "sparse_decode"])
@pytest.mark.parametrize(
    ("family", "option"), [("gemma2", "softcap"), ("gemma2", "scale"), ("granite", "scale"), ("gpt_oss", "sinks")]
)
def test_kernels_are_given_what_scores_need(family, option, operation, monkeypatch):
    """Dropped on the way to a kernel, in a prompt or in single tokens, it shows, also where all is selected."""
    kernels = attention.backend(IDS)

    def dropping(*args, **options) -> Any:
        assert options.pop(option) is not None
        return getattr(kernels, operation)(*args, **options)

    monkeypatch.setattr(attention, "backend", lambda *_: kernels._replace(**{operation: dropping}))
    logits = logits_of(sparse(original(family), 1))
    error = (logits - logits_with_everything(family)["original"]).abs().amax((0, 2))
    prompt, tokens = error.split((PREFILL, len(error) - PREFILL))
    assert (prompt.max() > FAR) == (operation == "sparse_attention")
    assert tokens.max() > FAR
