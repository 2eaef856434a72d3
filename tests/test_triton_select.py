"""Slots of selected tokens, from selections and from logits."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels.triton.select import select_expert_choice, selected_positions  # noqa: E402
from mosa_hf.routing import select_by_expert_choice  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_slots(index: torch.Tensor, count: torch.Tensor, selected: torch.Tensor) -> None:
    """Each group's slots hold the tokens of `selected` [B, T, G] in ascending order, the other slots 0."""
    assert index.dtype == count.dtype == torch.int32
    for b in range(index.shape[0]):
        for g in range(index.shape[1]):
            expected = selected[b, :, g].nonzero()[:, 0][: index.shape[2]]
            assert count[b, g] == len(expected)
            assert index[b, g, : len(expected)].tolist() == expected.tolist()
            assert not index[b, g, len(expected) :].any()


@pytest.mark.parametrize(
    ("shape", "rate"),
    [((2, 70, 3), 0.2), ((1, 600, 11), 0.1), ((3, 5, 1), 0.0), ((1, 300, 9), 1.0), ((1, 1, 2), 0.5)],
)
def test_selected_positions(shape, rate):
    torch.manual_seed(0)
    selected = torch.rand(shape, device=DEVICE) < rate
    largest = int(selected.sum(1).max())
    for num_slots in (max(1, largest), shape[1], largest + 3, max(1, largest // 2)):
        index, count = selected_positions(selected, num_slots)
        assert index.shape == (shape[0], shape[2], num_slots)
        check_slots(index, count, selected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "sparsity", "min_tokens"), [((3, 50, 9), 8, 2), ((2, 300, 2), 3, 1), ((1, 7, 1), 7, 1)]
)
def test_select_expert_choice(shape, sparsity, min_tokens, include_first, padded, ties):
    torch.manual_seed(shape[1])
    logits = torch.randn(shape, device=DEVICE)
    if ties:  # zeros of both signs among them
        logits = logits.round()
    valid, num_valid = None, torch.full(shape[:1], shape[1], device=DEVICE)
    first = torch.zeros(shape[:2], dtype=torch.bool, device=DEVICE)
    if padded:
        num_padding = torch.randint(0, shape[1] + 1, (shape[0], 1), device=DEVICE)
        valid = torch.arange(shape[1], device=DEVICE) >= num_padding
        num_valid = valid.sum(1)
        first = torch.arange(shape[1], device=DEVICE) == num_padding
    else:
        first[:, 0] = True
    first = first if include_first else None
    expected, _ = select_by_expert_choice(logits, sparsity, min_tokens, valid, first)
    quota = (num_valid // sparsity).clamp(min=min_tokens).minimum(num_valid).int()

    index, count = select_expert_choice(logits, quota, max(1, int(quota.max())), valid, first)
    check_slots(index, count, expected)


def test_select_expert_choice_of_extreme_logits():
    """Infinities, the smallest and the largest numbers order as floats do, whatever bits represent them."""
    values = [float("-inf"), -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, float("inf")]
    torch.manual_seed(1)
    logits = torch.tensor(values, device=DEVICE)[torch.randint(0, len(values), (2, 40, 5), device=DEVICE)]
    for quota in (1, 7, 20, 40):
        expected, _ = select_by_expert_choice(logits, 1e9, quota)
        index, count = select_expert_choice(logits, torch.full((2,), quota, dtype=torch.int32, device=DEVICE), quota)
        check_slots(index, count, expected)


def test_ops_are_well_behaved():
    selected = torch.rand(2, 20, 3, device=DEVICE) < 0.3
    torch.library.opcheck(selected_positions, (selected, 8))
    quota = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(select_expert_choice, (torch.randn(2, 20, 3, device=DEVICE), quota, 4))
