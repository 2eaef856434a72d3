"""The fast paths against the specification: outputs and all gradients, on random shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf.kernels import backend, portable, reference, use_backend
from mosa_hf.kernels.layout import NEVER, HeadWeights, KeyValues, RaggedKeyValues, Tokens

FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
shapes = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 3),
        "num_tokens": st.integers(1, 70),
        "num_groups": st.integers(1, 5),
        "heads_per_group": st.integers(1, 3),
        "sparsity": st.integers(1, 9),
        "head_dim": st.sampled_from([2, 6, 16]),
        "rotary_share": st.sampled_from([0.5, 1.0]),
        "bias": st.booleans(),
        "padded": st.booleans(),
        "packed": st.booleans(),
        "num_past": st.sampled_from([0, 0, 1, 13]),
        "evicts": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)
HIDDEN_SIZE = 12


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """1e-5 relative to the tensor's own scale: sums over tokens grow with T."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


def random_call(shape: dict, num_keys_before: int) -> Tokens:
    """Random selections, gates, rotary angles and padding, as the routers would hand them over."""
    batch_size, num_tokens, num_groups = shape["batch_size"], shape["num_tokens"], shape["num_groups"]
    valid = segment = None
    if shape["padded"]:
        num_padding = torch.randint(0, num_tokens + 1, (batch_size, 1))
        valid = torch.arange(num_tokens) >= num_padding
        position = (valid.cumsum(1) - 1).clamp(min=0)
    else:
        position = torch.arange(num_tokens).expand(batch_size, -1)
    if shape["packed"] and not num_keys_before and valid is None:
        segment = torch.randint(0, 2, (batch_size, num_tokens)).cumsum(1) // 4
    rotary_dim = max(2, int(shape["head_dim"] * shape["rotary_share"]) // 2 * 2)
    angle = torch.rand(batch_size, num_tokens, rotary_dim)
    selected = torch.rand(batch_size, num_tokens, num_groups) < 1 / shape["sparsity"]
    if valid is not None:
        selected = selected & valid[..., None]
    gate = torch.rand(batch_size, num_tokens, num_groups, requires_grad=True)
    position = position + num_keys_before
    until = random_until(position[..., None].expand_as(selected)) if shape["evicts"] else None
    score = torch.randn(selected.shape) if shape["evicts"] else None
    return Tokens(position, valid, segment, angle.cos(), angle.sin(), selected, gate, score, until)


def random_until(position: torch.Tensor) -> torch.Tensor:
    """When a budget evicts the tokens of these positions: never, or any time from the token's own on."""
    until = position + (torch.rand(position.shape) * 20).long()
    return until.masked_fill(torch.rand(position.shape) < 0.3, NEVER)


def random_kept(shape: dict, num_before: int) -> KeyValues | None:
    """Cached selected tokens of positions below `num_before`, a different number for each row and group."""
    if not num_before:
        return None
    size = (shape["batch_size"], shape["num_groups"], num_before)
    filled = torch.arange(num_before) < torch.randint(0, num_before + 1, (*size[:2], 1))
    position = torch.arange(num_before).expand(size)
    key, value = (torch.randn(*size, shape["head_dim"], requires_grad=True) for _ in range(2))
    until = random_until(position) if shape["evicts"] else None
    return KeyValues(key, value, position, filled, None, until)


def ragged(kept: KeyValues | None) -> RaggedKeyValues | None:
    """The same entries as a cache holds them: runs with room between them."""
    if kept is None or not kept.valid.any():
        return None
    count = kept.valid.sum(-1)
    room = count + torch.randint(0, 4, count.shape)
    start = room.flatten().cumsum(0).view_as(room) - room
    where = (start[..., None] + kept.valid.cumsum(-1) - 1)[kept.valid]
    size = int(room.sum())
    key, value = (
        states.new_zeros(size, states.shape[-1]).index_copy(0, where, states[kept.valid].detach())
        for states in (kept.key, kept.value)
    )
    position = torch.zeros(size, dtype=torch.int32).index_copy(0, where, kept.position[kept.valid].to(torch.int32))
    until = None
    if kept.until is not None:
        until = torch.full((size,), NEVER).index_copy(0, where, kept.until[kept.valid])
    return RaggedKeyValues(key.requires_grad_(), value.requires_grad_(), position, start, count, until)


def gradients(output: torch.Tensor, weight: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    if not output.requires_grad:  # nothing was read
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def all_form_call(shape: dict, window: int, biased: bool, fixed: bool = False):
    """
    Arguments of `all_attention`, and those of them that take gradients; with `fixed`, kept entries as a cache of fixed
    size hands them over.
    """
    num_recent = min(shape["num_past"], max(window - 1, 0)) if not shape["padded"] else 0
    num_kept = shape["num_past"] - num_recent
    # Kept tokens have left the window of every query, if only behind recent ones.
    tokens = random_call(shape, shape["num_past"] + (window if shape["padded"] else 0))
    batch_size, num_tokens, groups, head_dim = (
        shape[name] for name in ("batch_size", "num_tokens", "num_groups", "head_dim")
    )
    num_near = num_recent + num_tokens
    position = torch.cat((torch.arange(num_kept, shape["num_past"]).expand(batch_size, -1), tokens.position), dim=1)
    recent = torch.rand(batch_size, num_recent, groups) < 1 / shape["sparsity"]
    near = KeyValues(
        *(torch.randn(batch_size, groups, num_near, head_dim, requires_grad=True) for _ in range(2)),
        position[:, None].expand(-1, groups, -1),
        None if tokens.valid is None else tokens.valid[:, None].expand(-1, groups, -1),
        torch.cat((recent, tokens.selected), dim=1).transpose(1, 2),
    )
    if shape["evicts"]:
        near = near._replace(until=random_until(near.position))
    kept = random_kept(shape, num_kept)
    kept = kept if fixed else ragged(kept)
    query = torch.randn(batch_size, groups, shape["heads_per_group"], num_tokens, head_dim, requires_grad=True)
    bias = (-torch.rand(batch_size, groups, num_near)).requires_grad_() if biased else None
    inputs = [query, near.key, near.value, *([bias] if biased else []), *([] if kept is None else kept[:2])]
    return (query, near, kept, tokens, window, bias), inputs


@FAST
@given(shapes)
def test_selected_heads(shape):
    torch.manual_seed(shape["seed"])
    groups, head_dim = shape["num_groups"], shape["head_dim"]
    query_dim = shape["heads_per_group"] * head_dim
    sizes = [(query_dim, HIDDEN_SIZE), (head_dim, HIDDEN_SIZE), (head_dim, HIDDEN_SIZE), (HIDDEN_SIZE, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if shape["bias"] else []
    # Divided by the root of the fan-in, as trained weights are: float32 rounding is measured against values near 1.
    weights = HeadWeights(*((torch.randn(groups, *size) / size[-1] ** 0.5).requires_grad_() for size in sizes))
    hidden_states = torch.randn(shape["batch_size"], shape["num_tokens"], HIDDEN_SIZE, requires_grad=True)
    past = random_kept(shape, shape["num_past"])
    tokens = random_call(shape, shape["num_past"])

    expected, expected_new = reference.selected_heads(hidden_states, weights, tokens, past)
    actual, actual_new = portable.selected_heads(hidden_states, weights, tokens, past)
    close(actual, expected, "output")
    stored = ("key", "value", "position", "until", "score") if shape["evicts"] else ("key", "value", "position")
    for name in stored:  # what a cache would append, in its order
        close(
            getattr(actual_new, name)[actual_new.valid].double(),
            getattr(expected_new, name)[expected_new.valid].double(),
            name,
        )
    assert torch.equal(actual_new.valid.sum(-1), expected_new.valid.sum(-1))

    inputs = [hidden_states, tokens.gate, *(w for w in weights if w is not None)]
    inputs += [past.key, past.value] if past is not None else []
    upstream = torch.randn_like(expected)
    for i, pair in enumerate(
        zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    ):
        close(*pair, f"gradient {i}")


@FAST
@given(shapes, st.integers(0, 9), st.booleans(), st.booleans())
def test_all_attention(shape, window, biased, small_blocks):
    check_all_attention(shape, window, biased, small_blocks)


@FAST
@given(shapes, st.integers(1, 16), st.sampled_from([0, 1, 64]))
def test_all_attention_of_a_single_token(shape, window, decode_loop):
    """With the loop over cached entries, and without."""
    limit, portable.DECODE_LOOP = portable.DECODE_LOOP, decode_loop
    try:
        check_all_attention({**shape, "num_tokens": 1, "num_past": 13}, window, biased=False, small_blocks=False)
    finally:
        portable.DECODE_LOOP = limit


def check_all_attention(shape, window, biased, small_blocks):
    torch.manual_seed(shape["seed"])
    (query, near, kept, tokens, window, bias), inputs = all_form_call(shape, window, biased)

    block, portable.QUERY_BLOCK = portable.QUERY_BLOCK, 16 if small_blocks else portable.QUERY_BLOCK
    try:
        actual = portable.all_attention(query, near, kept, tokens, window, bias)
    finally:
        portable.QUERY_BLOCK = block
    expected = reference.all_attention(query, near, kept, tokens, window, bias)
    # What padding queries get is free.
    real = torch.ones(()) if tokens.valid is None else tokens.valid[:, None, None, :, None]
    close(actual * real, expected * real, "output")

    upstream = torch.randn_like(expected) * real
    for i, pair in enumerate(
        zip(gradients(actual, upstream, inputs), gradients(expected, upstream, inputs), strict=True)
    ):
        close(*pair, f"gradient {i}")


def test_use_backend():
    assert backend() is portable
    with use_backend("reference"):
        assert backend() is reference
        with use_backend("torch"):
            assert backend() is portable
        assert backend() is reference
    assert backend() is portable
    with pytest.raises(ValueError, match="'cuda' is not available.*reference.*torch"), use_backend("cuda"):
        pass
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert backend() is portable
