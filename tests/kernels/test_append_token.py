"""One more token in a store's memory: every form against lists of tuples, of any windows and budgets."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosa_hf.kernels import _load
from mosa_hf.kernels.append_token.reference import Token
from mosa_hf.kernels.entries import Entries
from mosa_hf.kernels.entry_codes import decoded, encoded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_ROWS, NUM_GROUPS = 2, 3
BACKENDS = ["reference", "torch"]
if importlib.util.find_spec("triton"):
    BACKENDS.append(pytest.param("triton", marks=pytest.mark.slow))


def memory(capacity: int, has_position: bool, has_score: bool, is_coded: bool = False) -> Entries:
    """Empty ranges that lie evenly; keys have 5 channels and values 3."""
    entries, num_entries = Entries(), NUM_ROWS * NUM_GROUPS * capacity
    entries.start = (torch.arange(NUM_ROWS * NUM_GROUPS, device=DEVICE) * capacity).view(NUM_ROWS, NUM_GROUPS)
    entries.length, entries.num_selected, entries.num_evicted = (torch.zeros_like(entries.start) for _ in range(3))
    entries.null, entries.max_length, entries.stride = num_entries, capacity, None
    sizes = {"key": (torch.float32, 5), "value": (torch.float32, 3), "selected": (torch.bool,)}
    sizes |= {"position": (torch.int32,)} if has_position else {}
    sizes |= {"score": (torch.float32,)} if has_score else {}
    entries.states = {
        name: torch.zeros(num_entries + 1, *size, dtype=dtype, device=DEVICE) for name, (dtype, *size) in sizes.items()
    }
    if is_coded:
        entries.states = encoded(entries.states)
    return entries


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=8)
@given(
    window=st.sampled_from([0, 1, 4]),
    budget=st.sampled_from([None, 1, 3]),
    is_padded=st.booleans(),
    notes=st.booleans(),
    is_coded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_tokens_one_by_one(name, window, budget, is_padded, notes, is_coded, seed):
    random, num_steps = torch.Generator().manual_seed(seed), 12
    entries = memory(window + num_steps + 1, budget is not None or not window, budget is not None, is_coded)
    num_stored = torch.zeros(NUM_ROWS, dtype=torch.int64)
    rows = [[[] for _ in range(NUM_GROUPS)] for _ in range(NUM_ROWS)]  # of (number, selected, score)
    for step in range(num_steps):
        valid = (torch.rand(NUM_ROWS, 3, generator=random) < 0.8)[:, 2] if is_padded else None  # of a whole mask
        selected = torch.rand(NUM_ROWS, NUM_GROUPS, generator=random) < 0.5
        selected = selected if valid is None else selected & valid[:, None]
        score = torch.randint(3, (NUM_ROWS, NUM_GROUPS), generator=random).float()
        key = torch.full((NUM_ROWS, NUM_GROUPS, 5), float(step + 1))
        states = (key, -key[..., :3], selected, score if budget else None, valid)
        token = Token._make(x if x is None else x.to(DEVICE) for x in states)
        before = {key: own.clone() for key, own in entries.states.items()}
        taken = _load(name).append_token(entries, token, num_stored.to(DEVICE), window, budget, notes)
        for row, own in enumerate(rows):
            is_real = valid is None or bool(valid[row])
            for group, tokens in enumerate(own):
                gone = None
                if is_real:
                    tokens.append([step + 1, bool(selected[row, group]), float(score[row, group])])
                    chosen = [each for each in tokens if each[1]]
                    if budget and len(chosen) > budget:
                        gone = min(chosen, key=lambda each: (each[2], -each[0]))
                        gone[1] = False
                held = {each[0] for i, each in enumerate(tokens) if each[1] or i >= len(tokens) - window}
                first, length = int(entries.start[row, group]), int(entries.length[row, group])
                found = decoded({name: own[first : first + length].cpu() for name, own in entries.states.items()})
                assert sorted(found["key"][:, 0].tolist()) == sorted(held)
                assert torch.equal(found["value"], -found["key"][:, :3])
                of_selected = {int(x) for x in found["key"][:, 0][found["selected"]]}
                assert of_selected == {each[0] for each in tokens if each[1]}
                place = row * NUM_GROUPS + group
                if budget:
                    assert entries.num_selected[row, group] == len(of_selected)
                if notes and window and is_real and num_stored[row] >= window:
                    entry = first + int(num_stored[row]) % window
                    assert all(torch.equal(own[place], before[x][entry]) for x, own in taken.overwritten.items())
                if notes and budget and taken.is_evicted is not None:
                    assert bool(taken.is_evicted[row, group]) == (gone is not None)
                    if gone is not None:
                        evicted = decoded(taken.evicted)
                        assert evicted["key"][place, 0] == gone[0] and evicted["score"][place] == gone[2]
        num_stored = num_stored + (1 if valid is None else valid.long())
    if budget:
        assert entries.num_evicted.sum() > 0 or num_steps <= budget


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_those_of_the_reference(dtype):
    """To the last bit: of numbers of any size, of zeros, and halfway between two codes."""
    torch.manual_seed(0)
    both = {name: memory(8, False, False, is_coded=True) for name in ("reference", "triton")}
    for entries in both.values():
        entries.states |= {name: entries.states[name].to(dtype) for name in ("key_scale", "value_scale")}
    num_stored = torch.zeros(NUM_ROWS, dtype=torch.int64, device=DEVICE)
    for step in range(6):
        key = (torch.randn(NUM_ROWS, NUM_GROUPS, 5) * 10.0 ** (step - 3)).to(dtype)
        key[0, 0], key[1, 1] = 0.0, torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0])
        states = key, -key[..., :3].contiguous(), torch.ones(NUM_ROWS, NUM_GROUPS, dtype=torch.bool)
        token = Token(*(x.to(DEVICE) for x in states), None, None)
        for name, entries in both.items():
            _load(name).append_token(entries, token, num_stored, 4)
        num_stored = num_stored + 1
    for name, own in both["triton"].states.items():
        assert torch.equal(own[:-1], both["reference"].states[name][:-1]), name
