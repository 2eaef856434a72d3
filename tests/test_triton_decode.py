"""Decoding one token a row on a cache of fixed size, against the rule written out for one row and group."""

import math

import pytest
import torch

pytest.importorskip("triton")

from mosa_hf.kernels import reference  # noqa: E402
from mosa_hf.kernels.layout import FixedKeyValues, KeyValues, Tokens  # noqa: E402
from mosa_hf.kernels.triton import decode  # noqa: E402
from mosa_hf.kernels.triton.decode import decode_all  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor compiles for half a minute on a CPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def on_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """A handful of entries in several splits and several comparisons, as thousands of them are."""
    monkeypatch.setattr(decode, "BLOCK_SLOTS", 16)
    monkeypatch.setattr(decode, "BLOCK_SCORES", 16)


def empty_state(batch_size: int, num_groups: int, capacity: int, window: int, head_dim: int, dtype=torch.float32):
    """Nothing cached; what is not filled holds NaN, which must never be read."""
    size = (batch_size, num_groups)
    return FixedKeyValues(
        key=torch.full((*size, capacity, head_dim), torch.nan, dtype=dtype),
        value=torch.full((*size, capacity, head_dim), torch.nan, dtype=dtype),
        position=torch.zeros(*size, capacity, dtype=torch.int32),
        score=torch.full((*size, capacity), torch.nan),
        count=torch.zeros(size, dtype=torch.int32),
        num_evicted=torch.zeros(size, dtype=torch.int32),
        ring_key=torch.full((*size, window, head_dim), torch.nan, dtype=dtype),
        ring_value=torch.full((*size, window, head_dim), torch.nan, dtype=dtype),
        ring_score=torch.full((*size, window), -math.inf),
        num_tokens=torch.zeros(batch_size, dtype=torch.int64),
    )


class Group:
    """One row and group by the rule: `kept` entries and a `ring`, each entry (score, position, key, value)."""

    def __init__(self, window: int, budget: int):
        self.window, self.budget = window, budget
        self.kept, self.ring, self.num_evicted = [], {}, 0

    def step(self, token: int, score: float, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor):
        entry = [score, token, key, value]
        if self.window:
            leaving = self.ring.get(token % self.window)
            if leaving is not None and leaving[0] > -math.inf:
                self.kept.append(leaving)
            self.ring[token % self.window] = entry
        elif score > -math.inf:
            self.kept.append(entry)
        selected = self.kept + [entry for entry in self.ring.values() if entry[0] > -math.inf]
        if len(selected) > self.budget:
            lowest = min(selected, key=lambda entry: (entry[0], -entry[1]))
            place = next((i for i, entry in enumerate(self.kept) if entry is lowest), None)
            if place is None:
                lowest[0] = -math.inf
            else:
                self.kept[place] = self.kept[-1]
                self.kept.pop()
            self.num_evicted += 1
        entries = self.kept + list(self.ring.values())
        if not entries:
            return torch.zeros_like(query)
        keys, values = (torch.stack([entry[i] for entry in entries]).double() for i in (2, 3))
        return (query.double() @ keys.T * query.shape[-1] ** -0.5).softmax(-1) @ values


# Window, budget, spare capacity, head size, query heads a group, tokens, with padding, dtype.
CASES = [
    (0, 1, 0, 16, 1, 6, False, torch.float32),
    (0, 12, 0, 16, 3, 20, True, torch.float32),
    (0, 10, 8, 64, 2, 14, False, torch.float16),
    (1, 1, 0, 16, 1, 6, True, torch.float32),
    (1, 6, 1, 20, 2, 12, False, torch.float32),
    (5, 3, 0, 64, 3, 14, True, torch.float32),
    (5, 18, 2, 80, 1, 30, True, torch.float32),
    (9, 18, 0, 128, 3, 30, True, torch.float32),
    (20, 9, 0, 16, 2, 30, False, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_all_follows_the_rule(case, small_blocks):
    """Entry by entry, score by score, and what the queries read, token after token; many scores are equal."""
    window, budget, spare, head_dim, num_heads, num_tokens, padded, dtype = case
    batch_size, num_groups = 2, 2
    state = empty_state(batch_size, num_groups, budget + spare, window, head_dim, dtype)
    groups = {(row, group): Group(window, budget) for row in range(batch_size) for group in range(num_groups)}
    seen = [0] * batch_size
    for _ in range(num_tokens):
        query = torch.randn(batch_size, num_groups, num_heads, head_dim).to(dtype)
        key, value = (torch.randn(batch_size, num_groups, head_dim).to(dtype) for _ in range(2))
        score = torch.randint(0, 5, (batch_size, num_groups)).float()
        score[torch.rand(batch_size, num_groups) < 0.2] = -math.inf
        for row in range(batch_size):
            if seen[row] == 0:
                score[row] = math.inf
        valid = torch.rand(batch_size) < 0.85 if padded else None
        output = decode_all(query, key, value, score, valid, state, budget)
        assert output.dtype == dtype and output.isfinite().all()
        for (row, number), group in groups.items():
            at = row, number
            if valid is None or valid[row]:
                expected = group.step(seen[row], score[at].item(), key[at], value[at], query[at])
                torch.testing.assert_close(output[at].double(), expected.double(), rtol=0, atol=TOLERANCE[dtype])
            count = len(group.kept)
            assert state.count[at] == count and state.num_evicted[at] == group.num_evicted
            assert state.score[at][:count].tolist() == [entry[0] for entry in group.kept]
            assert state.position[at][:count].tolist() == [entry[1] for entry in group.kept]
            assert all(torch.equal(state.key[at][i], entry[2]) for i, entry in enumerate(group.kept))
            assert all(torch.equal(state.value[at][i], entry[3]) for i, entry in enumerate(group.kept))
            assert all(state.ring_score[at][slot] == entry[0] for slot, entry in group.ring.items())
        seen = [n + (1 if valid is None or valid[row] else 0) for row, n in enumerate(seen)]
        assert state.num_tokens.tolist() == seen
    assert state.num_evicted.any()


@pytest.mark.parametrize("window", [0, 1, 7])
def test_decode_all_is_form_all_token_by_token(window):
    batch_size, num_groups, num_heads, num_tokens, head_dim = 2, 2, 2, 20, 16
    query = torch.randn(batch_size, num_groups, num_heads, num_tokens, head_dim)
    key, value = (torch.randn(batch_size, num_groups, num_tokens, head_dim) for _ in range(2))
    score = torch.randn(batch_size, num_groups, num_tokens)
    selected = score > 0.5
    position = torch.arange(num_tokens).expand(batch_size, -1)
    near = KeyValues(key, value, position[:, None].expand(-1, num_groups, -1), None, selected)
    tokens = Tokens(position, None, None, None, None, selected.transpose(1, 2), None)
    expected = reference.all_attention(
        query, near._replace(valid=torch.ones_like(selected)), None, tokens, window
    )  # [B, G, R, T, d]
    state = empty_state(batch_size, num_groups, num_tokens, window, head_dim)
    score = score.masked_fill(~selected, -math.inf)
    for i in range(num_tokens):
        output = decode_all(query[..., i, :], key[:, :, i], value[:, :, i], score[..., i], None, state, num_tokens)
        torch.testing.assert_close(output, expected[..., i, :], rtol=0, atol=1e-4)
    assert not state.num_evicted.any()


def filled_state(window: int) -> FixedKeyValues:
    state = empty_state(2, 2, 6, window, 16)
    for _ in range(12):
        decode_all(*one_token(), state, 4)
    return FixedKeyValues(*(x.nan_to_num() if x.is_floating_point() else x for x in state))


def one_token():
    valid = torch.tensor([True, False])
    return torch.randn(2, 2, 2, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16), torch.randn(2, 2), valid


@pytest.mark.parametrize("window", [0, 5])
def test_the_op_passes_opcheck(window):
    torch.library.opcheck(decode._decode, (*one_token(), *filled_state(window), 4))


def test_decode_all_compiles_into_one_graph():
    state, token = filled_state(5), one_token()
    other = FixedKeyValues(*(x.clone() for x in state))
    expected = decode_all(*token, state, 4)
    torch.testing.assert_close(torch.compile(decode_all, fullgraph=True, backend=COMPILER)(*token, other, 4), expected)
    for actual, expected in zip(other, state, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_decode_all_can_be_captured_in_a_cuda_graph():
    state, token = filled_state(5), one_token()
    other = FixedKeyValues(*(x.clone() for x in state))
    expected = [decode_all(*token, state, 4) for _ in range(3)][-1]
    decode_all(*token, FixedKeyValues(*(x.clone() for x in other)), 4)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records and does not run
        actual = decode_all(*token, other, 4)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(actual, expected)
    for replayed, stepped in zip(other, state, strict=True):
        torch.testing.assert_close(replayed, stepped)


def test_what_does_not_fit_is_refused():
    state = empty_state(2, 2, 6, 5, 16)
    with pytest.raises(ValueError, match="budget of 7 tokens does not fit 6"):
        decode_all(*one_token(), state, 7)
    with pytest.raises(ValueError, match="must be contiguous"):
        decode_all(*one_token(), state._replace(key=state.key.transpose(0, 1)), 4)
