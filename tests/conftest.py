"""What the tests share: tiny models, and the real one."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports Triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mosa_hf import MosaConfig, MosaForCausalLM  # noqa: E402

collect_ignore = ["upstream"]  # suites to inherit from: `test_upstream.py` does

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_mosa_heads": 6,
    "num_mosa_key_value_heads": 3,
    "mosa_sparsity": 4,
    "initializer_range": 0.3,  # large, so that what heads do shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FORMS = {
    "selected": {"mosa_query_tokens": "selected"},
    "all": {"mosa_query_tokens": "all", "mosa_window": 5},
    "all_no_window": {"mosa_query_tokens": "all", "mosa_window": 0},
}
# A layer without MoSA heads, one without dense heads, one with both.
MIXED_LAYERS = {
    "per_layer_config": {
        0: {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0},
        1: {"num_attention_heads": 0, "num_key_value_heads": 0},
    }
}


@pytest.fixture(params=FORMS)
def form(request) -> dict:
    return FORMS[request.param]


def tiny_config(**fields) -> MosaConfig:
    return MosaConfig(**{**TINY, **fields})


def tiny_model(seed: int = 0, **fields) -> MosaForCausalLM:
    torch.manual_seed(seed)
    return MosaForCausalLM(tiny_config(**fields)).eval()
