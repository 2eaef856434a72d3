"""`torch.compile(fullgraph=True)`: of the forward, of training, and of a decoding step on a static cache."""

import pytest
import torch
from transformers import CompileConfig

from .conftest import FORMS, sparse_form
from .contract import check_same_step, padded_batch, random_ids, training_step

# Softcap, a layer with a sliding window, and scale.
GEMMA2 = sparse_form(
    "gemma2",
    query_pre_attn_scalar=16,
    attn_logit_softcapping=2.0,
    layer_types=["full_attention", "sliding_attention"],
    sliding_window=4,
    mosa_plan=[[{"window": 5, "sparsity": 4}, None, {"window": 1, "sparsity": 3}], [None] * 3],
    num_hidden_layers=2,
)
# The default compiler for what users do, a faster one (the same graphs, no code generated) for the variants.
CASES = {
    "native": (FORMS["native"], None, "inductor"),
    "sparse": (FORMS["sparse"], None, "inductor"),
    "native, budget": (FORMS["native"], 3, "aot_eager"),
    "sparse, budget": (FORMS["sparse"], 3, "aot_eager"),
    "softcap": (GEMMA2, None, "aot_eager"),
}
every_case = pytest.mark.parametrize("form, budget, compiler", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def assert_no_graph_break() -> None:
    assert not torch._dynamo.utils.counters["graph_break"]


@every_case
@torch.no_grad()
def test_forward(form, budget, compiler):
    model = form.model(mosa_cache_budget=budget)
    compiled_model = torch.compile(model, fullgraph=True, backend=compiler)
    batch = padded_batch("left")
    for inputs in ({"input_ids": batch["input_ids"]}, batch):
        expected = model(**inputs, use_cache=False).logits
        actual = compiled_model(**inputs, use_cache=False).logits
        real = batch["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        assert (actual - expected)[real].abs().max() < 1e-4
    assert_no_graph_break()


@every_case
def test_training(form, budget, compiler):
    """Loss, gradients and the thresholds' moving average."""
    model = form.model(mosa_cache_budget=budget, mosa_routing="threshold" if budget else "expert_choice")
    expected = training_step(model)
    check_same_step(training_step(model, compiler="aot_eager"), expected)
    assert_no_graph_break()


@every_case
@torch.no_grad()
def test_decoding_step(form, budget, compiler):
    """`generate` compiles the step without a graph break, once, and gives the tokens of a plain dynamic cache."""
    model = form.model(mosa_cache_budget=budget)
    compile_config = CompileConfig(fullgraph=True, backend=compiler)
    compile_config._compile_all_devices = True  # upstream compiles on GPUs only unless it is told to
    batch, options = padded_batch("left"), {"max_new_tokens": 6, "do_sample": False}
    del batch["position_ids"]
    expected = model.generate(**batch, **options)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(**batch, **options, **static), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_no_graph_break()


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "everything"])
def test_ops(is_plain):
    """The registrations hold: schema, fake kernels, autograd."""
    torch.manual_seed(0)
    batch_size, num_tokens, groups, heads, head_dim, hidden_size = 2, 9, 3, 2, 4, 6

    def learned(*size: int) -> torch.Tensor:
        return torch.randn(*size, requires_grad=True)

    position = torch.arange(num_tokens).expand(batch_size, -1).contiguous()
    valid = segment = until = None
    if not is_plain:
        valid, segment = position >= torch.tensor([[3], [0]]), position // 5
        until = (position + 3)[:, None].expand(-1, groups, -1).contiguous()
    selected = torch.rand(batch_size, groups, num_tokens) < 0.5
    states = [learned(batch_size, groups, num_tokens, head_dim) for _ in range(2)]
    optional = [None, None] if is_plain else [-torch.rand(batch_size, groups, num_tokens), learned(groups, heads)]
    numbers = [3, None, None] if is_plain else [3, 0.3, 2.0]
    query = learned(batch_size, groups, heads, num_tokens, head_dim)
    inputs = [query, *states, *optional, position, valid, selected, until, position, segment, *numbers]
    torch.library.opcheck(torch.ops.mosa.sparse_attention.default, inputs)

    sizes = [(heads * head_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size)]
    weights = [learned(groups, *size) for size in (*sizes, (hidden_size, heads * head_dim))]
    biases = [None] * 3 if is_plain else [learned(groups, size[0]) for size in sizes]
    angle, gate = torch.rand(batch_size, num_tokens, head_dim), torch.rand(batch_size, num_tokens, groups)
    selected, until = (None if x is None else x.transpose(1, 2).contiguous() for x in (selected, until))
    tokens = [position, valid, segment, angle.cos(), angle.sin(), selected, gate.requires_grad_(), until]
    hidden_states = learned(batch_size, num_tokens, hidden_size)
    torch.library.opcheck(torch.ops.mosa.selected_heads.default, [hidden_states, *weights, *biases, *tokens])
