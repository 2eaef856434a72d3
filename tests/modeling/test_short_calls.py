"""A first call within all windows is plain causal attention: the implementation that the user chose gets all of it."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mosa_hf import use_backend

from ..conftest import sparse_form

ONE, NONE = {"window": 6, "sparsity": 4}, None
HEADS = 6


@pytest.fixture
def seen():
    """How many heads an implementation of the user's gets, layer by layer."""
    counts = []

    def attention(module, query, *args, **kwargs):
        counts.append(query.shape[1])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("counted", attention)
    AttentionMaskInterface.register("counted", sdpa_mask)
    return counts


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("groups", [[ONE] * 3, [ONE, NONE, ONE]], ids=["sparse", "mixed"])
@torch.no_grad()
def test_it_gets_all_heads(groups, has_cache, seen):
    form = sparse_form(mosa_plan=[groups] * 3)
    model = form.model()
    model.set_attn_implementation("counted")
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    cache = DynamicCache(config=model.config) if has_cache else None
    short = model(ids[:, :6], attention_mask=mask, past_key_values=cache, use_cache=has_cache).logits
    assert seen == [HEADS] * 3
    with use_backend("reference"):  # where kernels are asked for, they compute it
        own = DynamicCache(config=model.config) if has_cache else None
        expected = model(ids[:, :6], attention_mask=mask, past_key_values=own, use_cache=has_cache).logits
    torch.testing.assert_close(short[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    seen.clear()
    model(ids, use_cache=False)  # a token longer
    assert seen == [2 * groups.count(NONE)] * 3 if NONE in groups else not seen
    if has_cache:  # and what follows reads what the first call left
        more = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        step = model(ids[:, 6:], attention_mask=more, past_key_values=cache).logits[:, -1]
        whole = model(ids, attention_mask=more, use_cache=False).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
