"""
The contract of every model that selects tokens: one body for all forms and families. A full forward, chunks on any
cache, each row alone, packed rows and the reference agree; nothing leaks; training reaches every weight.
"""

import copy
from functools import partial

import torch
from transformers import DynamicCache, StaticCache

from mosa_hf import use_backend
from testing.difference import max_difference
from testing.tiny import random_tokens

from .conftest import Form

LENGTH = 25
MASKS = {
    "left": [[1] * 25, [0] * 11 + [1] * 14, [0] * 24 + [1]],
    # Padding on the right, before a later turn, and on both sides of a token.
    "anywhere": [[1] * 25, [1] * 14 + [0] * 11, [1] * 9 + [0] * 5 + [1] * 11, [0] * 7 + [1] * 18, [1] + [0] * 24],
}
CHUNKS = ([1] * 6 + [9], [11, 1, 1, 5, 1])

random_ids = partial(random_tokens, vocab_size=97)


def padded_batch(padding: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of random tokens with padding, and the positions that `generate` would give them."""
    mask = torch.tensor(MASKS[padding])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": random_ids(*mask.shape, seed=seed) * mask,
        "attention_mask": mask,
        "position_ids": position_ids,
    }


def in_chunks(model, batch: dict[str, torch.Tensor], sizes: list[int], cache) -> torch.Tensor:
    """Logits of a batch fed chunk by chunk on one cache, as a hand-written loop does it."""
    logits, end = [], 0
    while end < batch["input_ids"].shape[1]:
        start, end = end, end + sizes[len(logits) % len(sizes)]
        output = model(
            batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            position_ids=batch["position_ids"][:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def check_parity(model, padding: str, seed: int = 0) -> None:
    """
    Full forward == the reference == chunks of any size on growing and on static caches == each row alone (threshold
    routing).
    """
    batch = padded_batch(padding, seed)
    full = model(**batch, use_cache=False).logits
    with use_backend("reference"):
        assert max_difference(full, model(**batch, use_cache=False).logits, batch) < 1e-4
    for sizes in CHUNKS:
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=LENGTH)):
            assert max_difference(full, in_chunks(model, batch, sizes, cache), batch) < 1e-4, (type(cache), sizes)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][row : row + 1, mask], use_cache=False).logits[0]
        assert (full[row, mask] - alone).abs().max() < 1e-4


@torch.no_grad()
def check_packed(model) -> None:
    """Packed sequences equal the sequences alone."""
    lengths = [9, 1, 20, 4]
    input_ids = random_ids(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids, position_ids=position_ids, use_cache=False).logits[0]
    alone = [model(ids, use_cache=False).logits[0] for ids in input_ids.split(lengths, dim=1)]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


@torch.no_grad()
def largest_leak(model) -> float:
    """
    The largest change of a logit before a changed token. In float64, where rounding (matmuls of other sizes) cannot be
    mistaken for a leak.
    """
    model, input_ids = copy.deepcopy(model).double(), random_ids(1, 40)
    logits, leaks = model(input_ids, use_cache=False).logits, []
    for changed in (5, 21, 39):
        others = input_ids.clone()
        others[:, changed:] = random_ids(1, 40 - changed, seed=changed)
        leaks.append((model(others, use_cache=False).logits - logits)[:, :changed].abs().max().item())
    return max(leaks)


def training_step(
    model, padding: str = "left", compiler: str = "", **checkpointing
) -> tuple[torch.Tensor, dict, dict]:
    """Loss, gradients and buffers after a step on a padded batch, of a copy of `model` in training."""
    model, batch = copy.deepcopy(model).train(), padded_batch(padding)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    is_real = batch["attention_mask"].bool()
    is_real[:, 1:] &= is_real[:, :-1].clone()  # what follows padding is predicted by padding, whose output is free
    step = torch.compile(model, fullgraph=True, backend=compiler) if compiler else model
    output = step(**batch, labels=batch["input_ids"].masked_fill(~is_real, -100), use_cache=False)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return output.loss.detach(), gradients, dict(model.named_buffers())


def check_same_step(step, expected) -> None:
    """Two training steps came out alike."""
    torch.testing.assert_close(step[0], expected[0], rtol=0, atol=1e-5)
    for name, gradient in expected[1].items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} gets no gradient"
        scale = max(1.0, gradient.abs().max().item())
        assert (step[1][name] - gradient).abs().max() < 1e-5 * scale, name
    for name, buffer in expected[2].items():
        torch.testing.assert_close(step[2][name], buffer, rtol=1e-5, atol=1e-6, msg=name)


def check_training(model, padding: str) -> None:
    """The step that the reference takes, with gradient checkpointing too; thresholds move, once."""
    with use_backend("reference"):
        expected = training_step(model, padding)
    for options in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        check_same_step(training_step(model, padding, **options), expected)
    thresholds = [name for name in expected[2] if name.endswith("threshold")]
    before = dict(model.named_buffers())
    assert thresholds and all((expected[2][name] != before[name]).all() for name in thresholds)


@torch.no_grad()
def check_saving(form: Form, path, **fields) -> None:
    """Saved in shards, loaded again: nothing is missing, and the same is computed."""
    model, input_ids = form.model(**fields), random_ids(2, 30)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.normal_()
    model.save_pretrained(path, max_shard_size="20kB")
    reloaded, info = form.causal_lm_class.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model(input_ids).logits
    assert torch.equal(reloaded(input_ids).logits, expected)
    is_tied = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert is_tied == bool(model.config.tie_word_embeddings)
    placed = form.causal_lm_class.from_pretrained(path, device_map={"": "cpu"})
    assert torch.equal(placed(input_ids).logits, expected)
    base = form.model_class.from_pretrained(path)
    assert torch.equal(base(input_ids).last_hidden_state, model.base_model(input_ids).last_hidden_state)
