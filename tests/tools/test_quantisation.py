"""Quantised weights of a tiny dense model and of the same one converted: the same projections, and never a router."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mosa_hf import ConversionConfig, MosaLlamaForCausalLM, convert_checkpoint, convert_model, save_routers
from mosa_hf.modeling.router import MosaRouter
from testing.tiny import byte_tokenizer, random_tokens, tiny_base

from .conftest import TEXT, Folders

IDS = random_tokens(2, 40)
CONVERSION = ConversionConfig(sparsity=4, window=8)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Folders:
    """As `folders`, with matrices of whole blocks of 64, as 4 bits need them."""
    root = tmp_path_factory.mktemp("wide")
    model = tiny_base("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model.save_pretrained(root / "original")
    convert_model(model, CONVERSION, random_tokens(4, 64)).save_pretrained(root / "converted")
    return Folders(root / "original", root / "converted")


def torchao_int8() -> Any:
    pytest.importorskip("torchao", minversion="0.18")  # what 0.16 makes, Transformers does not save
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def quanto_int8() -> Any:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


def bitsandbytes(**fields) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**fields)


CONFIGS = {
    "torchao int8": torchao_int8,
    "quanto int8": quanto_int8,
    "bitsandbytes int8": partial(bitsandbytes, load_in_8bit=True),
    "bitsandbytes nf4": partial(
        bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}


def kinds(model) -> dict[str, tuple[type, type, torch.dtype]]:
    """Of every module with a weight: its class, and the class and dtype of the weight."""
    modules = ((name, module) for name, module in model.named_modules() if hasattr(module, "weight"))
    return {name: (type(each), type(each.weight.data), each.weight.dtype) for name, each in modules}


def check_touched(models: list, folders: Folders) -> None:
    """
    The quantised `models`, original and converted, differ from those of `folders` in the same projections, which are
    all of them; routers are what they are on disk.
    """
    touched = []
    for model, folder in zip(models, folders, strict=True):
        plain = kinds(AutoModelForCausalLM.from_pretrained(folder))
        touched.append({name for name, kind in kinds(model).items() if kind != plain[name]})
    assert touched[0] == touched[1]
    assert {name for name in touched[1] if name.startswith("model.")} == {
        f"model.layers.{layer}.{name}"
        for layer in range(3)
        for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }
    routers = models[1].mosa_routers()
    assert routers.keys() == {0, 1, 2}
    saved = AutoModelForCausalLM.from_pretrained(folders.converted).mosa_routers()
    for layer, router in routers.items():
        assert type(router) is MosaRouter and router.weight.dtype == torch.float32
        assert torch.equal(router.weight, saved[layer].weight)
        assert torch.equal(router.threshold, saved[layer].threshold)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def generate(model, **fields) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_at_loading(name, wide: Folders, tmp_path):
    """Quantised as loaded: what is touched, that it generates, and saves and loads where the original does."""
    models, works = [], []
    for folder in wide:
        exact = logits_of(AutoModelForCausalLM.from_pretrained(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name](), dtype=torch.float32)
        models.append(model)
        own = {"saved": True}
        try:
            model.save_pretrained(tmp_path / folder.name)
        except ValueError as error:
            own["saved"] = str(error)
        logits = logits_of(model)
        assert logits.isfinite().all() and not torch.equal(logits, exact)  # it is quantised
        own["cached"] = torch.equal(generate(model), generate(model, use_cache=False))
        if own["saved"] is True:
            reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder.name)
            own["reloaded"] = torch.equal(logits_of(reloaded), logits)
        works.append(own)
    check_touched(models, wide)
    assert works[0]["saved"] == works[1]["saved"]
    assert name != "quanto int8" or "is quantized with quanto and is not serializable" in works[0]["saved"]
    assert name == "quanto int8" or (works[0]["reloaded"] and works[1]["reloaded"])
    # bitsandbytes quantises the outliers among a call's activations another way, so calls of other tokens differ.
    assert name == "bitsandbytes int8" or (works[0]["cached"] and works[1]["cached"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_routers_put_on_a_quantised_base(name, wide: Folders, tmp_path):
    """It is the same model as the quantised conversion."""
    options = {"quantization_config": CONFIGS[name](), "dtype": torch.float32}
    save_routers(AutoModelForCausalLM.from_pretrained(wide.converted), tmp_path / "routers")
    model = MosaLlamaForCausalLM.from_pretrained(wide.original, routers=tmp_path / "routers", **options)
    whole = AutoModelForCausalLM.from_pretrained(wide.converted, **options)
    assert torch.equal(logits_of(model), logits_of(whole))
    assert torch.equal(generate(model), generate(whole))
    converted = convert_model(AutoModelForCausalLM.from_pretrained(wide.original, **options), CONVERSION, IDS)
    assert kinds(converted) == kinds(whole)
    assert logits_of(converted).isfinite().all()


def test_torchao_in_memory(wide: Folders):
    quantization = pytest.importorskip("torchao.quantization")
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in wide]
    for model in models:
        exact = logits_of(model)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert not torch.equal(logits_of(model), exact)
        assert torch.equal(generate(model), generate(model, use_cache=False))
    check_touched(models, wide)


def test_quanto_in_memory(wide: Folders, tmp_path):
    """Quantised, frozen, and brought back from a state dict and a map, as quanto's documentation does it."""
    quanto = pytest.importorskip("optimum.quanto")
    models = []
    for folder in wide:
        model = AutoModelForCausalLM.from_pretrained(folder)
        exact = logits_of(model)
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
        logits = logits_of(model)
        assert not torch.equal(logits, exact)
        assert torch.equal(generate(model), generate(model, use_cache=False))
        save_file(model.state_dict(), tmp_path / f"{folder.name}.safetensors")
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        quanto.requantize(fresh, load_file(tmp_path / f"{folder.name}.safetensors"), quanto.quantization_map(model))
        assert torch.equal(logits_of(fresh), logits)
        models.append(model)
    check_touched(models, wide)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_on_quantised_models(name, wide: Folders):
    """LoRA beside quantised projections, and on the converted model routers trained in full."""
    adapted = []
    for folder in wide:
        is_converted = folder == wide.converted
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=CONFIGS[name](),
            dtype=torch.float32,
            **({"mosa_gate_slope": 1.0} if is_converted else {}),
        )
        if name.startswith("bitsandbytes"):
            model = prepare_model_for_kbit_training(model)
        routers = {"modules_to_save": ["mosa_router"]} if is_converted else {}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **routers))
        adapted.append({key.split(".lora_")[0] for key, _ in model.named_parameters() if ".lora_" in key})
        trained = {key: each.clone() for key, each in model.named_parameters() if each.requires_grad}
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for _ in range(2):  # the first moves one of LoRA's two matrices only
            loss = model.train()(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = {
            key for key, each in model.named_parameters() if key in trained and not torch.equal(each, trained[key])
        }
        assert changed == trained.keys()
        assert sum("mosa_router" in key for key in changed) == (3 if is_converted else 0)
        with torch.no_grad():
            assert model.eval()(IDS, labels=IDS).loss < loss
    assert adapted[0] == adapted[1] and len(adapted[0]) == 3 * 7


# --- GGUF ---

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path) -> None:
    """A tiny Llama of 8-bit blocks, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    model = tiny_base("llama", intermediate_size=64, vocab_size=258, attention_bias=False)
    config, vocabulary = model.config, byte_tokenizer().get_vocab()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "th", "<eos>"])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    block = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        name, array = name.removesuffix(".weight"), tensor.numpy()
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            name = f"blk.{layer}.{GGUF_NAMES[part]}"
        else:
            name = GGUF_NAMES[name]
        if array.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array, block), raw_dtype=block)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    """A GGUF base with routers as it is loaded, in memory and on disk; neither saves while it is called quantised."""
    write_gguf(tmp_path / "base.gguf")
    options = {"gguf_file": "base.gguf", "dtype": torch.float32}
    original = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert generate(original).shape == (2, 48)
    convert_checkpoint(
        tmp_path / "base.gguf", tmp_path / "converted", CONVERSION, TEXT, num_windows=4, window_length=64
    )
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert (
        tokenizer(TEXT)["input_ids"]
        == AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")(TEXT)["input_ids"]
    )
    base = original.state_dict()
    assert all(torch.equal(tensor, converted.state_dict()[name]) for name, tensor in base.items())
    assert torch.equal(generate(converted), generate(converted, use_cache=False))

    save_routers(converted, tmp_path / "routers")
    on_the_fly = MosaLlamaForCausalLM.from_pretrained(tmp_path, routers=tmp_path / "routers", **options)
    assert torch.equal(logits_of(on_the_fly), logits_of(converted))
    assert torch.equal(generate(on_the_fly), generate(converted))
    for model in (original, on_the_fly):
        with pytest.raises(ValueError, match="(?i)quantized with .*gguf and is not serializable"):
            model.save_pretrained(tmp_path / "saved")
    converted.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits_of(converted))
