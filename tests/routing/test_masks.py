"""Masks: a model that selects every token gives the original's logits, or refuses the mask; never something else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_masks_for_generate, sdpa_mask

from mosa_hf import ConversionConfig, GroupPlan, MosaLlamaConfig, convert_model
from mosa_hf.compat import CACHE
from mosa_hf.modeling import attention_options
from mosa_hf.modeling.group_plan import SparseGroup
from mosa_hf.modeling.sparse_models import with_sparse_groups
from mosa_hf.routing import read_mask
from testing.tiny import random_tokens, tiny_base

from ..conftest import native_form

LOWEST = torch.finfo(torch.float32).min


def selecting_all(base, plan: GroupPlan | None = None):
    """The base with groups that select every token, which changes nothing."""
    conversion = ConversionConfig(window=3, sparsity=1) if plan is None else ConversionConfig(plan=plan)
    return convert_model(base, conversion)


BASE = tiny_base("llama", num_hidden_layers=2)
PARTLY = GroupPlan(((SparseGroup(3, 1), None), (SparseGroup(0, 1), SparseGroup(2, 1))))
MODELS = {"all sparse": selecting_all(BASE), "partly dense": selecting_all(BASE, PARTLY)}


def blocks(*lengths: int) -> torch.Tensor:
    """Causal within blocks, `[T, T]` bool."""
    return torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()


def causal(valid: torch.Tensor) -> torch.Tensor:
    """`[B, T, T]` bool of a 2-D mask."""
    return valid.bool()[:, None] & torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril()


def additive(visible: torch.Tensor, lowest: float = LOWEST) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, lowest)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, calls: list[tuple[int, torch.Tensor | None]], use_cache: bool) -> torch.Tensor:
    """Logits `[B, T, V]` of the tokens, fed in `calls` of so many tokens and a mask each."""
    cache, logits, start = DynamicCache() if use_cache else None, [], 0
    for length, mask in calls:
        inputs = ids[:, start : start + length]
        start += length
        logits.append(model(inputs, attention_mask=mask, past_key_values=cache, use_cache=use_cache).logits)
    return torch.cat(logits, dim=1)


# A mask of pairs is drawn as a sensible one with, perhaps, a few pairs turned round.


@st.composite
def visible_pairs(draw, batch_size: int, num_tokens: int, past: torch.Tensor | None) -> torch.Tensor:
    """`[B, T, S]` bool."""
    kind = draw(st.sampled_from(["padding", "packed", "packed padding", "prefix", "tree", "all", "random"]))
    valid = torch.tensor(draw(st.lists(padding(num_tokens), min_size=batch_size, max_size=batch_size))).bool()
    if kind == "packed":
        valid = torch.ones_like(valid)
    pairs = causal(valid)
    seed = draw(st.integers(0, 999))
    random = torch.Generator().manual_seed(seed)
    if kind.startswith("packed"):
        cut = draw(st.integers(1, num_tokens))
        pairs[:, cut:, :cut] = False
    elif kind == "prefix":
        pairs[..., : draw(st.integers(1, num_tokens))] = True
    elif kind == "tree":
        pairs &= (torch.rand(pairs.shape, generator=random) < 0.7) | torch.eye(num_tokens, dtype=torch.bool)
    elif kind == "all":
        pairs[:] = True
    elif kind == "random":
        pairs = torch.rand(pairs.shape, generator=random) < 0.5
    if past is not None:
        pairs = torch.cat((past.bool()[:, None].expand(-1, num_tokens, -1), pairs), dim=2)
    num_flips = draw(st.sampled_from([0, 0, 0, 1, 2]))
    flips = torch.randint(pairs.numel(), (num_flips,), generator=random)
    pairs.view(-1)[flips] = ~pairs.view(-1)[flips]
    return pairs


def padding(length: int):
    ones, zeros = st.just([1] * length), st.integers(0, length - 1)
    left, right = zeros.map(lambda n: [0] * n + [1] * (length - n)), zeros.map(lambda n: [1] * (length - n) + [0] * n)
    return st.one_of(ones, left, right, st.lists(st.integers(0, 1), min_size=length, max_size=length))


@st.composite
def masks(draw):
    """Calls (length and mask each) of a batch, which of their queries count, and whether there is a cache."""
    batch_size, use_cache = draw(st.integers(1, 2)), draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3 if use_cache else 1))
    calls, counts, said, past = [], [], None, None
    for i, length in enumerate(lengths):
        last = i == len(lengths) - 1
        rows = st.lists(padding(length), min_size=batch_size, max_size=batch_size)
        if last and draw(st.booleans()):
            pairs = draw(visible_pairs(batch_size, length, past))
            own = pairs[..., pairs.shape[2] - length :]
            counts.append(own.diagonal(dim1=1, dim2=2))
            shape = draw(st.sampled_from(["bool", "min", "inf", "bias", "heads"]))
            four = pairs[:, None]
            if shape == "heads":
                four = four.repeat(1, 4, 1, 1)
                if draw(st.booleans()):
                    four[0, 1, -1, 0] ^= True
            elif shape != "bool":
                four = additive(four, {"min": LOWEST, "inf": -torch.inf, "bias": -1.0}[shape])
            calls.append((length, four))
            continue
        own = torch.tensor(draw(rows))
        mask = own if past is None else torch.cat((past, own), dim=1)
        if last and past is not None and draw(st.booleans()):  # it says something else of what is cached
            mask = mask.clone()
            mask[:, draw(st.integers(0, past.shape[1] - 1))] ^= 1
        if bool(mask.all()) and draw(st.booleans()):
            said = None
        elif last and draw(st.integers(0, 3)) == 0:
            said = None
        else:
            said = mask.to(draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
        calls.append((length, said))
        counts.append(own.bool())
        past = mask
    return calls, torch.cat(counts, dim=1), use_cache


@settings(max_examples=300)
@given(case=masks(), name=st.sampled_from(list(MODELS)))
def test_a_mask_is_obeyed_or_refused(case, name):
    calls, counts, use_cache = case
    ids = random_tokens(*counts.shape)
    try:
        actual = logits_of(MODELS[name], ids, calls, use_cache)
    except ValueError:
        return
    expected = logits_of(BASE, ids, calls, use_cache)
    assert (actual - expected)[counts].abs().max() < 1e-4 if counts.any() else True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("form", ["bool", "additive", "row for all", "head each", "padded"])
@torch.no_grad()
def test_block_diagonal_masks_are_packed_sequences(name, use_cache, form):
    model, ids = MODELS[name], random_tokens(2, 40)
    pairs = blocks(20, 13, 7).expand(2, 1, -1, -1).clone()
    counts = torch.ones(2, 40, dtype=torch.bool)
    if form == "padded":  # the end of the last sequence of a row, and the beginning of the first one of the other
        counts[0, -3:] = counts[1, :2] = False
        pairs &= counts[:, None, None]
    mask = {"bool": pairs, "row for all": pairs[:1], "head each": pairs.expand(-1, 4, -1, -1)}.get(
        form, additive(pairs)
    )
    expected = BASE(ids, attention_mask=mask, use_cache=use_cache).logits
    actual = model(ids, attention_mask=mask, use_cache=use_cache)
    assert (actual.logits - expected)[counts].abs().max() < 1e-4
    if use_cache:  # what comes after a packed prompt reads all of it, as the original's does
        new = random_tokens(2, 1, seed=1)
        mask = torch.cat((counts, counts.new_ones(2, 1)), dim=1) if form == "padded" else None
        cache = BASE(ids, attention_mask=additive(pairs)).past_key_values
        expected = BASE(new, past_key_values=cache, attention_mask=mask).logits
        actual = model(new, past_key_values=actual.past_key_values, attention_mask=mask).logits
        assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("routing", ["threshold", "expert_choice"])
@torch.no_grad()
def test_packing_by_a_mask_is_packing_by_positions(form, routing):
    """Of models that select some tokens; the first of each sequence in any case."""
    model = form.model(mosa_inference_routing=routing)
    ids, lengths = random_tokens(1, 40) % 97, (11, 1, 20, 8)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    actual = model(ids, position_ids=positions, attention_mask=blocks(*lengths)[None, None], use_cache=False).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("padded", ["left", "right", "both"])
@torch.no_grad()
def test_packing_beside_padding_is_each_sequence_alone(form, padded):
    model = form.model()
    ids, lengths = random_tokens(1, 30) % 97, (11, 12)
    before = {"left": 7, "right": 0, "both": 3}[padded]
    pairs = torch.zeros(30, 30, dtype=torch.bool)
    pairs[before : before + 23, before : before + 23] = blocks(*lengths)
    positions = torch.zeros(30, dtype=torch.int64)
    positions[before : before + 23] = torch.cat([torch.arange(n) for n in lengths])
    actual = model(ids, position_ids=positions[None], attention_mask=pairs[None, None], use_cache=False).logits
    for start, length in zip((before, before + 11), lengths, strict=True):
        alone = model(ids[:, start : start + length], use_cache=False).logits
        assert (actual[:, start : start + length] - alone).abs().max() < 1e-5


def native(**fields):
    return native_form().model(**fields)


REFUSED = {
    "prefix": (blocks(8) | (torch.arange(8) < 3), "says more"),
    "everything": (torch.ones(8, 8).bool(), "says more"),
    "tree": (blocks(8) & ~(torch.eye(8).roll(2, 0) > 0), "says more"),
    "sliding": (blocks(8).triu(-2), "says more"),
    "strictly causal": (blocks(8).tril(-1), "says more"),
    "chunks joined again": (blocks(4, 4) | (torch.arange(8)[:, None] == 7) & (torch.arange(8) < 8), "says more"),
    "bias": (-0.5 * torch.arange(8.0).flip(0).expand(8, 8).tril(), "adds to scores"),
    "one and zero": (blocks(8).float(), "adds to scores"),
    "not a number": (torch.full((8, 8), torch.nan), "adds to scores"),
    "integers": (blocks(8).long(), "make it bool"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("use_cache", [False, True])
def test_other_masks_are_refused_at_the_entry(form, kind, use_cache):
    mask, message = REFUSED[kind]
    model = form.model()
    cache = DynamicCache() if use_cache else None
    with pytest.raises(ValueError, match=f"{message}.*" + ("to_dense" if kind != "integers" else "")):
        model(random_tokens(1, 8) % 97, attention_mask=mask[None, None], past_key_values=cache, use_cache=use_cache)
    assert cache is None or not cache.layers or cache.get_seq_length() == 0


def all_dense():
    """The base in a class that could have sparse groups, and has none."""
    return with_sparse_groups(BASE, MosaLlamaConfig.from_base(BASE.config, mosa_plan=[[None] * 2] * 2))


@pytest.mark.parametrize("kind", ["prefix", "everything", "tree", "sliding", "bias"])
@torch.no_grad()
def test_where_all_groups_are_dense_masks_are_the_originals(kind):
    model, ids, mask = all_dense(), random_tokens(1, 8), REFUSED[kind][0][None, None]
    expected = BASE(ids, attention_mask=mask, use_cache=False).logits
    for cache in (None, DynamicCache(config=model.config)):
        given = {"attention_mask": mask, CACHE: cache, "use_cache": cache is not None}
        assert torch.equal(model(ids, **given).logits, expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_where_all_groups_are_dense_padded_prompts_are_continued(cache):
    """The cache holds the padding, as the original's does."""
    ids, mask = random_tokens(2, 9) % 97, torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    plain = native(num_mosa_heads=0, num_mosa_key_value_heads=0)
    for model, original in ((all_dense(), BASE), (plain, plain)):
        expected = original.generate(ids, use_cache=False, **greedy)
        assert torch.equal(model.generate(ids, cache_implementation=cache, **greedy), expected)


def test_masks_that_differ_by_head_or_have_another_shape_are_refused(form):
    model, ids = form.model(), random_tokens(2, 8) % 97
    by_head = blocks(8).expand(2, 2, -1, -1).clone()
    by_head[0, 1, 5, 2] = False
    wrong = {
        "differs by head": by_head,
        "does not fit": torch.ones(3, 8),
        "does not fit 2 rows": blocks(8).expand(3, 1, -1, -1),
        "does not fit 2 rows of 8": torch.ones(2, 1, 5, 8).bool(),
        "covers 6 tokens": torch.ones(2, 6),
        "covers 9 tokens": torch.ones(2, 9),
        "3-D|must be 2-D": torch.ones(2, 8, 8),
        "must be a tensor": [[1] * 8] * 2,
    }
    for message, mask in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_a_mask_that_hides_or_shows_cached_tokens_is_refused(form):
    model, ids = form.model(), random_tokens(2, 12) % 97
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    for prefill, later in [
        (None, mask),  # hides
        (mask[:, :8], torch.ones_like(mask)),  # shows
        (mask[:, :8], mask.flip(0)),  # of another row
        (mask[:, :8], None),
        (mask[:, :8], mask[:, 8:]),  # of the new tokens alone, as nobody would read it but us
    ]:
        for chunk in (4, 1):
            cache = DynamicCache()
            model(ids[:, :8], attention_mask=prefill, past_key_values=cache)
            with pytest.raises(ValueError, match="attention_mask"):
                told = None if later is None else later[:, : later.shape[1] - 4 + chunk]
                model(ids[:, 8 : 8 + chunk], attention_mask=told, past_key_values=cache)
            # Nothing has happened to the cache.
            right = torch.ones_like(mask) if prefill is None else mask
            model(ids[:, 8:], attention_mask=right, past_key_values=cache)
            assert cache.get_seq_length() == 12


@torch.no_grad()
def test_what_was_padding_is_known_of_rows_that_are_chosen_and_after_a_crop(form):
    model, ids = form.model(), random_tokens(2, 12) % 97
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = DynamicCache()
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    model(ids[:, 8:9], attention_mask=mask[:, :9], past_key_values=cache)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    rows = mask.repeat_interleave(2, dim=0)
    ids = ids.repeat_interleave(2, dim=0)
    expected = model(ids[:, :9], attention_mask=rows[:, :9], use_cache=False).logits[:, -1:]
    actual = model(ids[:, 8:9], attention_mask=rows[:, :9], past_key_values=cache).logits
    assert (actual - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="hides"):
        model(ids[:, 9:10], attention_mask=mask.repeat(2, 1)[:, :10], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 3]))  # rows without padding need no mask
    expected = model(ids[2:, :10], use_cache=False).logits[:, -1:]
    assert (model(ids[2:, 9:10], past_key_values=cache).logits - expected).abs().max() < 1e-5


@torch.no_grad()
def test_static_caches_know_what_was_padding(form):
    model, ids = form.model(), random_tokens(2, 9) % 97
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    cache = StaticCache(model.config, max_cache_len=16)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    for wrong in (torch.ones_like(mask), None):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, 8:], attention_mask=wrong, past_key_values=cache)
    expected = model(ids, attention_mask=mask[:, :9], use_cache=False).logits[:, -1:]
    actual = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    assert (actual - expected).abs().max() < 1e-5


def test_packing_beside_a_budget_or_a_static_cache_needs_use_cache_false(form):
    ids, mask = random_tokens(1, 8) % 97, blocks(5, 3)[None, None]
    with pytest.raises(ValueError, match="use_cache=False"):
        form.model(mosa_cache_budget=2)(ids, attention_mask=mask)
    model = form.model()
    wide = torch.nn.functional.pad(mask, (0, 8))
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, attention_mask=wide, past_key_values=StaticCache(model.config, max_cache_len=16))


@torch.no_grad()
def test_packing_after_cached_tokens_is_refused(form):
    model, ids = form.model(), random_tokens(1, 8) % 97
    cache = model(ids[:, :2]).past_key_values
    with pytest.raises(ValueError, match="without cached tokens"):
        model(ids[:, 2:], attention_mask=blocks(5, 3)[None, None, 2:], past_key_values=cache)


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "gpt_oss"])
@torch.no_grad()
def test_masks_by_layer_type_are_those_of_upstream(family):
    base = tiny_base(family)
    model, ids = selecting_all(base), random_tokens(2, 24)
    valid = torch.ones(2, 24, dtype=torch.long)
    valid[1, :5] = 0
    made = create_masks_for_generate(base.config, base.get_input_embeddings()(ids), valid, None, position_ids=None)
    assert set(made) == {"full_attention", "sliding_attention"}
    expected = base(ids, attention_mask=made, use_cache=False).logits
    actual = model(ids, attention_mask=made, use_cache=False).logits
    assert (actual - expected)[valid.bool()].abs().max() < 1e-4
    with pytest.raises(ValueError, match="says more"):
        model(ids, attention_mask=made | {"full_attention": torch.ones(2, 1, 24, 24).bool()}, use_cache=False)
    with pytest.raises(ValueError, match="'full_attention'"):
        model(ids, attention_mask={"sliding_attention": None}, use_cache=False)


def test_masks_by_layer_type_are_refused_where_all_layers_share_one(form):
    with pytest.raises(ValueError, match="one mask for all layers"):
        form.model()(random_tokens(1, 8) % 97, attention_mask={"full_attention": None})


def test_attention_that_is_not_causal_is_refused(form):
    ids = random_tokens(1, 8) % 97
    model = form.model()
    with pytest.raises(ValueError, match="`is_causal` is False"):
        model(ids, is_causal=False)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="`is_causal` is False"):
        model(ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_that_is_not_causal_is_refused(name):
    model = selecting_all(BASE, PARTLY if name == "partly dense" else None)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="`is_causal` of MosaLlamaAttention"):
        model(random_tokens(1, 8))


@pytest.mark.parametrize(
    "option",
    [
        {"position_bias": torch.zeros(1, 4, 8, 8)},
        {"alibi": torch.zeros(4)},
        {"score_mod": lambda score, *indices: score},
        {"sliding_window": 4},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_change_scores_are_refused(form, option):
    ids = random_tokens(1, 8) % 97
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` would change attention scores"):
        form.model()(ids, **option)


def test_fields_of_the_config_are_no_arguments_of_a_call(form):
    message = r"`mosa_cache_budget`: no argument of a call.*`from_pretrained\(\.\.\., mosa_cache_budget=\.\.\.\)`"
    with pytest.raises(ValueError, match=message):
        form.model()(random_tokens(1, 8) % 97, mosa_cache_budget=3)


@torch.no_grad()
def test_options_that_stock_models_ignore_are_ignored(form):
    model, ids = form.model(), random_tokens(1, 8) % 97
    expected = model(ids).logits
    options = {"token_type_ids": torch.ones_like(ids), "num_items_in_batch": torch.tensor(8.0), "position_bias": None}
    assert torch.equal(model(ids, **options).logits, expected)


@torch.no_grad()
def test_lengths_for_flash_attention_agree_with_the_packing(form):
    model, ids = form.model(), random_tokens(1, 8) % 97
    positions, lengths = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), torch.tensor([0, 5, 8])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    assert torch.equal(model(ids, position_ids=positions, use_cache=False, **options).logits, expected)
    with pytest.raises(ValueError, match="`cu_seq_lens_q`.*begin at \\[0, 5\\].*begin at \\[0\\]"):
        model(ids, use_cache=False, **options)


def test_no_mask_or_an_unpadded_one_costs_what_it_did():
    """A decoding step's look at its mask: so many operations as before masks were compared with what is cached."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number = getattr(self, "number", 0) + 1
            return function(*args, **kwargs or {})

    seen = torch.tensor([[False, True, True], [True, True, True]])
    whole = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for mask, past, most in [(None, None, 0), (torch.ones_like(whole), None, 2), (whole, seen, 4)]:
        with Count() as count:
            meaning = read_mask(mask, 2, 1, 3, past, is_cached=True)
        assert getattr(count, "number", 0) <= most  # a look at the column itself took 5
        assert meaning.valid is None and meaning.segment is None


@pytest.mark.parametrize("family", ["gpt_oss", "llama", "gemma2"])
@torch.no_grad()
def test_positions_pack_where_they_do_in_the_original(family):
    """gpt_oss makes its masks without them, and is read as one sequence."""
    base = tiny_base(family)
    model, ids = selecting_all(base), random_tokens(1, 20)
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    expected = base(ids, position_ids=positions, use_cache=False).logits
    assert (model(ids, position_ids=positions, use_cache=False).logits - expected).abs().max() < 1e-4
    assert model.model.packs_by_positions == (family != "gpt_oss")


@torch.no_grad()
def test_prepared_masks_say_that_nothing_is_packed():
    base = tiny_base("qwen2")
    model, ids = selecting_all(base), random_tokens(1, 20)
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    masks = {"full_attention": None, "sliding_attention": None}
    expected = base(ids, attention_mask=masks, position_ids=positions, use_cache=False).logits
    actual = model(ids, attention_mask=masks, position_ids=positions, use_cache=False).logits
    assert (actual - expected).abs().max() < 1e-4


def test_masks_by_layer_type_agree_on_padding():
    model, ids = selecting_all(tiny_base("gemma2")), random_tokens(1, 20)
    hidden = causal(torch.tensor([[0] * 4 + [1] * 16]))[:, None]
    with pytest.raises(ValueError, match="sliding_attention.*says of other tokens"):
        model(ids, attention_mask={"full_attention": hidden, "sliding_attention": blocks(20)[None, None]})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_eager_attention_reads_masks_of_bools(family):
    """Which the original adds to its scores as ones: the right values are those of the 2-D mask."""
    base = tiny_base(family)
    model = convert_model(base, ConversionConfig(plan=half_dense(base)))
    base.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    ids, valid = random_tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    valid[1, :5] = 0
    expected = base(ids, attention_mask=valid, use_cache=False).logits
    actual = model(ids, attention_mask=causal(valid)[:, None], use_cache=False).logits
    if family == "llama":  # elsewhere a 4-D mask takes the place of the sliding layers' own, too
        assert (actual - expected)[valid.bool()].abs().max() < 1e-4
    additives = model(ids, attention_mask=additive(causal(valid))[:, None], use_cache=False).logits
    assert (actual - additives)[valid.bool()].abs().max() < 1e-5


def half_dense(base) -> GroupPlan:
    config = base.config
    local = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = [(None, None) if kind != "full_attention" else (SparseGroup(3, 1), None) for kind in local]
    return GroupPlan(tuple(layers))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "dropout"])
def test_what_attention_functions_take_is_the_models_to_give(form, option):
    with pytest.raises(ValueError, match=f"`{option}` would change"):
        form.model()(random_tokens(1, 8) % 97, **{option: 2.0})


def test_an_attention_function_of_ones_own_is_said_not_to_reach_sparse_groups(form, monkeypatch):
    """Which have kernels of their own; dense groups do call it (`test_families`)."""
    AttentionInterface.register("scaled", sdpa_attention_forward)
    AttentionMaskInterface.register("scaled", sdpa_mask)
    model, said = form.model(), []
    model.set_attn_implementation("scaled")
    monkeypatch.setattr(attention_options.logger, "warning_once", said.append)
    model(random_tokens(1, 8) % 97)
    assert len(said) == 1 and "attn_implementation='scaled'" in said[0]


@pytest.mark.parametrize("what", ["mask", "cache"])
def test_vmap_says_what_it_cannot_map(what):
    model, ids = MODELS["all sparse"], random_tokens(3, 12)
    with pytest.raises(ValueError, match="vmap.*use_cache=False"), torch.no_grad():
        if what == "mask":
            one = lambda row, mask: model(row[None], attention_mask=mask[None], use_cache=False).logits  # noqa: E731
            torch.func.vmap(one)(ids, torch.ones_like(ids))
        else:
            torch.func.vmap(lambda row: model(row[None], use_cache=True).logits)(ids)


@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_prepared_masks_go_on_with_a_cache(kind):
    """Those of a static cache have columns for tokens to come, in sliding layers fewer."""
    base = tiny_base("gemma2")
    model, ids = selecting_all(base), random_tokens(1, 24)
    logits = []
    for each in (base, model):
        cache = DynamicCache(config=base.config) if kind == "growing" else StaticCache(base.config, max_cache_len=32)
        own, start = [], 0
        for length in (10, 1, 9, 1):
            part = ids[:, start : start + length]
            positions = torch.arange(start, start + length)[None]
            valid = torch.ones(1, start + length, dtype=torch.long)
            embeds = base.get_input_embeddings()(part)
            masks = create_masks_for_generate(base.config, embeds, valid, cache, position_ids=positions)
            own.append(each(part, attention_mask=masks, position_ids=positions, past_key_values=cache).logits)
            start += length
        logits.append(torch.cat(own, dim=1))
    assert (logits[1] - logits[0]).abs().max() < 1e-4
