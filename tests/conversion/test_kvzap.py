"""KVzap's predictors, linear and MLP, in folders of their format that are made here, select what they say."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from mosa_hf import convert_checkpoint, load_routers, save_routers, to_dense, trace_routing
from mosa_hf.conversion.kvzap import load_kvzap
from mosa_hf.modeling.router import MosaRouter
from mosa_hf.modeling.router_files import LATER_FIELDS, MOSA_FIELDS
from testing.tiny import random_tokens, tiny_base
from testing.tiny_multimodal import tiny_multimodal

THRESHOLD = -0.5
HIDDEN = 4  # D / 8, as KVzap has it
TEXT = random_tokens(2, 50)


def linear() -> nn.Module:
    return nn.Linear(32, 2)


def mlp() -> nn.Module:
    layers = nn.Sequential(nn.Linear(32, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2))
    for each in layers.parameters():
        nn.init.normal_(each)
    return layers


KINDS = {"linear": (linear, None), "mlp": (mlp, HIDDEN)}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def write(path, layers, hidden_dim=None):
    path.mkdir()
    settings = {"model_type": "kvzap", "input_dim": 32, "output_dim": 2, "n_modules": len(layers)}
    (path / "config.json").write_text(json.dumps(settings | {"hidden_dim": hidden_dim}))
    state = {f"layers.{name}": tensor.clone() for name, tensor in nn.ModuleList(layers).state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def predictors(kind: str) -> list[nn.Module]:
    """Of three layers."""
    torch.manual_seed(0)
    return [KINDS[kind][0]() for _ in range(3)]


def loaded(kind: str, path, **options):
    base = tiny_base("qwen3")
    folder = write(path / "kvzap", predictors(kind), KINDS[kind][1])
    return base, load_kvzap(base, folder, THRESHOLD, window=4, **options)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(TEXT, use_cache=False).logits


@pytest.mark.parametrize("include_first", [True, False])
@torch.no_grad()
def test_selects_what_the_predictor_says(kind, include_first, tmp_path):
    base, model = loaded(kind, tmp_path, include_first=include_first)
    assert model.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    calls = []
    hooks = [
        router.register_forward_hook(lambda module, args, output: calls.append((args[0], output[0])))
        for router in model.mosa_routers().values()
    ]
    with trace_routing(model) as selected:
        logits_of(model)
    for hook in hooks:
        hook.remove()
    layers = predictors(kind)
    for layer, (hidden_states, logits) in enumerate(calls):
        score = layers[layer](hidden_states)  # log importance
        margin = logits - model.mosa_routers()[layer].threshold
        torch.testing.assert_close(margin, score - THRESHOLD, rtol=0, atol=1e-5)
        expected = score >= THRESHOLD
        if include_first:
            expected[:, 0] = True
        assert torch.equal(selected[layer][0], expected) and 0.02 < expected.float().mean() < 0.98


def test_on_pictures_and_text(kind, tmp_path):
    """Its predictors are of the decoder's layers."""
    folder = write(tmp_path / "kvzap", predictors(kind), KINDS[kind][1])
    routers = load_kvzap(tiny_multimodal("llava"), folder, THRESHOLD, window=4).mosa_routers()
    expected = load_kvzap(tiny_base(), folder, THRESHOLD, window=4).mosa_routers()
    assert routers.keys() == expected.keys() == {0, 1, 2}
    for layer, router in routers.items():
        assert torch.equal(router.weight, expected[layer].weight)


@torch.no_grad()
def test_decodes_what_a_full_forward_computes(kind, tmp_path):
    _, model = loaded(kind, tmp_path)
    expected = logits_of(model)
    for sizes in ([1] * 50, [17, 1, 1, 30, 1]):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in TEXT.split(sizes, dim=1)]
        assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-4
    options = {"attention_mask": torch.ones_like(TEXT), "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(TEXT, use_cache=False, **options)
    for cached in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(TEXT, **cached, **options), tokens)


def test_saved_and_loaded_in_every_form_and_back_to_the_base(kind, tmp_path):
    base, model = loaded(kind, tmp_path)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole")
    save_routers(model, tmp_path / "routers")
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", routers=tmp_path / "routers")
    expected = logits_of(model)
    for folder in ("whole", "converted"):
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), expected)
    assert torch.equal(logits_of(load_routers(base, tmp_path / "routers")), expected)
    with torch.no_grad():
        assert torch.equal(logits_of(to_dense(model)), logits_of(base))
    assert not torch.equal(expected, logits_of(base))  # something was left out

    half = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    names = {"weight", "threshold"} | ({"hidden_weight", "hidden_bias"} if kind == "mlp" else set())
    for layer, router in half.mosa_routers().items():
        assert type(router) is MosaRouter and router.state_dict().keys() == names
        whole = model.mosa_routers()[layer].state_dict()
        for name, tensor in router.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, whole[name])


def test_tools_find_no_linear_layer_in_a_router(kind, tmp_path):
    base, model = loaded(kind, tmp_path)
    assert all(not list(router.children()) for router in model.mosa_routers().values())
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear"}
    adapted = [get_peft_model(each, LoraConfig(**lora)) for each in (base, model)]
    trained = [{name for name, each in one.named_parameters() if each.requires_grad} for one in adapted]
    assert trained[0] == trained[1] and trained[0]


def test_folders_of_before_there_were_mlps(tmp_path):
    base, model = loaded("linear", tmp_path)
    save_routers(model, tmp_path / "routers")
    path = tmp_path / "routers" / "mosa_config.json"
    content = json.loads(path.read_text())
    assert content.pop("mosa_router_hidden_size") is None
    assert content.pop("mosa_cache_dtype") is None
    # Of these alone a folder has to say nothing: a field that is added has to be one of those above.
    first = (
        "cache_budget conversion gate_slope include_first inference_routing min_tokens plan router_bias routing "
        "sparsity threshold_momentum window"
    )
    assert set(MOSA_FIELDS) - set(LATER_FIELDS) == {f"mosa_{name}" for name in first.split()}
    path.write_text(json.dumps(content))
    assert torch.equal(logits_of(load_routers(base, tmp_path / "routers")), logits_of(model))
    with pytest.raises(ValueError, match="safetensors lacks .*layers.0.self_attn.mosa_router.hidden_bias"):
        load_routers(base, tmp_path / "routers", mosa_router_hidden_size=4)

    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    content = json.loads(path.read_text())
    del content["mosa_router_hidden_size"]
    path.write_text(json.dumps(content))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits_of(model))


def test_predictors_that_do_not_fit(tmp_path):
    layers = predictors("linear")
    with pytest.raises(ValueError, match="`n_modules` is 2, not 3"):
        load_kvzap(tiny_base(), write(tmp_path / "few", layers[:2]), THRESHOLD)
    with pytest.raises(ValueError, match="layer 1 sparse, but its attention has a sliding window"):
        load_kvzap(tiny_base("gemma3_text"), write(tmp_path / "sliding", layers), THRESHOLD)
    with pytest.raises(ValueError, match=r"has \[3, 32\] as layers.1.weight, which must be \[2, 32\]"):
        load_kvzap(tiny_base(), write(tmp_path / "wide", [layers[0], nn.Linear(32, 3), layers[2]]), THRESHOLD)
    with pytest.raises(ValueError, match=r"has no layers.0.2.weight, which must be \[2, 8\]"):
        load_kvzap(tiny_base(), write(tmp_path / "no mlp", layers, hidden_dim=8), THRESHOLD)
    with pytest.raises(ValueError, match=r"has \[2, 4\] as layers.0.2.weight, which must be \[2, 8\]"):
        load_kvzap(tiny_base(), write(tmp_path / "narrow", predictors("mlp"), hidden_dim=8), THRESHOLD)
    for size in (0, "8"):
        with pytest.raises(Exception, match="mosa_router_hidden_size"):
            load_kvzap(tiny_base(), write(tmp_path / f"size {size}", layers, hidden_dim=size), THRESHOLD)
    with pytest.raises(OSError):
        load_kvzap(tiny_base(), tmp_path / "nothing", THRESHOLD)
    with pytest.raises(ValueError, match="`threshold` must be a number, got NaN"):
        load_kvzap(tiny_base(), tmp_path / "few", float("nan"))
    for name, own in layers[1].named_parameters():
        with torch.no_grad():
            own[0] = torch.nan
        with pytest.raises(ValueError, match=rf"model.safetensors: layers.1.{name} has NaN or infinite values"):
            load_kvzap(tiny_base(), write(tmp_path / f"NaN {name}", layers), THRESHOLD)
        nn.init.zeros_(own)
