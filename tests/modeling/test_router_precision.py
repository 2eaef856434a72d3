"""Routers keep float32 however a model comes to half precision: the same tokens are selected as of a loaded model."""

import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from mosa_hf.modeling.router import MosaRouter

from ..cache.test_cache import propagating
from ..conftest import FORMS, Form
from ..contract import random_ids

IDS = random_ids(2, 24)
HALF = torch.bfloat16


def make(form: Form, **fields) -> nn.Module:
    if form is FORMS["sparse"]:
        fields["mosa_router_hidden_size"] = 6
    model = form.model(mosa_router_bias=True, **fields)
    for router in routers_of(model):
        nn.init.normal_(router.bias)
    return model


def routers_of(model: nn.Module) -> list[MosaRouter]:
    return [module for module in model.modules() if isinstance(module, MosaRouter)]


def states_of(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for router in routers_of(model) for tensor in router.state_dict().values()]


def all_on_the_cpu(model: nn.Module, folder) -> nn.Module:
    return dispatch_model(model.to(HALF), {"": "cpu"}, force_hooks=True)


def evaluated_by_trainer(model: nn.Module, folder) -> nn.Module:
    arguments = TrainingArguments(folder, bf16_full_eval=True, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.evaluate()
    return trainer.model


WAYS = {
    "to": lambda model, folder: model.to(HALF),
    "to with a device": lambda model, folder: model.to("cpu", HALF),
    "bfloat16": lambda model, folder: model.bfloat16(),
    "type": lambda model, folder: model.type(HALF),
    "by way of float64": lambda model, folder: model.double().to(HALF),
    "dispatch_model": all_on_the_cpu,
    "cpu_offload": lambda model, folder: cpu_offload(model.to(HALF), torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model.to(HALF), folder, torch.device("cpu")),
    "bf16_full_eval": evaluated_by_trainer,
}


@pytest.mark.parametrize("way", WAYS)
def test_routers_are_those_that_a_loaded_model_has(form, way, tmp_path):
    model = make(form)
    before = [tensor.clone() for tensor in states_of(model)]
    model.save_pretrained(tmp_path / "saved")
    loaded = form.causal_lm_class.from_pretrained(tmp_path / "saved", dtype=HALF)
    loaded.base_model.rotary_emb.to(HALF)  # which upstream's models round, unless they are loaded
    model = WAYS[way](model, tmp_path / "offloaded")
    if "offload" not in way:  # whose weights are elsewhere until they are needed
        assert all(map(torch.equal, states_of(model), before))
        assert {parameter.dtype for name, parameter in model.named_parameters() if "router" not in name} == {HALF}
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, loaded.eval()(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_optimizers_keep_what_they_hold(dtype):
    """Parameters stay the same objects, their gradients as exact as they are; a float64 model has float64 routers."""
    router = routers_of(make(FORMS["sparse"]))[0]
    held, tensors = dict(router.named_parameters()), {key: each.clone() for key, each in router.state_dict().items()}
    for parameter in held.values():
        parameter.grad = torch.full_like(parameter, 1 / 3)
    gradients = {name: parameter.grad.clone() for name, parameter in held.items()}
    router.to(dtype)
    for name, parameter in router.named_parameters():
        assert parameter is held[name] and torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(each, tensors[key]) for key, each in router.state_dict().items())
    assert all(each.dtype == torch.float64 for each in router.double().state_dict().values())
    assert all(each.dtype == torch.float32 for each in router.to(dtype).state_dict().values())


def test_moves_still_move():
    router = routers_of(make(FORMS["sparse"]))[0]
    tensors = {key: each.clone() for key, each in router.state_dict().items()}
    router.share_memory()
    assert router.weight.is_shared() and router.threshold.is_shared()
    on_meta = make(FORMS["sparse"]).to("meta", HALF)
    assert {each.device.type for each in states_of(on_meta)} == {"meta"}
    assert {each.dtype for each in states_of(on_meta.to_empty(device="cpu"))} == {torch.float32}
    assert all(torch.equal(each, tensors[key]) for key, each in router.state_dict().items())


def test_saved_routers_of_adapters_keep_it_too():
    model = get_peft_model(
        make(FORMS["sparse"]), LoraConfig(target_modules="all-linear", modules_to_save=["mosa_router"])
    )
    before = [tensor.clone() for tensor in states_of(model)]
    assert len(before) == 2 * 2 * 5  # of two layers, the original and the one that learns
    assert all(map(torch.equal, states_of(model.half()), before))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, HALF])
def test_what_rounds_them_all_the_same_is_told(dtype, form, tmp_path, caplog):
    """Accelerate puts tensors into modules by itself, of the type that it is asked for."""
    make(form).save_pretrained(tmp_path)
    config = form.config(mosa_router_bias=True, **({"mosa_router_hidden_size": 6} if form is FORMS["sparse"] else {}))
    with init_empty_weights():
        model = form.causal_lm_class(config)
    model = load_checkpoint_and_dispatch(model, tmp_path, {"": "cpu"}, dtype=dtype)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING), propagating("mosa_hf.modeling.router"), torch.no_grad():
        model.eval()(IDS)
    assert ("Routers have been rounded to torch.bfloat16" in caplog.text) == (dtype is HALF)
