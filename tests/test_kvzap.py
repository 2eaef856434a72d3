"""KVzap's predictors, in a folder of their format that is made here, select what they say."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mosa_hf import trace_routing
from mosa_hf.conversion.kvzap import load_kvzap

from .bases import random_tokens, tiny_base

THRESHOLD = -0.5


def write(path, layers, hidden_dim=None):
    path.mkdir()
    settings = {"model_type": "kvzap", "input_dim": 32, "output_dim": 2, "n_modules": len(layers)}
    (path / "config.json").write_text(json.dumps(settings | {"hidden_dim": hidden_dim}))
    state = {f"layers.{name}": tensor.clone() for name, tensor in nn.ModuleList(layers).state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("include_first", [True, False])
@torch.no_grad()
def test_selects_what_the_predictor_says(include_first, tmp_path):
    torch.manual_seed(0)
    base, layers = tiny_base("qwen3"), [nn.Linear(32, 2) for _ in range(3)]
    model = load_kvzap(base, write(tmp_path / "kvzap", layers), THRESHOLD, window=4, include_first=include_first)
    assert model.model.embed_tokens.weight is base.model.embed_tokens.weight
    inputs = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    text = random_tokens(2, 50)
    with trace_routing(model) as selected:
        model(text, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, hidden_states in enumerate(inputs):
        expected = layers[layer](hidden_states) >= THRESHOLD
        if include_first:
            expected[:, 0] = True
        assert torch.equal(selected[layer][0], expected) and 0.02 < expected.float().mean() < 0.98
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(text, **options), model.generate(text, use_cache=False, **options))


def test_predictors_that_do_not_fit(tmp_path):
    linear = [nn.Linear(32, 2) for _ in range(3)]
    with pytest.raises(ValueError, match="MLP of 8 hidden units"):
        load_kvzap(tiny_base(), write(tmp_path / "mlp", linear, hidden_dim=8), THRESHOLD)
    with pytest.raises(ValueError, match="`n_modules` is 2, not 3"):
        load_kvzap(tiny_base(), write(tmp_path / "few", linear[:2]), THRESHOLD)
    with pytest.raises(ValueError, match="layer 1 sparse, but its attention has a sliding window"):
        load_kvzap(tiny_base("gemma3_text"), write(tmp_path / "sliding", linear), THRESHOLD)
    with pytest.raises(ValueError, match="lacks a linear predictor of 2 groups for layer 1"):
        load_kvzap(tiny_base(), write(tmp_path / "wide", [linear[0], nn.Linear(32, 3), linear[2]]), THRESHOLD)
    with pytest.raises(OSError):
        load_kvzap(tiny_base(), tmp_path / "nothing", THRESHOLD)
