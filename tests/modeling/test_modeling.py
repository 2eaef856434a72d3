"""The models as a Transformers user meets them."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, set_seed

from mosa_hf import (
    ConversionConfig,
    MosaConfig,
    MosaForCausalLM,
    convert_model,
    to_dense,
    trace_routing,
    use_backend,
)
from mosa_hf.modeling import attention
from testing.difference import max_difference

from ..conftest import FORMS, MIXED_LAYERS, SHAPE, native_form, sparse_form, tiny_llama, tiny_model
from ..contract import (
    check_packed,
    check_parity,
    check_same_step,
    check_saving,
    check_training,
    in_chunks,
    largest_leak,
    padded_batch,
    random_ids,
    training_step,
)

ROUTINGS = ["expert_choice", "threshold"]
HALF_ROTARY = {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
BIASES = {"attention_bias": True, "mosa_router_bias": True}
ONE_WINDOW = {"mosa_plan": None, "mosa_window": 5, "mosa_sparsity": 4}
NO_WINDOW = {"mosa_plan": None, "mosa_window": 0, "mosa_sparsity": 4}
VARIANTS = {
    "native": native_form(),
    "native mixed": FORMS["native"],
    "native local": native_form(sliding_window=6),
    "native half rotary": native_form(**HALF_ROTARY),
    "native biased": native_form(**BIASES, **MIXED_LAYERS),
    "sparse": FORMS["sparse"],
    "sparse, one window": sparse_form(**ONE_WINDOW),
    "sparse, no window": sparse_form(**NO_WINDOW),
    "sparse biased": sparse_form(**BIASES),
    "sparse, MLP routers": sparse_form(mosa_router_hidden_size=20),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", [0, 1])
def test_parity(variant, case):
    """Each variant with either kind of padding, once with a budget."""
    number = list(VARIANTS).index(variant) + case
    # Upstream's sliding windows count padding in the midst of a row.
    padding = "left" if case or variant == "native local" else "anywhere"
    check_parity(VARIANTS[variant].model(mosa_cache_budget=3 if number % 2 else None), padding, seed=number)


@torch.no_grad()
def test_parity_on_a_cache_with_sliding_layers():
    model, batch = tiny_model(sliding_window=6), padded_batch()
    full = model(**batch, use_cache=False).logits
    assert max_difference(full, in_chunks(model, batch, [9, 1, 1], DynamicCache(config=model.config)), batch) < 1e-4


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("variant", ["native local", "native mixed", "sparse", "sparse, no window"])
def test_packed_sequences_equal_the_sequences_alone(variant, routing, budget):
    check_packed(VARIANTS[variant].model(mosa_inference_routing=routing, mosa_cache_budget=budget))


def test_future_tokens_do_not_leak_through_threshold_selection(form):
    """Expert choice does leak, so the test is known to bite."""
    for budget in (None, 3, 1):
        assert largest_leak(form.model(mosa_cache_budget=budget)) <= 1e-6
    assert largest_leak(form.model(mosa_inference_routing="expert_choice")) > 1e-2


@pytest.mark.parametrize("routing, padding", [("expert_choice", "left"), ("threshold", "anywhere")])
@pytest.mark.parametrize("budget", [None, 3])
def test_training_step(form, routing, padding, budget):
    # A fast average: a layer that ran twice, to recompute, would select other tokens the second time.
    model = form.model(mosa_routing=routing, mosa_threshold_momentum=0.1, mosa_cache_budget=budget)
    check_training(model, padding)


def test_training_step_of_mlp_routers():
    check_training(VARIANTS["sparse, MLP routers"].model(mosa_threshold_momentum=0.1), "anywhere")


def test_training_without_a_gate_computes_what_evaluation_does():
    """So do the keys' margins over a gate so steep that it is a step."""
    batch, form = padded_batch("left"), FORMS["sparse"]
    expected = form.model()(**batch, use_cache=False).logits
    for slope, is_same in ((0, True), (1e5, True), (1, False)):
        model = form.model(mosa_gate_slope=slope).train()
        difference = max_difference(model(**batch, use_cache=False).logits, expected, batch)
        assert (difference < 1e-3) == is_same, slope
        thresholds = {name: buffer for name, buffer in model.named_buffers() if name.endswith("threshold")}
        fresh = dict(form.model().named_buffers())  # without a gradient, routers stay, and so do thresholds
        assert all(torch.equal(buffer, fresh[name]) for name, buffer in thresholds.items()) == (slope == 0)


def test_the_gate_is_the_logarithm_of_the_sigmoid_of_the_margin(monkeypatch):
    """Log σ(slope · (z − θ)); none for the first token, which has no margin to speak of."""
    model, gates = sparse_form(**ONE_WINDOW, mosa_gate_slope=0.7).model(), []
    thresholds = [router.threshold.clone() for router in model.mosa_routers().values()]
    inner = attention.sparse_attention

    def record(query, read, layout, window, gate, **options):
        gates.append(gate)
        return inner(query, read, layout, window, gate, **options)

    monkeypatch.setattr(attention, "sparse_attention", record)
    logits = []
    for router in model.mosa_routers().values():
        router.register_forward_hook(lambda module, args, output: logits.append(output))
    model.train()(random_ids(2, 20), use_cache=False)
    for gate, (z, selected), threshold in zip(gates, logits, thresholds, strict=True):
        expected = torch.log(torch.sigmoid(0.7 * (z - threshold)))
        expected[:, 0] = 0
        expected[~selected] = 0  # read by no query that has a bias
        torch.testing.assert_close(gate, expected)
    model.eval()(random_ids(2, 20))
    assert gates[3:] == [None] * 3  # evaluation has none


@pytest.mark.parametrize(
    "plan",
    [
        ONE_WINDOW | {"mosa_sparsity": 1},
        {"mosa_plan": [[{"window": 3, "sparsity": 1}, *[{"window": 3, "sparsity": 4}] * 2]] * 3},
    ],
)
def test_groups_that_keep_everything_have_no_margin(plan):
    """Training computes what evaluation does of them, and no gradient reaches the rows of their routers."""
    model, batch = sparse_form(**plan).model(), padded_batch("left")
    for router in model.mosa_routers().values():  # the others select nothing that a query would read from afar
        router.threshold.fill_(torch.inf)
    expected = model(**batch, use_cache=False).logits
    logits = model.train()(**batch, use_cache=False).logits
    assert max_difference(logits, expected, batch) < 1e-4
    logits.square().sum().backward()
    for router in model.mosa_routers().values():
        assert router.weight.grad is None or not router.weight.grad[0].any()


def test_training_step_with_the_auxiliary_loss():
    model = tiny_model(mosa_router_aux_loss_coef=0.5, **BIASES)
    for options in ({}, {"use_reentrant": False}):
        with use_backend("reference"):
            expected = training_step(model, "anywhere")
        check_same_step(training_step(model, "anywhere", **options), expected)
    assert expected[0] > training_step(tiny_model(**BIASES), "anywhere")[0] + 0.1


@pytest.mark.parametrize("routing", ROUTINGS)
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(["native", "sparse"]),
    training=st.booleans(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right", "packed"]),
    num_groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 3),
    sparsity=st.sampled_from([1, 1.5, 3, 8]),
    window=st.integers(0, 9),
    budget=st.sampled_from([None, 1, 3, 8]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_backends_agree(
    routing, form, training, lengths, side, num_groups, heads_per_group, sparsity, window, budget, flags, seed
):  # fmt: skip
    """Outputs and all gradients of random layers, in float64."""
    heads = {"num_attention_heads": num_groups * heads_per_group, "num_key_value_heads": num_groups}
    fields = {"mosa_plan": None, "mosa_window": window, "attention_bias": flags[2]}
    if form == "native":
        heads = {"num_mosa_heads": num_groups * heads_per_group, "num_mosa_key_value_heads": num_groups}
        fields = {"attention_bias": flags[2]}
    model = {"native": native_form, "sparse": sparse_form}[form]().model(
        seed,
        num_hidden_layers=1,
        hidden_size=24 * num_groups,
        mosa_sparsity=sparsity,
        mosa_routing=routing,
        mosa_inference_routing=routing,
        mosa_cache_budget=budget,
        mosa_include_first=flags[0],
        mosa_router_bias=flags[1],
        **heads,
        **fields,
    )
    model = model.double().train(training)
    mask, real = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    for row, length in enumerate(lengths):
        mask[row, slice(None, length) if side == "right" else slice(max(lengths) - length, None)] = 1
    inputs, real = {"input_ids": random_ids(*mask.shape, seed=seed), "attention_mask": mask}, mask[..., None]
    if side == "packed":
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        inputs, real = {"input_ids": random_ids(*position_ids.shape), "position_ids": position_ids}, 1
    results = []
    for name in ("reference", "torch"):
        twin = copy.deepcopy(model)
        with use_backend(name):
            logits = twin(**inputs, use_cache=False).logits * real
        loss = (logits * torch.sin(torch.arange(logits.numel()).view_as(logits))).sum()
        learned = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
        gradients = [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
        results.append([logits, *gradients, *twin.buffers()])
    for expected, actual in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("mask", ["4d_bool", "4d_float"])
@torch.no_grad()
def test_mask_formats(form, mask):
    model, batch = form.model(), padded_batch("left")
    expected = model(**batch, use_cache=False).logits
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    four = causal if mask == "4d_bool" else torch.zeros(causal.shape).masked_fill(~causal, torch.finfo().min)
    actual = model(**batch | {"attention_mask": four}, use_cache=False).logits
    assert max_difference(actual, expected, batch) < 1e-5


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(form):
    model, input_ids = form.model(), random_ids(2, 20)
    assert torch.equal(model(input_ids, attention_mask=torch.ones(2, 20)).logits, model(input_ids).logits)


def test_expert_choice_cannot_be_decoded(form):
    input_ids, model = random_ids(1, 8), form.model(mosa_inference_routing="expert_choice")
    with pytest.raises(ValueError, match="mosa_inference_routing='expert_choice'.*mosa_inference_routing='threshold'"):
        model.generate(input_ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        cache = model(input_ids, use_cache=True).past_key_values
        model(input_ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="`mosa_routing='expert_choice'`.*model.eval()"):
        form.model(mosa_routing="expert_choice").train().generate(input_ids, max_new_tokens=2)


def test_mosa_attention_on_a_stock_model():
    model = tiny_llama()
    model.set_attn_implementation("mosa")
    with pytest.raises(ValueError, match="LlamaAttention has no MoSA heads.*mosa-convert"):
        model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("variant", ["native local", "native mixed", "sparse"])
@torch.no_grad()
def test_attention_implementations_agree(variant):
    model, batch = VARIANTS[variant].model(), padded_batch()
    assert model.config._attn_implementation == "sdpa"
    expected = model(**batch).logits
    for implementation in ("eager", "mosa", "sdpa"):
        model.set_attn_implementation(implementation)
        assert max_difference(model(**batch).logits, expected, batch) < 1e-4, implementation


@torch.no_grad()
def test_attentions_are_the_dense_heads():
    """Of the native model, where every layer has some: one entry a layer, the weights that it computed with."""
    model, seen = native_form().model(), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model.set_attn_implementation("eager")
    output = model(random_ids(2, 9), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 9, 9)] * 3
    assert all(a is b for a, b in zip(output.attentions, seen, strict=True))
    assert len(output.hidden_states) == 4


def test_attentions_that_do_not_exist_are_refused(form):
    """By every way to ask, before anything is computed; each model has layers without and with dense heads."""
    missing = [1] if form is FORMS["native"] else [1, 2]
    refused = pytest.raises(ValueError, match=rf"layers \[{', '.join(map(str, missing))}\].*`mosa_hf.trace_routing")
    model = form.model()
    model.set_attn_implementation("eager")
    computed = []
    model.model.layers[0].register_forward_hook(lambda *_: computed.append(True))
    for ask in (model, model.model):
        with refused:
            ask(random_ids(1, 9), output_attentions=True)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"do_sample": True}):
        with refused:
            model.generate(
                random_ids(1, 9), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, **options
            )
    model.config.output_attentions = True
    with refused:
        model(random_ids(1, 9))
    assert not computed
    assert model(random_ids(1, 9), output_attentions=False).attentions is None  # an argument overrides the config
    for build in (form.model_class, form.causal_lm_class, form.classifier_class):
        with refused:
            build(form.config(output_attentions=True))


def test_attentions_of_dense_groups_alone_are_refused():
    model = FORMS["sparse"].model(mosa_plan=[[None] * 3] * 3)
    with pytest.raises(ValueError, match="MosaLlama model whose groups are all dense.*`mosa_hf.to_dense"):
        model(random_ids(1, 9), output_attentions=True)


def test_asking_for_attentions_as_a_model_is_loaded_or_converted(tmp_path):
    FORMS["sparse"].model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no matrix of attention weights"):
        FORMS["sparse"].causal_lm_class.from_pretrained(tmp_path, output_attentions=True)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, output_attentions=True))
    with pytest.raises(ValueError, match="no matrix of attention weights"):
        convert_model(base, ConversionConfig(sparsity=1))
    base.config.output_attentions = False
    assert to_dense(convert_model(base, ConversionConfig(sparsity=1))).config.output_attentions is False


@torch.no_grad()
def test_router_logits_and_selections():
    model, batch = FORMS["native"].model(), padded_batch("anywhere")
    with trace_routing(model) as selected:
        output = model(**batch, output_router_logits=True, use_cache=False)
        in_chunks(model, batch, [6, 1], DynamicCache())
    assert [tuple(z.shape) for z in output.router_logits] == [(5, 25, 3)] * 2
    assert list(selected) == [1, 2]
    for logits, layer in zip(output.router_logits, (1, 2), strict=True):
        expected = logits >= model.model.layers[layer].self_attn.mosa.router.threshold
        valid = batch["attention_mask"].bool()
        expected |= ((batch["position_ids"] == 0) & valid)[..., None]
        assert torch.equal(selected[layer][0], expected & valid[..., None])
        assert torch.equal(torch.cat(selected[layer][1:], dim=1), selected[layer][0])


@torch.no_grad()
def test_trace_routing_of_sparse_groups():
    model, input_ids = FORMS["sparse"].model(), random_ids(2, 30)
    with trace_routing(model) as selected:
        model(input_ids, use_cache=False)
        model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert {layer: [tuple(call.shape) for call in calls] for layer, calls in selected.items()} == {
        layer: [(2, 30, groups)] * 2 + [(2, 1, groups)] * 2 for layer, groups in ((1, 3), (2, 2))
    }
    with pytest.raises(ValueError, match="has no MoSA heads"), trace_routing(torch.nn.Linear(1, 1)):
        pass


@torch.no_grad()
def test_logits_to_keep(form):
    model, input_ids = form.model(), random_ids(2, 9)
    full = model(input_ids).logits
    for kept, expected in ((2, full[:, -2:]), (torch.tensor([0, 4]), full[:, [0, 4]])):
        assert torch.allclose(model(input_ids, logits_to_keep=kept).logits, expected, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@torch.no_grad()
def test_half_precision(form, dtype, tolerance, tmp_path):
    """Loads in half precision with routers in float32, and computes what float32 computes, roughly."""
    model, batch = form.model(1, initializer_range=0.1), padded_batch()
    model.save_pretrained(tmp_path)
    half = form.causal_lm_class.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if "router." in name else dtype), name
    logits = half(**batch).logits
    assert logits.dtype == dtype
    difference = (logits.float() - model(**batch).logits)[batch["attention_mask"].bool()].abs()
    assert difference.mean() < tolerance  # the logits' spread is about 0.5
    half.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_reload(form, tied, tmp_path):
    check_saving(form, tmp_path, tie_word_embeddings=tied)


@pytest.mark.parametrize("variant", ["native biased", "sparse biased", "sparse, MLP routers"])
@torch.no_grad()
def test_initialisation(variant):
    """Every weight is initialised, and thresholds give about the rate that is asked for before any training."""
    set_seed(0)
    form = VARIANTS[variant]
    model = form.causal_lm_class(form.config(initializer_range=0.02, hidden_size=96, mosa_sparsity=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            assert 0.015 < parameter.std() < 0.025, name
    with trace_routing(model.eval()) as selected:
        model(random_ids(8, 64))
    rates = [calls[0].float().mean().item() for calls in selected.values()]
    assert all(0.15 < rate < 0.45 for rate in rates), rates  # one in three or four


def test_inputs_embeds(form):
    model, batch = form.model(), padded_batch("anywhere")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    expected = model(**batch).logits
    batch["input_ids"], input_ids = None, batch["input_ids"]
    actual = model(**batch, inputs_embeds=embeds).logits
    assert max_difference(actual, expected, batch) < 1e-5
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)


def test_sequence_classification(form):
    torch.manual_seed(0)
    model = form.classifier_class(form.config(num_labels=3)).eval()
    lengths = (15, 6)
    mask = (torch.arange(15) < torch.tensor(lengths)[:, None]).long()
    input_ids = random_ids(2, 15) * mask
    together = model(input_ids, attention_mask=mask).logits
    alone = [model(ids[None, :length]).logits[0] for ids, length in zip(input_ids, lengths, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    model.train()(input_ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    routers = [parameter for name, parameter in model.named_parameters() if "router.weight" in name]
    assert routers and all(weight.grad.abs().max() > 0 for weight in routers)


def same_as_llama(model, llama) -> None:
    model.load_state_dict(llama.state_dict())
    input_ids = random_ids(2, 20)
    assert torch.allclose(model(input_ids).logits, llama(input_ids).logits, atol=1e-5)
    tokens = [each.generate(input_ids, max_new_tokens=5, do_sample=False) for each in (model, llama)]
    assert torch.equal(*tokens)


def test_a_model_of_dense_heads_only_is_llama():
    same_as_llama(MosaForCausalLM(MosaConfig(**SHAPE, num_mosa_heads=0)).eval(), tiny_llama())


def test_a_plan_of_dense_groups_only_is_llama():
    same_as_llama(sparse_form(**SHAPE, mosa_plan=[[None] * 2] * 3).model(), tiny_llama())


@torch.no_grad()
def test_groups_that_keep_every_token_are_dense():
    """At ρ = 1, whatever the thresholds are, sparse groups compute what Llama computes."""
    model = sparse_form(**NO_WINDOW | {"mosa_sparsity": 1}).model()
    llama = tiny_llama(num_attention_heads=6, num_key_value_heads=3)
    missing, unexpected = model.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected and all("mosa_router" in name for name in missing)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(torch.inf)
    batch = padded_batch("left")
    assert max_difference(model(**batch).logits, llama(**batch).logits, batch) < 1e-4
