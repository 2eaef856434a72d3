"""Models spread by Accelerate over what a machine without a GPU has: its memory and its disk."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from mosa_hf import ConversionConfig, convert_model, to_dense
from testing.tiny import random_tokens

TOKENS = random_tokens(2, 24)
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
HALF_ON_DISK = {
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    **dict.fromkeys(PARTS, "cpu"),
}


def computed(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what is generated on a cache."""
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
    return logits, model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)


def check_same(model: PreTrainedModel, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tokens = computed(model)
    assert torch.equal(logits, expected[0])
    assert torch.equal(tokens, expected[1])


def num_on_meta(model: PreTrainedModel) -> int:
    return sum(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", HALF_ON_DISK], ids=["cpu", "auto", "disk"])
def test_device_map(device_map, folders, tmp_path):
    for folder in folders:
        expected = computed(AutoModelForCausalLM.from_pretrained(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
        assert (num_on_meta(model) > 0) == (device_map is HALF_ON_DISK)
        check_same(model, expected)


@pytest.mark.parametrize("offload", ["memory", "disk", "dispatch"])
def test_offloading_a_model_in_memory(offload, folders, tmp_path):
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = computed(model)
        directory = tmp_path / folder.name
        if offload == "memory":
            cpu_offload(model, execution_device=torch.device("cpu"))
        elif offload == "disk":
            disk_offload(model, directory, execution_device=torch.device("cpu"))
        else:
            model = dispatch_model(model, HALF_ON_DISK, main_device="cpu", offload_dir=directory)
        assert num_on_meta(model) > 0
        check_same(model, expected)


def test_saving_and_converting_what_is_on_disk(folders, tmp_path):
    """A model half on disk is saved whole; so is what becomes of it."""
    options = {"device_map": HALF_ON_DISK, "offload_folder": tmp_path / "offloaded"}
    for folder in folders:
        expected = computed(AutoModelForCausalLM.from_pretrained(folder))
        AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(tmp_path / folder.name)
        check_same(AutoModelForCausalLM.from_pretrained(tmp_path / folder.name), expected)
    original = AutoModelForCausalLM.from_pretrained(folders.original, **options)
    converted = convert_model(original, ConversionConfig(sparsity=4, window=8), TOKENS)
    assert num_on_meta(converted) > 0
    in_memory = convert_model(
        AutoModelForCausalLM.from_pretrained(folders.original), ConversionConfig(sparsity=4, window=8), TOKENS
    )
    check_same(converted, computed(in_memory))
    check_same(to_dense(converted), computed(AutoModelForCausalLM.from_pretrained(folders.original)))
