"""What runs on the emulated device: small models of both forms, and what is counted of them by layer and step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from mosa_hf import MosaConfig, MosaForCausalLM, MosaLlamaConfig, MosaLlamaForCausalLM

from .device import Counts, counting, emulated_gpu, move, on_device

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
SPARSE = {"mosa_sparsity": 4, "mosa_window": 8}
NUM_TOKENS = 12  # of a prompt
CACHE_LENGTH = 256  # of a static cache
LAYERS = (1, 2)  # whose difference is what a layer costs


def original(num_layers: int, **fields) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=num_layers, **fields))


def sparse(num_layers: int, **fields) -> nn.Module:
    return MosaLlamaForCausalLM(MosaLlamaConfig(**SHAPE, num_hidden_layers=num_layers, **{**SPARSE, **fields}))


def native(num_layers: int, **fields) -> nn.Module:
    heads = {"num_mosa_heads": 6, "num_mosa_key_value_heads": 3, "mosa_sparsity": 4}
    return MosaForCausalLM(MosaConfig(**SHAPE, num_hidden_layers=num_layers, **{**heads, **fields}))


def planned(*groups: dict | None) -> Callable[[int], nn.Module]:
    """A model whose layers all have these groups."""
    return lambda num_layers: sparse(num_layers, mosa_plan=[list(groups)] * num_layers)


ONE, OTHER = {"window": 8, "sparsity": 4}, {"window": 4, "sparsity": 3}


@dataclass(frozen=True)
class Case:
    """A model, and how it is run."""

    model: Callable[[int], nn.Module]  # of a number of layers
    padding: tuple[int, int] = (0, 0)  # of the rows
    beams: bool = False


CASES = {
    "original": Case(original),
    "one set": Case(sparse),
    "one set beside dense groups": Case(planned(ONE, None, ONE)),
    "two sets": Case(planned(ONE, OTHER, ONE)),
    "budget": Case(lambda num_layers: sparse(num_layers, mosa_cache_budget=6)),
    "padded": Case(sparse, padding=(7, 0)),
    "beams": Case(sparse, beams=True),
    "native": Case(native),
    "native with a budget": Case(lambda num_layers: native(num_layers, mosa_cache_budget=6)),
}


def built(case: Case, num_layers: int) -> nn.Module:
    torch.manual_seed(0)
    whole = case.model(max(LAYERS)).eval()
    if num_layers == max(LAYERS):
        return whole
    model = case.model(num_layers).eval()
    model.load_state_dict(whole.state_dict(), strict=False)  # so that its layers see the same, and evict the same
    return model


@torch.no_grad()
def run(
    case: Case, model: nn.Module, is_static: bool, num_steps: int, place: Callable
) -> list[tuple[torch.Tensor, Counts]]:
    """Logits and counts of a prompt, and then of each step."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, NUM_TOKENS + num_steps), generator=generator)
    mask = None
    if any(case.padding):
        mask = place((torch.arange(ids.shape[1]) >= torch.tensor(case.padding)[:, None]).long())
    ids = place(ids)
    cache = DynamicCache(config=model.config)
    if is_static:
        cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    parts = [slice(0, NUM_TOKENS), *(slice(NUM_TOKENS + i, NUM_TOKENS + i + 1) for i in range(num_steps))]
    results = []
    for i, part in enumerate(parts):
        own_mask = None if mask is None else mask[:, : part.stop]
        rows = place(torch.tensor([1, 0] if i % 2 else [0, 0]))
        with counting() as counts:
            if case.beams and i:
                cache.reorder_cache(rows)
            logits = model(ids[:, part], attention_mask=own_mask, past_key_values=cache).logits[:, -1]
        results.append((getattr(logits, "held", logits), counts))
    return results


def run_both(case: Case, num_layers: int, is_static: bool, num_steps: int) -> tuple[list[Counts], float]:
    """Counts on the emulated device, and how far logits there are from those on the CPU."""
    model = built(case, num_layers)
    expected = run(case, model, is_static, num_steps, lambda x: x)
    with emulated_gpu():
        actual = run(case, move(copy.deepcopy(model)), is_static, num_steps, on_device)
    errors = [(own - other).abs().max().item() for (own, _), (other, _) in zip(actual, expected, strict=True)]
    return [counts for _, counts in actual], max(errors)


@dataclass(frozen=True)
class LayerCosts:
    """Of a layer: operations and waits of a prompt, and of a step, the mean over the steps."""

    prefill_launches: float
    prefill_waits: float
    step_launches: float
    step_waits: float
    num_mixed: int
    error: float


def layer_costs(case: Case, is_static: bool, num_steps: int = 3) -> LayerCosts:
    run_both(case, LAYERS[0], is_static, 1)  # a device is given constants once, whatever the number of layers
    few, many = (run_both(case, num_layers, is_static, num_steps) for num_layers in LAYERS)

    def per_layer(counts: Callable[[Counts], int], steps: slice) -> float:
        total = [sum(map(counts, each[steps])) for each, _ in (few, many)]
        return (total[1] - total[0]) / (LAYERS[1] - LAYERS[0]) / len(range(num_steps + 1)[steps])

    prompt, steps = slice(0, 1), slice(1, None)
    return LayerCosts(
        per_layer(lambda x: x.num_launches, prompt),
        per_layer(lambda x: x.num_waits, prompt),
        per_layer(lambda x: x.num_launches, steps),
        per_layer(lambda x: x.num_waits, steps),
        sum(each.mixed.total() for each in few[0] + many[0]),
        max(few[1], many[1]),
    )
