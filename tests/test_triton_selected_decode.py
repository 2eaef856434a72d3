"""Decoding of form "selected" on a cache of fixed size, against what its docstring says, written out."""

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels import reference  # noqa: E402
from mosa_hf.kernels.layout import FixedKeyValues, HeadWeights, Tokens, rotate  # noqa: E402
from mosa_hf.kernels.triton.selected_decode import decode_selected  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor takes half a minute on a CPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the largest value


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        actual.float() / scale, expected.float() / scale, rtol=0, atol=TOLERANCE[dtype], msg=lambda m: f"{name}: {m}"
    )


def empty_state(batch_size: int, num_groups: int, capacity: int, head_dim: int, dtype: torch.dtype) -> FixedKeyValues:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(batch_size, *shape, dtype=dtype, device=DEVICE)

    return FixedKeyValues(
        key=tensor(num_groups, capacity, head_dim) + torch.nan,  # empty slots are not read
        value=tensor(num_groups, capacity, head_dim) + torch.nan,
        position=tensor(num_groups, capacity, dtype=torch.int32),
        score=tensor(num_groups, capacity, dtype=torch.float32) + torch.nan,
        count=tensor(num_groups, dtype=torch.int32),
        num_evicted=tensor(num_groups, dtype=torch.int32),
        ring_key=tensor(num_groups, 0, head_dim),
        ring_value=tensor(num_groups, 0, head_dim),
        ring_score=tensor(num_groups, 0, dtype=torch.float32),
        num_tokens=tensor(dtype=torch.int64),
    )


def plain_step(hidden_states, weights, cos, sin, score, gate, valid, state, budget):
    """`decode_selected`, one row and group after another; `state` is updated."""
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    num_groups, head_dim, _ = weights.key.shape
    for b in range(len(hidden_states)):
        if valid is not None and not valid[b]:
            continue
        for g in range(num_groups):
            if score[b, g] == -torch.inf:
                continue
            query, key, value = (
                weight[g].float() @ hidden_states[b].float() + (0.0 if bias is None else bias[g].float())
                for weight, bias in zip(weights[:3], weights[4:], strict=True)
            )
            query = rotate(query.unflatten(0, (-1, head_dim)), cos[b].float(), sin[b].float())
            key = rotate(key, cos[b].float(), sin[b].float())
            slot = int(state.count[b, g])
            if slot < budget:
                state.count[b, g] += 1
            else:
                state.num_evicted[b, g] += 1
                ranks = [(float(state.score[b, g, s]), -int(state.position[b, g, s]), s) for s in range(budget)]
                ranks.append((float(score[b, g]), -int(state.num_tokens[b]), budget))
                slot = min(ranks)[2]
            if slot < budget:
                for kept, new in zip(state[:4], (key, value, state.num_tokens[b], score[b, g]), strict=True):
                    kept[b, g, slot] = new
            count = int(state.count[b, g])
            keys, values = state.key[b, g, :count].float(), state.value[b, g, :count].float()
            heads = (query @ keys.T * head_dim**-0.5).softmax(-1) @ values  # [R, d]
            output[b] += gate[b, g] * (weights.output[g].float() @ heads.flatten())
    state.num_tokens.add_(1 if valid is None else valid)
    return output


def random_weights(num_groups, num_heads, head_dim, hidden_size, bias, dtype) -> HeadWeights:
    query_dim = num_heads * head_dim
    sizes = [(query_dim, hidden_size), (head_dim, hidden_size), (head_dim, hidden_size), (hidden_size, query_dim)]
    sizes += [(query_dim,), (head_dim,), (head_dim,)] if bias else []
    return HeadWeights(
        *((torch.randn(num_groups, *size, device=DEVICE) / size[-1] ** 0.5).to(dtype) for size in sizes)
    )


def random_angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(*shape, device=DEVICE)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "num_heads", "bias", "hidden_size", "capacity", "budget", "padded", "num_kept"),
    [
        (16, 16, 1, False, 24, 4, 4, False, 0),
        (16, 8, 3, True, 300, 6, 1, True, 0),
        (64, 32, 2, False, 40, 5, 2, True, 0),
        (80, 80, 1, True, 20, 3, 2, False, 0),
        (128, 128, 1, False, 16, 2, 1, False, 0),
        (256, 64, 1, False, 16, 2, 1, False, 0),
        (16, 16, 2, False, 8, 80, 70, False, 67),  # more entries than are read at a time
    ],
)
def test_decode_selected(
    head_dim, rotary_dim, num_heads, bias, hidden_size, capacity, budget, padded, num_kept, dtype
):
    """Step after step; scores with many ties, some of them infinite."""
    torch.manual_seed(head_dim)
    batch_size, num_groups = 2, 2
    weights = random_weights(num_groups, num_heads, head_dim, hidden_size, bias, dtype)
    state = empty_state(batch_size, num_groups, capacity, head_dim, dtype)
    if num_kept:
        for kept in (state.key, state.value, state.score):
            kept[:, :, :num_kept] = torch.randint(-2, 3, kept[:, :, :num_kept].shape, device=DEVICE)
        state.position[:, :, :num_kept] = torch.randperm(num_kept, device=DEVICE)
        state.count[:], state.num_tokens[:] = num_kept, num_kept
    expected_state = FixedKeyValues(*(x.clone() for x in state))
    for step in range(8 if head_dim == 16 else 4):
        hidden_states = torch.randn(batch_size, hidden_size, device=DEVICE).to(dtype)
        score = torch.randint(-2, 3, (batch_size, num_groups), device=DEVICE).float()
        score = score.masked_fill(score == -2, -torch.inf)
        if step == 0:
            score = score.masked_fill(score > -torch.inf, torch.inf)
        gate = torch.rand(batch_size, num_groups, device=DEVICE)
        valid = torch.rand(batch_size, device=DEVICE) < 0.7 if padded else None
        arguments = (hidden_states, weights, *random_angles(batch_size, rotary_dim), score, gate, valid)

        actual = decode_selected(*arguments, state, budget)
        expected = plain_step(*arguments, expected_state, budget)
        close(actual, expected, dtype, f"output of step {step}")
        for name in ("position", "score", "count", "num_evicted", "num_tokens"):
            pair = (getattr(x, name) for x in (state, expected_state))
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        for name in ("key", "value"):
            kept, expected_kept = getattr(state, name), getattr(expected_state, name)
            assert torch.equal(kept.isnan(), expected_kept.isnan())
            close(kept.nan_to_num(), expected_kept.nan_to_num(), dtype, name)
    assert int(state.num_evicted.max()) > 0  # the budget was tested


def test_steps_are_the_full_forward():
    """With room for everything, decoding token by token is `selected_heads` of the whole sequence."""
    torch.manual_seed(0)
    batch_size, num_tokens, num_groups, head_dim, hidden_size = 2, 12, 3, 16, 24
    weights = random_weights(num_groups, 2, head_dim, hidden_size, True, torch.float32)
    hidden_states = torch.randn(batch_size, num_tokens, hidden_size, device=DEVICE)
    cos, sin = random_angles(batch_size, num_tokens, head_dim)
    score = torch.randn(batch_size, num_tokens, num_groups, device=DEVICE)
    selected = score > 0
    position = torch.arange(num_tokens, device=DEVICE).expand(batch_size, -1)
    tokens = Tokens(position, None, None, cos, sin, selected, score.sigmoid())
    expected, _ = reference.selected_heads(hidden_states, weights, tokens)

    state = empty_state(batch_size, num_groups, num_tokens, head_dim, torch.float32)
    score = score.masked_fill(~selected, -torch.inf)
    for t in range(num_tokens):
        arguments = (x[:, t] for x in (cos, sin, score, tokens.gate))
        actual = decode_selected(hidden_states[:, t], weights, *arguments, None, state, num_tokens)
        close(actual, expected[:, t], torch.float32, f"token {t}")


def small_step(batch_size: int = 2):
    """Arguments of a step, and a state that is full."""
    torch.manual_seed(0)
    weights = random_weights(3, 1, 16, 8, True, torch.float32)
    state = empty_state(batch_size, 3, 2, 16, torch.float32)
    arguments = (
        torch.randn(batch_size, 8, device=DEVICE),
        weights,
        *random_angles(batch_size, 16),
        torch.randn(batch_size, 3, device=DEVICE),
        torch.rand(batch_size, 3, device=DEVICE),
        torch.ones(batch_size, dtype=torch.bool, device=DEVICE),
    )
    for _ in range(2):
        decode_selected(*arguments, state, 2)
    return arguments, state


def test_op_is_well_behaved():
    (hidden_states, weights, *rest), state = small_step()
    kept = (*state[:6], state.num_tokens)
    torch.library.opcheck(torch.ops.mosa.decode_selected, (hidden_states, *weights, *rest, *kept, 2))


def test_compiles_into_one_graph():
    arguments, state = small_step()
    expected_state = FixedKeyValues(*(x.clone() for x in state))
    expected = decode_selected(*arguments, expected_state, 2)
    torch.compiler.reset()
    actual = torch.compile(decode_selected, fullgraph=True, backend=COMPILER)(*arguments, state, 2)
    assert torch.equal(actual, expected)
    for kept, expected_kept in zip(state, expected_state, strict=True):
        assert torch.equal(kept, expected_kept)


@pytest.mark.parametrize("budget", [0, 3])
def test_budget_must_fit(budget):
    arguments, state = small_step()
    with pytest.raises(ValueError, match=f"between 1 and the capacity 2, got {budget}"):
        decode_selected(*arguments, state, budget)


def test_state_must_be_contiguous():
    arguments, state = small_step()
    state = state._replace(key=state.key.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="contiguous"):
        decode_selected(*arguments, state, 2)


def test_weights_need_not_be_contiguous():
    (hidden_states, weights, *rest), state = small_step()
    other_state = FixedKeyValues(*(x.clone() for x in state))
    strided = HeadWeights(*(weight.transpose(0, 1).contiguous().transpose(0, 1) for weight in weights))
    expected = decode_selected(hidden_states, weights, *rest, state, 2)
    assert torch.equal(decode_selected(hidden_states, strided, *rest, other_state, 2), expected)
