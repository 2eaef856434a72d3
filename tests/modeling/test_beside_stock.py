"""
Everything else that a model can do, of families that differ most from the usual, beside the stock model: what works
there works here, with every token selected it gives the same, and what upstream refuses is refused.
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel

from mosa_hf import ConversionConfig, convert_model
from mosa_hf.compat import CACHE
from mosa_hf.modeling.family import family_of
from testing.decoders import BESIDE_STOCK as TYPES
from testing.decoders import classes_of, tiny_decoder
from testing.family_contract import GREEDY, difference, logits_of, sparse_model, tokens

from .test_parallel import in_two_processes, load

BY_DEFAULT = ("deepseek_v3", "falcon_h1", "gemma4_text", "qwen3_next")
IDS = tokens(2, 16)
MODES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}

each_type = pytest.mark.parametrize(
    "model_type", [pytest.param(x, marks=() if x in BY_DEFAULT else pytest.mark.families) for x in TYPES]
)


@lru_cache
def stock(model_type: str) -> PreTrainedModel:
    return tiny_decoder(model_type)


@lru_cache
def same(model_type: str) -> PreTrainedModel:
    """With every token selected."""
    return convert_model(stock(model_type), ConversionConfig(sparsity=1, window=4))


@lru_cache
def sparse(model_type: str) -> PreTrainedModel:
    return sparse_model(stock(model_type))


def outcome(function: Callable[[PreTrainedModel], torch.Tensor], model: PreTrainedModel) -> torch.Tensor | str:
    """What a function gives; "refused" if it raises."""
    try:
        return function(copy.deepcopy(model))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return "refused"


@each_type
@pytest.mark.parametrize("mode", MODES)
def test_generation(model_type, mode):
    def generate(model, **options):
        rows = IDS[:1] if mode == "prompt lookup" else IDS
        return model.generate(rows, **GREEDY, **options)

    expected = outcome(lambda model: generate(model, **MODES[mode]), stock(model_type))
    found = outcome(lambda model: generate(model, **MODES[mode]), same(model_type))
    if isinstance(expected, str):
        assert found == expected
        return
    assert torch.equal(found, expected)
    uncached = MODES[mode] if mode == "beams" else {}
    assert torch.equal(
        generate(sparse(model_type), **MODES[mode]), generate(sparse(model_type), use_cache=False, **uncached)
    )


@each_type
def test_padded_prompts_on_a_static_cache(model_type):
    """Padding reaches no layer, recurrent ones included."""
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0

    def generate(model, **options):
        return model.generate(IDS, attention_mask=mask, **GREEDY, **options)

    static = {"cache_implementation": "static"}
    expected = outcome(lambda model: generate(model, **static), stock(model_type))
    if isinstance(expected, str):
        assert outcome(lambda model: generate(model, **static), same(model_type)) == expected
        return
    assert torch.equal(generate(same(model_type), **static), expected)
    assert torch.equal(generate(sparse(model_type), **static), generate(sparse(model_type), use_cache=False))


@each_type
def test_crop(model_type):
    """The last four of a prompt are taken back; without more ado, what a model forgets cannot be."""

    @torch.no_grad()
    def cropped(model):
        cache = DynamicCache(config=model.config)
        if hasattr(model, "record_past"):
            model.record_past(cache)
        else:
            cache.activate_past_recording()
        options = {CACHE: cache, "use_cache": True}
        logits_of(model, IDS, **options)
        cache.crop(-4)
        return logits_of(model, IDS[:, 12:], **options)

    expected = outcome(cropped, stock(model_type))
    if isinstance(expected, str):
        assert outcome(cropped, sparse(model_type)) == expected
        return
    assert difference(cropped(same(model_type)), expected) < 1e-4
    whole = logits_of(sparse(model_type), IDS)[:, 12:]
    assert difference(cropped(sparse(model_type)), whole) < 1e-4 + 2 * difference(
        expected, logits_of(stock(model_type), IDS)[:, 12:]
    )


@pytest.mark.parametrize("model_type", [pytest.param(x, marks=pytest.mark.families) for x in TYPES])
def test_compiled(model_type):
    torch._dynamo.reset()
    for model in (same(model_type), sparse(model_type)):
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        assert difference(logits_of(compiled, IDS), logits_of(model, IDS)) < 1e-5


@each_type
def test_lora(model_type):
    """A step, and merged; the same weights are adapted as of the stock model."""
    adapted = {}
    for name, model in {"stock": stock(model_type), "sparse": sparse(model_type)}.items():
        config = LoraConfig(target_modules=r".*\.(q_proj|v_proj|q_b_proj|kv_b_proj)", task_type="CAUSAL_LM", r=4)
        adapted[name] = get_peft_model(copy.deepcopy(model), config)
    names = [
        {each for each, parameter in model.named_parameters() if parameter.requires_grad} for model in adapted.values()
    ]
    assert names[0] == names[1] and names[0]
    model = adapted["sparse"]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = logits_of(model.eval(), IDS)
    assert difference(after, logits_of(sparse(model_type), IDS)) > 1e-3
    assert difference(logits_of(model.merge_and_unload(), IDS), after) < 1e-3


@each_type
def test_training_step(model_type):
    """The loss is the original's where everything is selected, and its gradient reaches what it reaches there."""
    losses, reached = {}, {}
    fields = {"mosa_gate_slope": 1.0, "mosa_sparsity": 4, "mosa_window": 4}
    config_class = family_of(stock(model_type).config.model_type).config_class
    routed = copy.deepcopy(sparse(model_type))
    learning = type(routed)(config_class.from_base(stock(model_type).config, **fields))
    learning.load_state_dict(routed.state_dict())
    for name, model in {"stock": stock(model_type), "same": same(model_type), "learning": learning}.items():
        model = copy.deepcopy(model).train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses[name] = loss.item()
        reached[name] = {
            each for each, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
        }
    assert losses["same"] == pytest.approx(losses["stock"], rel=1e-4)
    assert reached["same"] == reached["stock"]
    routers = {name for name, _ in learning.named_parameters() if "mosa_router" in name}
    assert routers and routers <= reached["learning"]


def by_tensors(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Logits of each model in a folder, which the processes share."""
    return {
        path.name: logits_of(load(folder, path.name, tp_size=2), IDS)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }


@pytest.mark.families
def test_tensor_parallel(tmp_path):
    """In two processes, of each family for which upstream has a plan."""
    planned = [each for each in TYPES if getattr(classes_of(each)[0], "base_model_tp_plan", None)]
    assert len(planned) > 5
    for model_type in planned:
        copy.deepcopy(sparse(model_type)).save_pretrained(tmp_path / model_type)
    for model_type, logits in in_two_processes(by_tensors, tmp_path).items():
        assert difference(logits, logits_of(sparse(model_type), IDS)) < 1e-4, model_type
