"""An arena alone, on random requests in random pieces, beside the definition of what a query reads."""

import random

import pytest
import torch

from mosa_hf.kernels.sparse_attention.reference import sparse_attention
from mosa_hf.kernels.tensors import KeyValues
from mosa_hf.routing import evicted_at
from mosa_hf.vllm.arena import Arena, Chunk, Group, TokenStates
from mosa_hf.vllm.attention import read_token
from mosa_hf.vllm.prefill import Options, read_chunk
from mosa_hf.vllm.spec import BLOCK_SIZE, ArenaSpec, Update

HEADS, HEAD_DIM, MAX_LEN, NUM_ROWS = 2, 8, 200, 3
DENSE, SLIDING = Group(1, 1.0), Group(10, 0.0)
LAYERS = {
    "windows": [[Group(5, 0.3), Group(40, 0.2)], [Group(1, 0.5), Group(5, 0.3)]],
    "no window": [[Group(0, 0.3), Group(0, 0.5)]],
    "mixed": [[Group(7, 0.3), DENSE], [SLIDING, SLIDING], [DENSE, Group(0, 0.4)]],
    "budget": [[Group(7, 0.3, 9), DENSE], [SLIDING, SLIDING], [Group(0, 0.6, 4), Group(20, 0.9, 9)]],
}


class PlainPages:
    """Memory as it is on paper."""

    def __init__(self, num_blocks: int):
        self.key, self.value = (torch.zeros(num_blocks * BLOCK_SIZE, HEAD_DIM) for _ in range(2))

    def write(self, key, value, entry):
        self.key[entry], self.value[entry] = key[:, 0], value[:, 0]

    def read(self, table):
        entry = (table.long()[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)
        return self.key[entry], self.value[entry]

    def attend(self, query, length, table, scale, softcap, sinks, output):
        key, value = self.read(table.flatten(0, 1))
        mask = torch.arange(key.shape[1]) < length.flatten()[:, None]
        scores = (query.flatten(0, 1) @ key.transpose(1, 2) * scale).masked_fill(~mask[:, None], -torch.inf)
        output.copy_((scores.softmax(-1) @ value).view(query.shape))


class Request:
    """Random tokens for every layer, and what each of them should read."""

    def __init__(self, layers, length: int, generator: torch.Generator):
        self.past, self.length, num_groups = 0, length, len(layers[0])
        self.states, self.expected = [], []
        for groups in layers:
            query = torch.randn(length, num_groups * HEADS, HEAD_DIM, generator=generator)
            key, value = (torch.randn(length, num_groups, HEAD_DIM, generator=generator) for _ in range(2))
            selected = torch.rand(length, num_groups, generator=generator) < torch.tensor([x.rate for x in groups])
            score = torch.randint(0, 50, (length, num_groups), generator=generator).float()
            self.states.append(TokenStates(query, key, value, selected, score))
            self.expected.append(torch.cat([self._read(i, x) for i, x in enumerate(groups)], dim=1))

    def _read(self, index: int, group: Group) -> torch.Tensor:
        """The specification of a group, `[T, R, d]`."""
        query, key, value, selected, score = self.states[-1]
        query = query.view(self.length, -1, HEADS, HEAD_DIM)[:, index]
        position = torch.arange(self.length)
        own = selected[:, index][None, None]
        until = None
        if group.budget is not None:
            until = evicted_at(score[:, index][None, None], position[None, None], own, group.budget)
        recent = KeyValues(
            key[:, index][None, None], value[:, index][None, None], position[None, None], None, own, until
        )
        return sparse_attention(query.transpose(0, 1)[None, None], recent, None, position[None], None, group.window)[
            0, 0
        ].transpose(0, 1)


def arena_of(layers) -> Arena:
    shapes = tuple(each.shape() for groups in layers for each in groups)
    spec = ArenaSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=HEAD_DIM, dtype=torch.float32, ranks=(shapes,),
        num_rows=NUM_ROWS,
        max_len=MAX_LEN,
    )  # fmt: skip
    arena = Arena(layers, HEAD_DIM, MAX_LEN, MAX_LEN, spec, torch.device("cpu"))
    num_blocks = NUM_ROWS * spec.worst_blocks(MAX_LEN) + 1
    arena.row_of_block = torch.zeros(num_blocks, dtype=torch.int64)
    arena.pages = PlainPages(num_blocks)
    for name, dtype in (("position", torch.int64), ("selected", torch.bool), ("score", torch.float32)):
        setattr(arena, f"entry_{name}", torch.zeros(num_blocks * BLOCK_SIZE, dtype=dtype))
    return arena


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(2))
def test_random_pieces(name, seed):
    layers, generator = LAYERS[name], torch.Generator().manual_seed(seed)
    draw, arena = random.Random(seed), arena_of(LAYERS[name])
    options = Options(HEAD_DIM**-0.5, None, None)
    size, serial = arena.spec.worst_blocks(MAX_LEN), 0
    requests: dict[int, Request] = {}
    for _ in range(60):
        for row in range(NUM_ROWS):  # rows change hands
            if row not in requests and draw.random() < 0.5:
                serial += 1
                requests[row] = Request(layers, draw.randint(1, MAX_LEN - 1), generator)
                blocks = list(range(1 + row * size, 1 + (row + 1) * size))
                draw.shuffle(blocks)
                arena.apply([Update(row, serial, blocks[0], 0, blocks, size, False)])
        chosen = [row for row in requests if draw.random() < 0.8]
        pieces = {
            row: min(draw.choice((1, 1, 1, 30, 80)), requests[row].length - requests[row].past) for row in chosen
        }
        single = [row for row in chosen if pieces[row] == 1 and not arena.has_budget]
        step = None
        if single:
            past = torch.tensor([requests[row].past for row in single])
            step = arena.plan_decode(torch.tensor(single), past, None, MAX_LEN)
        chunks = [Chunk(row, 0, requests[row].past, pieces[row]) for row in chosen if row not in single]
        for chunk in chunks:
            arena.begin_chunk(chunk)
            assert not chunk.may_overflow
        for layer in range(len(layers)):
            for chunk in chunks:
                own = requests[chunk.row]
                output = read_chunk(arena, layer, chunk, own.states[layer].of(slice(chunk.past, chunk.end)), options)
                torch.testing.assert_close(
                    output, own.expected[layer][chunk.past : chunk.end].reshape(output.shape), rtol=1e-4, atol=1e-5
                )
            if step is not None:
                at = [requests[row].past for row in single]
                states = [requests[row].states[layer].of(slice(t, t + 1)) for row, t in zip(single, at, strict=True)]
                tokens = TokenStates(*(torch.cat(each) for each in zip(*states, strict=True)))
                output = torch.empty_like(tokens.query)
                read_token(arena, layer, step, tokens, options, output)
                expected = torch.stack([requests[row].expected[layer][t] for row, t in zip(single, at, strict=True)])
                torch.testing.assert_close(output, expected.reshape(output.shape), rtol=1e-4, atol=1e-5)
        for row, report in arena.reports().items():
            # Nobody has taken more than is needed for all.
            assert report.upto[0] == int(arena.used[row]) <= size
            assert list(report.upto) == sorted(report.upto)
        for row in chosen:
            requests[row].past += pieces[row]
            if requests[row].past == requests[row].length:
                del requests[row]
    assert serial > NUM_ROWS
    assert arena.take_dropped() == 0


def test_reports_bound_what_is_taken():
    """For each number of tokens ahead, a request takes no more blocks than was said before."""
    layers, generator = LAYERS["windows"] + LAYERS["mixed"], torch.Generator().manual_seed(0)
    options = Options(HEAD_DIM**-0.5, None, None)
    for ahead in (1, 2, 5, 32, 100):
        arena = arena_of(layers)
        size = arena.spec.worst_blocks(MAX_LEN)
        request = Request(layers, MAX_LEN, generator)
        arena.apply([Update(0, 1, 1, 0, list(range(1, size + 1)), size, False)])
        said = None
        while request.past < MAX_LEN:
            length = min(ahead, MAX_LEN - request.past)
            chunk = Chunk(0, 0, request.past, length)
            arena.begin_chunk(chunk)
            for layer in range(len(layers)):
                read_chunk(arena, layer, chunk, request.states[layer].of(slice(chunk.past, chunk.end)), options)
            if said is not None:
                assert int(arena.used[0]) <= said.blocks(chunk.end, arena.spec.num_groups())
            said, request.past = arena.reports()[0], chunk.end


def test_what_overflows_is_the_lowest_score():
    """With too few blocks, windows and dense groups stay whole, and what is kept of the rest scores highest."""
    layers = [[Group(8, 0.9), DENSE]]
    arena, generator = arena_of(layers), torch.Generator().manual_seed(0)
    request = Request(layers, 160, generator)
    owned = 5 + 3  # of the dense group for 160 tokens; and 96 entries
    arena.apply([Update(0, 1, 1, 0, list(range(1, owned + 1)), owned, False)])
    chunk = Chunk(0, 0, 0, 160)
    arena.begin_chunk(chunk)
    assert chunk.may_overflow
    read_chunk(arena, 0, chunk, request.states[0], Options(HEAD_DIM**-0.5, None, None))
    assert int(arena.used[0]) == owned and arena.have[0, 0].tolist() == [3, 5]
    selected, score = request.states[0].selected[:152, 0], request.states[0].score[:152, 0]
    dropped = arena.take_dropped()
    assert dropped == int(selected.sum()) - (96 - 8)
    stored = arena.pages.read(arena.table[0, :1, 0, :3])[0][0]
    is_kept = (request.states[0].key[:152, 0][:, None] == stored[None]).all(-1).any(-1)
    assert int(is_kept.sum()) == 96 - 8
    assert score[is_kept].min() >= score[selected & ~is_kept].max()


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_request_that_has_all_blocks_keeps_windows_and_dense_groups(piece):
    """Until its last token, however much it would like to select before."""
    layers = [[Group(8, 0.99), DENSE], [Group(20, 0.99), SLIDING], [DENSE, Group(1, 0.99)]]
    arena, generator = arena_of(layers), torch.Generator().manual_seed(0)
    request, spec, options = Request(layers, MAX_LEN, generator), arena.spec, Options(HEAD_DIM**-0.5, None, None)
    owned = spec.later_blocks(0) + 3
    arena.apply([Update(0, 1, 1, 0, list(range(1, owned + 1)), owned, True)])
    while request.past < MAX_LEN:
        chunk = Chunk(0, 0, request.past, min(piece, MAX_LEN - request.past))
        if piece == 1:
            step = arena.plan_decode(torch.tensor([0]), torch.tensor([request.past]), None, MAX_LEN)
        else:
            arena.begin_chunk(chunk)
        for layer, groups in enumerate(layers):
            tokens = request.states[layer].of(slice(chunk.past, chunk.end))
            if piece == 1:
                output = torch.empty_like(tokens.query)
                read_token(arena, layer, step, tokens, options, output)
            else:
                output = read_chunk(arena, layer, chunk, tokens, options)
            expected = request.expected[layer][chunk.past : chunk.end]
            for index, group in enumerate(groups):
                if group in (DENSE, SLIDING):
                    own = slice(index * HEADS, (index + 1) * HEADS)
                    torch.testing.assert_close(output[:, own], expected[:, own], rtol=1e-4, atol=1e-5)
        assert int(arena.used[0]) <= owned
        request.past = chunk.end
    assert arena.take_dropped() > 0
