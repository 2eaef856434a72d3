"""`mosa_cache_dtype`: keys and values of sparse groups as codes, the same function on every way through a model."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mosa_hf import cache_bytes, load_cache, save_cache, save_routers, use_backend
from mosa_hf.kernels.entry_codes import turned
from mosa_hf.modeling import sparse_groups
from mosa_hf.modeling.key_center import key_center, mean_rotation
from mosa_hf.modeling.kv_share import planned_bytes
from mosa_hf.modeling.router_files import router_tensors
from testing.decoders import tiny_decoder
from testing.difference import max_difference
from testing.tiny import with_random_routers

from ..conftest import PLAN, sparse_form
from ..contract import (
    LENGTH,
    check_packed,
    check_parity,
    check_training,
    in_chunks,
    padded_batch,
    random_ids,
    training_step,
)

INT8 = {"mosa_cache_dtype": "int8"}
FORMS = {
    "several windows": sparse_form(**INT8),
    "one window": sparse_form(**INT8, mosa_plan=None, mosa_window=5, mosa_sparsity=4),
    "no window": sparse_form(**INT8, mosa_plan=None, mosa_window=0, mosa_sparsity=3),
}
SOFTCAP = sparse_form(
    "gemma2",
    **INT8,
    mosa_plan=[[{"window": 5, "sparsity": 4}, None, {"window": 1, "sparsity": 3}], [None] * 3],
    num_hidden_layers=2,
    layer_types=["full_attention", "sliding_attention"],
    attn_logit_softcapping=2.0,
)


@pytest.mark.parametrize("padding", ["left", "anywhere"])
@pytest.mark.parametrize("name", FORMS)
def test_parity(name, padding):
    """In float64, where no number lies so near the middle of two codes that a matmul of another size changes it."""
    number = list(FORMS).index(name) + (padding == "left")
    check_parity(FORMS[name].model(mosa_cache_budget=3 if number % 2 else None).double(), padding, seed=number)
    if not number:
        check_packed(FORMS[name].model().double())


@pytest.mark.parametrize("form", [FORMS["several windows"], SOFTCAP], ids=["llama", "gemma2"])
def test_parity_in_float32(form):
    check_parity(form.model(), "left")


@torch.no_grad()
def test_what_is_rounded():
    """Keys and values of sparse groups, and no others: a window of all tokens gives what a rounding Llama gives."""

    def round_all(module, query, key, value, *args, **kwargs):
        groups = [i for i, group in enumerate(PLAN[module.layer_idx]) if group is not None]
        key, value = key.clone(), value.clone()
        place = torch.arange(key.shape[-1])
        turn = torch.cos(torch.pi / len(place) * (place[:, None] + 0.5) * place) * (2 / len(place)) ** 0.5
        turn[:, 0] /= 2**0.5  # the orthonormal cosine transform
        for states, matrix in ((key, turn), (value, torch.eye(len(place)))):
            own = states[:, groups] @ matrix
            step = own.abs().amax(-1, keepdim=True) / 127
            states[:, groups] = ((own / step).round() * step) @ matrix.T
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    plan = [[group and group | {"window": 64} for group in layer] for layer in PLAN]
    model, ids = sparse_form(**INT8, mosa_plan=plan).model(), random_ids(2, 40)
    AttentionInterface.register("rounding", round_all)
    base = LlamaForCausalLM(model.config.to_base()).eval()
    base.load_state_dict({name: x for name, x in model.state_dict().items() if "mosa" not in name})
    exact = base(ids).logits
    base.set_attn_implementation("rounding")
    expected = base(ids).logits
    assert 1e-3 < (expected - exact).abs().max() < 0.1 * exact.abs().max()
    cache, whole = DynamicCache(), model(ids, use_cache=False).logits
    cached = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([17, 1, 1, 21], 1)], dim=1)
    for actual in (whole, cached):
        assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype, share", [(torch.float32, 0.27), (torch.bfloat16, 0.53)], ids=str)
@torch.no_grad()
def test_bytes(dtype, share):
    """Of live tensors, scales and all else included, against the model's dtype; static caches hold scores as well."""
    held = {}
    for name in (None, "int8"):
        form = sparse_form(mosa_cache_dtype=name, head_dim=64, mosa_plan=None, mosa_window=16, mosa_sparsity=4)
        model = form.model().to(dtype)
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=512)):
            for part in random_ids(2, 412).split([400, *[1] * 12], 1):
                model(part, past_key_values=cache)
            held[name, type(cache)] = cache_bytes(cache)["sparse"]
    assert 0.2 < held["int8", DynamicCache] / held[None, DynamicCache] < share
    assert held["int8", StaticCache] / held[None, StaticCache] < share + 0.02
    planned = [
        planned_bytes(model.config.from_base(model.config, dtype=dtype, mosa_cache_dtype=name), 400)
        for name in (None, "int8")
    ]
    assert planned[0][0] == planned[1][0]
    assert planned[1][1] / planned[0][1] == pytest.approx((64 + dtype.itemsize) / (64 * dtype.itemsize), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"mosa_cache_budget": 3}], ids=["", "budget"])
@torch.no_grad()
def test_what_a_cache_goes_through(options, tmp_path):
    """Taken back, reordered, repeated, chosen, copied and written, it goes on as if it had read the tokens."""
    model, ids = FORMS["several windows"].model(**options).double(), random_ids(2, 40)
    cache = DynamicCache(config=model.config)
    for part in ids[:, :30].split([20, *[1] * 10], 1):
        model(part, past_key_values=cache)
    save_cache(cache, tmp_path / "cache.safetensors", model)
    caches = {
        "copied": copy.deepcopy(cache),
        "pickled": pickle.loads(pickle.dumps(cache)),
        "written": load_cache(tmp_path / "cache.safetensors", model),
        "taken back": copy.deepcopy(cache),
        "reordered": copy.deepcopy(cache),
        "repeated": copy.deepcopy(cache),
    }
    caches["taken back"].crop(-9)
    caches["reordered"].reorder_cache(torch.tensor([1, 0]))
    caches["repeated"].batch_repeat_interleave(3)
    caches["repeated"].batch_select_indices(torch.tensor([0, 4, 5]))
    rows = {"reordered": [1, 0], "repeated": [0, 1, 1]}
    for name, each in caches.items():
        own = ids[rows.get(name, [0, 1])]
        start = int(each.get_seq_length())
        assert start == (21 if name == "taken back" else 30)
        expected = model(own, use_cache=False).logits[:, start:]
        actual = [model(part, past_key_values=each).logits for part in own[:, start:].split([1, 1, 38 - start], 1)]
        assert (torch.cat(actual, dim=1) - expected).abs().max() < 1e-6, name


def test_training():
    """The reference's step, with gradient checkpointing too; near the one that nothing rounds."""
    check_training(FORMS["several windows"].model(mosa_routing="threshold"), "left")
    steps = [training_step(sparse_form(mosa_cache_dtype=name).model()) for name in (None, "int8")]
    for name, gradient in steps[0][1].items():
        if not name.endswith("mosa_router.weight"):
            assert 0 < (steps[1][1][name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_a_cache_in_training():
    """One call learns as it does without a cache; what an earlier call has stored has no gradient, and says so."""
    model, ids = FORMS["several windows"].model(), random_ids(2, 20)
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, use_cache=use_cache).logits.square().mean().backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    later = model(ids, past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="stored as codes .`mosa_cache_dtype`"):
        later.backward()
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    model(ids, past_key_values=cache).logits.sum().backward()


@pytest.mark.slow
@torch.no_grad()
def test_triton():
    pytest.importorskip("triton")
    model, batch = FORMS["one window"].model(num_hidden_layers=1), padded_batch()
    for build_cache in (DynamicCache, lambda: StaticCache(model.config, LENGTH)):
        logits = []
        for name in ("torch", "triton"):
            with use_backend(name):
                logits.append(in_chunks(model, batch, [20, 1, 1, 1, 1, 1], build_cache()))
        assert max_difference(*logits, batch) < 1e-4


def test_config(tmp_path):
    """A field that is saved, may be set as a model is loaded, and tells caches apart."""
    plain = sparse_form().model()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, mosa_cache_dtype="int8")
    ids, cache = random_ids(2, 20), DynamicCache()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, FORMS["several windows"].model().eval()(ids).logits)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="`mosa_cache_dtype`.*make a new cache"):
            plain(ids, past_key_values=cache)
    save_cache(cache, tmp_path / "cache.safetensors", model)
    with pytest.raises(ValueError, match="other groups than this one's, .*`mosa_cache_dtype`"):
        load_cache(tmp_path / "cache.safetensors", plain)
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.mosa_cache_dtype == "int8"


def biased(**fields) -> torch.nn.Module:
    """A model whose keys have large biases in the channels that turn least with positions, as Qwen2's have."""
    model = sparse_form("qwen2", **{"mosa_plan": None, "mosa_window": 5, "mosa_sparsity": 2, **fields}).model()
    with torch.no_grad():
        for layer in model.model.layers:
            of_head = layer.self_attn.k_proj.bias.view(-1, 2, layer.self_attn.head_dim // 2)
            of_head[..., -1] = 100
    return model


@pytest.mark.parametrize(
    "model_type", ["qwen2", "starcoder2", "phi", "glm"]
)  # two rotate a part, one of them by pairs
@torch.no_grad()
def test_the_center_is_the_key_of_nothing_on_average_over_positions(model_type):
    keys = []

    def capture(module, query, key, value, *args, **kwargs):
        keys.append(key)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", capture)
    model = tiny_decoder(model_type)
    model.set_attn_implementation("capture")
    decoder = model.model
    attention, nothing = decoder.layers[0].self_attn, torch.zeros(1, decoder.config.max_position_embeddings, 32)
    attention.k_proj.bias.normal_(0, 3)
    positions = torch.arange(nothing.shape[1])[None]
    attention(nothing, position_embeddings=decoder.rotary_emb(nothing, positions), attention_mask=None)
    expected = keys[0].mean(2, keepdim=True)[0]
    center = key_center(attention, mean_rotation(decoder, positions), len(expected))
    torch.testing.assert_close(center, expected, rtol=1e-3, atol=1e-4)
    assert center.abs().max() > 0.5


@pytest.mark.parametrize("change", ["scaled", "half"])
@torch.no_grad()
def test_the_center_follows_the_frequencies(change):
    """Else eager calls would take another from the keys than compiled ones, which go into the same cache."""
    decoder, ids = tiny_decoder("qwen2").model, random_ids(1, 4)
    used = mean_rotation(decoder, ids)
    assert mean_rotation(decoder, ids) is used
    if change == "half":
        decoder.rotary_emb.to(torch.bfloat16)
    else:
        decoder.rotary_emb.inv_freq.div_(4)
    found = mean_rotation(decoder, ids)
    fresh = mean_rotation(copy.deepcopy(decoder), ids)
    decoder.__dict__.pop("_mean_rotation")
    expected = mean_rotation(decoder, ids)
    for each in (found, fresh):
        assert torch.equal(each.cos, expected.cos) and not torch.equal(each.cos, used.cos)


@torch.no_grad()
def test_fake_tensors_leave_nothing_behind():
    """What is computed once and kept is none of them, if they come first."""
    decoder, ids, keys = tiny_decoder("qwen2").model, random_ids(1, 4), torch.rand(3, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert turned(torch.rand(3, 6)).shape == (3, 6)
        mean_rotation(decoder, random_ids(1, 4))
    torch.testing.assert_close(turned(keys) @ turned(keys).mT, keys @ keys.mT)
    assert type(mean_rotation(decoder, ids).cos) is torch.Tensor


@torch.no_grad()
def test_rotary_embeddings_that_are_no_cosines_and_sines():
    """Keys have no center then, and are turned like all."""
    model = tiny_decoder("llama4_text")
    assert mean_rotation(model.model, random_ids(1, 4)) is None
    sparse = with_random_routers(model, mosa_sparsity=3, mosa_window=4, mosa_cache_dtype="int8")
    assert sparse(random_ids(1, 20)).logits.isfinite().all()


@torch.no_grad()
def test_a_large_bias_of_the_keys_takes_nothing_from_the_others():
    model, ids = biased(mosa_cache_dtype="int8", max_position_embeddings=64), random_ids(2, 40)
    exact = biased(max_position_embeddings=64)(ids).logits
    errors = [max_difference_of(model(ids).logits, exact)]
    with mock.patch.object(sparse_groups, "key_center", lambda *args: None):
        errors.append(max_difference_of(model(ids).logits, exact))
    assert 0 < errors[0] < errors[1] / 4


@torch.no_grad()
def test_offloaded_biases_are_read(tmp_path):
    model, ids = biased(mosa_cache_dtype="int8"), random_ids(2, 40)
    expected, routers = model(ids).logits, router_tensors(model)
    with mock.patch.object(sparse_groups, "key_center", lambda *args: None):
        assert not torch.equal(model(ids).logits, expected)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].self_attn.k_proj.bias.is_meta
    assert torch.equal(model(ids).logits, expected)
    save_routers(model, tmp_path / "routers")
    written = load_file(tmp_path / "routers" / "mosa_routers.safetensors")
    assert written.keys() == routers.keys() and all(torch.equal(written[name], own) for name, own in routers.items())


@pytest.mark.parametrize("padding", ["left", "anywhere"])
def test_parity_with_biases(padding):
    check_parity(biased(mosa_cache_dtype="int8").double(), padding)


@pytest.mark.parametrize(
    "family, fields, is_centered",
    [
        ("gemma2", {"attn_logit_softcapping": None}, True),
        ("gemma2", {"attn_logit_softcapping": 2.0}, False),
        ("gpt_oss", {}, False),
    ],
)
@torch.no_grad()
def test_sinks_and_softcaps_see_whole_keys(family, fields, is_centered):
    """A score beside a sink's, or under a softcap, is more than its difference to others."""
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "attention_bias": True}
    model, ids = sparse_form(family, **INT8, mosa_plan=None, **kinds, **fields).model(), random_ids(1, 30)
    model = model if family == "gpt_oss" else model.double()  # PyTorch has no grouped products of that
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias.normal_(0, 3)
    center = key_center(attention, mean_rotation(model.model, ids), attention.mosa_groups.num_groups)
    assert (center is not None) == is_centered
    cache, whole = DynamicCache(config=model.config), model(ids, use_cache=False).logits
    cached = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([17, 1, 12], 1)], dim=1)
    assert max_difference_of(cached, whole) < (1e-2 if family == "gpt_oss" else 1e-8)
    with mock.patch.object(sparse_groups, "key_center", lambda *args: torch.ones(3, 1, attention.head_dim)):
        if is_centered:
            model(ids)
        else:
            with pytest.raises(RuntimeError, match="which a softcap or a sink would notice"):
                model(ids)


def max_difference_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()
