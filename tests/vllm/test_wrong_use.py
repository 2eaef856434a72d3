"""What cannot be served is refused at the start, by name, with a remedy."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from mosa_hf.vllm import plugin, refused

from .serving import PLAN, engine, save_tiny

load_general_plugins()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path, "llama", PLAN)
    return path


def configured(path, **options):
    """vLLM's configuration, before anything is loaded."""
    settings = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True}
    return EngineArgs(str(path), **{**settings, **options}).create_engine_config()


@pytest.mark.parametrize(
    "option, message",
    [
        ({"enable_prefix_caching": True}, "`enable_prefix_caching`.*--no-enable-prefix-caching"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "`speculative_config`",
        ),
        ({"pipeline_parallel_size": 2}, "`pipeline_parallel_size`.*--tensor-parallel-size"),
        ({"kv_cache_dtype": "fp8"}, "`cache_dtype`"),
        ({"kv_offloading_size": 1}, "`kv_offloading_size`"),
        ({"max_model_len": -1}, "`max_model_len`.*Name a length"),
        ({"runner": "pooling"}, "`runner`.*Serve the original"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "`kv_transfer_config`"),
        ({"additional_config": {"mosa_reserve": "none"}}, "`mosa_reserve` must be one of feedback, rate, budget"),
        ({"additional_config": {"mosa_reserve": "budget"}}, "no `mosa_cache_budget`"),
        ({"additional_config": {"mosa_slack": 0.5}}, "`mosa_slack`"),
        ({"additional_config": {"mosa_slak": 2}}, "mosa_slak"),
    ],
)
def test_options(llama, option, message):
    with pytest.raises(ValueError, match=message):
        configured(llama, **option)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"mosa_cache_budget": 0}, StrictDataclassError, "`mosa_cache_budget` must be at least 1"),
        ({"mosa_cache_bugdet": 8}, StrictDataclassError, "`mosa_cache_bugdet`: MosaLlamaConfig has no such field"),
        ({"mosa_window": 8}, ValueError, "`mosa_window` would change nothing"),
        ({"mosa_routers": "nowhere"}, OSError, "nowhere"),
    ],
)
def test_overrides(llama, fields, error, message):
    with pytest.raises(error, match=message):
        configured(llama, hf_overrides=fields)


def test_prefix_caching_is_off_by_default(llama):
    config = configured(llama)
    assert config.cache_config.enable_prefix_caching is False
    assert config.kv_transfer_config.kv_connector == "ArenaConnector"


def edited(path, target, **fields):
    """A copy of a checkpoint with other fields in its config."""
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def test_unsupported_model(llama, tmp_path):
    path = edited(llama, tmp_path / "copy", architectures=["MosaGlm4ForCausalLM"])
    with pytest.raises(ValueError, match="MosaGlm4ForCausalLM cannot be served.*MosaLlamaForCausalLM"):
        configured(path)


@pytest.mark.parametrize("field, value", [("mosa_inference_routing", "expert_choice"), ("mosa_cache_dtype", "int8")])
def test_fields_that_are_not_served(llama, tmp_path, field, value):
    path = edited(llama, tmp_path / "copy", **{field: value})
    with pytest.raises(ValueError, match=f"`{field}` is '{value}'.*config.json"):
        configured(path)


def test_base_without_routers(llama, tmp_path):
    path = edited(llama, tmp_path / "copy", model_type="llama")
    with pytest.raises(ValueError, match="is a base model without routers.*mosa-convert"):
        configured(path)


@pytest.mark.parametrize("change, message", [("missing", "lacks .*mosa_router"), ("nan", "NaN"), ("shape", "shape")])
def test_checkpoint_without_its_routers(llama, tmp_path, change, message):
    path = edited(llama, tmp_path / "copy")
    weights = load_file(path / "model.safetensors")
    name = next(each for each in sorted(weights) if each.endswith("mosa_router.weight"))
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.full((2, 3), 1.0) if change == "shape" else weights[name] * float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message), engine(path):
        pass


def test_another_vllm(monkeypatch, caplog):
    """Its own models work; converted ones say why they do not."""
    models = dict(ModelRegistry.models)
    monkeypatch.setattr(
        ModelRegistry, "models", {name: x for name, x in models.items() if not name.startswith("Mosa")}
    )
    monkeypatch.setattr(plugin, "version", lambda name: "0.99.1")
    plugin.register()
    model = ModelRegistry.models["MosaLlamaForCausalLM"].load_model_cls()
    assert issubclass(model, refused.RefusedModel)
    with pytest.raises(ValueError, match="vLLM is 0.99.1, but mosa_hf serves models in 0.32 and 0.33"):
        model(vllm_config=None)
    assert ModelRegistry.models["LlamaForCausalLM"] is models["LlamaForCausalLM"]


def test_registering_again_changes_nothing():
    before = dict(ModelRegistry.models)
    plugin.register()
    assert set(ModelRegistry.models) == set(before)
    assert not issubclass(ModelRegistry.models["MosaLlamaForCausalLM"].load_model_cls(), refused.RefusedModel)
