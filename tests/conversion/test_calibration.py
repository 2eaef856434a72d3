"""Routers and thresholds from text: against a slow transcription of the definition, and what is left behind."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mosa_hf import ConversionConfig, GroupPlan, calibrate_thresholds, convert_model
from mosa_hf.conversion import importance
from mosa_hf.conversion.allocation import choose_groups, mean_losses, one_threshold
from mosa_hf.conversion.calibration import FLOOR, fit_routers, layer_offsets
from mosa_hf.conversion.importance import SecondReading
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.thresholds import highest_share
from testing.tiny import EVERY_FAMILY, random_tokens, tiny_base

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


def observe(model, row):
    """Of one window [T]: attention inputs of both readings, values of the first, weights of the second; float64."""
    inputs, values, attentions = [], [], []
    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        handles += [
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append(kwargs["hidden_states"][0].double()), with_kwargs=True
            ),
            attention.v_proj.register_forward_hook(lambda module, args, output: values.append(output[0].double())),
        ]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.cat((row, row))[None], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return inputs, values, [attention[0].double() for attention in attentions]


def slow_fit(model, input_ids, layer, group, include_first):
    """The definition, word by word, for one group: importance [N, T], the router's weight and bias."""
    output_weight = model.model.layers[layer].self_attn.o_proj.weight.double()
    heads_per_group, head_dim = 3, 8
    features, found = [], []
    for row in input_ids:
        inputs, values, attentions = observe(model, row)
        hidden, value, attention = inputs[layer], values[layer], attentions[layer]
        scores = torch.zeros(LENGTH, dtype=torch.float64)
        for j in range(LENGTH):
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                own = value[j, group * head_dim : (group + 1) * head_dim]
                written = (output_weight[:, head * head_dim : (head + 1) * head_dim] @ own).norm()
                for i in range(LENGTH, 2 * LENGTH):
                    scores[j] = max(scores[j], attention[head, i, j] * written / hidden[i].norm())
        features.append(hidden[:LENGTH])
        found.append(scores)
    skip = int(include_first)
    x = torch.cat([rows[skip:] for rows in features])
    y = torch.cat([scores[skip:] for scores in found]).clamp_min(FLOOR).log()
    centred = x - x.mean(0)
    strength = RIDGE * x.var(0, correction=0).mean() * len(x)
    gram = centred.T @ centred + strength * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean()))
    bias = y.mean() - x.mean(0) @ weight
    return torch.stack(found), weight, bias, torch.stack([rows @ weight + bias for rows in features])


def slow_offsets(model, input_ids):
    """What log importance gets before layers are compared, in layers' order; float64."""
    ratios = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for row in input_ids:
        twice = torch.cat((row, row))[None]
        received = model(twice, output_hidden_states=True).hidden_states  # by each layer, in order
        for layer, module in enumerate(model.model.layers):
            normalised = module.input_layernorm(received[layer])[0].double()
            for own, before in zip(normalised, received[layer][0].double(), strict=True):
                ratios[layer] += (own.norm() / before.norm()).log() / twice.numel() / len(input_ids)
    middle = ratios.sort().values[[(len(ratios) - 1) // 2, len(ratios) // 2]].mean()
    return ratios, torch.stack([min(max(ratio, middle), middle + 1) for ratio in ratios])


def test_offsets_lie_between_the_median_layers_and_one_above():
    """Of Qwen2.5-Coder-0.5B, three layers; of gemma-3-270m, whose embeddings are tiny; of an even number of layers."""
    for ratios, expected in (
        ([1.77, 0.77, -0.57], [1.77, 0.77, 0.77]),
        ([2.78, -4.10, -6.31], [-3.10, -4.10, -4.10]),
        ([0.0, 3.0, 1.0, 2.0], [1.5, 2.5, 1.5, 2.0]),
    ):
        torch.testing.assert_close(layer_offsets(torch.tensor(ratios)), torch.tensor(expected))


@torch.no_grad()
def test_layers_are_compared_on_the_scale_of_their_residual(model, input_ids):
    """A layer whose input is a hundred times as large, and normalised to the same, has less to say about it."""
    before = fit_routers(model, input_ids, ALIKE, ridge=RIDGE)
    model.model.layers[0].mlp.down_proj.weight *= 100  # what the second layer receives; its attention hardly sees it
    after = fit_routers(model, input_ids, ALIKE, ridge=RIDGE)
    gap_before, gap_after = (float(fits[0].offset - fits[1].offset) for fits in (before, after))
    ratios, offsets = slow_offsets(model, input_ids)
    assert gap_after == pytest.approx(float(offsets[0] - offsets[1]), abs=1e-4) and gap_after >= gap_before
    assert gap_after == 1 < float(ratios[0] - ratios[1]) / 2  # between the median's and one above
    normalised = [replace(fit, predicted=fit.predicted - fit.offset) for fit in after]
    plans = (one_threshold(ALIKE, ALIKE, fits) for fits in (normalised, after))
    shares = [sum(1 / kind.sparsity for kind in plan.layers[0]) for plan in plans]
    assert shares[1] > 1.1 * shares[0]


@pytest.mark.parametrize("include_first, plan", [(True, MIXED), (False, ALIKE)])
@torch.no_grad()
def test_matches_the_definition(model, input_ids, include_first, plan):
    model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(
        torch.randn(48)
    )  # not part of what a value writes
    fits = fit_routers(model, input_ids[:2], plan, include_first=include_first, ridge=RIDGE)
    assert len(fits) == 2
    _, offsets = slow_offsets(model, input_ids[:2])
    for layer, (fit, groups) in enumerate(zip(fits, plan.layers, strict=True)):
        sparse = [group for group in range(2) if groups[group] is not None]
        assert fit.weight.shape == (len(sparse), 48) and fit.importance.shape == (2, LENGTH, len(sparse))
        for i, group in enumerate(sparse):
            expected, weight, bias, predicted = slow_fit(model, input_ids[:2], layer, group, include_first)
            offset = offsets[layer]
            expected, bias, predicted = expected * offset.exp(), bias + offset, predicted + offset
            torch.testing.assert_close(fit.offset.double(), offset, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fit.importance[..., i].double(), expected, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(fit.weight[i].double(), weight, rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(fit.bias[i].double(), bias, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(fit.predicted[..., i].double(), predicted, rtol=1e-2, atol=1e-2)


def test_a_few_queries_are_looked_at_at_a_time(model, input_ids, monkeypatch):
    whole, seen = fit_routers(model, input_ids, ALIKE), []
    see = SecondReading.see
    monkeypatch.setattr(SecondReading, "see", lambda self, x, first: (seen.append(x.shape[2]), see(self, x, first)))
    monkeypatch.setattr(importance, "MOST_WEIGHTS", 6 * 2 * LENGTH * 7)
    parts = fit_routers(model, input_ids, ALIKE)
    assert seen == [7] * 6 + [6] + seen[7:] and len(seen) == 7 * 2 * 5  # blocks, layers, windows
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.importance, other.importance, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
    assert not any(hasattr(layer.self_attn, importance.NAME) for layer in model.model.layers)


def test_layers_without_sparse_groups(model, input_ids):
    one, both = (fit_routers(model, input_ids, plan) for plan in (GroupPlan(((None, None), (FEW, None))), ALIKE))
    assert one[0] is None and torch.equal(one[1].importance, both[1].importance[..., :1])


@EVERY_FAMILY
def test_every_family(family):
    """Attention modules of any name, with biases, sinks and softcaps; layers with a sliding window are left out."""
    base = tiny_base(family)
    num_groups = base.config.num_key_value_heads if family != "gpt_neox" else base.config.num_attention_heads
    sliding = [i for i, kind in enumerate(getattr(base.config, "layer_types", None) or []) if kind[:4] == "slid"]
    fits = fit_routers(base, random_tokens(4, LENGTH), GroupPlan.uniform(3, num_groups, FEW, sliding))
    assert [i for i, fit in enumerate(fits) if fit is None] == sliding
    for fit in fits:
        if fit is not None:
            assert fit.weight.shape == (num_groups, 32) and fit.weight.isfinite().all()
            centred = [states[:, 1:].flatten(0, 1) for states in (fit.predicted, fit.importance.log())]
            correlation = torch.stack(
                [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*(x.T for x in centred), strict=True)]
            )
            assert (correlation > 0.3).all()  # of in-sample predictions, with 32 features and 188 tokens


def test_one_threshold_serves_all_groups(model, input_ids):
    """Groups differ in their rates, and together select what was asked for."""
    fits = fit_routers(model, input_ids, ALIKE)
    fits[0].predicted[..., 0] += 1.0
    plan = one_threshold(ALIKE, ALIKE, fits)
    rates = [1 / kind.sparsity for groups in plan.layers for kind in groups]
    assert {kind.window for groups in plan.layers for kind in groups} == {8}
    assert sum(rates) / 4 == pytest.approx(1 / FEW.sparsity, rel=0.03)
    assert rates[0] == max(rates) and rates[0] > 1.5 / FEW.sparsity
    logits = torch.cat([fit.predicted[:, 1:].flatten(0, 1) for fit in fits], dim=1)
    threshold = highest_share(logits.view(-1, 1), [FEW.sparsity])
    torch.testing.assert_close(torch.tensor(rates), (logits >= threshold).float().mean(0), rtol=0.02, atol=1 / LENGTH)
    everything = GroupPlan.uniform(2, 2, SparseGroup(8, 1))
    assert one_threshold(everything, ALIKE, fits) == everything


def test_what_groups_get_that_would_select_nothing_the_others_do_without(model, input_ids):
    fits = fit_routers(model, input_ids, ALIKE)
    fits[1].predicted[...] -= 100.0
    rates = torch.tensor(
        [[1 / kind.sparsity for kind in groups] for groups in one_threshold(ALIKE, ALIKE, fits).layers]
    )
    torch.testing.assert_close(rates[1], torch.full((2,), 1 / LENGTH), rtol=1e-3, atol=0)  # a token of each window
    assert float(rates.sum()) / 4 == pytest.approx(1 / FEW.sparsity, rel=0.03)


def test_groups_that_lose_less_come_first(model, input_ids):
    fits = fit_routers(model, input_ids, ALIKE)
    losses = mean_losses(ALIKE, fits)
    logits, measured = (
        torch.cat([getattr(fit, name)[:, 1:].flatten(0, 1) for fit in fits], dim=1)
        for name in ("predicted", "importance")
    )
    left_out = logits < highest_share(logits.view(-1, 1), [FEW.sparsity])  # one threshold for all four
    torch.testing.assert_close(torch.tensor(losses).flatten(), (measured * left_out).mean(0))
    fits[1].importance[..., 0] *= 100
    worse = mean_losses(ALIKE, fits)
    assert worse[1][0] == pytest.approx(100 * losses[1][0], rel=1e-3) and worse[0] == losses[0]
    two = choose_groups(ConversionConfig(groups=3, sparsity=4), ALIKE, worse)
    assert two == GroupPlan(((FEW, FEW), (None, FEW)))
    few, many = (mean_losses(each, fits) for each in (ALIKE, GroupPlan.uniform(2, 2, SparseGroup(8, 1.5))))
    assert sum(map(sum, many)) < sum(map(sum, few))


def test_bfloat16_model(model, input_ids):
    exact = fit_routers(model, input_ids, ALIKE)
    rounded = fit_routers(model.to(torch.bfloat16), input_ids, ALIKE)
    for a, b in zip(exact, rounded, strict=True):
        assert b.weight.dtype == b.importance.dtype == torch.float32
        torch.testing.assert_close(a.importance.mean((0, 1)), b.importance.mean((0, 1)), rtol=0.1, atol=0)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaves_the_model_as_it_was(model, input_ids, error):
    model.train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls = 0

    def interrupt(module, args):
        nonlocal calls
        calls += 1
        if error is not None and calls == 2:  # between the two readings
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
    attention = [layer.self_attn for layer in model.model.layers]
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in attention)


@pytest.mark.parametrize(
    "shape, ridge, words",
    [
        ((0, LENGTH), 0.1, "`input_ids`.*at least one window"),
        ((LENGTH,), 0.1, "`input_ids`.*at least one window"),
        ((2, 1), 0.1, "`input_ids`.*T >= 2 tokens"),
        ((2, 1025), 0.1, "`input_ids`.*reads twice.*at most 1024 tokens"),
        ((2, LENGTH), 0.0, "`ridge`"),
    ],
)
def test_bad_arguments(model, shape, ridge, words):
    with pytest.raises(ValueError, match=words):
        fit_routers(model, torch.arange(math.prod(shape)).view(shape) % 64, ALIKE, ridge=ridge)
    with pytest.raises(ValueError, match=r"is a str of .*; pass token ids .*`calibration_windows\(tokenizer, text\)`"):
        fit_routers(model, "A text.", ALIKE)


def test_activations_that_are_not_finite(model, input_ids):
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="`model`.*not finite in layer 1"):
        fit_routers(model, input_ids, ALIKE)


def test_model_with_replaced_attention(model, input_ids):
    model.model.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="`model`.*has no attention of Transformers' own in layer 0"):
        fit_routers(model, input_ids, ALIKE)


def test_highest_share():
    logits = torch.arange(12.0).repeat(3, 1).T
    assert highest_share(logits, [1, 4, 100]).tolist() == [0, 8.5, 10.5]


@pytest.mark.parametrize("rate, selected", [(10, 2), (7, 2), (4, 5), (2, 5), (100, 2)])
def test_highest_share_lies_between_the_logits_of_different_tokens(rate, selected):
    """Equal inputs have logits that differ by rounding: they are all selected, or none of them is."""
    logits = torch.tensor([3.0] * 2 + [2.0] * 3 + [1.0] * 15)
    logits = logits + 1e-7 * torch.arange(20) * torch.tensor([1, -1]).repeat(10)
    threshold = highest_share(logits[:, None], [rate])
    assert (logits >= threshold).sum() == selected
    assert (logits - threshold).abs().min() > 0.4


def test_thresholds_follow_each_groups_own_rate(model, input_ids):
    """Every group selects its share of the text, padding and first tokens left out."""
    converted = convert_model(model, ConversionConfig(plan=MIXED), input_ids)
    text = torch.randint(64, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(text)
    mask[::2, : LENGTH // 2] = 0
    calibrate_thresholds(converted, [{"input_ids": text, "attention_mask": mask}])
    logits = {}
    hooks = [
        router.register_forward_hook(lambda module, args, output, layer=layer: logits.update({layer: output}))
        for layer, router in converted.mosa_routers().items()
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
