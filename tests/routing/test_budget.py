"""What a cache budget evicts and when: every form of streaming top-k against a sorted list."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosa_hf.kernels.append_token.reference import lowest_score
from mosa_hf.kernels.tensors import NEVER
from mosa_hf.routing.budget import evicted_at, within_budget


@settings(max_examples=120)
@given(
    num_slots=st.integers(1, 14),
    budget=st.integers(1, 6),
    num_values=st.sampled_from([1, 3, 100]),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_streaming_top_k(num_slots, budget, num_values, is_packed, seed):
    """
    Of the selected tokens up to t, those of the `budget` highest scores are left, ties to the earlier token: as
    `evicted_at` says when, `within_budget` who at the end, and `lowest_score` of one token more than the budget.
    """
    random = torch.Generator().manual_seed(seed)
    size = (2, 3, num_slots)
    score = torch.randint(num_values, size, generator=random) - num_values / 2
    score = score.masked_fill(torch.rand(size, generator=random) < 0.1, torch.inf)  # never evicted
    selected = torch.rand(size, generator=random) < 0.7
    position = torch.rand(size, generator=random).argsort(-1) + 5
    segment = None
    if is_packed:
        position = position.sort(-1).values
        segment = (torch.rand(2, 1, num_slots, generator=random) < 0.3).long().cumsum(-1)
    evicted = evicted_at(score, position, selected, budget, segment)
    evicted = torch.full(size, NEVER) if evicted is None else evicted
    for row, group in ((row, group) for row in range(2) for group in range(3)):
        sequence = [0] * num_slots if segment is None else segment[row, 0].tolist()
        scores, positions = score[row, group].tolist(), position[row, group].tolist()
        held = torch.zeros(num_slots, dtype=torch.bool)  # as one token after the other would leave it
        for slot in sorted(range(num_slots), key=positions.__getitem__):
            seen = [j for j in range(num_slots) if selected[row, group, j] and positions[j] <= positions[slot]]
            seen = [j for j in seen if sequence[j] == sequence[slot]]
            alive = set(sorted(seen, key=lambda j: (-scores[j], positions[j]))[:budget])
            assert {j for j in seen if evicted[row, group, j] > positions[slot]} == alive
            if not is_packed:
                held[slot] = selected[row, group, slot]
                if held.sum() > budget:
                    lowest = lowest_score(
                        score[row, group, None, None], position[row, group, None, None], held[None, None]
                    )
                    held[lowest] = False
                assert set(held.nonzero()[:, 0].tolist()) == alive
        if not is_packed:
            left = within_budget(score, position, selected, budget)[row, group]
            assert set(left.nonzero()[:, 0].tolist()) == alive
    assert (evicted >= position)[selected].all()


def test_more_tokens_than_are_compared_at_once():
    score = torch.rand(1, 1, 300, generator=torch.Generator().manual_seed(0))
    position, selected = torch.arange(300)[None, None], torch.ones(1, 1, 300, dtype=torch.bool)
    evicted = evicted_at(score, position, selected, 20)[0, 0]
    for t in (19, 20, 130, 299):
        alive = (evicted[: t + 1] > t).nonzero()[:, 0]
        assert torch.equal(alive, score[0, 0, : t + 1].topk(min(20, t + 1)).indices.sort().values)
