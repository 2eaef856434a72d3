"""The benchmark's rival computes what our heads compute, or a comparison of their speed would mean nothing."""

import pytest
import torch

from benchmarks.paper_layer import PaperLayer
from mosa_hf.modeling.heads import MosaHeads, RoutingState

from .conftest import tiny_config


def heads_of_the_paper(**fields) -> MosaHeads:
    torch.manual_seed(0)
    fields = {"num_mosa_heads": 3, "mosa_sparsity": 4, "mosa_include_first": False, **fields}
    heads = MosaHeads(tiny_config(hidden_size=16, **fields), 0).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def test_same_function():
    heads = heads_of_the_paper()
    hidden_states = torch.randn(2, 50, 16, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(2, 50, 4, dtype=torch.float64)
    position = torch.arange(50).expand(2, -1)
    state = RoutingState.build(hidden_states, None, position, None, may_be_packed=False)
    inputs = [hidden_states, *heads.parameters()]
    expected = heads(hidden_states, (angle.cos(), angle.sin()), state)
    actual = PaperLayer(heads)(hidden_states, angle.cos(), angle.sin())
    # The paper's layer routes in float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    for pair in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"mosa_query_tokens": "all"},
        {"num_mosa_heads": 6},
        {"attention_bias": True},
    ],
)
def test_other_heads_are_refused(fields):
    with pytest.raises(ValueError, match="one query head a group"):
        PaperLayer(heads_of_the_paper(**fields))
