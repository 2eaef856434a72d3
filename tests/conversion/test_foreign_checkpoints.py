"""Checkpoints with something around the model, or without its head: converted as upstream loads them, or an error."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mosa_hf import ConversionConfig, convert_checkpoint, save_routers, to_dense
from mosa_hf.modeling.family import family_of
from testing.decoders import tiny_decoder
from testing.tiny import random_tokens, tiny_base

EVERYTHING = ConversionConfig(sparsity=1)
TOKENS = random_tokens(2, 24)


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model(TOKENS, use_cache=False)[0]


def edit_names(folder: Path, rename) -> None:
    """Rename the tensors of a folder; those whose new name is None are left out."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def add(folder: Path, name: str, *shape: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(shape)}, folder / "model.safetensors", metadata={"format": "pt"})


WRAPPERS = {
    "_orig_mod.": "a model that `torch.compile` wraps: save what it wraps, `model._orig_mod`",
    "module.": "a model that DDP, DataParallel or DeepSpeed wraps: save what it wraps, `model.module`",
    "module._orig_mod.": "a model that `torch.compile` wraps",
    "_fsdp_wrapped_module.": "a model that FSDP wraps: save the model itself, with its state dict gathered",
    "base_model.model.": "a PEFT model: save `model.merge_and_unload()`",
    "language_model.": "a model of pictures and text: load it with its own class",
    "model.language_model.": "a model of pictures and text",
}


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_wrappers_are_named(prefix, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    edit_names(tmp_path / "base", lambda name: prefix + name)
    with pytest.raises(ValueError, match=f"model.safetensors has {prefix}.*{re.escape(WRAPPERS[prefix])}") as caught:
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    assert "different models" not in str(caught.value) and not (tmp_path / "converted").exists()


@pytest.mark.parametrize("within", ["model.layers.{i}._fsdp_wrapped_module.", "model.layers.{i}._orig_mod."])
def test_wrapped_layers_are_named(within, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")

    def rename(name):
        parts = name.split(".")
        return within.format(i=parts[2]) + ".".join(parts[3:]) if parts[1] == "layers" else name

    edit_names(tmp_path / "base", rename)
    with pytest.raises(ValueError, match="a model that .* wraps"):
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)


HEADS = {
    "v_head.summary.weight": "a value head, as TRL's .*: load the folder as `AutoModelForCausalLM`",
    "value_head.weight": "a value head",
    "score.weight": "a head that `architectures` in the config does not name: set `architectures`",
    "classifier.weight": "a head that `architectures`",
    "model.layers.0.self_attn.new.weight": "does not ask for. Weights and config belong to different models",
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_are_named(name, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    add(tmp_path / "base", name, 1, 32)
    with pytest.raises(ValueError, match=f"has {name}.*{HEADS[name]}"):
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)


@pytest.mark.parametrize("model_type, name", [("qwen3_next", "mtp.fc.weight"), ("gpt2", "transformer.h.0.attn.bias")])
def test_what_transformers_leaves_aside_stays_in_the_files(model_type, name, tmp_path):
    """Such as what predicts several tokens, which `generate(use_mtp=True)` reads."""
    base = tiny_decoder(model_type)
    base.save_pretrained(tmp_path / "base")
    add(tmp_path / "base", name, 1, 32)
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert torch.equal(outputs(loaded), outputs(base.eval()))
    assert name in json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())["weight_map"]


def test_the_remedy_for_a_value_head(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    add(tmp_path / "base", "v_head.summary.weight", 1, 32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "again")
    convert_checkpoint(tmp_path / "again", tmp_path / "converted", EVERYTHING)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert torch.equal(outputs(loaded), outputs(base))


def test_adapters_are_named(tmp_path):
    """Alone, and in the folder of their base: the stock model would load both, and the conversion one of them."""
    adapted = get_peft_model(tiny_base(), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_base().save_pretrained(tmp_path / "both")
    adapted.save_pretrained(tmp_path / "both")
    for folder in ("adapter", "both"):
        with pytest.raises(ValueError, match=f"{folder} has an adapter of PEFT .*Merge it first"):
            convert_checkpoint(tmp_path / folder, tmp_path / "converted", EVERYTHING)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("architectures", [None, ["CausalLM"]], ids=["none named", "causal LM named"])
def test_a_decoder_alone_with_tied_embeddings(architectures, family, tmp_path):
    """Its names have no prefix, and upstream adds it."""
    row, base = family_of(family), tiny_base(family, tie_word_embeddings=True)
    base.base_model.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=architectures and [row.base_head_classes["ForCausalLM"].__name__])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(outputs(stock), outputs(base))
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", ConversionConfig(sparsity=4, window=8), TOKENS)
    converted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(outputs(to_dense(converted)), outputs(base))
    save_routers(converted, tmp_path / "routers")
    again = type(converted).from_pretrained(tmp_path / "base", routers=tmp_path / "routers")
    assert torch.equal(outputs(again), outputs(converted))


def test_a_decoder_alone_without_its_head(tmp_path):
    """The stock model makes a new head, at random; with the decoder's class named there is none."""
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="holds a decoder alone, without lm_head.weight, .*name the decoder's class"):
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    edit_config(tmp_path / "base", architectures=["LlamaModel"])
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    loaded = family_of("llama").model_class.from_pretrained(tmp_path / "converted")
    assert torch.equal(outputs(loaded), outputs(base.model))


def test_a_decoder_with_the_names_of_a_head(tmp_path):
    """The config names the decoder's class; upstream takes the prefix away."""
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=["LlamaModel"])
    with pytest.raises(ValueError, match="has lm_head.weight, .*a head that `architectures` in the config"):
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    edit_names(tmp_path / "base", lambda name: None if name.startswith("lm_head") else name)
    convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
    loaded = family_of("llama").model_class.from_pretrained(tmp_path / "converted")
    assert torch.equal(outputs(loaded), outputs(base.model))


def test_names_with_and_without_their_prefix(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    add(tmp_path / "base", "norm.weight", 32)
    with pytest.raises(ValueError, match="norm.weight, which is there with and without its prefix"):
        convert_checkpoint(tmp_path / "base", tmp_path / "converted", EVERYTHING)
