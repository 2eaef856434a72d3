"""Routers of a saved model are all there when it is loaded, from wherever that is; or there is an error."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mosa_hf import ConversionConfig, MosaForCausalLM, MosaLlamaForCausalLM, convert_model, save_routers
from mosa_hf.modeling.loading import router_tensors_of
from testing.tiny import EVERY_FAMILY, random_tokens, tiny_base, with_random_routers

from ..conftest import native_form

TOKENS = random_tokens(2, 30) % 97
MODELS = {
    "sparse": lambda: sparse_model(),
    "native": lambda: native_form().model(),
}


def sparse_model(family: str = "llama", head: str | None = "ForCausalLM", **fields):
    return with_random_routers(tiny_base(family, head), mosa_window=4, **fields)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(TOKENS, use_cache=False).logits


def first_router(model, kind: str = "weight") -> str:
    return next(name for name in router_tensors_of(model) if name.endswith(kind))


Damage = Callable[[dict[str, torch.Tensor], str], object]
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "missing": ("weight", lambda tensors, name: tensors.pop(name), "lacks {name}, and new routers select at random"),
    "missing threshold": ("threshold", lambda tensors, name: tensors.pop(name), "lacks {name}, and new routers"),
    "renamed": (
        "weight",
        lambda tensors, name: tensors.update({name.replace("router.", "gate."): tensors.pop(name)}),
        "lacks {name}, .* It has .*gate.weight, which the model has not: .*`key_mapping`",
    ),
    "int8": ("weight", lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "{name} has dtype"),
    "boolean threshold": (
        "threshold",
        lambda tensors, name: tensors.update({name: tensors[name] > 0}),
        "{name} has dtype",
    ),
    "not finite": ("weight", lambda tensors, name: tensors[name].view(-1)[3:4].fill_(torch.inf), "{name} has NaN or"),
    "NaN threshold": ("threshold", lambda tensors, name: tensors[name][:1].fill_(torch.nan), "{name} has NaN or"),
    "of another shape": (
        "weight",
        lambda tensors, name: tensors.update({name: tensors[name][:, 1:].clone()}),
        "{module}.* shape .*Load it with the fields that it was saved with",
    ),
    "a bias in vain": (
        "weight",
        lambda tensors, name: tensors.update({name.replace("weight", "bias"): torch.ones(len(tensors[name]))}),
        "without which its router selects other tokens",
    ),
}


def one_file(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {}


def two_files(tensors, folder):
    """The second has the tensors in the midst."""
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {}


def pickle(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")
    return {"use_safetensors": False}


def in_memory(tensors, folder):
    return {"source": None, "state_dict": tensors}


def on_disk_meanwhile(tensors, folder):
    """Layers offloaded to disk."""
    two_files(tensors, folder)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    return {"device_map": places | {"model.layers": "disk"}, "offload_folder": folder / "offload"}


SOURCES = [one_file, two_files, pickle, in_memory, on_disk_meanwhile]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
@pytest.mark.parametrize("form", MODELS)
def test_damaged_routers_are_refused(form, source, tmp_path):
    model = MODELS[form]()
    model.config.save_pretrained(tmp_path)
    for damage, (kind, spoil, message) in {None: ("weight", lambda *_: None, ""), **DAMAGES}.items():
        tensors, name = {key: tensor.clone() for key, tensor in model.state_dict().items()}, first_router(model, kind)
        spoil(tensors, name)
        options = {"config": model.config, "ignore_mismatched_sizes": True, **source(tensors, tmp_path)}
        where = options.pop("source", tmp_path)
        if damage is None:
            assert torch.equal(logits_of(type(model).from_pretrained(where, **options)), logits_of(model))
            continue
        with pytest.raises(ValueError, match=message.format(name=name, module=name.rpartition(".")[0])) as caught:
            type(model).from_pretrained(where, **options)
        assert str(tmp_path if where else "`state_dict`") in str(caught.value), damage


def test_other_shapes_are_refused_without_being_asked(tmp_path):
    """In our words, where upstream refuses too."""
    model = sparse_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mosa_router.threshold has shape .*`ignore_mismatched_sizes`"):
        MosaLlamaForCausalLM.from_pretrained(tmp_path, mosa_plan=[[None, {"window": 4, "sparsity": 8}]] * 3)


def test_a_base_model_has_none(tmp_path):
    """Instead of routers at random; with those that are asked for it loads."""
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    for model_class, remedy in ((MosaLlamaForCausalLM, "routers="), (MosaForCausalLM, "convert_to_native")):
        with pytest.raises(ValueError, match=f"base lacks .*and 5 more tensors of routers.*{remedy}.*from_config"):
            model_class.from_pretrained(tmp_path / "base")
    converted = convert_model(base, ConversionConfig(sparsity=1))
    save_routers(converted, tmp_path / "routers")
    loaded = MosaLlamaForCausalLM.from_pretrained(tmp_path / "base", routers=tmp_path / "routers")
    assert torch.equal(logits_of(loaded), logits_of(converted))
    torch.manual_seed(0)
    assert logits_of(AutoModelForCausalLM.from_config(converted.config)).isfinite().all()  # to train from scratch


@pytest.mark.parametrize("head", [None, "ForCausalLM", "ForSequenceClassification"])
def test_heads_may_be_new(head, tmp_path):
    """A head that is missing is the user's to train, as in the stock model; what is loaded is the same."""
    model = sparse_model(head=head)
    model.save_pretrained(tmp_path)
    expected = {name: tensor for name, tensor in router_tensors_of(model.base_model).items()}
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        loaded = router_tensors_of(auto.from_pretrained(tmp_path).base_model)
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_infinite_thresholds_select_everything(tmp_path):
    model = sparse_model()
    for router in model.mosa_routers().values():
        router.threshold.fill_(-torch.inf)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_fields_that_leave_out_a_routers_part(tmp_path):
    model = sparse_model(mosa_router_bias=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has .*mosa_router.bias, without which.*`mosa_router_bias`"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mosa_router_bias=False)
    plan = [[None] * 2, *[[{"window": 4, "sparsity": 8}] * 2] * 2]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, mosa_plan=plan)  # a layer's routers are not needed
    assert dense.mosa_routers().keys() == {1, 2}


@EVERY_FAMILY
def test_names_on_disk(family, tmp_path):
    """No renaming of a family's weights catches routers, whatever their parts."""
    model = sparse_model(family, mosa_router_bias=True, mosa_router_hidden_size=4)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert len(router_tensors_of(model)) >= 5 and router_tensors_of(model).keys() <= names


def test_a_familys_renaming_that_catches_routers(tmp_path, monkeypatch):
    """Upstream's patterns are regular expressions, whose dots match all: ".router." is in "mosa_router."."""
    before = get_checkpoint_conversion_mapping("mosa_llama")
    register_checkpoint_conversion_mapping(
        "mosa_llama", [WeightRenaming(".gate.weight", ".router.weight")], overwrite=True
    )
    try:
        sparse_model().save_pretrained(tmp_path)
        assert "model.layers.0.self_attn.mosa.gate.weight" in load_file(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="lacks .*mosa_router.weight .*It has .*, which the model has not"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        register_checkpoint_conversion_mapping("mosa_llama", before or [], overwrite=True)


def test_names_that_the_user_maps(tmp_path):
    """`key_mapping`: of the remedy in the error, and of quantised numbers that it makes routers."""
    model = sparse_model()
    model.config.save_pretrained(tmp_path)
    tensors = {name.replace("mosa_router", "old"): tensor for name, tensor in model.state_dict().items()}
    one_file(tensors, tmp_path)
    mapping = {"self_attn.old": "self_attn.mosa_router"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping=mapping)
    assert torch.equal(logits_of(loaded), logits_of(model))
    name = first_router(model).replace("mosa_router", "old")
    one_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path)
    with pytest.raises(ValueError, match=f"{name} has dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping=mapping)


@pytest.mark.parametrize("form", MODELS)
def test_numbers_of_16_bits_load(form, tmp_path):
    """A model saved in half precision, which `from_pretrained` makes float32 again."""
    model = MODELS[form]().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in router_tensors_of(loaded).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, router_tensors_of(model)[name].float())


def test_adapters_with_routers(tmp_path):
    """PEFT's files hold routers of their own, or none; both load."""
    model = sparse_model(mosa_gate_slope=1.0)
    model.save_pretrained(tmp_path / "base")
    for saved in (None, ["mosa_router"]):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, modules_to_save=saved)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        folder = tmp_path / f"adapter{bool(saved)}"
        adapted.save_pretrained(folder)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
        assert torch.equal(logits_of(again), logits_of(adapted))


def test_trainer_loads_the_best(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        learning_rate=0.1,
    )
    trainer = Trainer(model=sparse_model(), args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(Path(trainer.state.best_model_checkpoint))
    assert torch.allclose(logits_of(best), logits_of(trainer.model), atol=1e-5)
