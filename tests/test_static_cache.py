"""Static caches: compiled decoding, room that runs out, and the one-token kernels against the whole-sequence ones."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from mosa_hf import cache_bytes
from mosa_hf.cache import FixedSparseKeyValues, num_overflowed, static_capacity
from mosa_hf.kernels import reference
from mosa_hf.kernels.layout import HeadWeights, KeyValues, Tokens
from mosa_hf.routing import evicted_at

from .conftest import MIXED_LAYERS, tiny_model

NUM_GROUPS, HEAD_DIM, HIDDEN_SIZE = 3, 4, 10


def random_tokens(batch_size: int, num_tokens: int, padded: bool) -> tuple[Tokens, torch.Tensor]:
    """A padded sequence with random selections and scores (with ties), and its hidden states."""
    valid = None
    position = torch.arange(num_tokens).expand(batch_size, -1)
    if padded:
        valid = torch.arange(num_tokens) >= torch.randint(0, num_tokens, (batch_size, 1))
        position = (valid.cumsum(1) - 1).clamp(min=0)
    selected = torch.rand(batch_size, num_tokens, NUM_GROUPS) < 0.5
    selected = selected if valid is None else selected & valid[..., None]
    score = torch.randint(-3, 4, selected.shape).float()
    if torch.rand(()) < 0.5:  # the first token of each row is never evicted
        first = position == 0 if valid is None else (position == 0) & valid
        selected, score = selected | first[..., None], score.masked_fill(first[..., None], torch.inf)
    angle = torch.rand(batch_size, num_tokens, HEAD_DIM)
    gate = torch.rand(selected.shape)
    return Tokens(position, valid, None, angle.cos(), angle.sin(), selected, gate, score), torch.randn(
        batch_size, num_tokens, HIDDEN_SIZE
    )


def one_token(tokens: Tokens, t: int) -> Tokens:
    return Tokens(*(None if x is None else x[:, t : t + 1] for x in tokens))


def with_until(tokens: Tokens, budget: int) -> Tokens:
    selected = tokens.selected.transpose(1, 2)
    position = tokens.position[:, None].expand_as(selected)
    until = evicted_at(tokens.score.transpose(1, 2), position, selected, budget)
    return tokens if until is None else tokens._replace(until=until.transpose(1, 2))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    form=st.sampled_from(["selected", "all"]),
    batch_size=st.integers(1, 3),
    num_tokens=st.integers(1, 24),
    num_prefilled=st.integers(0, 24),
    window=st.integers(0, 6),
    budget=st.integers(1, 10),
    heads_per_group=st.integers(1, 2),
    padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_one_token_at_a_time_equals_the_specification(
    form, batch_size, num_tokens, num_prefilled, window, budget, heads_per_group, padded, seed
):
    """A prefill of any length, then single tokens: outputs of the parallel form, and what is held at the end."""
    torch.manual_seed(seed)
    tokens, hidden_states = random_tokens(batch_size, num_tokens, padded)
    window = window if form == "all" else 0
    cache = FixedSparseKeyValues(window, budget, 24, NUM_GROUPS, HEAD_DIM)
    whole = with_until(tokens, budget)
    query_dim = heads_per_group * HEAD_DIM
    sizes = [(query_dim, HIDDEN_SIZE), (HEAD_DIM, HIDDEN_SIZE), (HEAD_DIM, HIDDEN_SIZE), (HIDDEN_SIZE, query_dim)]
    weights = HeadWeights(*(torch.randn(NUM_GROUPS, *size) for size in sizes))
    query, key, value = reference.project(hidden_states, weights, tokens)
    selected = tokens.selected.transpose(1, 2)
    position = tokens.position[:, None].expand_as(selected)
    valid = None if tokens.valid is None else tokens.valid[:, None].expand_as(selected)
    if form == "all":
        until = None if whole.until is None else whole.until.transpose(1, 2)
        near = KeyValues(key, value, position, valid, selected, until)
        expected = reference.all_attention(query, near, None, tokens, window)  # [B, G, R, T, d]
    else:
        expected = reference.selected_heads(hidden_states, weights, whole)[0]  # [B, T, D]

    num_prefilled = min(num_prefilled, num_tokens)
    outputs = []
    for start, end in [(0, num_prefilled), *((t, t + 1) for t in range(num_prefilled, num_tokens))]:
        if start == end:
            continue
        call = Tokens(*(None if x is None else x[:, start:end] for x in tokens))
        cache.advance(call.valid, hidden_states[:, start:end])
        score = call.score.masked_fill(~call.selected, -torch.inf)
        single = None if call.valid is None else call.valid[:, 0]
        states = tuple(x[:, :, start:end] for x in (key, value))
        if form == "all" and end - start > 1:
            near, kept = cache.update(*states, call)
            outputs.append(reference.all_attention(query[:, :, :, start:end], near, kept, call, window))
        elif form == "all":
            step = (query[:, :, :, start], key[:, :, start], value[:, :, start], score[:, 0], single)
            outputs.append(reference.decode_all(*step, cache.state, budget)[:, :, :, None])
        elif end - start > 1:
            past, call = cache.read_selected(call)
            output, new = reference.selected_heads(hidden_states[:, start:end], weights, call, past)
            cache.append_selected(past, new, end - start)
            outputs.append(output)
        else:
            angles = (call.cos[:, 0], call.sin[:, 0])
            step = (hidden_states[:, start], weights, *angles, score[:, 0], call.gate[:, 0], single)
            outputs.append(reference.decode_selected(*step, cache.state, budget)[:, None])
    dim = 3 if form == "all" else 1
    actual = torch.cat(outputs, dim=dim)
    if tokens.valid is not None:  # what padding gets is free
        real = tokens.valid[:, None, None, :, None] if form == "all" else tokens.valid[..., None]
        actual, expected = actual * real, expected * real
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    check_held(cache, tokens, key, budget)


def check_held(cache: FixedSparseKeyValues, tokens: Tokens, key: torch.Tensor, budget: int) -> None:
    """Kept entries and selected ring slots are the `budget` highest scores with their own keys; others are counted."""
    state = cache.state
    for b in range(len(state.count)):
        num_tokens = int(state.num_tokens[b])
        assert num_tokens == (tokens.selected.shape[1] if tokens.valid is None else int(tokens.valid[b].sum()))
        first = tokens.selected.shape[1] - num_tokens  # padding is on the left
        for g in range(NUM_GROUPS):
            chosen = [t for t in range(first, first + num_tokens) if tokens.selected[b, t, g]]
            best = sorted(chosen, key=lambda t: (-tokens.score[b, t, g].item(), t))[:budget]
            count = int(state.count[b, g])
            held = {int(p): state.key[b, g, slot] for slot, p in enumerate(state.position[b, g, :count])}
            for slot, score in enumerate(state.ring_score[b, g].tolist()):
                if score > -torch.inf:
                    held[num_tokens - 1 - (num_tokens - 1 - slot) % cache.window] = state.ring_key[b, g, slot]
            assert sorted(held) == sorted(t - first for t in best)
            assert all(torch.allclose(held[t - first], key[b, g, t], atol=1e-5) for t in best)
            assert int(state.num_evicted[b, g]) == len(chosen) - len(best)


def batch_of(num_tokens: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, num_tokens, dtype=torch.long)
    mask[0, :5] = 0
    input_ids = torch.randint(1, 97, (2, num_tokens), generator=generator) * mask
    return {"input_ids": input_ids, "attention_mask": mask}


def test_a_static_cache_can_be_reordered_and_reset(form):
    model, batch = tiny_model(**form, **MIXED_LAYERS), batch_of()
    cache = StaticCache(config=model.config, max_cache_len=24)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**batch, position_ids=positions, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        rows = {name: x[[1, 1]] for name, x in batch.items()}
        ids = torch.cat((rows["input_ids"], torch.tensor([[7], [7]])), dim=1)
        expected = model(ids, use_cache=False).logits[:, -1:]
        step = model(torch.tensor([[7], [7]]), past_key_values=cache).logits
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
        cache.reset()
        again = model(rows["input_ids"], past_key_values=cache).logits
    torch.testing.assert_close(again, model(rows["input_ids"]).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="static cache cannot be cropped"):
        cache.layers[1].crop(-1)


def test_static_cache_that_is_too_short_is_refused(form):
    model = tiny_model(**form)
    cache = StaticCache(config=model.config, max_cache_len=22)
    with pytest.raises(ValueError, match="room for 22 tokens.*`max_cache_len`"):
        model.generate(**batch_of(), max_new_tokens=4, past_key_values=cache)
    with pytest.raises(ValueError, match="room for 22 tokens, not 25: raise `max_cache_len`"):
        model(torch.ones(1, 25, dtype=torch.long), past_key_values=cache)


def test_overflow_is_a_budget_and_is_reported(form, caplog):
    """A selection far above its rate does not fit: lowest scores go, as with a budget, and a warning counts them."""
    length, sparsity = 300, 64
    model = tiny_model(**form, mosa_sparsity=sparsity)
    capacity = static_capacity(length, sparsity)
    assert capacity < length
    for module in model.modules():
        if hasattr(module, "threshold"):
            module.threshold.fill_(-torch.inf)  # everything is selected
    input_ids = torch.randint(1, 97, (1, length - 8))
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with caplog.at_level(logging.WARNING, logger="transformers"), propagating("transformers"):
        output = model.generate(input_ids, cache_implementation="static", **options)
    overflow = num_overflowed(output.past_key_values)
    assert overflow == 3 * 3 * (length - 1 - capacity)  # layers, groups; the last token is never fed
    assert f"no room for {overflow} selected tokens" in caplog.text

    budgeted = tiny_model(**form, mosa_sparsity=sparsity, mosa_cache_budget=capacity)
    budgeted.load_state_dict(model.state_dict())
    assert torch.equal(output.sequences, budgeted.generate(input_ids, **options).sequences)
    assert num_overflowed(DynamicCache()) == 0


class propagating:
    """Lets a library's log records reach the root logger, where pytest listens."""

    def __init__(self, name: str):
        self.logger = logging.getLogger(name)

    def __enter__(self):
        self.before, self.logger.propagate = self.logger.propagate, True

    def __exit__(self, *error):
        self.logger.propagate = self.before


def test_static_bytes_are_fixed_and_bounded(form):
    model = tiny_model(**form, num_hidden_layers=1, mosa_sparsity=16)
    cache = StaticCache(config=model.config, max_cache_len=512)
    with torch.no_grad():
        model(torch.randint(1, 97, (1, 4)), past_key_values=cache)
        before = cache_bytes(cache)
        model(torch.randint(1, 97, (1, 400)), past_key_values=cache)
    assert cache_bytes(cache) == before
    per_entry = 2 * 8 * 4 + 4 + 4  # key and value of 8 float32 channels, position, score
    groups, capacity = 3, static_capacity(512, 16)
    assert before["selected"] == groups * (capacity * per_entry + 8) + 8
    assert before["dense"] == 2 * 2 * 512 * 8 * 4
