"""The model as a Transformers user meets it: parity, causality, padding, saving, training hooks."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, set_seed

from mosa_hf import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel, trace_routing, use_backend

from .conftest import MIXED_LAYERS, TINY, tiny_config, tiny_model

ROUTINGS = ["expert_choice", "threshold"]
LAYERS = {
    "uniform": {},
    "mixed": MIXED_LAYERS,
    "local": {"sliding_window": 6},
    "half_rotary": {
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "biased": {"attention_bias": True, "mosa_router_bias": True, **MIXED_LAYERS},
}


def padded_batch(side: str, lengths=(37, 24, 1), seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of random tokens with padding on one side, with the positions that `generate` would give them."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    if side == "right":
        mask = mask.flip(1)
    input_ids = torch.randint(1, TINY["vocab_size"], mask.shape, generator=generator) * mask
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def in_chunks(model, batch: dict[str, torch.Tensor], sizes: list[int], cache=None) -> torch.Tensor:
    """Logits of a batch fed chunk by chunk on one cache, as a hand-written loop does it."""
    logits, end = [], 0
    while end < batch["input_ids"].shape[1]:
        start, end = end, end + sizes[len(logits) % len(sizes)]
        output = model(
            batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            position_ids=batch["position_ids"][:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def max_difference(a: torch.Tensor, b: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    return (a - b)[batch["attention_mask"].bool()].abs().max().item()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [None, 3])
@torch.no_grad()
def test_decode_parity(form, layers, side, budget):
    """
    Full forward == prefill and one token at a time == any chunking == each row alone, on growing and on static caches
    (threshold routing).
    """
    for seed in range(2):
        model = tiny_model(seed, **form, **LAYERS[layers], mosa_cache_budget=budget)
        batch = padded_batch(side, seed=seed)
        full = model(**batch, use_cache=False).logits
        with use_backend("reference"):
            assert max_difference(full, model(**batch, use_cache=False).logits, batch) < 1e-4
        for sizes in ([20, 1, 1, 1, 1, 1], [1], [7], [5, 1, 11]):
            assert max_difference(full, in_chunks(model, batch, sizes), batch) < 1e-4, sizes
            static = StaticCache(config=model.config, max_cache_len=37)
            assert max_difference(full, in_chunks(model, batch, sizes, static), batch) < 1e-4, sizes
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = model(batch["input_ids"][row : row + 1, mask], use_cache=False).logits[0]
            assert (full[row, mask] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("cache", [DynamicCache, lambda: DynamicCache(config=tiny_config(sliding_window=6))])
@torch.no_grad()
def test_parity_on_a_cache_of_the_users(form, cache):
    model = tiny_model(**form, sliding_window=6)
    batch = padded_batch("left")
    full = model(**batch, use_cache=False).logits
    assert max_difference(full, in_chunks(model, batch, [9, 1, 1], cache()), batch) < 1e-4


@torch.no_grad()
def test_continuing_a_right_padded_batch(form):
    """Padding between the turns of a conversation leaves no trace."""
    model = tiny_model(**form)
    first, second = padded_batch("right", (12, 7)), padded_batch("left", (9, 5), seed=1)
    offset = first["attention_mask"].sum(1, keepdim=True)
    batch = {
        "input_ids": torch.cat((first["input_ids"], second["input_ids"]), dim=1),
        "attention_mask": torch.cat((first["attention_mask"], second["attention_mask"]), dim=1),
        "position_ids": torch.cat((first["position_ids"], second["position_ids"] + offset), dim=1),
    }
    together = in_chunks(model, batch, [12, 9])
    assert max_difference(together, model(**batch, use_cache=False).logits, batch) < 1e-4
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][row : row + 1, mask], use_cache=False).logits[0]
        assert (together[row, mask] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("budget", [None, 2])
@torch.no_grad()
def test_packed_sequences_equal_the_sequences_alone(form, routing, budget):
    model = tiny_model(**form, mosa_inference_routing=routing, sliding_window=6, mosa_cache_budget=budget)
    lengths = [9, 1, 20, 4]
    input_ids = torch.randint(1, 97, (1, sum(lengths)))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids, position_ids=position_ids, use_cache=False).logits[0]
    alone = [model(ids, use_cache=False).logits[0] for ids in input_ids.split(lengths, dim=1)]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_future_tokens_do_not_leak_through_threshold_selection(form, routing):
    """
    Every logit before a changed token stays. Expert choice does leak, so the test is known to bite. In float64, where
    rounding (matmuls of other sizes) cannot be mistaken for a leak.
    """
    leaks = []
    for seed in range(3):
        budget = (None, 3, 1)[seed]
        model = tiny_model(seed, **form, mosa_inference_routing=routing, mosa_cache_budget=budget).double()
        input_ids = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids, use_cache=False).logits
        for changed in (5, 21, 39):
            others = input_ids.clone()
            others[:, changed:] = torch.randint(1, 97, (1, 40 - changed))
            leaks.append((model(others, use_cache=False).logits - logits)[:, :changed].abs().max().item())
    if routing == "threshold":
        assert max(leaks) <= 1e-6
    else:
        assert max(leaks) > 1e-2


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_gradients_equal_the_reference(form, routing, side):
    batch = padded_batch(side, (30, 13))
    results = []
    for name in ("reference", "torch"):
        model = tiny_model(**form, **MIXED_LAYERS, mosa_routing=routing, mosa_router_aux_loss_coef=0.1).train()
        with use_backend(name):
            # Not the first token either: with padding before it, its prediction is padding's own output.
            ignored = (batch["attention_mask"] == 0) | (batch["position_ids"] == 0)
            labels = batch["input_ids"].masked_fill(ignored, -100)
            output = model(**batch, labels=labels)
            output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output.loss, gradients, dict(model.named_buffers())))
    (loss, gradients, buffers), (torch_loss, torch_gradients, torch_buffers) = results
    assert abs(loss - torch_loss) < 1e-5
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} gets no gradient"
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - torch_gradients[name]).abs().max() < 1e-5 * scale, name
    for name, buffer in buffers.items():
        assert torch.allclose(buffer, torch_buffers[name], atol=1e-6), name


@pytest.mark.parametrize("mask", ["4d_bool", "4d_float", "ones"])
@torch.no_grad()
def test_mask_formats(form, mask):
    model = tiny_model(**form)
    batch = padded_batch("left" if mask != "ones" else "right", (20, 11) if mask != "ones" else (20, 20))
    expected = model(**batch, use_cache=False).logits
    if mask == "ones":
        actual = model(batch["input_ids"], use_cache=False).logits
    else:
        keys = batch["attention_mask"].bool()[:, None, None, :]
        causal = torch.ones(20, 20, dtype=torch.bool).tril() & keys
        four = causal if mask == "4d_bool" else torch.zeros(causal.shape).masked_fill(~causal, torch.finfo().min)
        actual = model(
            batch["input_ids"], attention_mask=four, position_ids=batch["position_ids"], use_cache=False
        ).logits
    assert max_difference(actual, expected, batch) < 1e-5


@pytest.mark.parametrize("layers", ["uniform", "mixed"])
def test_generate_equals_a_plain_loop(form, layers):
    model = tiny_model(**form, **LAYERS[layers])
    batch = padded_batch("left", (12, 5))
    batch.pop("position_ids")
    tokens = model.generate(**batch, max_new_tokens=15, do_sample=False)
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(15):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    assert torch.equal(tokens, input_ids)
    assert torch.equal(tokens, model.generate(**batch, max_new_tokens=15, do_sample=False, prefill_chunk_size=4))


def test_generate_refuses_expert_choice():
    input_ids = torch.randint(1, 97, (1, 8))
    model = tiny_model(mosa_inference_routing="expert_choice")
    with pytest.raises(ValueError, match="mosa_inference_routing='expert_choice'.*mosa_inference_routing='threshold'"):
        model.generate(input_ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        cache = model(input_ids, use_cache=True).past_key_values
        model(input_ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="`mosa_routing='expert_choice'`.*model.eval()"):
        tiny_model().train().generate(input_ids, max_new_tokens=2)


def test_mosa_attention_on_a_stock_model():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model.set_attn_implementation("mosa")
    with pytest.raises(ValueError, match="LlamaAttention has no MoSA heads.*mosa-convert"):
        model(torch.ones(1, 4, dtype=torch.long))


@torch.no_grad()
def test_attention_implementations_agree(form):
    model = tiny_model(**form, sliding_window=6)
    batch = padded_batch("left")
    assert model.config._attn_implementation == "sdpa"
    expected = model(**batch).logits
    for implementation in ("eager", "mosa", "sdpa"):
        model.set_attn_implementation(implementation)
        assert max_difference(model(**batch).logits, expected, batch) < 1e-4, implementation


@torch.no_grad()
def test_attentions_are_the_dense_heads(form):
    model = tiny_model(**form, **MIXED_LAYERS)
    model.set_attn_implementation("eager")
    output = model(torch.randint(1, 97, (2, 9)), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 9, 9)] * 2  # the second layer has no dense heads
    assert len(output.hidden_states) == 4


@torch.no_grad()
def test_router_logits_and_selections(form):
    model = tiny_model(**form, **MIXED_LAYERS)
    batch = padded_batch("right", (20, 8))
    with trace_routing(model) as selected:
        output = model(**batch, output_router_logits=True, use_cache=False)
        in_chunks(model, batch, [6, 1])
    assert [tuple(z.shape) for z in output.router_logits] == [(2, 20, 3)] * 2
    assert list(selected) == [1, 2]
    for logits, layer in zip(output.router_logits, (1, 2), strict=True):
        threshold = model.model.layers[layer].self_attn.mosa.router.threshold
        expected = logits >= threshold
        expected[:, 0] = True
        assert torch.equal(selected[layer][0], expected & batch["attention_mask"].bool()[..., None])
        assert torch.equal(torch.cat(selected[layer][1:], dim=1), selected[layer][0])
    with pytest.raises(ValueError, match="has no MoSA heads"), trace_routing(torch.nn.Linear(1, 1)):
        pass


@torch.no_grad()
def test_logits_to_keep(form):
    model = tiny_model(**form)
    input_ids = torch.randint(1, 97, (2, 9))
    full = model(input_ids).logits
    assert torch.allclose(model(input_ids, logits_to_keep=2).logits, full[:, -2:], atol=1e-6)
    assert torch.allclose(model(input_ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(form, dtype, tmp_path):
    """Loads in half precision with routers in float32, and computes what float32 computes, roughly."""
    model = tiny_model(**form, initializer_range=0.1)
    model.save_pretrained(tmp_path)
    half = MosaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".router." in name else dtype), name
    batch = padded_batch("left")
    logits = half(**batch).logits
    assert logits.dtype == dtype
    difference = (logits.float() - model(**batch).logits)[batch["attention_mask"].bool()].abs()
    assert difference.mean() < 0.02  # the logits' spread is about 0.5
    half.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_save_and_reload(form, tied, tmp_path):
    model = tiny_model(**form, **MIXED_LAYERS, tie_word_embeddings=tied)
    for layer in model.model.layers[1:]:
        layer.self_attn.mosa.router.threshold.normal_()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    input_ids = torch.randint(1, 97, (2, 30))
    reloaded, info = MosaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(reloaded(input_ids).logits, model(input_ids).logits)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    placed = MosaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(placed(input_ids).logits, model(input_ids).logits)
    base = MosaModel.from_pretrained(tmp_path)
    assert torch.equal(base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


def test_initialisation_is_seeded_and_complete(form):
    """Direct construction and loading from an empty checkpoint initialise every MoSA weight alike in distribution."""
    config = tiny_config(**form, attention_bias=True, mosa_router_bias=True, initializer_range=0.02, hidden_size=64)
    set_seed(0)
    model = MosaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            assert 0.015 < parameter.std() < 0.025, name
    rates = []
    with torch.no_grad(), trace_routing(model.eval()) as selected:
        model(torch.randint(1, 97, (8, 64)))
        rates = [calls[0].float().mean().item() for calls in selected.values()]
    assert all(0.15 < rate < 0.4 for rate in rates), rates  # one in four, before any training


def test_gradient_checkpointing_and_inputs_embeds(form):
    batch = padded_batch("right", (20, 9))
    model = tiny_model(**form).train()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        if checkpointing:
            twin.gradient_checkpointing_enable()
        twin(
            inputs_embeds=embeds.detach(),
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"],
            use_cache=False,
        ).loss.backward()
        gradients.append([p.grad for p in twin.model.layers.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_sequence_classification(form):
    torch.manual_seed(0)
    model = MosaForSequenceClassification(tiny_config(**form, num_labels=3)).eval()
    batch = padded_batch("right", (15, 6))
    together = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = [
        model(ids[mask.bool()][None]).logits[0]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    model.train()(
        batch["input_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor([0, 2])
    ).loss.backward()
    assert model.model.layers[0].self_attn.mosa.router.weight.grad.abs().max() > 0


def test_a_model_of_dense_heads_only_is_llama():
    """Without MoSA heads, the model computes what Llama computes."""
    fields = {
        name: TINY[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "initializer_range",
        )
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    model = MosaForCausalLM(MosaConfig(**fields, num_mosa_heads=0)).eval()
    model.load_state_dict(llama.state_dict())
    input_ids = torch.randint(1, 97, (2, 20))
    assert torch.allclose(model(input_ids).logits, llama(input_ids).logits, atol=1e-5)
    assert torch.equal(
        model.generate(input_ids, max_new_tokens=5, do_sample=False),
        llama.generate(input_ids, max_new_tokens=5, do_sample=False),
    )
