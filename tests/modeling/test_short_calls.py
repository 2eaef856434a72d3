"""A first call within all windows is plain causal attention: the implementation that the user chose gets all of it."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
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


def no_cache(config):
    return None


def dynamic(config):
    return DynamicCache(config=config)


def static(config):
    return StaticCache(config=config, max_cache_len=20)


@pytest.mark.parametrize("make", [no_cache, dynamic, static])
@pytest.mark.parametrize("groups", [[ONE] * 3, [ONE, NONE, ONE]], ids=["sparse", "mixed"])
@torch.no_grad()
def test_it_gets_all_heads(groups, make, seen):
    form = sparse_form(mosa_plan=[groups] * 3)
    model = form.model()
    model.set_attn_implementation("counted")
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    cache, has_cache = make(model.config), make is not no_cache
    short = model(ids[:, :6], attention_mask=mask, past_key_values=cache, use_cache=has_cache).logits
    assert seen == [HEADS] * 3
    with use_backend("reference"):  # where kernels are asked for, they compute it
        options = {"past_key_values": make(model.config), "use_cache": has_cache}
        expected = model(ids[:, :6], attention_mask=mask, **options).logits
    torch.testing.assert_close(short[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    seen.clear()
    model(ids, use_cache=False)  # a token longer
    assert seen == [2 * groups.count(NONE)] * 3 if NONE in groups else not seen
    if has_cache:  # and what follows reads what the first call left
        more = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        step = model(ids[:, 6:], attention_mask=more, past_key_values=cache).logits[:, -1]
        whole = model(ids, attention_mask=more, use_cache=False).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [no_cache, dynamic])
@pytest.mark.parametrize("groups", [[ONE] * 3, [ONE, NONE, ONE]], ids=["sparse", "mixed"])
def test_dropout_acts_on_dense_groups_alone(groups, make):
    model = sparse_form(mosa_plan=[groups] * 3).model(attention_dropout=0.5).train()
    ids = torch.randint(3, 90, (2, 6))

    def logits(**options):
        torch.manual_seed(0)
        return model(ids, **options).logits

    with use_backend("reference"):  # which draws of dense groups only
        expected = logits(use_cache=False)
    cache = make(model.config)
    torch.testing.assert_close(logits(past_key_values=cache, use_cache=cache is not None), expected)
    is_dropped = not torch.allclose(expected, model.eval()(ids).logits, atol=1e-4)
    assert is_dropped == (NONE in groups)


# flex_attention compiles.
@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [[ONE] * 3, [ONE, NONE, ONE]], ids=["sparse", "mixed"])
@torch.no_grad()
def test_masks_of_a_static_cache(groups, implementation):
    """They have columns for tokens to come, which the first call's keys have not."""
    model = sparse_form(mosa_plan=[groups] * 3).model()
    ids, mask = torch.randint(3, 90, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    model.set_attn_implementation(implementation)
    logits = model(ids, attention_mask=mask, past_key_values=static(model.config)).logits[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
