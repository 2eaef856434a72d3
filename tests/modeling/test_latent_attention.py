"""
Latent attention (MLA) with sparse groups: expanded and absorbed compute the same, whatever the weights are by now; a
decoding step expands nothing; a cache holds the latents and no more. The contract of `test_families.py` holds too.
"""

import copy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from mosa_hf import (
    ConversionConfig,
    cache_bytes,
    convert_model,
    load_cache,
    save_cache,
    to_dense,
    trace_routing,
    use_backend,
)
from mosa_hf.conversion.calibration import fit_routers
from mosa_hf.kernels.entries import PackedKeyValues
from mosa_hf.kernels.tensors import NEVER, KeyValues
from mosa_hf.modeling.group_plan import GroupPlan, SparseGroup
from mosa_hf.modeling.latent_attention import expands_as_known, is_linear, is_plain
from mosa_hf.modeling.sparse_groups import SparseGroupsMixin, sparse_attention_class
from mosa_hf.routing.layout import CallLayout
from testing.decoders import tiny_decoder
from testing.tiny import random_tokens, tiny_base, with_random_routers

IDS = random_tokens(2, 40)
WINDOW = 4


def sparse_model(plan=None, budget: int | None = None, **fields):
    """A DeepSeek-V3 whose random routers select about one token in two; by default, all layers are sparse."""
    base = tiny_base("deepseek_v3", **fields)
    group = {"window": WINDOW, "sparsity": 2}
    fields = {"mosa_plan": plan or [[group]] * 3, "mosa_cache_budget": budget, "mosa_include_first": False}
    return with_random_routers(base, seed=1, **fields)


def attention_of(model, layer: int = 0) -> nn.Module:
    return model.model.layers[layer].self_attn


@torch.no_grad()
def in_steps(model, ids: torch.Tensor = IDS, num_read: int = 30, cache=None) -> torch.Tensor:
    """Logits of a prompt, and of the tokens behind it one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([model(part, cache=cache).logits for part in split(ids, num_read)], dim=1)


def split(ids: torch.Tensor, num_read: int) -> tuple[torch.Tensor, ...]:
    return ids.split([num_read] + [1] * (ids.shape[1] - num_read), dim=1)


@torch.no_grad()
def at_once(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


class Case:
    """A module of random size and weights, and what its queries may read."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.draw = torch.Generator().manual_seed(seed)
        self.rows, self.num_heads, self.nope, self.size = (self.number(1, 4) for _ in range(4))
        self.rank, self.rope = self.number(1, 9), 2 * self.number(1, 3)
        config = SimpleNamespace(
            attention_dropout=0.0,
            attention_bias=False,
            hidden_size=8,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            q_lora_rank=None,
            kv_lora_rank=self.rank,
            qk_rope_head_dim=self.rope,
            qk_nope_head_dim=self.nope,
            v_head_dim=self.size,
            rope_parameters={"rope_type": "default"},
        )
        self.module = sparse_attention_class(DeepseekV3Attention)(config, layer_idx=0).double()
        self.sinks = torch.randn(self.num_heads).double() if self.chance() else None
        self.softcap = 2.0 if self.chance() else None

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.draw))

    def chance(self) -> bool:
        return self.number(0, 2) == 1

    def states(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    def packed(self, evicted: bool) -> PackedKeyValues:
        """Ranges that lie anywhere, one of them maybe empty."""
        length = torch.randint(0, 7, (self.rows, 1), generator=self.draw)
        start = (length + 2).cumsum(0) - length
        key = self.states(int(length.sum()) + 2 * self.rows + 5, self.rank + self.rope)
        evicted_at = torch.randint(8, 14, (len(key),), generator=self.draw) if evicted else None
        return PackedKeyValues(key, key[:, :0], start, length, max(7, int(length.max())), evicted_at=evicted_at)

    def several(self) -> tuple[torch.Tensor, tuple, CallLayout, torch.Tensor | None]:
        """Queries, what they may read, how they stand, and a gate for training."""
        num_queries, num_before = self.number(1, 6), self.number(0, 6)
        num_recent = num_before + num_queries
        key = self.states(self.rows, 1, num_recent, self.rank + self.rope)
        position = (10 - num_before + torch.arange(num_recent)).expand(self.rows, 1, -1)
        selected = torch.rand(self.rows, 1, num_recent, generator=self.draw) < 0.5
        evicted_at = torch.where(torch.rand(position.shape, generator=self.draw) < 0.5, 12, NEVER)
        recent = KeyValues(key, key[..., :0], position, None, selected, evicted_at if self.chance() else None)
        read = recent, self.packed(self.chance()) if self.chance() else None
        layout = CallLayout(position[:, 0, num_before:], None, None, None, None, None)
        gate = (-torch.rand(self.rows, num_queries, 1).double()).requires_grad_() if self.chance() else None
        return self.states(self.rows, self.num_heads, num_queries, self.nope + self.rope), read, layout, gate

    def check(self, query: torch.Tensor, read, layout=None, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Both forms give the same, and the same gradients; returns what they give."""
        learned = [query, self.module.kv_b_proj.weight, *([] if gate is None else [gate])]
        parts = [read] if isinstance(read, PackedKeyValues) else [part for part in read if part is not None]
        learned += [part.key for part in parts]
        outputs, gradients = [], []
        for attend in (self.module.attend_expanded, self.module.attend_absorbed):
            options = {"scale": 0.7, "softcap": self.softcap, "sinks": self.sinks}
            output = attend(query, read, layout, WINDOW, gate, **options)
            assert output.shape == (self.rows, self.num_heads, query.shape[2], self.size)
            outputs.append(output)
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            loss = (output * weights).sum() + sum(0.0 * each.sum() for each in learned)  # where nothing is read
            gradients.append(torch.autograd.grad(loss, learned))
        torch.testing.assert_close(*outputs)
        for expanded, absorbed in zip(*gradients, strict=True):
            torch.testing.assert_close(expanded, absorbed)
        return outputs[0].detach()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_both_forms_are_one_function(backend):
    """Of several tokens and of one, of random shapes, forward and backward."""
    for seed in range(25):
        case = Case(seed)
        with use_backend(backend):
            case.check(*case.several())
            query = case.states(case.rows, case.num_heads, 1, case.nope + case.rope)
            packed = case.packed(evicted=False)
            output = case.check(query, packed)
        if case.softcap is not None or case.sinks is not None:
            continue
        for row, (entries, _) in enumerate(packed.split()):  # by upstream's code
            key, value = DeepseekV3Attention.expand_kv(
                case.module, *entries[None, None].split([case.rank, case.rope], dim=-1)
            )
            expected = F.scaled_dot_product_attention(query[row], key[0], value[0], scale=0.7) if len(entries) else 0
            assert (output[row] - expected).abs().max() < 1e-12


def expansions(model, monkeypatch) -> list[int]:
    """Grows by the number of entries whenever keys and values are expanded."""
    counts: list[int] = []
    for module in model.modules():
        if isinstance(module, SparseGroupsMixin):
            own = module.expanded
            monkeypatch.setattr(module, "expanded", lambda x, own=own: counts.append(x.shape[2]) or own(x))
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_step_expands_nothing(dtype, monkeypatch):
    model = sparse_model().to(dtype)
    expanded = expansions(model, monkeypatch)
    expected = at_once(model)
    assert expanded == [40] * 3  # without a cache: that is the specification
    expanded.clear()
    cache = DynamicCache(config=model.config)
    in_steps(model, IDS[:, :30], 30, cache)
    expanded.clear()
    logits = in_steps(model, IDS[:, 30:39], 1, cache)
    assert not expanded
    assert (logits - expected[:, 30:39]).abs().max() < (1e-4 if dtype == torch.float32 else 0.5)
    assert model(IDS[:, 39:], cache=cache).logits.requires_grad and len(expanded) >= 3  # what trains expands


def test_of_long_calls_what_is_read_is_expanded():
    """Of numbers as DeepSeek-V3 has them: a token or a few absorb, a prompt does not."""
    module = copy.deepcopy(attention_of(sparse_model()))
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    module.__dict__ |= sizes
    for num_queries, num_read, is_cheaper in [(1, 4096, True), (8, 4096, True), (2048, 2048, False), (1, 1, False)]:
        key = torch.empty(1, 1, num_read, 576, device="meta")
        read = KeyValues(key, key, None, None, None), None
        query = torch.empty(1, 128, num_queries, 192, device="meta")
        assert module.absorbing_is_cheaper(query, read) == is_cheaper


def test_weights_are_those_of_the_moment():
    """Trained, loaded, merged, hooked: nothing of a projection is kept from one step to the next."""
    model = sparse_model()

    def check() -> None:
        logits = in_steps(model)
        assert (logits - at_once(model)).abs().max() < 1e-4
        seen.append(logits)

    seen: list[torch.Tensor] = []
    check()
    projection = attention_of(model).kv_b_proj
    projection.weight.data *= 1.5
    check()
    with torch.no_grad():
        projection.weight.add_(0.1)
    check()
    handle = projection.register_forward_hook(lambda module, args, output: output * 0.5)
    assert not is_plain(projection) and is_linear(projection)
    check()
    handle.remove()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)).eval()
    assert not is_linear(attention_of(model.base_model.model).kv_b_proj)
    check()
    with model.disable_adapter():
        check()
    model = model.merge_and_unload()
    check()
    assert is_plain(attention_of(model).kv_b_proj)
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)):
        assert (seen[i] - seen[j]).abs().max() > 1e-3
    assert (seen[5] - seen[2]).abs().max() < 1e-4 and (seen[6] - seen[4]).abs().max() < 1e-4


def test_adapters_that_differ_by_row():
    """Of ranges that differ, too: each row's entries are expanded by its own adapter."""
    model, names = sparse_model(budget=6), ["one", "two", "__base__"]
    config = LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    ids, mask = torch.randint(3, 90, (3, 30)), torch.ones(3, 30, dtype=torch.long)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "adapter_names": names}
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, **options).logits
        cache = DynamicCache(config=model.config)
        logits = []
        for start, end in [(0, 17), (17, 18), (18, 25), (25, 26), (26, 30)]:
            part = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "adapter_names": names}
            logits.append(model(past_key_values=cache, **part).logits)
        assert (torch.cat(logits, dim=1) - expected)[mask.bool()].abs().max() < 1e-4
        model.set_adapter("two")
        alone = model(input_ids=ids[1:2], attention_mask=mask[1:2], use_cache=False).logits
        assert (alone - expected[1:2])[mask[1:2].bool()].abs().max() < 1e-4


class Rounded(nn.Module):
    """A projection whose weight is stored in another form, as quantised ones are."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("steps", (weight * 64).round().to(torch.int8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.steps.to(states.dtype) / 64)


def test_a_quantised_projection_is_asked(monkeypatch):
    model = sparse_model()
    for module in model.modules():
        if isinstance(module, SparseGroupsMixin):
            module.kv_b_proj = Rounded(module.kv_b_proj.weight.detach())
            assert not is_plain(module.kv_b_proj) and is_linear(module.kv_b_proj)
    expected, expanded = at_once(model), expansions(model, monkeypatch)
    cache = DynamicCache(config=model.config)
    in_steps(model, IDS[:, :30], 30, cache)
    expanded.clear()
    assert (in_steps(model, IDS[:, 30:], 1, cache) - expected[:, 30:]).abs().max() < 1e-4
    assert not expanded


def test_upstream_expands_as_known():
    """In every family that expands latents."""
    folder, found = Path(transformers.__file__).parent / "models", 0
    for path in sorted(folder.glob("*/modeling_*.py")):
        if "def expand_kv(" in path.read_text():
            module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            classes = [each for each in vars(module).values() if isinstance(each, type) and "expand_kv" in vars(each)]
            assert classes and all(map(expands_as_known, classes)), path.stem
            found += 1
    assert found > 10


def test_other_ways_to_expand_are_seen():
    class Swapped(DeepseekV3Attention):
        def expand_kv(self, kv_nope, k_rot):
            key, value = super().expand_kv(kv_nope, k_rot)
            return key.roll(1, -1), value

    class Scaled(DeepseekV3Attention):
        def expand_kv(self, kv_nope, k_rot):
            return super().expand_kv(2 * kv_nope, k_rot)

    assert expands_as_known(DeepseekV3Attention)
    assert not expands_as_known(Swapped) and not expands_as_known(Scaled)
    assert not sparse_attention_class(Scaled).expands_as_known


@pytest.mark.parametrize("budget", [None, 9])
def test_a_cache_holds_latents(budget, tmp_path):
    """Its bytes by the formula; written and read again."""
    model = sparse_model([[{"window": WINDOW, "sparsity": 2}], [None], [{"window": 0, "sparsity": 3}]], budget)
    cache = DynamicCache(config=model.config)
    expected = in_steps(model, num_read=30)
    in_steps(model, IDS[:, :30], 20, cache)
    held, width = cache_bytes(cache), 12 + 4
    assert held["dense"] == 2 * 30 * width * 4
    for layer, window in ((0, WINDOW), (2, 0)):
        memory = cache.layers[layer].stores[0].memory
        assert memory.states["key"].shape[1] == width and memory.states["value"].shape[1] == 0
        sizes = {name: own.untyped_storage().nbytes() for name, own in memory.states.items()}
        assert sizes["key"] == len(memory.states["key"]) * width * 4 and sizes["value"] == 0
        num_selected = memory.length - window
        assert 2 < num_selected.min() and num_selected.max() <= (budget or 25)
        num_free = (memory.capacity - memory.length).sum()
        assert len(memory.states["key"]) == memory.length.sum() + num_free + 1 and num_free <= 6
    save_cache(cache, tmp_path / "cache.safetensors", model)
    loaded = load_cache(tmp_path / "cache.safetensors", model)
    logits = in_steps(model, IDS[:, 30:], 1, copy.deepcopy(cache))
    assert (logits - expected[:, 30:]).abs().max() < 1e-4
    for each in (cache, loaded):
        assert torch.equal(in_steps(model, IDS[:, 30:], 1, each), logits)


@torch.no_grad()
def test_tokens_are_taken_back():
    model = sparse_model()
    cache, expected = DynamicCache(config=model.config), in_steps(model)
    in_steps(model, IDS[:, :36], 30, cache)
    cache.crop(-5)
    in_steps(model, random_tokens(2, 4, seed=5), 1, cache)
    cache.crop(-4)
    assert (in_steps(model, IDS[:, 31:], 1, cache) - expected[:, 31:]).abs().max() < 1e-5
    model.record_past(cache)
    model(random_tokens(2, 7, seed=6), cache=cache)
    cache.crop(-9)
    assert (in_steps(model, IDS[:, 38:], 1, cache) - expected[:, 38:]).abs().max() < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    """The forward, and a decoding step on a static cache, without a graph break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sparse_model(num_hidden_layers=1, plan=[[{"window": WINDOW, "sparsity": 2}]])
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager")
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(IDS, **options, **static), model.generate(IDS, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(IDS, use_cache=False).logits - at_once(model)).abs().max() < 1e-4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_importance_is_of_the_head_that_reads_most():
    """Against the definition, head by head, of keys and values that upstream expands."""
    base = tiny_base("deepseek_v3", num_hidden_layers=1)
    base.set_attn_implementation("eager")
    row, plan = random_tokens(1, 24), GroupPlan.uniform(1, 1, SparseGroup(4, 2))
    (fit,) = fit_routers(base, row, plan)
    layer = base.model.layers[0]
    twice = torch.cat((row, row), dim=1)
    with torch.no_grad():
        (attention,) = base(twice, output_attentions=True).attentions
        states = layer.input_layernorm(base.model.embed_tokens(twice))
        latents = layer.self_attn.kv_a_proj_with_mqa(states)[..., :12]
        values = layer.self_attn.kv_b_proj(layer.self_attn.kv_a_layernorm(latents))
        values = values.unflatten(-1, (4, -1))[0, :24, :, -6:]
        added = torch.einsum("thd,ohd->tho", values, layer.self_attn.o_proj.weight.unflatten(1, (4, 6)))
        share = (attention[0, :, 24:, :24] / states[0, 24:].norm(dim=-1)[:, None]).amax(1)  # [H, T]
    expected = (share * added.norm(dim=-1).T).amax(0)
    torch.testing.assert_close(fit.importance[0, :, 0], expected * fit.offset.exp())  # see `layer_offsets`


def test_converted_and_trained():
    """Routers from text; a step of training that reaches every weight but the routers'."""
    base = tiny_base("deepseek_v3")
    conversion = ConversionConfig(window=WINDOW, sparsity=2)
    model = convert_model(base, conversion, random_tokens(4, 64, seed=3))
    assert (in_steps(model) - at_once(model)).abs().max() < 1e-4
    plans = GroupPlan.of_config(model.config).layers
    assert [len(groups) for groups in plans] == [1, 1, 1] and all(groups[0].sparsity > 1 for groups in plans)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    lacking = {name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()}
    assert all("router" in name or "experts" in name for name in lacking)


def test_layers_with_two_attention_modules(tmp_path):
    """LongCat's: each of them has a place, a line of the plan and a router of its own."""
    base = tiny_decoder("longcat_flash")
    conversion = ConversionConfig(window=WINDOW, sparsity=2, groups=((0, 0), (1, 0), (3, 0)))
    model = convert_model(base, conversion, random_tokens(4, 64, seed=3))
    assert sorted(model.mosa_routers()) == [0, 1, 3]
    plan = [[None if each is None else each.window for each in groups] for groups in model.mosa_decoder.layer_plans()]
    assert plan == [[WINDOW], [WINDOW], [None], [WINDOW]]
    routers = [getattr(layer.self_attn[i], "mosa_router", None) for layer in model.model.layers for i in (0, 1)]
    assert routers == [model.mosa_routers().get(place) for place in range(4)]
    with trace_routing(model) as selected:
        expected = at_once(model)
    assert sorted(selected) == [0, 1, 3]
    assert (in_steps(model) - expected).abs().max() < 1e-4
    assert (at_once(base) - expected).abs().max() > 1e-3
    greedy = {"max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(IDS, **greedy)
    assert torch.equal(tokens, model.generate(IDS, **greedy, use_cache=False))
    assert torch.equal(tokens, model.generate(IDS, **greedy, cache_implementation="static"))
    assert torch.equal(at_once(to_dense(model)), at_once(base))
    model.save_pretrained(tmp_path)
    assert torch.equal(at_once(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    del model.model.layers[0]
    model.config.num_layers, model.config.num_hidden_layers = 1, 2
    model.mosa_decoder.update_config()
    assert [each != [None] for each in model.config.mosa_plan] == [False, True]
