"""Which files are checked when a model is loaded: those that the stock model loads too, and no others."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mosa_hf import MosaLlamaForCausalLM
from testing.json_files import edit_json
from testing.tiny import random_tokens, tiny_base, with_random_routers

from ..conftest import native_form

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENS = random_tokens(2, 30) % 97
KINDS = ("stock", "sparse", "native")


def tiny(kind: str):
    if kind == "native":
        return native_form().model()
    base = tiny_base()
    return base if kind == "stock" else with_random_routers(base, mosa_window=4)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200] if path.is_file() else b"stale")
    return path.name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def save_pickles(model, folder: Path) -> None:
    """In two files and an index."""
    model.config.save_pretrained(folder)
    tensors = list(model.state_dict().items())
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        torch.save(dict(part), folder / f"part{number}.bin")
        weight_map |= dict.fromkeys(dict(part), f"part{number}.bin")
    (folder / PICKLE_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# How a model is laid out below a folder: what is stale or odd there does not matter to the stock model. What follows
# are the arguments of `from_pretrained`; the first is the folder by default.


def subfolder(model, folder):
    model.save_pretrained(folder / "sub")
    truncate(folder / SAFE)
    return {"subfolder": "sub"}


def variant(model, folder):
    model.save_pretrained(folder, variant="fp32")
    truncate(folder / SAFE)
    return {"variant": "fp32"}


def sharded_variant(model, folder):
    model.save_pretrained(folder, variant="fp32", max_shard_size="40kB")
    (folder / SAFE_INDEX).write_text("{")
    return {"variant": "fp32"}


def pickle_beside_stale_safetensors(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / PICKLE)
    truncate(folder / SAFE)
    return {"use_safetensors": False}


def pickles_beside_an_incomplete_index(model, folder):
    save_pickles(model, folder)
    (folder / SAFE_INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    return {"use_safetensors": False}


def one_file_beside_a_stale_index(model, folder):
    model.save_pretrained(folder)
    (folder / SAFE_INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    return {}


def a_tensor_in_two_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="40kB")
    first, second = shards(folder)[:2]
    tensors = load_file(first)
    save_file(load_file(second) | {min(tensors): tensors[min(tensors)]}, second, metadata={"format": "pt"})
    return {}


def a_tensor_that_the_index_lacks(model, folder):
    model.save_pretrained(folder, max_shard_size="40kB")
    edit_json(folder / SAFE_INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    return {}


def a_tensor_that_nothing_needs(model, folder):
    model.save_pretrained(folder, max_shard_size="40kB")
    path = shards(folder)[0]
    save_file(load_file(path) | {"v_head.summary.weight": torch.ones(1)}, path, metadata={"format": "pt"})
    return {}


def an_index_that_names_another_shard(model, folder):
    model.save_pretrained(folder, max_shard_size="40kB")
    name = shards(folder)[0].name
    edit_json(folder / SAFE_INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    return {}


def links(model, folder):
    model.save_pretrained(folder / "blobs", max_shard_size="40kB")
    (folder / "snapshot").mkdir()
    for file in (folder / "blobs").iterdir():
        (folder / "snapshot" / file.name).symlink_to(file)
    return {"source": folder / "snapshot"}


def a_name_of_the_hub(model, folder):
    """Files of which are in the cache."""
    commit = "0" * 40
    model.save_pretrained(folder / "models--some--model" / "snapshots" / commit, max_shard_size="40kB")
    (folder / "models--some--model" / "refs").mkdir()
    (folder / "models--some--model" / "refs" / "main").write_text(commit)
    return {"source": "some/model", "cache_dir": folder, "local_files_only": True}


def weights_that_the_config_names(model, folder):
    model.save_pretrained(folder)
    (folder / SAFE).rename(folder / "mine.safetensors")
    truncate(folder / SAFE)
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights="mine.safetensors"))
    return {}


def config_elsewhere(model, folder):
    model.save_pretrained(folder)
    (folder / "config").mkdir()
    (folder / "config.json").rename(folder / "config" / "config.json")
    return {"config": folder / "config"}


def tensors_in_memory(model, folder):
    model.config.save_pretrained(folder)
    truncate(folder / SAFE)
    return {"source": None, "config": model.config, "state_dict": dict(model.state_dict())}


LAYOUTS = [
    subfolder,
    variant,
    sharded_variant,
    pickle_beside_stale_safetensors,
    pickles_beside_an_incomplete_index,
    one_file_beside_a_stale_index,
    a_tensor_in_two_shards,
    a_tensor_that_the_index_lacks,
    a_tensor_that_nothing_needs,
    an_index_that_names_another_shard,
    links,
    a_name_of_the_hub,
    weights_that_the_config_names,
    config_elsewhere,
    tensors_in_memory,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_stock_model_loads(kind, layout, tmp_path):
    model = tiny(kind)
    options = layout(model, tmp_path)
    loaded = type(model).from_pretrained(options.pop("source", tmp_path), **options)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_an_adapter_on_a_model(tmp_path):
    """In a folder of its own, which names the model, and in the model's."""
    for model in (tiny("stock"), tiny("sparse")):
        folder, kind = tmp_path / type(model).__name__, type(model)
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
        expected = logits_of(adapted)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / "adapter")
        truncate(folder / "adapter" / SAFE)  # which nobody loads
        assert torch.equal(logits_of(kind.from_pretrained(folder / "adapter")), expected)
        for file in (folder / "adapter").glob("adapter*"):
            file.rename(folder / "base" / file.name)
        assert torch.equal(logits_of(kind.from_pretrained(folder / "base")), expected)
        truncate(folder / "base" / "adapter_model.safetensors")
        if kind is MosaLlamaForCausalLM:
            with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or truncated"):
                kind.from_pretrained(folder / "base")


def hub_shard(folder: Path) -> Path:
    return next(folder.glob("models--*/snapshots/*/model-00002-*"))


# Damage to a file that is loaded, by the layout that loads it; the error names the file that this returns.
DAMAGES = {
    "truncated": (one_file_beside_a_stale_index, lambda folder: truncate(folder / SAFE)),
    "subfolder": (subfolder, lambda folder: truncate(folder / "sub" / SAFE)),
    "variant": (variant, lambda folder: truncate(folder / "model.fp32.safetensors")),
    "last shard": (a_tensor_that_the_index_lacks, lambda folder: truncate(shards(folder)[-1])),
    "shard of the Hub": (a_name_of_the_hub, lambda folder: truncate(hub_shard(folder))),
    "pickle": (pickle_beside_stale_safetensors, lambda folder: truncate(folder / PICKLE)),
    "second pickle": (pickles_beside_an_incomplete_index, lambda folder: truncate(folder / "part1.bin")),
    "named by the config": (weights_that_the_config_names, lambda folder: truncate(folder / "mine.safetensors")),
    "index": (a_tensor_in_two_shards, lambda folder: truncate(folder / SAFE_INDEX)),
    "index of a variant": (sharded_variant, lambda folder: truncate(folder / "model.safetensors.index.fp32.json")),
    "index of pickles": (pickles_beside_an_incomplete_index, lambda folder: truncate(folder / PICKLE_INDEX)),
}


@pytest.mark.parametrize("knows_dtype", [True, False], ids=["", "dtype from the first file"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(damage, knows_dtype, tmp_path):
    layout, spoil = DAMAGES[damage]
    options = layout(tiny("sparse"), tmp_path)
    if not knows_dtype:
        config = next(tmp_path.rglob("config.json"))
        edit_json(config, lambda content: content.pop("dtype", None))
    named = spoil(tmp_path)
    with pytest.raises(ValueError, match="copy or download it again") as caught:
        MosaLlamaForCausalLM.from_pretrained(options.pop("source", tmp_path), **options)
    assert named in str(caught.value)


@pytest.mark.parametrize("layout", [links, pickles_beside_an_incomplete_index], ids=lambda layout: layout.__name__)
def test_missing_files_are_named(layout, tmp_path):
    options = layout(tiny("sparse"), tmp_path)
    source = options.pop("source", tmp_path)
    file = next(file for pattern in ("model-00002-*", "part1.bin") for file in source.glob(pattern))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the weight file {file.name}: copy or download it again"):
        MosaLlamaForCausalLM.from_pretrained(source, **options)


def test_no_weights_at_all(tmp_path):
    """In the words of the stock model."""
    tiny("sparse").config.save_pretrained(tmp_path)
    tiny("stock").config.save_pretrained(tmp_path / "stock")
    texts = []
    for kind, folder in ((MosaLlamaForCausalLM, tmp_path), (LlamaForCausalLM, tmp_path / "stock")):
        with pytest.raises(OSError, match="no file named model.safetensors") as caught:
            kind.from_pretrained(folder)
        texts.append(str(caught.value).replace(str(folder), ""))
    assert texts[0] == texts[1]
