"""What a layer asks of a GPU in a step and in a prompt: few operations, no waiting, nothing on another device."""

import pytest
import torch

from mosa_hf.cache.store import SparseStore

from .cases import CASES, layer_costs
from .device import counting, emulated_gpu, on_device

# Operations of a step beyond the original's, growing and static; None: not of static caches.
LIMITS = {
    "one set": (10, 15),
    "one set beside dense groups": (15, 15),
    "two sets": (10, 15),
    "budget": (10, 15),
    "padded": (10, 20),
}


@pytest.fixture(scope="module")
def of_original():
    return [layer_costs(CASES["original"], is_static, num_steps=2) for is_static in (False, True)]


@pytest.mark.parametrize(
    ("name", "is_static"), [*((name, False) for name in LIMITS), ("one set", True), ("two sets", True)]
)
def test_a_layer_asks_little(name, is_static, of_original):
    costs = layer_costs(CASES[name], is_static, num_steps=3)
    assert costs.error < 1e-5 and costs.num_mixed == 0
    assert costs.step_waits == 0
    assert costs.step_launches - of_original[is_static].step_launches <= LIMITS[name][is_static]


@torch.no_grad()
def test_growing_memory_asks_seldom():
    window, num_steps, generator = 64, 200, torch.Generator().manual_seed(0)
    with emulated_gpu():
        store = SparseStore(window)

        def read(num_tokens: int) -> None:
            selected = on_device(torch.rand(1, 3, num_tokens, generator=generator) < 0.2)
            key = on_device(torch.randn(1, 3, num_tokens, 4, generator=generator))
            store.begin(selected)
            store.extend(key, key)
            store.evict()

        read(2 * window)
        with counting() as counts:
            for _ in range(num_steps):
                read(1)
        lengths = store.memory.length.held
    assert counts.num_waits / num_steps <= 0.05
    assert (lengths > window).all()
