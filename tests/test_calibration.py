"""Routers and thresholds from text: against a slow transcription of the definition, and what is left behind."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mosa_hf import ConversionConfig, GroupPlan, calibrate_thresholds, convert_model
from mosa_hf.conversion.calibration import FLOOR, fit_routers
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.thresholds import highest_share

from .bases import random_tokens, tiny_base

LENGTH, RIDGE = 48, 0.05
FEW, MANY = SparseGroup(window=8, sparsity=4), SparseGroup(window=5, sparsity=2)
ALIKE = GroupPlan.uniform(2, 2, FEW)
MIXED = GroupPlan(((FEW, MANY), (None, FEW)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,  # attention far from uniform
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def input_ids():
    return torch.randint(64, (5, LENGTH), generator=torch.Generator().manual_seed(1))


def observe(model, input_ids):
    """Attention weights [layers][N, H, T, T] and inputs of the attention modules [layers][N, T, D], in float64."""
    inputs = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"].double()), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return [attention.double() for attention in attentions], inputs


def slow_fit(attention, hidden_states, group, sparse, include_first):
    """The docstring of fit_routers, word by word, for one group: attention [N, H, T, T], hidden_states [N, T, D]."""
    windows, heads, length, _ = attention.shape
    attention = attention.unflatten(1, (2, heads // 2))[:, group]
    features, targets = [], []
    for n in range(windows):
        for j in range(1 if include_first else 0, length):
            far = [t for t in range(length) if t - j >= sparse.window]
            if len(far) < sparse.window:
                continue
            mean = sum(attention[n, :, t, j].amax() * (t + 1) for t in far) / len(far)
            features.append(hidden_states[n, j])
            targets.append(mean.clamp_min(FLOOR).log())
    x, y = torch.stack(features), torch.stack(targets)
    x, y = x - x.mean(0), y - y.mean(0)
    strength = RIDGE * x.var(0, correction=0).mean() * len(x)
    weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    z = hidden_states @ weight
    threshold = z.flatten().sort(descending=True).values[round(windows * length / sparse.sparsity) - 1]

    selected = z >= threshold
    selected[:, 0] |= include_first
    kept, queries = 0.0, 0
    for n in range(windows):
        for t in range(sparse.window, length):
            seen = selected[n] | (t - torch.arange(length) < sparse.window)
            kept = kept + (attention[n, :, t].mean(0) * seen).sum()
            queries += 1
    return weight, threshold, kept / queries


@pytest.mark.parametrize("plan", [ALIKE, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("include_first", [True, False])
def test_matches_the_definition(model, input_ids, include_first, plan):
    fits = fit_routers(model, input_ids, plan, include_first=include_first, ridge=RIDGE)
    assert len(fits) == 2
    for fit, groups, attention, hidden_states in zip(fits, plan.layers, *observe(model, input_ids), strict=True):
        sparse = [group for group in range(2) if groups[group] is not None]
        assert len(fit.weight) == len(fit.threshold) == len(fit.kept_mass) == len(sparse)
        for i, group in enumerate(sparse):
            expected = slow_fit(attention, hidden_states, group, groups[group], include_first)
            weight, threshold, kept_mass = expected
            torch.testing.assert_close(fit.weight[i].double(), weight, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(fit.threshold[i].double(), threshold, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(fit.kept_mass[i].double(), kept_mass, rtol=1e-3, atol=1e-3)
        assert fit.weight.dtype == fit.threshold.dtype == fit.kept_mass.dtype == torch.float32


def test_layers_without_sparse_groups(model, input_ids):
    one, both = (fit_routers(model, input_ids, plan) for plan in (GroupPlan(((None, None), (FEW, None))), ALIKE))
    assert one[0] is None and torch.equal(one[1].weight, both[1].weight[:1])


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "gpt_oss"])
def test_other_families(family):
    """Attention modules of any name, with sinks and softcaps; a layer with a sliding window is left out."""
    base = tiny_base(family)
    num_groups = base.config.num_attention_heads if family == "gpt_neox" else base.config.num_key_value_heads
    plan = GroupPlan.uniform(3, num_groups, FEW, [1])
    fits = fit_routers(base, random_tokens(4, LENGTH), plan)
    assert fits[1] is None
    for fit in (fits[0], fits[2]):
        assert fit.weight.shape == (num_groups, 32) and fit.weight.isfinite().all()
        assert ((0.2 < fit.kept_mass) & (fit.kept_mass < 1)).all()


def test_more_keys_keep_more_mass(model, input_ids):
    few, many, everything = (
        fit_routers(model, input_ids, GroupPlan.uniform(2, 2, SparseGroup(8, sparsity))) for sparsity in (16, 2, 1)
    )
    for a, b, c in zip(few, many, everything, strict=True):
        assert (a.kept_mass < b.kept_mass).all()
        torch.testing.assert_close(c.kept_mass, torch.ones(2))


def test_no_window(model, input_ids):
    fits = fit_routers(model, input_ids, GroupPlan.uniform(2, 2, SparseGroup(0, 4)))
    assert all(fit.weight.isfinite().all() and (fit.kept_mass < 1).all() for fit in fits)


def test_bfloat16_model(model, input_ids):
    exact = fit_routers(model, input_ids, ALIKE)
    rounded = fit_routers(model.to(torch.bfloat16), input_ids, ALIKE)
    for a, b in zip(exact, rounded, strict=True):
        assert b.weight.dtype == torch.float32
        torch.testing.assert_close(a.kept_mass, b.kept_mass, rtol=0, atol=0.05)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaves_the_model_as_it_was(model, input_ids, error):
    model.train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls = 0

    def interrupt(module, args):
        nonlocal calls
        calls += 1
        if error is not None and calls == 2:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    if error is None:
        fit_routers(model, input_ids, ALIKE)
    else:
        with pytest.raises(error):
            fit_routers(model, input_ids, ALIKE)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    "shape, ridge, words",
    [
        ((0, LENGTH), 0.1, "`input_ids`.*at least one window"),
        ((LENGTH,), 0.1, "`input_ids`.*at least one window"),
        ((2, 16), 0.1, "`input_ids`.*more than 16 tokens"),
        ((2, LENGTH), 0.0, "`ridge`"),
    ],
)
def test_bad_arguments(model, shape, ridge, words):
    with pytest.raises(ValueError, match=words):
        fit_routers(model, torch.zeros(shape, dtype=torch.long), ALIKE, ridge=ridge)


def test_activations_that_are_not_finite(model, input_ids):
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="`model`.*not finite in layer 1"):
        fit_routers(model, input_ids, ALIKE)


def test_model_with_replaced_attention(model, input_ids):
    model.model.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="`model`.*has no LlamaAttention in layer 0"):
        fit_routers(model, input_ids, ALIKE)


def test_highest_share():
    logits = torch.arange(12.0).repeat(3, 1).T
    assert highest_share(logits, [1, 4, 100]).tolist() == [0, 9, 11]


def test_thresholds_follow_each_groups_own_rate(model, input_ids):
    """Every group selects its share of the text, padding and first tokens left out."""
    converted = convert_model(model, ConversionConfig(plan=MIXED), input_ids)
    text = torch.randint(64, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(text)
    mask[::2, : LENGTH // 2] = 0
    calibrate_thresholds(converted, [{"input_ids": text, "attention_mask": mask}])
    logits = {}
    hooks = [
        router.register_forward_hook(lambda module, args, output: logits.update({module.layer_idx: output}))
        for router in converted.mosa_routers().values()
    ]
    with torch.no_grad():
        converted(text, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    rates = [selected[mask.bool()].float().mean(0) for _, selected in (logits[0], logits[1])]
    torch.testing.assert_close(torch.cat(rates), torch.tensor([1 / 4, 1 / 2, 1 / 4]), rtol=0.12, atol=0)


def test_calibration_on_logits_that_are_not_finite(model, input_ids):
    converted = convert_model(model, ConversionConfig(plan=MIXED), input_ids)
    before = [router.threshold.clone() for router in converted.mosa_routers().values()]
    converted.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="router of layer 1 gives logits that are not finite"):
        calibrate_thresholds(converted, [input_ids])
    assert all(torch.equal(x, y.threshold) for x, y in zip(before, converted.mosa_routers().values(), strict=True))
