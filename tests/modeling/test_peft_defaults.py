"""PEFT's methods as they are by default, without `target_modules`: what works on the stock model works converted."""

import copy
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from transformers import PreTrainedModel

import mosa_hf
from mosa_hf import MosaConfig, save_routers
from mosa_hf.modeling.family import family_of
from testing.decoders import tiny_decoder
from testing.tiny import FAMILIES, random_tokens, tiny_base, with_random_routers

from ..conftest import MIXED_LAYERS, tiny_model

IDS = random_tokens(2, 20) % 97  # the native model's vocabulary
# What a method cannot do without on a tiny model. Methods that are not here take their defaults.
FIELDS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "POLY": {"n_tasks": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 10},
}
PROMPTS = {"PROMPT_TUNING": {}, "P_TUNING": {}, "MULTITASK_PROMPT_TUNING": {"num_tasks": 2}}
PREFIXES = {"PREFIX_TUNING": {}, "CARTRIDGE": {}}
FIELDS |= {name: {"num_virtual_tokens": 4, **fields} for name, fields in {**PROMPTS, **PREFIXES}.items()}
# One needs scikit-learn, one adapters on disk, one examples in its configuration; one has copies of the whole model.
LEFT_OUT = {"ADAMSS", "XLORA", "CPT", "SHADOW"}
METHODS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in LEFT_OUT)


def sparse(family: str, **fields) -> PreTrainedModel:
    fields = {"mosa_sparsity": 4, "mosa_window": 3, "mosa_gate_slope": 0.0, **fields}
    return with_random_routers(tiny_base(family), **fields)


def adapt(model: PreTrainedModel, method: str, **fields) -> PeftModel:
    torch.manual_seed(0)
    fields = {"task_type": "CAUSAL_LM", **FIELDS.get(method, {}), **fields}
    return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[method](**fields))


def step(model: PeftModel, method: str) -> None:
    """One of training, that reaches every parameter which wants it."""
    tasks = {"task_ids": torch.tensor([0, 1])} if method in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()(input_ids=IDS, labels=IDS, use_cache=False, **tasks).loss.backward()
    assert trained and all(parameter.grad is not None for parameter in trained)
    before = [parameter.clone() for parameter in trained]
    optimizer.step()
    assert not all(map(torch.equal, before, trained))
    model.eval()


def trained_names(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in PREFIXES])
def test_every_method_adapts_what_it_adapts_in_the_original(method):
    original, converted = adapt(tiny_base(), method), adapt(sparse("llama"), method)
    assert trained_names(converted) == trained_names(original)
    step(original, method)
    step(converted, method)


def tables() -> list[dict]:
    """Whatever dictionary of PEFT has an entry for a type of model that has a MoSA type."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "peft"]
    found = {id(each): each for module in modules for each in vars(module).values() if isinstance(each, dict)}
    tuners = [getattr(each, "target_module_mapping", None) for each in peft.PEFT_TYPE_TO_TUNER_MAPPING.values()]
    found |= {id(each): each for each in tuners if each}
    return [each for each in found.values() if each.keys() & {"llama", "gpt_neox", "gemma3_text", "qwen3_moe"}]


def test_every_table_knows_every_type():
    assert len(tables()) > 35
    for table in tables():
        for family in map(family_of, FAMILIES):
            if family.name in table:
                assert table[family.config_class.model_type] == table[family.name]
        # Neither attention modules, which adaption prompts wrap, nor experts are like Llama's in the native model.
        is_of_modules = "llama" not in table or hasattr(table["llama"], "k_proj_layer")
        assert is_of_modules or table[MosaConfig.model_type] == table["llama"]
    before = [dict(table) for table in tables()]
    mosa_hf.registration.register()
    assert tables() == before


@pytest.mark.parametrize("method", ["IA3", "LN_TUNING", "ADALORA", "OFT", "VERA"])
@pytest.mark.parametrize("name", ["native", "gpt_neox", "gemma2"])
def test_other_types(name, method):
    """IA3 tells feed-forward layers apart; of one type no norms are known, and of none the paper's heads."""
    original = tiny_base("llama" if name == "native" else name)
    model = tiny_model(**MIXED_LAYERS) if name == "native" else sparse(name)
    try:
        names = trained_names(adapt(original, method))
    except ValueError as error:
        with pytest.raises(ValueError, match="specify `target_modules`"):
            adapt(model, method)
        assert (name, method) == ("gpt_neox", "LN_TUNING"), error
        return
    adapted = adapt(model, method)
    if name == "native":  # of which the second layer has no dense heads
        names = {each for each in names if "layers.1.self_attn" not in each}
    assert trained_names(adapted) == names
    step(adapted, method)


@pytest.mark.parametrize("method", ["IA3", "VERA", "LOKR", "ADAPTION_PROMPT", "PROMPT_TUNING"])
def test_saved_adapters_load(method, tmp_path):
    model = adapt(sparse("llama"), method)
    step(model, method)
    # With a cache, PEFT puts its prompt before every new token in Transformers 5.24: before those of the original too.
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": method != "PROMPT_TUNING"}
    tokens = model.generate(input_ids=IDS, **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse("llama"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(loaded.generate(input_ids=IDS, **{**options, "use_cache": False}), tokens)


def test_adapters_of_single_experts_are_put_into_the_tensor_of_all(tmp_path):
    """As Transformers 4 had them, module by module."""
    base = tiny_decoder("mixtral")
    size, inner = base.config.hidden_size, base.config.intermediate_size
    torch.manual_seed(0)
    state = {
        f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora_{letter}.weight": (
            0.3 * torch.randn(*((4, num_in) if letter == "A" else (num_out, 4)))
        )
        for layer in range(base.config.num_hidden_layers)
        for expert in range(base.config.num_local_experts)
        for name, num_in, num_out in [("w1", size, inner), ("w2", inner, size), ("w3", size, inner)]
        for letter in "AB"
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=4, lora_alpha=4, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    converted = with_random_routers(base, mosa_sparsity=1, mosa_window=3)
    stock = base(IDS).logits
    expected = PeftModel.from_pretrained(base, tmp_path)(IDS).logits
    assert not torch.allclose(expected, stock, atol=1e-2)
    torch.testing.assert_close(
        PeftModel.from_pretrained(converted, tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_are_adapted_as_in_the_original(family, targets):
    base = tiny_decoder(family)
    converted = with_random_routers(base, mosa_sparsity=4, mosa_window=3)
    names = [trained_names(adapt(model, "LORA", target_modules=targets)) for model in (copy.deepcopy(base), converted)]
    assert names[0] == names[1] and any("experts" in name for name in names[0])


def test_an_adaption_prompt_leaves_routers_their_names(tmp_path):
    """It wraps attention modules, within which they lie."""
    model = sparse("mistral")
    names = list(model.state_dict())
    adapted = adapt(model, "ADAPTION_PROMPT")
    assert list(adapted.get_base_model().mosa_routers()) == [0, 1, 2]
    save_routers(adapted, tmp_path / "routers")
    assert mosa_hf.load_routers(tiny_base("mistral"), tmp_path / "routers").state_dict().keys() == set(names)


@pytest.mark.parametrize("name", ["sparse", "native"])
@pytest.mark.parametrize("method", PREFIXES)
def test_learned_caches_are_refused_by_name(method, name):
    """Their keys are of no token that a router has looked at."""
    step(adapt(tiny_base(), method), method)
    model = adapt(sparse("llama") if name == "sparse" else tiny_model(), method)
    for call in (model.train(), model.eval(), model.generate):
        with pytest.raises(ValueError, match="prefix tuning and cartridges .*`PromptTuningConfig`"):
            call(input_ids=IDS)


def test_adaption_prompts_of_the_native_model_are_refused():
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'mosa'"):
        adapt(tiny_model(), "ADAPTION_PROMPT")
