"""The two rules of selection against plain loops, with ties, padding anywhere and packed sequences."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf.routing import select_by_expert_choice, select_by_threshold

FAST = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def routing_calls(draw) -> dict:
    """Arguments that both rules understand."""
    batch_size, num_tokens, num_groups = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    num_values = draw(st.sampled_from([1, 2, 4, 1000]))
    logits = torch.randint(num_values, (batch_size, num_tokens, num_groups), generator=generator) / 4 - 1
    valid = segment = first = None
    if draw(st.booleans()):
        valid = torch.rand(batch_size, num_tokens, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    if draw(st.booleans()):
        segment = (torch.rand(batch_size, num_tokens, generator=generator) < 0.3).long().cumsum(1)
        segment = segment - segment[:, :1]
    if draw(st.booleans()):
        first = torch.zeros(batch_size, num_tokens, dtype=torch.bool)
        for row, sequences in enumerate(sequences_of(batch_size, num_tokens, valid, segment)):
            first[row, [tokens[0] for tokens in sequences]] = True
    return {"logits": logits, "valid": valid, "segment": segment, "first": first}


def sequences_of(batch_size: int, num_tokens: int, valid, segment) -> list[list[list[int]]]:
    """For each row, the real tokens of each of its sequences."""
    rows = []
    for row in range(batch_size):
        sequences = {}
        for token in range(num_tokens):
            if valid is None or valid[row, token]:
                sequences.setdefault(0 if segment is None else int(segment[row, token]), []).append(token)
        rows.append(list(sequences.values()))
    return rows


def chosen_by_loop(call: dict, sparsity: float, min_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `select_by_expert_choice` has to return."""
    logits, first = call["logits"], call["first"]
    batch_size, num_tokens, num_groups = logits.shape
    selected = torch.zeros(batch_size, num_tokens, num_groups, dtype=torch.bool)
    free_logits = [[] for _ in range(num_groups)]  # of the whole batch
    num_free = [0] * num_groups
    for row, sequences in enumerate(sequences_of(batch_size, num_tokens, call["valid"], call["segment"])):
        for tokens in sequences:
            num_selected = min(max(math.floor(len(tokens) / sparsity), min_tokens), len(tokens))
            for group in range(num_groups):
                forced = [token for token in tokens if first is not None and first[row, token]]
                free = [token for token in tokens if token not in forced]
                free.sort(key=lambda token: (-logits[row, token, group].item(), token))
                chosen = (forced + free)[:num_selected]
                selected[row, chosen, group] = True
                free_logits[group] += [logits[row, token, group].item() for token in free]
                num_free[group] += len(chosen) - len(forced)
    last = [sorted(seen)[-count] if count else math.nan for seen, count in zip(free_logits, num_free, strict=True)]
    return selected, torch.tensor(last)


@FAST
@given(
    call=routing_calls(),
    sparsity=st.sampled_from([1, 1.1, 1.5, 2, 2.75, 4, 16]),
    min_tokens=st.integers(1, 5),
)
def test_expert_choice_equals_a_plain_loop(call, sparsity, min_tokens):
    selected, last = select_by_expert_choice(sparsity=sparsity, min_tokens=min_tokens, **call)
    expected, expected_last = chosen_by_loop(call, sparsity, min_tokens)
    assert torch.equal(selected, expected)
    torch.testing.assert_close(last, expected_last, equal_nan=True)


def test_threshold_where_one_row_has_all_the_highest():
    call = {"logits": torch.rand(3, 40, 2), "valid": None, "first": None, "segment": None}
    call["logits"][1] += 1
    _, last = select_by_expert_choice(sparsity=4, min_tokens=2, **call)
    assert torch.equal(last, chosen_by_loop(call, 4, 2)[1])


@pytest.mark.parametrize("num_values", [2, 10**6], ids=["ties", "no_ties"])
def test_expert_choice_compiles(num_values):
    # A compiled graph cannot look whether there are ties.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(num_values, (2, 40, 3), generator=generator) / num_values
    call = {"logits": logits, "valid": torch.arange(40) >= torch.tensor([[0], [7]]), "first": None, "segment": None}
    compiled = torch.compile(select_by_expert_choice, fullgraph=True, backend="aot_eager")
    for valid in (call["valid"], None):
        selected, last = compiled(logits, 4, 2, valid)
        expected, expected_last = chosen_by_loop({**call, "valid": valid}, 4, 2)
        assert torch.equal(selected, expected) and torch.equal(last, expected_last)


def test_expert_choice_with_nothing_but_padding():
    selected, last = select_by_expert_choice(torch.ones(2, 3, 2), 2, 2, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert not selected.any() and last.isnan().all()


@FAST
@given(call=routing_calls(), threshold=st.sampled_from([-2.0, -0.75, -0.5, 0.0, 99.0]))
def test_threshold_rule_equals_a_plain_loop(call, threshold):
    logits, valid, first = call["logits"], call["valid"], call["first"]
    thresholds = threshold + torch.arange(logits.shape[2]) / 4
    selected = select_by_threshold(logits, thresholds, valid, first)
    for row, token, group in torch.ones_like(selected).nonzero().tolist():
        is_real = valid is None or bool(valid[row, token])
        is_forced = first is not None and bool(first[row, token])
        is_high = logits[row, token, group].item() >= thresholds[group].item()
        assert selected[row, token, group].item() == (is_real and (is_forced or is_high))
