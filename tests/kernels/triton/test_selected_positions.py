"""Slots of selected tokens."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels.selected_positions.triton import selected_positions  # noqa: E402


@pytest.mark.parametrize(
    ("shape", "rate"),
    [((2, 70, 3), 0.2), ((1, 300, 11), 0.1), ((3, 5, 1), 0.0), ((1, 270, 9), 1.0), ((1, 1, 2), 0.5)],
)
def test_selected_positions(shape, rate):
    """Each group's slots hold its tokens in ascending order, the other slots 0; of too many tokens the first."""
    selected = torch.rand(shape) < rate
    largest = int(selected.sum(1).max())
    for num_slots in (max(1, largest), shape[1], largest + 3, max(1, largest // 2)):
        index, count = selected_positions(selected, num_slots)
        assert index.shape == (shape[0], shape[2], num_slots) and index.dtype == count.dtype == torch.int32
        for b in range(shape[0]):
            for g in range(shape[2]):
                expected = selected[b, :, g].nonzero()[:, 0][:num_slots].tolist()
                assert count[b, g] == len(expected)
                assert index[b, g].tolist() == expected + [0] * (num_slots - len(expected))


def test_op_is_well_behaved():
    torch.library.opcheck(selected_positions, (torch.rand(2, 20, 3) < 0.3, 8))
