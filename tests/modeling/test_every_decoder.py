"""
Every decoder type of Transformers, tiny: it holds the contract of `testing.family_contract`, or is refused for a
reason that is right. By default a few whose kinds differ; `make families` tries all.
"""

import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mosa_hf
from mosa_hf import ConversionConfig, convert_model
from mosa_hf.modeling import families
from mosa_hf.modeling.families import CLASSES, class_named
from mosa_hf.modeling.family import FAMILIES, family_of
from testing.decoders import decoder_types, is_wrapper, tiny_decoder
from testing.families import findings_of
from testing.family_contract import difference, logits_of, tokens

# Layers without names of arguments (nemotron), a decoder within the base model (opt), other names for layers (gpt2),
# layers that share keys (gemma4), recurrent ones (falcon_h1, jamba, qwen3_next, lfm2), chunks (llama4), values of
# another size (mimo_v2_flash), another family's class (exaone), renamed weights (phimoe).
BY_DEFAULT = (
    "exaone falcon_h1 gemma4_text gpt2 jamba lfm2 llama4_text mimo_v2_flash nemotron opt phimoe qwen3_next".split()
)
QUICK = ("gpt2", "llama4_text", "nemotron", "opt")
# Types that are no decoder with causal softmax attention of its own through Transformers' interface, or do more in it
# than sparse groups know, by why.
REFUSED = {
    "encoder": "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert "
    "data2vec-text electra ernie marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart prophetnet "
    "rembert roberta roberta-prelayernorm roc_bert roformer whisper xlm-roberta xlm-roberta-xl xmod",
    "code of its own": "bloom cpmant falcon falcon_mamba gpt_neo gpt_neox_japanese mamba mamba2 mpt openai-gpt "
    "reformer rwkv trocr xglm xlm xlnet xlstm",
    "not of global attention": "axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4 qwen4_exp "
    "qwen4_exp_text recurrent_gemma",
    "has a sliding window": "moshi",
    "does not work with them": "inkling2_loop_text inkling2_text inkling_text mllama",
    "no layers with causal attention": "git",
    "twice": "diffllama",
    "mask of its own": "doge",
    "several times": "hrm_text",
    "side by side": "jetmoe",
    "cache of its own": "minimax",
    "one within the other": "blt",
    "share one attention module": "zamba zamba2",
}
REASONS = {model_type: reason for reason, types in REFUSED.items() for model_type in types.split()}


def of_type(model_type: str):
    of_default = () if model_type in QUICK else pytest.mark.slow
    return pytest.param(model_type, marks=of_default if model_type in BY_DEFAULT else pytest.mark.families)


@pytest.mark.parametrize("model_type", [of_type(each) for each in decoder_types()])
def test_type(model_type):
    found = findings_of(model_type)
    if is_wrapper(model_type):
        assert found.reason is not None
    elif model_type in REASONS:
        assert found.reason is not None and REASONS[model_type] in found.reason
    else:
        assert found.reason is None and not found.failed


@pytest.mark.parametrize("model_type", ["bert", "doge", "jetmoe", "mamba"])
def test_what_cannot_be_computed_is_refused(model_type):
    with pytest.raises(ValueError, match=f"{model_type!r} cannot have sparse groups: "):
        family_of(model_type)


@pytest.mark.parametrize("model_type", ["doge", "jetmoe"])
def test_a_comparison_finds_what_nobody_knew(model_type, monkeypatch):
    monkeypatch.setattr(families, "REFUSED", {})
    with pytest.raises(ValueError, match="cannot have sparse groups: (with every token selected|its attention does)"):
        convert_model(tiny_decoder(model_type), ConversionConfig(sparsity=1, window=4))
    del FAMILIES[model_type]


def test_an_attention_function_that_computes_something_else_is_found_each_time():
    """Whatever was converted before: two models may differ by nothing but the function that they call."""

    def biased(module, query, key, value, attention_mask, **options):
        mask = torch.ones(query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]) - 1
        near = torch.arange(key.shape[2]) * 0.5  # added to scores, which sparse groups do not know
        return sdpa_attention_forward(module, query, key, value, (mask * 1e9 + near)[None, None], **options)

    AttentionInterface.register("biased", biased)
    AttentionMaskInterface.register("biased", sdpa_mask)
    settings = ConversionConfig(sparsity=1, window=4)
    convert_model(tiny_decoder("llama"), settings)
    model = tiny_decoder("llama")
    model.set_attn_implementation("biased")
    with pytest.raises(ValueError, match="with every token selected, its hidden states differ"):
        convert_model(model, settings)


def test_names_that_are_none():
    for name in ("MosaNothingForCausalLM", "MosaBertModel", "MosaLlama", "Nothing"):
        assert not hasattr(mosa_hf, name)
    with pytest.raises(AttributeError, match="MosaBertModel.*encoder"):
        class_named("MosaBertModel")
    assert "mosa_nothing" not in CONFIG_MAPPING and "mosa" in CONFIG_MAPPING
    with pytest.raises(ValueError, match="mosa_nothing"):
        AutoConfig.for_model("mosa_nothing")


def test_threads_that_ask_at_once_get_one_family():
    for made in (FAMILIES, CLASSES):
        made.pop("helium", None), made.pop("MosaHeliumModel", None)
    make, barrier = FAMILIES.make, threading.Barrier(2)

    def slow(model_type: str):
        time.sleep(0.05)
        return make(model_type)

    def ask(_) -> Any:
        barrier.wait()
        return family_of("helium")

    with mock.patch.object(FAMILIES, "make", slow), ThreadPoolExecutor(2) as threads:
        one, other = threads.map(ask, range(2))
    assert one is other and one.model_class is CLASSES["MosaHeliumModel"]


def test_classes_are_made_when_they_are_asked_for():
    for made in (FAMILIES, CLASSES):
        made.pop("helium", None), made.pop("MosaHeliumModel", None)
    model_class = mosa_hf.MosaHeliumModel
    assert model_class is FAMILIES["helium"].model_class is transformers.MosaHeliumModel
    assert model_class.config_class.model_type == "mosa_helium" and "mosa_helium" in CONFIG_MAPPING


FRESH = """
import pickle, sys
import torch
{first}
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 27)[None]
expected = torch.load("expected.pt")
models = {{
    "saved": lambda: AutoModelForCausalLM.from_pretrained("saved", trust_remote_code={trust}),
    "pickled": lambda: pickle.load(open("model.pkl", "rb")),
}}
for name in {names}:
    assert torch.equal(models[name]().eval()(ids, use_cache=False).logits, expected), name
assert "mosa_hf.conversion" not in sys.modules  # what runs a model does not wait for what makes one
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import mosa_hf", "from mosa_hf import MosaGlm4ForCausalLM", ""])
def test_a_fresh_process_finds_the_classes(first, tmp_path):
    """By the Auto class, by pickle, by name; and one that never imported this package, trusting code or by pickle."""
    model = convert_model(tiny_decoder("glm4"), ConversionConfig(sparsity=1, window=4))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save(model(torch.arange(3, 27)[None], use_cache=False).logits, tmp_path / "expected.pt")
    code = FRESH.format(first=first, trust=not first, names=["saved", "pickled"] if first else ["saved"])
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    if not first:
        code = FRESH.format(first=first, trust=True, names=["pickled"])
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


def test_gradient_checkpointing_where_layers_drop_keywords():
    model = convert_model(tiny_decoder("nemotron"), ConversionConfig(sparsity=1, window=4)).train()
    assert model.mosa_decoder.drops_keywords
    model(tokens(), labels=tokens()).loss.backward()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(tokens(), labels=tokens())


def test_positions_are_the_familys(tmp_path):
    """OPT counts them by the mask: nobody has to give them."""
    stock = tiny_decoder("opt")
    model = convert_model(stock, ConversionConfig(sparsity=1, window=4))
    ids, mask = tokens(2), torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    ours, theirs = (logits_of(each, ids, attention_mask=mask) for each in (model, stock))
    assert difference(ours[mask.bool()], theirs[mask.bool()]) < 1e-5
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
