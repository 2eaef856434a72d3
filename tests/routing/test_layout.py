"""How the tokens of a call stand in their sequences: padding anywhere, packing, positions, masks of every format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosa_hf.routing import CallLayout, columns_of_mask, read_mask


def layout_of(
    num_tokens: int,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_cached: torch.Tensor | None = None,
    batch_size: int = 2,
    may_be_packed: bool = False,
    past_length: int | None = None,
    may_look: bool = True,
) -> CallLayout:
    position_ids = torch.arange(num_tokens)[None] if position_ids is None else position_ids
    embeds = torch.zeros(batch_size, num_tokens, 4)
    if not may_look:
        meaning = columns_of_mask(mask, batch_size, num_tokens, past_length)
    else:
        past_length = past_length or 0
        past = None if mask is None or not past_length else mask[:, :past_length].bool()
        meaning = read_mask(mask, batch_size, num_tokens, past_length, past, is_cached=num_cached is not None)
    return CallLayout.build(embeds, meaning, position_ids, num_cached, may_be_packed, may_look)


def same(actual: CallLayout, expected: CallLayout) -> None:
    for name, states in vars(expected).items():
        if name == "copies":  # on other devices
            continue
        other = getattr(actual, name)
        assert (states is None and other is None) or torch.equal(other, states), name


masks = st.integers(1, 8).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=4)
)


@settings(max_examples=100)
@given(mask=masks, num_cached=st.lists(st.integers(0, 3), min_size=4, max_size=4), cache=st.sampled_from("nds"))
def test_positions_and_order_with_padding_anywhere(mask, num_cached, cache):
    """Without a cache, behind a growing one, and behind a static one, whose mask covers all of it."""
    batch_size, num_tokens = len(mask), len(mask[0])
    valid, past_length, num_cached = torch.tensor(mask).bool(), None, num_cached[:batch_size]
    cached = None if cache == "n" else torch.tensor(num_cached)
    whole = valid.long()
    if cache == "s":
        past_length = 3
        whole = torch.cat((torch.ones(batch_size, 3), whole, torch.ones(batch_size, 2)), dim=1)
    may_look = cache != "s"  # as of a static cache in a graph
    layout = layout_of(num_tokens, whole, None, cached, batch_size, past_length=past_length, may_look=may_look)

    assert torch.equal(valid if layout.valid is None else layout.valid, valid)
    assert (layout.valid is None) == (bool(valid.all()) and may_look)
    first = torch.zeros_like(valid) if layout.first is None else layout.first
    for row in range(batch_size):
        position = 0 if cached is None else num_cached[row]
        for token in range(num_tokens):
            assert first[row, token] == (mask[row][token] == 1 and position == 0)
            if mask[row][token]:
                assert layout.position[row, token] == position
                position += 1

    if all(sorted(row) == row for row in mask) and cache != "s":
        assert layout.order is None and layout.inverse is None
    tokens = torch.arange(batch_size * num_tokens).view(batch_size, num_tokens)
    moved = layout.pad_left(tokens, dim=1)
    for row, real, own in zip(moved.tolist(), valid, tokens, strict=True):
        assert row[num_tokens - int(real.sum()) :] == own[real].tolist()  # in their order, at the end
        assert sorted(row) == own.tolist()
    assert torch.equal(layout.pad_back(moved, dim=1), tokens)
    states = tokens[:, None, :, None].expand(-1, 3, -1, 2)
    assert torch.equal(layout.pad_left(states, dim=2), moved[:, None, :, None].expand(-1, 3, -1, 2))


@pytest.mark.parametrize("batch_of_ids", [1, 2])
def test_packed_sequences(batch_of_ids):
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]]).expand(batch_of_ids, -1)
    layout = layout_of(6, position_ids=position_ids, may_be_packed=True)
    assert layout.segment.tolist() == [[0, 0, 0, 1, 1, 2]] * 2
    assert layout.first.tolist() == [[True, False, False, True, False, True]] * 2
    assert layout.position.tolist() == [list(range(6))] * 2
    assert layout.valid is layout.order is layout.inverse is None


def test_restarting_positions_mean_nothing_beside_a_mask_or_cache():
    layout = layout_of(4, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert layout.segment is None
    assert layout.first.tolist() == [[True, False, False, False]] * 2


def four_dimensional(padding: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Causal `[B, 1, T, T]` mask of a 2-D one, as Transformers makes it."""
    num_tokens = padding.shape[1]
    keep = padding[:, None, None].bool() & torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if dtype == torch.bool:
        return keep
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 1, 1]] * 2])
def test_four_dimensional_masks_mean_the_same_as_two_dimensional(dtype, padding):
    padding = torch.tensor(padding)
    same(layout_of(4, four_dimensional(padding, dtype)), layout_of(4, padding))


@pytest.mark.parametrize("padding", [[0, 1, 1], [1, 0, 1]])
def test_a_mask_may_be_shared_by_all_rows(padding):
    shared = four_dimensional(torch.tensor([padding]), torch.bool)  # [1, 1, T, T] for a batch of two
    same(layout_of(3, shared), layout_of(3, shared.expand(2, -1, -1, -1)))


def test_a_mask_without_padding_is_no_mask():
    for mask in (torch.ones(2, 5), four_dimensional(torch.ones(2, 5), torch.bool)):
        same(layout_of(5, mask), layout_of(5))


def test_only_the_last_columns_of_a_mask_are_the_call():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    layout = layout_of(2, mask, num_cached=torch.tensor([1, 3]), past_length=3)
    assert layout.valid.tolist() == [[True, True], [False, True]]
    assert layout.position[0].tolist() == [1, 2] and layout.position[1, 1] == 3


@pytest.mark.parametrize(
    "shape, message",
    [((2, 3), "covers 3 tokens, fewer than the 4"), ((2, 1, 1, 3), "covers 3 tokens"), ((2, 4, 4), r"\(2, 4, 4\)")],
)
def test_masks_of_the_wrong_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        read_mask(torch.ones(shape), 2, 4)
