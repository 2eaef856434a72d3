"""The parts of a sparse store, each alone: entries that grow or do not, calls, and the record of a single token."""

import pytest
import torch

from mosa_hf.cache.calls import CallLog
from mosa_hf.cache.fixed_memory import FixedMemory
from mosa_hf.cache.memory import AHEAD, SLACK, EntryMemory
from mosa_hf.cache.undo import MAX_UNDO, UndoRecord

LIKE = (torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 6), 3)  # keys of 4 channels, values of 6, of 2 rows and 3 groups


def memory_of(kind: str) -> EntryMemory:
    has_position, has_score = True, kind == "fixed"
    return (
        FixedMemory(2, 5, 40, *LIKE, has_position, has_score) if kind == "fixed" else EntryMemory(*LIKE, True, False)
    )


def append(memory: EntryMemory, number: int) -> torch.Tensor:
    """One more entry to every range, whose key says which it is."""
    memory.reserve_one()
    entries = memory.start + memory.length
    key = torch.arange(6)[:, None] * 1000.0 + number + torch.zeros(4)
    memory.put(entries, key=key, value=-key[:, :1].expand(-1, 6), selected=torch.full((6,), number % 2 == 0))
    memory.lengthen(1)
    return entries


def held(memory: EntryMemory) -> list[list[float]]:
    """The first channel of the keys in every range."""
    return [key[:, 0].tolist() for key, _ in memory.read().split()]


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_entries_are_appended_removed_and_repacked(kind):
    memory = memory_of(kind)
    assert memory.behind(0, torch.zeros(2, 1, dtype=torch.int64)) is None or kind == "fixed"
    for number in range(5):
        append(memory, number)
    assert held(memory) == [[1000 * i + n for n in range(5)] for i in range(6)]
    key, value = memory.read().split()[4]
    assert torch.equal(value[:, 0], -key[:, 0]) and memory.read() is memory.read()  # until something changes

    where = torch.zeros(2, 3, dtype=torch.bool)
    where[1, 2] = True
    memory.remove(memory.start + 1, where)  # the last entry takes its place
    assert held(memory)[5] == [5000, 5004, 5002, 5003] and held(memory)[0] == [0, 1, 2, 3, 4]
    memory.put(torch.full((2, 3), memory.null), key=torch.full((6, 4), 9.0))  # counts for nothing
    assert held(memory)[5] == [5000, 5004, 5002, 5003]

    if kind == "growing":  # whose ranges move; rows of a fixed one are selected by the same code
        entries, filled = memory.slots()
        memory.repack(entries, filled & (torch.arange(entries.shape[-1]) != 2))
        assert held(memory)[5] == [5000, 5004, 5003] and held(memory)[0] == [0, 1, 3, 4]
    memory.select_rows(torch.tensor([1, 1, 0]))
    assert [row[0] for row in held(memory)] == [3000, 4000, 5000, 3000, 4000, 5000, 0, 1000, 2000]


@torch.no_grad()
def test_growing_memory_has_little_slack_and_asks_for_more_when_it_is_full():
    memory = memory_of("growing")
    for number in range(200):
        append(memory, number)
        assert memory.free >= 0 and bool((memory.length <= memory.capacity).all())
        assert memory.null <= 6 * (number + 1 + number // SLACK + 2)
    assert held(memory)[3] == [3000 + n for n in range(200)]


@torch.no_grad()
@pytest.mark.parametrize(("num_certain", "room"), [(-3, 1), (1, 1), (5, 5), (1000, AHEAD)])
def test_growing_memory_gets_room_for_tokens_that_are_sure_to_come(num_certain, room):
    memory = memory_of("growing")
    memory.reserve_one(num_certain)
    assert memory.capacities == [room + 1] * memory.length.numel()  # and one of slack


@torch.no_grad()
def test_fixed_memory_never_moves():
    memory = memory_of("fixed")
    places = [states.data_ptr() for states in (*memory.tensors(),)]
    for number in range(7):  # a ring of 2 and 5 selected ones
        append(memory, number)
    memory.make_room(None, None, 2, torch.full_like(memory.length, 3))
    assert places == [states.data_ptr() for states in (*memory.tensors(),)]
    assert memory.stride == 7 and held(memory)[1] == [1000, 1001, 1002]


@torch.no_grad()
def test_what_is_written_where_nothing_may_change_is_written_to_a_copy():
    memory = memory_of("growing")
    append(memory, 0)
    before, entries = memory.states["key"], (memory.start + 0)[..., None]
    rows = {name: states[entries] for name, states in memory.states.items()} | {"key": torch.full((2, 3, 1, 4), 7.0)}
    with torch.enable_grad():  # autograd may have saved what is there
        memory.write(entries, rows)
    assert memory.states["key"] is not before and held(memory) == [[7.0]] * 6
    assert before[memory.start[0, 1]][0] == 1000.0


def log_of(*masks: list[list[int]] | int) -> CallLog:
    """Of calls with padding, or of so many columns without."""
    calls = CallLog(torch.zeros(2, 1, 1))
    for mask in masks:
        valid = None if isinstance(mask, int) else torch.tensor(mask).bool()
        calls.begin(valid, mask if valid is None else valid.shape[1])
        calls.expect(mask if valid is None else valid.shape[1], valid)
        calls.settle()
    return calls


def test_a_log_counts_tokens_apart_from_columns():
    calls = log_of([[0, 1, 1], [1, 1, 1]], 2, 1, [[1, 0], [0, 1]])
    assert calls.num_tokens.tolist() == [6, 7] and calls.common_length is None
    assert calls.lengths == [3, 3, 2]  # calls without padding are one
    assert [calls.num_removed(n).tolist() for n in (1, 2, 5, 7, 8)] == [[0, 1], [1, 1], [4, 4], [6, 6], [6, 7]]
    calls.forget(3)
    assert calls.lengths == [3, 2] and calls.num_removed(9).tolist() == [4, 5]
    assert log_of(3, 4).common_length == 7


def test_a_log_knows_how_far_it_can_go_back():
    window = 4
    calls = log_of(10)
    calls.num_lost = torch.tensor([6, 6])  # the ring has had the last four
    assert calls.num_croppable(3, window) == 1  # to go further, the next query would read tokens that are gone
    for _ in range(40):
        calls.begin(None, 1)
        calls.add_one(None)
        calls.note(UndoRecord(1))
    assert len(calls.records) == MAX_UNDO and calls.num_croppable(49, window) == MAX_UNDO + 1
    assert calls.num_croppable(50, window) == 50  # of nothing that is left is anything read
    calls.note(None)  # a call of several tokens ends them
    assert calls.records == []


def test_rows_of_a_log_and_of_its_records():
    calls = log_of([[0, 1], [1, 1]])
    calls.note(UndoRecord(1, is_evicted=torch.tensor([[True], [False]]), num_final=torch.tensor([5, 6])))
    calls.select_rows(torch.tensor([1, 0]))
    assert calls.num_tokens.tolist() == [2, 1] and calls.num_removed(2).tolist() == [2, 1]
    assert calls.records[0].num_final.tolist() == [5, 6]  # only noted
    (record,) = calls.pop_records(1)
    assert record.num_final.tolist() == [6, 5] and record.is_evicted.tolist() == [[False], [True]]
    assert calls.records == []


@torch.no_grad()
def test_a_record_gives_back_what_a_token_took():
    """The fourth token of a ring of three came into the first one's place, which was kept, for it was selected."""
    memory = memory_of("growing")
    for number in range(3):
        append(memory, number)
    before = held(memory)
    record = UndoRecord(3, overwritten=memory.gather(memory.start))
    memory.reserve_one()
    memory.put(memory.start + memory.length, **memory.gather(memory.start))
    memory.put(memory.start + memory.length, position=torch.zeros(6, dtype=torch.int32))
    memory.lengthen(1)
    memory.put(memory.start, key=torch.full((6, 4), 33.0))
    assert held(memory) != before and memory.max_length == 4
    memory.reserve(1)
    record.undo(memory, torch.tensor([4, 4]), torch.tensor([1, 1]), window=3)
    assert held(memory) == before
