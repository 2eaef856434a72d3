"""The benchmark's baseline computes what our heads compute, or a comparison of their speed would mean nothing."""

import pytest
import torch

from benchmarks.speed.paper_layer import PaperLayer
from benchmarks.speed.training import heads_and_baseline, largest_errors
from mosa_hf.modeling.heads import MosaHeads

from ..conftest import tiny_config


def test_same_function():
    shape = {"batch_size": 2, "num_tokens": 50, "num_groups": 3, "sparsity": 4}
    ours, baseline, inputs = heads_and_baseline(**shape, dtype=torch.float64)
    for name, error in largest_errors(ours, baseline, inputs).items():
        assert error < 1e-12, name


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_mosa_heads": 6, "num_mosa_key_value_heads": 3}, "one query head a group"),
        ({"attention_bias": True}, "no biases"),
        ({"mosa_router_bias": True}, "no biases"),
        ({"mosa_include_first": True}, "by expert choice alone"),
        ({"mosa_routing": "threshold"}, "by expert choice alone"),
    ],
)
def test_other_heads_are_refused(fields, message):
    fields = {"num_mosa_heads": 3, "num_mosa_key_value_heads": 3, "mosa_include_first": False, **fields}
    with pytest.raises(ValueError, match=message):
        PaperLayer(MosaHeads(tiny_config(**fields)))
