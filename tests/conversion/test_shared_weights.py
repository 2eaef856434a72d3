"""A converted model and its base are in one memory: what changes one of them may not damage the other."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mosa_hf import ConversionConfig, convert_model, load_routers, save_routers, to_dense
from mosa_hf.conversion import convert_to_native
from mosa_hf.conversion.healing import teacher_of
from testing.tiny import random_tokens, tiny_base

TEXT, TOKENS = random_tokens(2, 48), random_tokens(2, 20, seed=1)


def pair(tied: bool = False):
    """A base, and what it is converted to."""
    base = tiny_base(tie_word_embeddings=tied, num_hidden_layers=2)
    return base, convert_model(base, ConversionConfig(window=4, sparsity=3), TEXT)


@torch.no_grad()
def logits_of(model):
    return model(TOKENS, use_cache=False).logits


def resized(model):
    model.resize_token_embeddings(300)
    assert model.get_input_embeddings().weight.shape[0] == 300


def shrunk(model):
    model.resize_token_embeddings(pad_to_multiple_of=100, new_num_tokens=90)


def in_bfloat16(model):
    model.to(torch.bfloat16)


def on_no_device(model):
    model.to("meta")


def with_other_weights(model):
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def with_other_embeddings(model):
    model.set_input_embeddings(torch.nn.Embedding(256, 32))
    model.set_output_embeddings(torch.nn.Linear(32, 256, bias=False))


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


def pruned(model):
    for layer in model.model.layers:
        prune.l1_unstructured(layer.mlp.down_proj, "weight", amount=0.5)
        prune.remove(layer.mlp.down_proj, "weight")


def frozen_and_learning(model):
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()


CHANGES = [
    resized,
    shrunk,
    in_bfloat16,
    on_no_device,
    with_other_weights,
    with_other_embeddings,
    tied,
    pruned,
    frozen_and_learning,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("changed", [0, 1], ids=["base", "converted"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["", "tied"])
def test_one_is_changed_and_the_other_is_what_it_was(change, changed, is_tied, tmp_path):
    models = pair(is_tied)
    model, other = models[changed], models[1 - changed]
    expected, alone = logits_of(other), copy.deepcopy(model)
    change(model)
    assert other.dtype == torch.float32 and other.device.type == "cpu"
    assert torch.equal(logits_of(other), expected)
    assert all(parameter.grad is None for parameter in other.parameters())
    own = [parameter for name, parameter in other.named_parameters() if ".mosa_router." not in name]
    assert all(parameter.requires_grad for parameter in own)
    assert is_tied == (other.get_input_embeddings().weight is other.get_output_embeddings().weight)
    if change in (resized, shrunk):
        other.save_pretrained(tmp_path)
        assert torch.equal(logits_of(type(other).from_pretrained(tmp_path)), expected)
    if change is in_bfloat16:  # what it would be without another model in its memory
        assert torch.equal(logits_of(model), logits_of(alone.to(torch.bfloat16)))


def test_the_way_back_and_ready_routers_do_the_same(tmp_path):
    base, converted = pair()
    save_routers(converted, tmp_path / "routers")
    for other in (to_dense(converted), load_routers(base, tmp_path / "routers")):
        expected = logits_of(other)
        converted.resize_token_embeddings(converted.config.vocab_size + 4)
        base.to(torch.float64)
        assert torch.equal(logits_of(other), expected) and other.dtype == torch.float32
        base.to(torch.float32)


def test_a_model_that_was_resized_is_whole(tmp_path):
    """Converted and resized, it generates with a cache, is saved and loaded; stock does."""
    base, model = pair()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for each in (base, model):
        each.resize_token_embeddings(300)
        tokens = each.generate(TOKENS, **options)
        assert torch.equal(tokens, each.generate(TOKENS, use_cache=False, **options))
        each.save_pretrained(tmp_path / type(each).__name__)
        loaded = type(each).from_pretrained(tmp_path / type(each).__name__)
        assert loaded.config.vocab_size == 300 and torch.equal(loaded.generate(TOKENS, **options), tokens)


def test_the_way_back_leaves_modules_that_came_later(tmp_path):
    """Adapters, heads and projections that nobody has initialised as Transformers does."""
    _, model = pair()
    model.lm_head, up_proj = torch.nn.Linear(32, 256, bias=False), torch.nn.Linear(32, 48, bias=False)
    model.model.layers[0].mlp.up_proj = up_proj
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before, expected = {name: x.clone() for name, x in adapted.state_dict().items()}, logits_of(adapted.eval())
    save_routers(adapted, tmp_path / "routers")
    for make in (to_dense, lambda each: load_routers(to_dense(each), tmp_path / "routers")):
        make(adapted.get_base_model())
        assert all(torch.equal(x, before[name]) for name, x in adapted.state_dict().items())
    assert torch.equal(logits_of(adapted), expected)
    names = {name for module in to_dense(model).modules() for name in vars(module) if name.startswith("mosa")}
    assert not names


def test_a_head_that_is_not_tied_stays_so(tmp_path):
    """Whatever the config says, as of checkpoints that have both and that upstream does not tie."""
    base = tiny_base(tie_word_embeddings=True)
    base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.save_pretrained(tmp_path / "base")
    converted = convert_model(base, ConversionConfig(window=4, sparsity=1), TEXT)
    save_routers(converted, tmp_path / "routers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits_of(base)
    models = converted, to_dense(converted), loaded, load_routers(loaded, tmp_path / "routers"), teacher_of(converted)
    for model in (*models, type(converted).from_pretrained(tmp_path / "base", routers=tmp_path / "routers")):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
        assert not model.all_tied_weights_keys
    converted.save_pretrained(tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_in_place_both_have():
    """They are in one memory still: an optimizer's step, and an adapter that is merged (docs/limits.md)."""
    base, model = pair()
    expected = logits_of(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(logits_of(base), expected)
    assert torch.equal(logits_of(to_dense(model)), logits_of(base))

    base, _ = pair()
    apart = convert_model(copy.deepcopy(base), ConversionConfig(window=4, sparsity=3), TEXT)  # what the docs advise
    student = get_peft_model(apart, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    student.merge_and_unload()
    assert torch.equal(logits_of(base), expected)


def test_what_is_made_in_inference_mode_can_learn(tmp_path):
    """Converted or loaded there, in every form; what was built there stays what it is, and can be converted."""
    base, converted = pair()
    save_routers(converted, tmp_path / "routers")
    converted.save_pretrained(tmp_path / "converted")
    fields = {"mosa_gate_slope": 1.0, "mosa_threshold_momentum": 0.9}
    with torch.inference_mode():
        models = [
            convert_to_native(base, ConversionConfig(window=0, sparsity=3), TEXT),
            load_routers(base, tmp_path / "routers", **fields),
            AutoModelForCausalLM.from_pretrained(tmp_path / "converted", **fields),
            convert_model(base, ConversionConfig(window=4, sparsity=3), TEXT),
        ]
        built = tiny_base()
    for model in models:
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        model.requires_grad_(True).train()(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters()).step()
    assert convert_model(built, ConversionConfig(sparsity=1)).lm_head.weight.is_inference()


def test_a_teacher_shares_the_very_parameters_that_do_not_learn():
    """So that both go to a device, or to another dtype, together."""
    _, model = pair()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    teacher, own = teacher_of(model), dict(model.named_parameters())
    assert type(teacher) is LlamaForCausalLM
    for name, parameter in teacher.named_parameters():
        assert (parameter is own[name]) == (name != "model.norm.weight")
    assert teacher.model.norm.weight.data_ptr() != model.model.norm.weight.data_ptr()
