"""PEFT's adapters on a tiny dense model and on the same one converted; routers trained beside them."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from mosa_hf import calibrate_thresholds, load_routers, save_routers, to_dense, trace_routing
from mosa_hf.modeling.router import MosaRouter
from testing.tiny import random_tokens, tiny_base

from ..cache.test_cache import propagating
from ..conftest import FORMS, Form
from .conftest import Folders, states_of

IDS = random_tokens(2, 48) % 97  # the native model's vocabulary
ROUTERS = {"modules_to_save": ["mosa_router"]}
# As docs/tools.md has it: LoRA on every projection, and routers trained in full.
ALL = {"target_modules": "all-linear", **ROUTERS}


def load(folder, **fields):
    return AutoModelForCausalLM.from_pretrained(folder, **fields)


def adapt(model, **fields) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **fields))


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def difference(model, logits: torch.Tensor) -> float:
    """Of a model's logits from others, as a share of the largest."""
    return float((logits_of(model) - logits).abs().max() / logits.abs().max())


def adapted_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_the_same_projections_are_adapted(targets, folders: Folders):
    original, converted = (adapt(load(folder), target_modules=targets) for folder in folders)
    assert adapted_modules(original) == adapted_modules(converted)
    assert len(adapted_modules(converted)) == 3 * (2 if targets is None else 7)
    assert {name for name, each in original.named_parameters() if each.requires_grad} == {
        name for name, each in converted.named_parameters() if each.requires_grad
    }
    assert sum(isinstance(module, MosaRouter) for module in converted.modules()) == 3  # as they were, and no copies


def test_a_router_is_adapted_if_it_is_named_only(folders: Folders):
    """`target_modules` cannot name one; `target_parameters` can."""
    with pytest.raises(ValueError, match="MosaRouter.*is not supported"):
        adapt(load(folders.converted), target_modules=["mosa_router"])
    model = load(folders.converted, mosa_gate_slope=1.0)
    model = adapt(model, target_modules=[], target_parameters=["mosa_router.weight"])
    assert adapted_modules(model) == {f"base_model.model.model.layers.{i}.self_attn.mosa_router" for i in range(3)}
    before = logits_of(model)
    train(model)
    after = logits_of(model)
    assert not torch.equal(before, after)
    with trace_routing(model) as selected:
        logits_of(model)
    merged = model.merge_and_unload()
    with trace_routing(merged) as again:
        assert difference(merged, after) < 1e-5
    assert all(torch.equal(selected[layer][0], again[layer][0]) for layer in selected)


@pytest.mark.parametrize("fields", [ROUTERS | {"target_modules": None}, ALL], ids=["routers", "all"])
def test_adapters_and_routers_in_one_configuration(fields, folders: Folders, tmp_path):
    """Both train; the base is untouched under them; saved, reloaded and merged they are the same model."""
    model = load(folders.converted, mosa_gate_slope=1.0)
    before, original = logits_of(model), states_of(model)
    adapted = adapt(model, **fields)
    assert torch.equal(logits_of(adapted), before)
    assert [type(module) for module in model.mosa_routers().values()] == [MosaRouter] * 3
    train(adapted)
    after = logits_of(adapted)
    assert (after - before).abs().max() > 1e-2
    for layer, router in model.mosa_routers().items():
        start = original[f"model.layers.{layer}.self_attn.mosa_router.weight"]
        assert router.weight.requires_grad and (router.weight - start).abs().max() > 1e-3

    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), before)
        kept = {name: router.weight for name, router in model.mosa_routers().items()}
        assert all(
            torch.equal(weight, original[f"model.layers.{layer}.self_attn.mosa_router.weight"])
            for layer, weight in kept.items()
        )
    assert torch.equal(logits_of(adapted), after)

    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(folders.converted), tmp_path / "adapter")
    assert torch.equal(logits_of(reloaded), after)
    prompt = IDS[:, :20]
    tokens = adapted.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(reloaded.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), tokens)

    save_routers(adapted, tmp_path / "routers")  # those in force, by their plain names
    merged = reloaded.merge_and_unload()
    assert difference(merged, after) < 1e-5
    assert merged.state_dict().keys() == original.keys()
    assert torch.equal(logits_of(load_routers(to_dense(merged), tmp_path / "routers")), logits_of(merged))
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(merged))


def test_what_reads_routers_reads_those_in_force(folders: Folders):
    model = adapt(load(folders.converted, mosa_gate_slope=1.0), **ALL)
    train(model)
    routers = model.get_base_model().mosa_routers()
    with trace_routing(model) as selected:
        logits_of(model)
        with model.disable_adapter():
            logits_of(model)
    assert all(len(calls) == 2 for calls in selected.values())
    assert any(not torch.equal(*calls) for calls in selected.values())
    before = {layer: router.threshold.clone() for layer, router in routers.items()}
    originals = states_of(load(folders.converted))
    calibrate_thresholds(model, [IDS])
    assert all(not torch.equal(router.threshold, before[layer]) for layer, router in routers.items())
    with model.disable_adapter():
        for layer, router in model.get_base_model().mosa_routers().items():
            assert torch.equal(router.threshold, originals[f"model.layers.{layer}.self_attn.mosa_router.threshold"])


def test_routers_that_no_gradient_reaches_stay_and_say_so(folders: Folders, caplog):
    model = adapt(load(folders.converted, mosa_threshold_momentum=0.5), **ALL)
    before = [states_of(router) for router in model.get_base_model().mosa_routers().values()]
    logging.Logger.warning_once.cache_clear()  # Transformers' own: other tests provoke the warning too
    with caplog.at_level(logging.WARNING), propagating("mosa_hf.modeling.sparse_groups"):
        train(model)
    assert "`from_pretrained(..., mosa_gate_slope=1.0)`" in caplog.text
    for state, router in zip(before, model.get_base_model().mosa_routers().values(), strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in router.state_dict().items())


def test_routers_of_a_base_can_be_trained_as_they_are_put_on_it(folders: Folders, tmp_path):
    model = load(folders.converted)
    save_routers(model, tmp_path / "routers")
    own = type(model).from_pretrained(folders.original, routers=tmp_path / "routers", mosa_gate_slope=1.0)
    assert own.config.mosa_gate_slope == 1.0
    assert all(router.weight.requires_grad for router in own.mosa_routers().values())
    assert torch.equal(logits_of(own), logits_of(model))
    assert not any(router.weight.requires_grad for router in model.mosa_routers().values())
    with pytest.raises(ValueError, match="`mosa_gate_slope` must be finite"):
        load_routers(tiny_base("llama", vocab_size=260), tmp_path / "routers", mosa_gate_slope=-1.0)


HEADS = ["mosa.q_proj", "mosa.k_proj", "mosa.v_proj", "mosa.o_proj"]
NATIVE = {
    "heads": {"target_parameters": HEADS},
    "router weights": {"target_parameters": ["router.weight"]},
    "routers": {"modules_to_save": ["router"]},
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_heads(name, tmp_path):
    """LoRA on the groups' 3-D projections, and routers, merge to 1e-5."""
    form: Form = FORMS["native"]
    fields = {"mosa_routing": "threshold", "mosa_threshold_momentum": 1.0, "mosa_router_aux_loss_coef": 0.1}
    model = form.model(**fields)
    before, names = logits_of(model), model.state_dict().keys()
    adapted = adapt(model, target_modules="all-linear", **NATIVE[name])
    assert torch.equal(logits_of(adapted), before)
    train(adapted)
    after = logits_of(adapted)
    assert difference(adapted, before) > 1e-2
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(form.model(**fields), tmp_path)
    assert torch.equal(logits_of(reloaded), after)
    merged = reloaded.merge_and_unload()
    assert merged.state_dict().keys() == names
    assert difference(merged, after) < 1e-5


def test_native_heads_and_whole_routers_do_not_combine():
    """PEFT saves no module within one that has LoRA on parameters, which the heads of a layer are."""
    with pytest.raises(ValueError, match="trying to target a module"):
        adapt(FORMS["native"].model(), target_parameters=HEADS, modules_to_save=["router"])
