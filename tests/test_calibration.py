"""fit_routers against a slow transcription of its definition, and what it leaves behind."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mosa_hf.conversion.calibration import FLOOR, fit_routers

LENGTH, WINDOW, SPARSITY, RIDGE = 48, 8, 4, 0.05


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


def slow_fit(attention, hidden_states, include_first):
    """The docstring of fit_routers, word by word, for one layer: attention [N, H, T, T], hidden_states [N, T, D]."""
    windows, heads, length, _ = attention.shape
    groups = attention.unflatten(1, (2, heads // 2))
    features, targets = [], []
    for n in range(windows):
        for j in range(1 if include_first else 0, length):
            far = [t for t in range(length) if t - j >= WINDOW]
            if len(far) < WINDOW:
                continue
            mean = sum(groups[n, :, :, t, j].amax(-1) * (t + 1) for t in far) / len(far)
            features.append(hidden_states[n, j])
            targets.append(mean.clamp_min(FLOOR).log())
    x, y = torch.stack(features), torch.stack(targets)
    x, y = x - x.mean(0), y - y.mean(0)
    strength = RIDGE * x.var(0, correction=0).mean() * len(x)
    weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).T
    z = hidden_states @ weight.T
    threshold = z.flatten(0, 1).sort(0, descending=True).values[round(windows * length / SPARSITY) - 1]

    selected = z >= threshold
    selected[:, 0] |= include_first
    kept, queries = 0.0, 0
    for n in range(windows):
        for t in range(WINDOW, length):
            seen = selected[n].T | (t - torch.arange(length) < WINDOW)
            kept = kept + (groups[n, :, :, t].mean(1) * seen).sum(-1)
            queries += 1
    return weight, threshold, kept / queries


@pytest.mark.parametrize("include_first", [True, False])
def test_matches_the_definition(model, input_ids, include_first):
    fits = fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW, include_first=include_first, ridge=RIDGE)
    assert len(fits) == 2
    for fit, attention, hidden_states in zip(fits, *observe(model, input_ids), strict=True):
        weight, threshold, kept_mass = slow_fit(attention, hidden_states, include_first)
        torch.testing.assert_close(fit.weight.double(), weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.threshold.double(), threshold, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.kept_mass.double(), kept_mass, rtol=1e-3, atol=1e-3)
        assert fit.weight.dtype == fit.threshold.dtype == fit.kept_mass.dtype == torch.float32


def test_more_keys_keep_more_mass(model, input_ids):
    few, many = (fit_routers(model, input_ids, sparsity=s, window=WINDOW) for s in (16, 2))
    everything = fit_routers(model, input_ids, sparsity=1, window=WINDOW)
    for a, b, c in zip(few, many, everything, strict=True):
        assert (a.kept_mass < b.kept_mass).all()
        torch.testing.assert_close(c.kept_mass, torch.ones(2))


def test_no_window(model, input_ids):
    fits = fit_routers(model, input_ids, sparsity=SPARSITY, window=0)
    assert all(fit.weight.isfinite().all() and (fit.kept_mass < 1).all() for fit in fits)


def test_bfloat16_model(model, input_ids):
    exact = fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW)
    rounded = fit_routers(model.to(torch.bfloat16), input_ids, sparsity=SPARSITY, window=WINDOW)
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
        fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW)
    else:
        with pytest.raises(error):
            fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    "settings, shape, words",
    [
        ({}, (0, LENGTH), "`input_ids`.*at least one window"),
        ({}, (LENGTH,), "`input_ids`.*at least one window"),
        ({}, (2, 2 * WINDOW), "`input_ids`.*more than 16 tokens"),
        ({"sparsity": 0.5}, (2, LENGTH), "`sparsity`"),
        ({"window": -1}, (2, LENGTH), "`window`"),
        ({"ridge": 0.0}, (2, LENGTH), "`ridge`"),
    ],
)
def test_bad_arguments(model, settings, shape, words):
    with pytest.raises(ValueError, match=words):
        fit_routers(
            model, torch.zeros(shape, dtype=torch.long), **{"sparsity": SPARSITY, "window": WINDOW, **settings}
        )


def test_activations_that_are_not_finite(model, input_ids):
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="`model`.*not finite in layer 1"):
        fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW)


def test_model_without_self_attention(model, input_ids):
    del model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="`model`.*`self_attn`"):
        fit_routers(model, input_ids, sparsity=SPARSITY, window=WINDOW)
