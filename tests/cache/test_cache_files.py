"""Filled caches on disk: what is read back goes on as what was written, and what is not this model's is refused."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    TorchAoConfig,
    cache_utils,
)
from transformers.cache_utils import QuantizedCache

from mosa_hf import cache_bytes, calibrate_thresholds, load_cache, save_cache
from mosa_hf.cache import seen_tokens
from mosa_hf.modeling.cache_files import checksum
from testing.decoders import tiny_decoder
from testing.family_contract import sparse_model, tokens

from ..conftest import FORMS, PLAN, SHAPE, native_form, sparse_form
from ..contract import random_ids
from .test_lost_caches import IDS, LOST, ONE_WINDOW, READ, SLIDING, fed, filled, static

FILES = {
    **{name: form for name, (form, _) in LOST.items()},
    "budget": sparse_form("gemma2", **ONE_WINDOW, **SLIDING, mosa_cache_budget=3),
    "no window": sparse_form(**ONE_WINDOW | {"mosa_window": 0}),
    "native, budget": native_form(mosa_cache_budget=3, per_layer_config={2: {"sliding_window": 4}}),
    "dense": sparse_form(mosa_plan=[[None] * 3] * 3),
}
PADDING = torch.ones(2, 34, dtype=torch.long)
PADDING[1, :7] = 0


def made_without_a_config(model):
    cache = DynamicCache()
    fed(model, cache, 0, READ)
    return cache


def recording(model):
    cache = DynamicCache(config=model.config)
    model.record_past(cache)
    fed(model, cache, 0, READ)
    return cache


def after_single_tokens(model):
    cache = filled(model)
    for t in range(READ, 24):
        fed(model, cache, t, t + 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    fed(model, cache, 24, 25)
    return cache


def padded(model):
    return filled(model, attention_mask=PADDING[:, :READ])


def in_a_static_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=40)
    fed(model, cache, 0, READ)
    return cache


@torch.no_grad()
def continued(model, cache, change) -> torch.Tensor | str:
    """Logits after `change`, of single tokens and others; or what `change` refuses."""
    try:
        change(cache)
    except RuntimeError as error:
        return str(error)
    rows = len(cache.layers[-1].keys)
    ids = IDS.repeat_interleave(rows // 2, 0)
    logits = []
    for length in (1, 3, 1):
        seen, new = seen_tokens(cache, cache.get_seq_length()), torch.ones(rows, length, dtype=torch.bool)
        new[0, 0] = length == 1  # some of the new ones are padding, too
        past = new.new_ones(rows, int(cache.get_seq_length())) if seen is None else seen
        mask = torch.cat((past, new), dim=1)
        logits.append(model(ids[:, -length:], attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def go_on(cache):
    pass


CHANGES = [
    go_on,
    lambda cache: cache.crop(-2),
    lambda cache: cache.batch_repeat_interleave(2),
    lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
]
CASES = [(name, read) for name in FILES for read in (filled, after_single_tokens, in_a_static_cache)]
CASES += [
    (name, read)
    for name in ("partly dense", "sliding", "native, budget")
    for read in (made_without_a_config, recording, padded)
]


@pytest.mark.parametrize("name, read", CASES)
def test_what_is_read_back_goes_on_as_what_was_written(name, read, tmp_path):
    """To the last bit, whatever is done to it; and holds no more bytes."""
    model = FILES[name].model()
    cache = read(model)
    save_cache(cache, tmp_path / "cache.safetensors", model)
    again = load_cache(tmp_path / "cache.safetensors", model)
    assert type(again) is type(cache) and again.get_seq_length() == cache.get_seq_length()
    if read is not recording:  # which keeps positions in a view
        before, after = cache_bytes(cache), cache_bytes(again)
        assert after["sparse"] == before["sparse"] and after["dense"] <= before["dense"]
    for change in CHANGES[: 1 if read is in_a_static_cache else None]:
        expected, actual = (continued(model, copy.deepcopy(each), change) for each in (cache, again))
        if isinstance(expected, str):
            assert actual == expected
        else:
            assert torch.equal(actual, expected)


def test_generation_goes_on_in_another_dtype_and_mode_of_gradients(tmp_path):
    """A document that was read by `generate`, in half precision, and questions about it."""
    model = FORMS["sparse"].model().to(torch.bfloat16)
    path, cache = tmp_path / "folder" / "cache.safetensors", DynamicCache(config=model.config)
    options = {"do_sample": False, "max_new_tokens": 5}
    document = model.generate(IDS, past_key_values=cache, **options)
    with torch.inference_mode():
        save_cache(cache, path, model)
    again = load_cache(path, model)
    assert all(
        x.dtype == torch.bfloat16 for x in (again.layers[0].keys, again.layers[1].stores[0].memory.states["key"])
    )
    question = torch.cat((document, IDS[:, :4]), dim=1)
    expected = model.generate(question, past_key_values=cache, **options)
    assert torch.equal(model.generate(question, past_key_values=again, **options), expected)


@pytest.mark.parametrize("make", [DynamicCache, static])
@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_anothers_keys_have_none_to_write(model_type, make, tmp_path):
    model, path, ids = sparse_model(tiny_decoder(model_type)), tmp_path / "cache.safetensors", tokens(2, READ + 3)
    cache = make(config=model.config)
    fed(model, cache, 0, READ, ids)
    save_cache(cache, path, model)
    again = load_cache(path, model)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
    assert torch.equal(*(fed(model, each, READ, READ + 3, ids) for each in (again, cache)))


def test_a_file_holds_tensors_alone_and_is_replaced_at_once(tmp_path, monkeypatch):
    model = FORMS["sparse"].model()
    path = tmp_path / "cache.safetensors"
    save_cache(filled(model), path, model)
    before = path.read_bytes()
    assert len(load_file(path)) > 10 and set(json.loads(metadata_of(path)["mosa_cache"])["layers"][0]) == {
        "kind",
        "states",
        "stores",
    }
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):

        def full(tensors, unfinished, metadata):
            unfinished.write_bytes(b"half")
            raise OSError("the disk is full")

        patch.setattr("mosa_hf.modeling.cache_files.save_file", full)
        save_cache(after_single_tokens(model), path, model)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# --- whose it is ---

OTHERS = {
    "weights": (lambda: FORMS["sparse"].model(seed=1), "other weights or thresholds"),
    "dtype": (lambda: FORMS["sparse"].model().to(torch.bfloat16), "dtype torch.float32, and this one is of torch.bf"),
    "plan": (lambda: FORMS["sparse"].model(mosa_plan=PLAN[::-1]), "other groups than this one's"),
    "budget": (lambda: FORMS["sparse"].model(mosa_cache_budget=5), "other groups than this one's"),
    "class": (lambda: FORMS["native"].model(), "class MosaLlamaModel, and this one is of MosaModel"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_file_is_refused(name, tmp_path):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    save_cache(filled(model), path, model)
    make, message = OTHERS[name]
    with pytest.raises(
        ValueError, match=f"cache.safetensors is the cache of a model of {message}.*read the text again"
    ):
        load_cache(path, make())
    load_cache(path, copy.deepcopy(model))  # an equal one


def set_last(name: str, factor: float) -> Callable[[], PreTrainedModel]:
    """The model with another last row of a weight, whose beginning is the same."""

    def make() -> PreTrainedModel:
        model = FORMS["sparse"].model()
        with torch.no_grad():
            model.get_parameter(name)[-1] *= factor
        return model

    return make


ALIKE = {
    "row": (set_last("model.layers.1.self_attn.v_proj.weight", -1.0), "other weights or thresholds"),
    "embedding": (set_last("model.embed_tokens.weight", 1.01), "other weights or thresholds"),
    "field": (lambda: FORMS["sparse"].model(mosa_include_first=False), "another configuration"),
    "upstream's field": (lambda: FORMS["sparse"].model(rms_norm_eps=0.5), "another configuration"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_model_that_differs_in_little_is_another(name, tmp_path):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    save_cache(filled(model), path, model)
    make, message = ALIKE[name]
    with pytest.raises(ValueError, match=f"cache.safetensors is the cache of a model of {message}"):
        load_cache(path, make())
    load_cache(path, FORMS["sparse"].model(mosa_gate_slope=0.5))  # which training alone reads


def test_adapters_are_part_of_the_model(tmp_path):
    settings: Any = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(FORMS["sparse"].model(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    model.add_adapter("other", LoraConfig(**settings))
    path = tmp_path / "cache.safetensors"
    save_cache(filled(model), path, model)
    load_cache(path, model)
    with rescale_adapter_scale(model, 0.5), pytest.raises(ValueError, match="other active adapters"):
        load_cache(path, model)
    with model.disable_adapter(), pytest.raises(ValueError, match="other active adapters"):
        load_cache(path, model)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="other active adapters"):
        load_cache(path, model)


def test_other_thresholds_are_another_model(tmp_path):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    save_cache(filled(model), path, model)
    calibrate_thresholds(model, random_ids(2, 40).split(1))
    with pytest.raises(ValueError, match="other weights or thresholds"):
        load_cache(path, model)


def test_models_that_have_no_files_are_refused(tmp_path):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    cache, stock = filled(model), LlamaForCausalLM(LlamaConfig(**SHAPE))
    for call in (lambda: save_cache(cache, path, stock), lambda: load_cache(path, stock)):
        with pytest.raises(ValueError, match="LlamaForCausalLM is no MoSA model.*torch.save"):
            call()
    model._tp_size = 2
    with pytest.raises(ValueError, match="tensor-parallel.*without `tp_plan`"):
        save_cache(cache, path, model)
    assert not path.exists()


# --- what cannot be written ---


def test_caches_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    cache = filled(model)
    lost = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(ValueError, match="lost what they selected"):
        save_cache(lost, path, model)
    with pytest.raises(ValueError, match="whose groups differ|have not seen"):
        save_cache(cache, path, sparse_form(**ONE_WINDOW).model())
    cache.offloading = True
    with pytest.raises(ValueError, match="offloaded cache cannot be written.*`DynamicCache`"):
        save_cache(cache, path, model)

    if hasattr(cache_utils, "Fp8QuantizedLayer"):  # older versions quantise by packages that are not here
        dense_first = sparse_form(mosa_plan=[[None, None, {"window": 5, "sparsity": 4}]] * 3).model()
        quantised = QuantizedCache("fp8", config=dense_first.config)
        fed(dense_first, quantised, 0, READ)
        with pytest.raises(ValueError, match="Layer 0 is a Fp8QuantizedLayer.*`DynamicCache`.*torch.save"):
            save_cache(quantised, path, dense_first)

    sliding = native_form(sliding_window=6).model()
    static = StaticCache(config=sliding.config, max_cache_len=40)
    fed(sliding, static, 0, READ)
    with pytest.raises(ValueError, match="all have a sliding window.*`DynamicCache`"):
        save_cache(static, path, sliding)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    cache = filled(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model.layers[1].self_attn.o_proj, "forward", interrupted)
        fed(model, cache, READ, 23)
    with pytest.raises(ValueError, match="failed half-way"):
        save_cache(cache, path, model)
    assert not path.exists()


# --- files that are damaged ---


@pytest.fixture
def written(tmp_path):
    model, path = FORMS["sparse"].model(), tmp_path / "cache.safetensors"
    save_cache(after_single_tokens(model), path, model)
    return model, path


def test_damaged_files_are_refused(written, tmp_path):
    model, path = written
    content = path.read_bytes()
    for length in (0, 4, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cache.safetensors is damaged or truncated.*write it again"):
            load_cache(path, model)
    for place in (len(content) - 7, len(content) * 3 // 4):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="cache.safetensors is damaged .its checksum"):
            load_cache(path, model)
    with pytest.raises(FileNotFoundError, match="no file .*other.safetensors: `mosa_hf.save_cache` writes one"):
        load_cache(tmp_path / "other.safetensors", model)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a file that `mosa_hf.save_cache` wrote"):
        load_cache(path, model)


def rewritten(path, change) -> None:
    """The file with other states, and a checksum that fits."""
    tensors, about = load_file(path), json.loads(metadata_of(path)["mosa_cache"])
    change(tensors, about)
    text = json.dumps(about)
    save_file(tensors, path, metadata={"mosa_cache": text, "checksum": checksum(text, tensors)})


STORE = "layers.1.stores.0."


def put(name, states):
    return lambda tensors, about: tensors.update({name: states})


def drop(name):
    return lambda tensors, about: tensors.pop(name)


CHANGED = {
    "version": (lambda tensors, about: about.update(version=1), "version 1 of the format.*reads version 2"),
    "missing": (drop(STORE + "entries.value"), "not the states of such a cache: 'value'"),
    "missing keys": (drop("layers.0.keys"), "does not hold.*keys"),
    "unknown": (put(STORE + "other", torch.ones(2)), "states that no cache has.*other"),
    "of no layer": (put("layers.7.keys", torch.ones(2)), "states of no layer.*layers.7"),
    "fewer layers": (lambda tensors, about: about["layers"].pop(), "does not hold what this model's cache does"),
    "kind": (lambda tensors, about: about["layers"][0].update(kind="StaticLayer"), "cannot hold the states of a Stat"),
    "entries": (put(STORE + "entries.key", torch.ones(3, 8)), "entries and one more of each state"),
    "run": (lambda tensors, about: tensors[STORE + "memory.length"].fill_(1000), "a range goes beyond its memory"),
    "rows": (put(STORE + "calls.num_stored", torch.ones(3)), "such a cache|rows differ"),
    "lengths": (put("layers.0.keys", torch.ones(2, 3, 7, 8)), "different numbers of tokens"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_states_that_no_cache_has_are_refused(written, name):
    model, path = written
    change, message = CHANGED[name]
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"cache.safetensors .*{message}"):
        load_cache(path, model)


@pytest.mark.parametrize("way", ["offloaded", "quantised"])
@torch.no_grad()
def test_weights_that_are_elsewhere_or_of_another_class_are_told_apart(way, tmp_path):
    def loaded(folder: str) -> PreTrainedModel:
        quantised = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())} if way == "quantised" else {}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **quantised).eval()
        return model if quantised else cpu_offload(model, torch.device("cpu"))

    model = sparse_form(**ONE_WINDOW).model()
    model.save_pretrained(tmp_path / "one")
    model.model.layers[1].self_attn.v_proj.weight.add_(0.1 * torch.randn(()))
    model.save_pretrained(tmp_path / "other")
    one, same, other = (loaded(folder) for folder in ("one", "one", "other"))
    cache = DynamicCache(config=one.config)
    one(IDS[:, :READ], past_key_values=cache)
    save_cache(cache, tmp_path / "cache.safetensors", one)
    again = load_cache(tmp_path / "cache.safetensors", same)
    found = same(IDS[:, READ:], past_key_values=again).logits
    torch.testing.assert_close(found, one(IDS, use_cache=False).logits[:, READ:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="of a model of other weights"):
        load_cache(tmp_path / "cache.safetensors", other)
    if way == "offloaded":
        load_cache(tmp_path / "cache.safetensors", AutoModelForCausalLM.from_pretrained(tmp_path / "one"))
