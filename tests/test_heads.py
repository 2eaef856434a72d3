"""The MoSA module as a whole, backend against backend, in float64: outputs and all gradients, on random shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf.kernels import use_backend
from mosa_hf.modeling.heads import MosaHeads, RoutingState

from .conftest import tiny_config

HIDDEN_SIZE = 16


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    form=st.sampled_from(["selected", "all"]),
    batch_size=st.integers(1, 3),
    num_tokens=st.integers(1, 70),
    num_groups=st.integers(1, 5),
    heads_per_group=st.integers(1, 3),
    sparsity=st.integers(1, 9),
    window=st.integers(0, 9),
    rotary_dim=st.sampled_from([4, 8]),
    budget=st.sampled_from([None, 1, 3, 8]),
    seed=st.integers(0, 2**16),
)
def test_backends_agree(
    routing,
    training,
    side,
    form,
    batch_size,
    num_tokens,
    num_groups,
    heads_per_group,
    sparsity,
    window,
    rotary_dim,
    budget,
    seed,
):
    torch.manual_seed(seed)
    config = tiny_config(
        hidden_size=HIDDEN_SIZE,
        num_mosa_heads=num_groups * heads_per_group,
        num_mosa_key_value_heads=num_groups,
        mosa_sparsity=sparsity,
        mosa_query_tokens=form,
        mosa_window=window if form == "all" else 0,
        mosa_cache_budget=budget,
        mosa_routing=routing,
        mosa_inference_routing=routing,
        mosa_include_first=bool(seed % 2),
        attention_bias=bool(seed % 3),
    )
    heads = MosaHeads(config, layer_idx=0).double().train(training)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    mask = None
    if side != "none":
        lengths = torch.randint(1, num_tokens + 1, (batch_size, 1))
        mask = (
            torch.arange(num_tokens) < lengths if side == "right" else torch.arange(num_tokens) >= num_tokens - lengths
        )
    hidden_states = torch.randn(batch_size, num_tokens, HIDDEN_SIZE, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(batch_size, num_tokens, rotary_dim, dtype=torch.float64)
    upstream = torch.randn(batch_size, num_tokens, HIDDEN_SIZE, dtype=torch.float64)
    inputs = [hidden_states, *heads.parameters()]
    results = {}
    for name in ("reference", "torch"):
        state = RoutingState.build(hidden_states, mask, torch.arange(num_tokens)[None], None, may_be_packed=False)
        with use_backend(name):
            output = heads(hidden_states, (angle.cos(), angle.sin()), state)
        gradients = torch.autograd.grad((output * upstream).sum(), inputs, allow_unused=True)
        results[name] = [
            output,
            *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)),
        ]
        heads.router.threshold.zero_()  # training moved it
    for expected, actual in zip(results["reference"], results["torch"], strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max() < 1e-10 * scale
