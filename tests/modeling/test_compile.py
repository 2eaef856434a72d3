"""`torch.compile(fullgraph=True)`: of the forward, of training, and of a decoding step on a static cache."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from torch.export import Dim
from transformers import CompileConfig, DynamicCache, StaticCache

from mosa_hf import trace_routing
from mosa_hf.compat import CACHE
from mosa_hf.modeling import forward_context

from ..conftest import PLAN as LAYERS
from ..conftest import native_form, sparse_form
from ..contract import check_same_step, padded_batch, random_ids, training_step

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ONE_LAYER = {"num_hidden_layers": 1}
# Upstream compiles a step twice where layers have a sliding window.
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
PLAN = [[{"window": 5, "sparsity": 4}, None, {"window": 1, "sparsity": 3}], [None] * 3]
# A graph takes as long as it has layers: of two, one has dense heads too.
SPARSE = {"mosa_plan": LAYERS[1:], "num_hidden_layers": 2}
NO_DENSE_HEADS = {0: {"num_attention_heads": 0, "num_key_value_heads": 0}}
FORMS = {
    "native": native_form(num_hidden_layers=2, per_layer_config=NO_DENSE_HEADS),
    "sparse": sparse_form(**SPARSE),
    "softcap": sparse_form("gemma2", attn_logit_softcapping=2.0, mosa_plan=PLAN, **TWO_LAYERS),
    "int8": sparse_form(mosa_cache_dtype="int8", **SPARSE),
    "native, one layer": native_form(**ONE_LAYER),
    "sparse, one layer": sparse_form(mosa_plan=PLAN[:1], **ONE_LAYER),
}
# The same graphs as the compiler that users have, without the C++ that it takes most of a minute to compile.
FAST = "aot_eager"
KINDS = {"growing": DynamicCache, "static": partial(StaticCache, max_cache_len=32)}


def cases(**budgets: int | None) -> pytest.MarkDecorator:
    """These forms with their budgets, and the others on the compiler that users have."""
    variants = ("native", "int8", "softcap")
    own = [
        pytest.param(name, budget, FAST, marks=pytest.mark.slow if name in variants else ())
        for name, budget in budgets.items()
    ]
    slow = [pytest.param(name, None, "inductor", marks=pytest.mark.real) for name in FORMS if "layer" in name]
    return pytest.mark.parametrize("name, budget, compiler", [*own, *slow])


def assert_no_graph_break() -> None:
    assert not torch._dynamo.utils.counters["graph_break"]


@cases(native=3, sparse=3, int8=None, softcap=None)
@torch.no_grad()
def test_forward(name, budget, compiler):
    model = FORMS[name].model(mosa_cache_budget=budget)
    compiled_model = torch.compile(model, fullgraph=True, backend=compiler)
    batch = padded_batch("left")
    for inputs in [{"input_ids": batch["input_ids"]}, batch][compiler != FAST :]:
        expected = model(**inputs, use_cache=False).logits
        actual = compiled_model(**inputs, use_cache=False).logits
        real = batch["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        assert (actual - expected)[real].abs().max() < 1e-4
    assert_no_graph_break()


@pytest.mark.slow
@torch.no_grad()
def test_more_rows_and_a_mask_come_later():
    """A size that has changed once is a symbol, to which that of a mask is compared."""
    model, batch = FORMS["sparse, one layer"].model(), padded_batch("left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows, names in (
        (1, ["input_ids"]),
        (2, ["input_ids", "attention_mask"]),
        (3, ["input_ids", "attention_mask"]),
    ):
        inputs = {name: batch[name][:rows] for name in names}
        expected, actual = (each(**inputs, use_cache=False).logits for each in (model, compiled))
        assert (actual - expected)[batch["attention_mask"][:rows].bool()].abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, budget",
    [("sparse", 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("native", None), ("int8", 3)))],
)
def test_training(name, budget):
    """Loss, gradients and the thresholds' moving average; the native model's auxiliary loss."""
    fields = {"mosa_router_aux_loss_coef": 0.5} if name == "native" else {}
    routing = "threshold" if budget else "expert_choice"
    model = FORMS[name].model(mosa_cache_budget=budget, mosa_routing=routing, **fields)
    expected = training_step(model)
    check_same_step(training_step(model, compiler=FAST), expected)
    assert_no_graph_break()


@cases(native=None, sparse=3, int8=3, softcap=None)
@torch.no_grad()
def test_decoding_step(name, budget, compiler):
    """`generate` compiles the step without a graph break, once, and gives the tokens of a plain dynamic cache."""
    model = FORMS[name].model(mosa_cache_budget=budget)
    compile_config = CompileConfig(fullgraph=True, backend=compiler)
    compile_config._compile_all_devices = True  # upstream compiles on GPUs only unless it is told to
    batch, options = padded_batch("left"), {"max_new_tokens": 6, "do_sample": False}
    del batch["position_ids"]
    expected = model.generate(**batch, **options)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(**batch, **options, **static), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_no_graph_break()


ONCE_MORE = {"sparse": 3, "softcap": None, "int8": None}  # with padding, and a budget


@pytest.mark.parametrize(
    "name, budget, side",
    [
        ("sparse", None, None),
        ("native", None, "left"),
        pytest.param("native", None, None, marks=pytest.mark.slow),
        *(pytest.param(name, x, "left", marks=pytest.mark.slow) for name, x in ONCE_MORE.items()),
    ],
)
@torch.no_grad()
def test_growing_cache(name, budget, side):
    """A part of each call is captured, and a part is not; nor are some of the calls."""
    model = FORMS[name].model(mosa_cache_budget=budget)
    batch = padded_batch("left") if side else {"input_ids": padded_batch("left")["input_ids"]}
    real = batch["attention_mask"].bool() if side else torch.ones_like(batch["input_ids"]).bool()
    compiled, length = torch.compile(model, backend="eager"), real.shape[1]
    expected = model(**batch, use_cache=False).logits
    assert (compiled(**batch).logits - expected)[real].abs().max() < 1e-4
    for models in ((compiled, compiled), (compiled, model), (model, compiled)):
        cache, logits = DynamicCache(config=model.config), []
        for i, (start, end) in enumerate([(0, length - 2), (length - 2, length - 1), (length - 1, length)]):
            own = {key: x[:, (0 if key == "attention_mask" else start) : end] for key, x in batch.items()}
            logits.append(models[i > 0](**own, **{CACHE: cache}).logits)
        assert (torch.cat(logits, dim=1) - expected)[real].abs().max() < 1e-4


@pytest.mark.slow
def test_checkpointing_makes_no_cache(monkeypatch):
    """Upstream's leaves it out, so that nothing has to run uncompiled."""
    model, ids = FORMS["sparse, one layer"].model().train(), padded_batch("left")["input_ids"]
    model.gradient_checkpointing_enable()
    said: list[str] = []
    monkeypatch.setattr(forward_context.logger, "warning_once", said.append)
    torch.compile(model, backend="eager")(ids, labels=ids).loss.backward()
    assert not said and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [pytest.param("native", marks=pytest.mark.slow), "sparse"])
@torch.no_grad()
def test_a_growing_cache_is_no_part_of_a_graph(name, monkeypatch):
    """Its layers run as they are, with one break, and say so; who wants one graph is told how to have it."""
    model, ids = FORMS[name].model(), padded_batch("left")["input_ids"]
    said: list[str] = []
    monkeypatch.setattr(forward_context.logger, "warning_once", said.append)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    tokens = [each.generate(ids, max_new_tokens=4, do_sample=False) for each in (compiled, model)]
    assert torch.equal(*tokens)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert len(breaks) == 1 and "`use_cache=False`, or a static cache" in next(iter(breaks))
    assert "This call's layers run uncompiled" in said[0]
    whole = torch.compile(model.forward, backend="eager", fullgraph=True)
    for options in ({}, {CACHE: DynamicCache(config=model.config)}):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="pass `use_cache=False`, or a static cache"):
            whole(ids, **options)
    assert (whole(ids, use_cache=False).logits - model(ids).logits).abs().max() < 1e-4


DENSE = {
    "native": native_form(num_mosa_heads=0, num_mosa_key_value_heads=0, **ONE_LAYER),
    "sparse": sparse_form(mosa_plan=[[None] * 3], **ONE_LAYER),
}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sparse", "growing"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("sparse", "static"), *product(["native"], KINDS)]),
    ],
)
@torch.no_grad()
def test_a_model_without_sparse_layers_compiles_whole(name, kind):
    """As the original does, with a cache that grows as well; here a step on a cache that was filled before."""
    model, ids = DENSE[name].model(), padded_batch("left")["input_ids"]
    cache, whole = KINDS[kind](config=model.config), torch.compile(model.forward, backend="eager", fullgraph=True)
    model(ids[:, :-1], **{CACHE: cache})
    expected = model(ids, use_cache=False).logits[:, -1:]
    assert (whole(ids[:, -1:], **{CACHE: cache}).logits - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("native", marks=pytest.mark.slow), "sparse"])
@torch.no_grad()
def test_an_exported_program_takes_any_number_of_rows_and_tokens(name):
    """Of other inputs and runtimes: tests/tools/test_export.py."""
    model, ids = FORMS[name].model().double(), padded_batch("left")["input_ids"]
    shapes = {"input_ids": {0: Dim("rows"), 1: Dim("tokens")}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes)
    for other in (ids, random_ids(3, 7), random_ids(1, 30)):
        expected = model(other, use_cache=False).logits
        assert (program.module()(input_ids=other, use_cache=False).logits - expected).abs().max() < 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_a_new_static_cache_is_no_part_of_a_graph():
    """It is upgraded before, by the one line that the error names."""
    model, ids = FORMS["sparse"].model(), padded_batch("left")["input_ids"]
    whole = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call `model\.base_model\.upgrade_cache\(cache\)`"):
        whole(ids, **{CACHE: cache})
    model.base_model.upgrade_cache(cache)
    assert (whole(ids, **{CACHE: cache}).logits - model(ids, use_cache=False).logits).abs().max() < 1e-4


def test_what_a_graph_passes_over_is_not_recorded():
    model = FORMS["sparse"].model()
    with pytest.raises(ValueError, match="`model` is compiled.*trace it uncompiled"):
        with trace_routing(torch.compile(model, backend="eager")):
            pass
    with trace_routing(model) as selected, torch.no_grad():
        model(padded_batch("left")["input_ids"], use_cache=False)
    assert [len(calls) for calls in selected.values()] == [1] * len(selected)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="`model` is compiled"), trace_routing(model):
        pass


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "everything"])
def test_ops(is_plain):
    """The registrations hold: schema, fake kernels, autograd."""
    torch.manual_seed(0)
    batch_size, num_tokens, groups, heads, head_dim, hidden_size = 2, 9, 3, 2, 4, 6

    def learned(*size: int) -> torch.Tensor:
        return torch.randn(*size, requires_grad=True)

    position = torch.arange(num_tokens).expand(batch_size, -1).contiguous()
    valid = segment = evicted_at = None
    if not is_plain:
        valid, segment = position >= torch.tensor([[3], [0]]), position // 5
        evicted_at = (position + 3)[:, None].expand(-1, groups, -1).contiguous()
    selected = torch.rand(batch_size, groups, num_tokens) < 0.5
    sizes = (head_dim, head_dim if is_plain else head_dim + 3)  # of keys, of values
    states = [learned(batch_size, groups, num_tokens, size) for size in sizes]
    optional = [None, None] if is_plain else [-torch.rand(batch_size, groups, num_tokens), learned(groups, heads)]
    numbers = [3, None, None] if is_plain else [3, 0.3, 2.0]
    query = learned(batch_size, groups, heads, num_tokens, head_dim)
    inputs = [query, *states, *optional, position, valid, selected, evicted_at, position, segment, *numbers]
    torch.library.opcheck(torch.ops.mosa.sparse_attention.default, inputs)

    sizes = [(heads * head_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size)]
    weights = [learned(groups, *size) for size in (*sizes, (hidden_size, heads * head_dim))]
    biases = [None] * 3 if is_plain else [learned(groups, size[0]) for size in sizes]
    angle, gate = torch.rand(batch_size, num_tokens, head_dim), torch.rand(batch_size, num_tokens, groups)
    selected, evicted_at = (None if x is None else x.transpose(1, 2).contiguous() for x in (selected, evicted_at))
    tokens = [position, valid, segment, angle.cos(), angle.sin(), selected, gate.requires_grad_(), evicted_at]
    hidden_states = learned(batch_size, num_tokens, hidden_size)
    torch.library.opcheck(torch.ops.mosa.selected_heads.default, [hidden_states, *weights, *biases, *tokens])
