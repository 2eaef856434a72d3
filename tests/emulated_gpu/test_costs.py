"""What a layer asks of a GPU in a step and in a prompt: few operations, no waiting, nothing on another device."""

import pytest
import torch

from mosa_hf.cache.calls import fetch_counts
from mosa_hf.cache.store import SparseStore

from .cases import CASES, layer_costs
from .device import counting, emulated_gpu, on_device

# Operations of a step beyond the original's, and of a prompt in all: with a growing cache and with a static one.
LIMITS = {
    "one set": ((-5, 1), (66, 87)),
    "one set beside dense groups": ((7, 13), (85, 104)),
    "two sets": ((1, 9), (99, 130)),
    "budget": ((-1, 0), (79, 89)),
    "padded": ((-4, 2), (81, 102)),
    "beams": ((19, 0), (66, 0)),
    "native": ((11, 17), (87, 104)),
    "native with a budget": ((15, 16), (96, 104)),
}


@pytest.fixture(scope="module")
def of_original():
    return [layer_costs(CASES["original"], is_static, num_steps=2) for is_static in (False, True)]


def cases() -> list:
    """Every kind with both caches; what others nearly stand for is slow, since each takes seconds."""
    quick = {("one set", False)}
    own = [(name, is_static) for name in LIMITS for is_static in (False, True) if (name, is_static) != ("beams", True)]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in own]


@pytest.mark.parametrize(("name", "is_static"), cases())
def test_a_layer_asks_little(name, is_static, of_original):
    costs = layer_costs(CASES[name], is_static, num_steps=3)
    of_step, of_prompt = (limits[is_static] for limits in LIMITS[name])
    assert costs.error < 1e-5 and costs.num_mixed == 0
    assert costs.step_waits == 0
    assert costs.step_launches - of_original[is_static].step_launches <= of_step
    assert costs.prefill_launches <= of_prompt
    assert costs.prefill_waits <= 1 + is_static  # the original waits once with a static cache


@pytest.mark.slow
@torch.no_grad()
def test_growing_memory_asks_seldom():
    window, num_steps, generator = 64, 200, torch.Generator().manual_seed(0)
    with emulated_gpu():
        store = SparseStore(window)

        def read(num_tokens: int) -> None:
            selected = on_device(torch.rand(1, 3, num_tokens, generator=generator) < 0.2)
            key = on_device(torch.randn(1, 3, num_tokens, 4, generator=generator))
            store.begin(selected)
            counts, read_by = store.extend(key, key)
            read_by(*fetch_counts([counts]))
            store.end_call()

        read(2 * window)
        with counting() as counts:
            for _ in range(num_steps):
                read(1)
        lengths = store.memory.length.held
    assert counts.num_waits / num_steps <= 0.05
    assert (lengths > window).all()
