"""`torch.compile(fullgraph=True)`: of the forward, of training, and of a decoding step on a static cache."""

import pytest
import torch
from transformers import CompileConfig

from mosa_hf.kernels import compiled
from mosa_hf.kernels.layout import HeadWeights, KeyValues, Tokens

from .conftest import FORMS, MIXED_LAYERS, tiny_model
from .test_static_cache import batch_of

# The default compiler for what users do, a faster one (the same graphs, no code generated) for the variants.
COMPILED = [("selected", None, "inductor"), ("all", None, "inductor"), ("all_no_window", 3, "aot_eager")]
COMPILED += [("selected", 3, "aot_eager"), ("all", 3, "aot_eager")]
pytestmark = pytest.mark.parametrize("name, budget, compiler", COMPILED)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def assert_no_graph_break() -> None:
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_forward(name, budget, compiler):
    model = tiny_model(**FORMS[name], **MIXED_LAYERS, mosa_cache_budget=budget)
    compiled_model = torch.compile(model, fullgraph=True, backend=compiler)
    batch = batch_of()
    for inputs in ({"input_ids": batch["input_ids"]}, batch):
        expected = model(**inputs, use_cache=False).logits
        actual = compiled_model(**inputs, use_cache=False).logits
        real = batch["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        assert (actual - expected)[real].abs().max() < 1e-4
    assert_no_graph_break()


@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
def test_training(name, budget, compiler, routing):
    """Loss, gradients and the threshold's moving average."""
    model = tiny_model(**FORMS[name], num_hidden_layers=2, mosa_routing=routing, mosa_cache_budget=budget).train()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    input_ids = batch_of()["input_ids"]
    results = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.load_state_dict(start)
        model.zero_grad()
        loss = step(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        results.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters()), *map(torch.clone, model.buffers())]
        )
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert_no_graph_break()


@torch.no_grad()
def test_decoding_step(name, budget, compiler):
    """`generate` compiles the step without a graph break, once, and gives the tokens of a plain dynamic cache."""
    model = tiny_model(**FORMS[name], num_hidden_layers=2, mosa_cache_budget=budget)
    compile_config = CompileConfig(fullgraph=True, backend=compiler)
    compile_config._compile_all_devices = True  # upstream compiles on GPUs only unless it is told to
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch_of(), **options)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(**batch_of(), **options, **static), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_no_graph_break()


def test_ops(name, budget, compiler):
    """The registrations hold: schema, fake kernels, autograd."""
    torch.manual_seed(0)
    batch_size, num_tokens, groups, heads, head_dim, hidden_size = 2, 9, 3, 2, 4, 6
    position = torch.arange(num_tokens).expand(batch_size, -1)
    selected = torch.rand(batch_size, num_tokens, groups) < 0.5
    until = None if budget is None else (position + budget)[..., None].expand_as(selected).contiguous()
    angle = torch.rand(batch_size, num_tokens, head_dim)
    gate = torch.rand(selected.shape, requires_grad=True)
    tokens = Tokens(position, None, None, angle.cos(), angle.sin(), selected, gate, None, until)
    if name == "selected":
        sizes = [(heads * head_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size)]
        sizes += [(hidden_size, heads * head_dim)]
        weights = HeadWeights(*(torch.randn(groups, *size, requires_grad=True) for size in sizes))
        hidden_states = torch.randn(batch_size, num_tokens, hidden_size, requires_grad=True)
        op, inputs = torch.ops.mosa.selected_heads.default, compiled.selected_inputs(hidden_states, weights, tokens)
    else:
        states = [torch.randn(batch_size, groups, num_tokens, head_dim, requires_grad=True) for _ in range(2)]
        query = torch.randn(batch_size, groups, heads, num_tokens, head_dim, requires_grad=True)
        turned = (x if x is None else x.transpose(1, 2) for x in (selected, until))
        near = KeyValues(*states, position[:, None].expand(-1, groups, -1), None, *turned)
        bias = -torch.rand(batch_size, groups, num_tokens)
        op, inputs = torch.ops.mosa.all_attention.default, compiled.all_inputs(query, near, tokens, 3, bias)
    torch.library.opcheck(op, inputs)
