"""Which tokens are selected: both rules against plain loops, what a model call shares, and the routers in training."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosa_hf.modeling.heads import MosaRouter, RoutingState
from mosa_hf.routing import select_by_expert_choice, select_by_threshold, valid_tokens

from .conftest import tiny_config, tiny_model

FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
ROUTINGS = ["expert_choice", "threshold"]


# --- the two rules ---


@st.composite
def routing_calls(draw) -> dict:
    """Arguments that both rules understand, with many ties, padding anywhere and packed sequences."""
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


@FAST
@given(
    call=routing_calls(),
    sparsity=st.sampled_from([1, 1.5, 2, 2.75, 4, 16]),
    min_tokens=st.integers(1, 5),
)
def test_expert_choice_equals_a_plain_loop(call, sparsity, min_tokens):
    selected, last = select_by_expert_choice(sparsity=sparsity, min_tokens=min_tokens, **call)

    logits, first = call["logits"], call["first"]
    batch_size, num_tokens, num_groups = logits.shape
    expected = torch.zeros(batch_size, num_tokens, num_groups, dtype=torch.bool)
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
                expected[row, chosen, group] = True
                free_logits[group] += [logits[row, token, group].item() for token in free]
                num_free[group] += len(chosen) - len(forced)
    assert torch.equal(selected, expected)
    reached = [sorted(seen)[-count] if count else math.nan for seen, count in zip(free_logits, num_free, strict=True)]
    torch.testing.assert_close(last, torch.tensor(reached), equal_nan=True)


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


def test_expert_choice_with_nothing_but_padding():
    selected, last = select_by_expert_choice(torch.ones(2, 3, 2), 2, 2, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert not selected.any() and last.isnan().all()


# --- what the layers of a model call share ---


def build_state(
    num_tokens: int,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_cached_tokens: torch.Tensor | None = None,
    batch_size: int = 2,
    may_be_packed: bool = False,
) -> RoutingState:
    if position_ids is None:
        position_ids = torch.arange(num_tokens)[None]
    embeds = torch.zeros(batch_size, num_tokens, 4)
    return RoutingState.build(embeds, mask, position_ids, num_cached_tokens, may_be_packed)


masks = st.integers(1, 8).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=4)
)


@FAST
@given(mask=masks, num_cached=st.lists(st.integers(0, 3), min_size=4, max_size=4), may_cache=st.booleans())
def test_positions_and_order_with_padding_anywhere(mask, num_cached, may_cache):
    batch_size, num_tokens = len(mask), len(mask[0])
    cached = torch.tensor(num_cached[:batch_size]) if may_cache else None
    state = build_state(num_tokens, torch.tensor(mask), num_cached_tokens=cached, batch_size=batch_size)

    valid = torch.tensor(mask).bool()
    if valid.all():
        assert state.valid is None
    else:
        assert torch.equal(state.valid, valid)
    for row in range(batch_size):
        position = num_cached[row] if may_cache else 0
        for token in range(num_tokens):
            if mask[row][token]:
                assert state.position[row, token] == position
                assert state.first[row, token] == (position == 0)
                position += 1
            else:
                assert not state.first[row, token]

    if all(sorted(row) == row for row in mask):
        assert state.order is None and state.inverse is None
        return
    for row, order, inverse in zip(mask, state.order.tolist(), state.inverse.tolist(), strict=True):
        assert [order[slot] for slot in inverse] == list(range(num_tokens))
        padding = [token for token in range(num_tokens) if not row[token]]
        real = [token for token in range(num_tokens) if row[token]]
        assert sorted(order[: len(padding)]) == padding
        assert order[len(padding) :] == real


@pytest.mark.parametrize("batch_of_ids", [1, 2])
def test_packed_sequences(batch_of_ids):
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]]).expand(batch_of_ids, -1)
    state = build_state(6, position_ids=position_ids, may_be_packed=True)
    assert state.segment.tolist() == [[0, 0, 0, 1, 1, 2]] * 2
    assert state.first.tolist() == [[True, False, False, True, False, True]] * 2
    assert state.position.tolist() == [list(range(6))] * 2
    assert state.valid is state.order is state.inverse is None


def test_restarting_positions_mean_nothing_beside_a_mask_or_cache():
    state = build_state(4, position_ids=torch.tensor([[0, 1, 0, 1]]), may_be_packed=False)
    assert state.segment is None
    assert state.first.tolist() == [[True, False, False, False]] * 2


def four_dimensional(padding: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Causal `[B, 1, T, T]` mask of a 2-D one, as Transformers makes it."""
    num_tokens = padding.shape[1]
    keep = padding[:, None, None].bool() & torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return (
        keep if dtype == torch.bool else torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 1, 1]] * 2])
def test_four_dimensional_masks_mean_the_same_as_two_dimensional(dtype, padding):
    padding = torch.tensor(padding)
    expected, actual = build_state(4, padding), build_state(4, four_dimensional(padding, dtype))
    for name in ("position", "valid", "first", "order", "inverse"):
        want, got = getattr(expected, name), getattr(actual, name)
        assert (want is None and got is None) or torch.equal(want, got), name


@pytest.mark.parametrize("padding", [[0, 1, 1], [1, 0, 1]])
def test_a_mask_may_be_shared_by_all_rows(padding):
    shared = four_dimensional(torch.tensor([padding]), torch.bool)  # [1, 1, T, T] for a batch of two
    state, expected = build_state(3, shared), build_state(3, shared.expand(2, -1, -1, -1))
    for name in ("position", "valid", "first", "order", "inverse"):
        want, got = getattr(expected, name), getattr(state, name)
        assert (want is None and got is None) or torch.equal(want, got), name


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5), four_dimensional(torch.ones(2, 5), torch.bool)], ids=["2-D", "4-D"]
)
def test_a_mask_without_padding_is_no_mask(mask):
    state = build_state(5, mask)
    assert state.valid is state.order is state.inverse is None
    assert state.position.tolist() == [list(range(5))] * 2


def test_only_the_last_columns_of_a_mask_are_the_call():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    state = build_state(2, mask, num_cached_tokens=torch.tensor([1, 3]))
    assert state.valid.tolist() == [[True, True], [False, True]]
    assert state.position[0].tolist() == [1, 2] and state.position[1, 1] == 3
    assert not state.first.any()


@pytest.mark.parametrize(
    "shape, message",
    [((2, 3), "covers 3 tokens, fewer than the 4"), ((2, 1, 1, 3), "covers 3 tokens"), ((2, 4, 4), r"\(2, 4, 4\)")],
)
def test_masks_of_the_wrong_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        valid_tokens(torch.ones(shape), 4)


# --- routers ---


def router_of(hidden_states: torch.Tensor, **fields) -> tuple[MosaRouter, RoutingState]:
    """A fresh router and the state of a model call on `hidden_states`."""
    torch.manual_seed(0)
    router = MosaRouter(tiny_config(hidden_size=hidden_states.shape[-1], **fields), layer_idx=1)
    return router, build_state(hidden_states.shape[1], batch_size=hidden_states.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_threshold_is_a_moving_average_in_training_only(routing, dtype):
    hidden_states = torch.randn(2, 24, 16).to(dtype)
    router, state = router_of(hidden_states, mosa_routing=routing, mosa_threshold_momentum=0.99)
    router.threshold.copy_(torch.tensor([1.0, 2.0, -1.0]))
    router = router.to(dtype)
    logits, _ = router.eval()(hidden_states, state)
    assert router.threshold.tolist() == [1.0, 2.0, -1.0] and state.thresholds == {}

    by_choice, last = select_by_expert_choice(logits.detach(), 4, 2, first=state.first)
    by_threshold = select_by_threshold(logits, torch.tensor([1.0, 2.0, -1.0]), first=state.first)
    for _ in range(2):  # gradient checkpointing calls a layer twice in one model call
        _, selected = router.train()(hidden_states, state)
        assert torch.equal(selected, by_choice if routing == "expert_choice" else by_threshold)
        expected = 0.99 * torch.tensor([1.0, 2.0, -1.0]) + 0.01 * last
        torch.testing.assert_close(router.threshold.float(), expected, rtol=1e-5, atol=1e-6)

    router(hidden_states, build_state(24))  # the next model call
    torch.testing.assert_close(router.threshold.float(), 0.99 * expected + 0.01 * last, rtol=1e-5, atol=1e-6)


def test_threshold_stays_where_no_token_was_chosen_freely():
    hidden_states = torch.randn(2, 1, 16)  # of one token, the first
    router, state = router_of(hidden_states)
    _, selected = router.train()(hidden_states, state)
    assert selected.all() and router.threshold.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_sparsity_one_selects_every_real_token(routing, training):
    hidden_states, mask = torch.randn(2, 5, 16), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    router, _ = router_of(hidden_states, mosa_sparsity=1, mosa_routing=routing, mosa_inference_routing=routing)
    router.threshold.fill_(1e9)
    _, selected = router.train(training)(hidden_states, build_state(5, mask))
    assert torch.equal(selected, mask.bool()[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("include_first", [True, False])
def test_first_token_is_selected_on_demand_only(include_first):
    hidden_states = torch.randn(2, 5, 16)
    router, state = router_of(hidden_states, mosa_include_first=include_first)
    router.threshold.fill_(1e9)
    _, selected = router.eval()(hidden_states, state)
    assert selected[:, 0].all() == include_first and not selected[:, 1:].any()


def test_logits_are_float32_whatever_the_model_computes_in():
    hidden_states = torch.randn(2, 24, 16)
    router, state = router_of(hidden_states, mosa_router_bias=True)
    expected, selected = router.eval()(hidden_states, state)
    with torch.autocast("cpu", torch.bfloat16):
        logits, same = router(hidden_states, state)
    assert torch.equal(logits, expected) and torch.equal(same, selected)

    router = router.bfloat16()
    logits, _ = router(hidden_states.bfloat16(), state)
    expected = hidden_states.bfloat16().float() @ router.weight.float().T + router.bias.float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


def test_router_logits_of_a_model_are_float32():
    model, input_ids = tiny_model().bfloat16(), torch.arange(1, 20)[None]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = tiny_model()(input_ids, output_router_logits=True).router_logits
    for router_logits in (model(input_ids, output_router_logits=True).router_logits, autocast):
        assert [logits.dtype for logits in router_logits] == [torch.float32] * 3


# --- training whole models ---


def train_step(model, **checkpointing) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradients and thresholds after one step on a padded batch."""
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    torch.manual_seed(1)
    input_ids = torch.randint(1, 97, (2, 20))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :6] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    loss = model.train()(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
    loss.backward()
    thresholds = [layer.self_attn.mosa.router.threshold for layer in model.model.layers]
    return {name: parameter.grad for name, parameter in model.named_parameters()}, thresholds


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("use_reentrant, aux_loss", [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_gradient_checkpointing_changes_nothing(form, routing, use_reentrant, aux_loss):
    # A fast average, so that a layer which ran twice would select other tokens the second time.
    fields = {"mosa_routing": routing, "mosa_threshold_momentum": 0.1, "mosa_router_aux_loss_coef": aux_loss, **form}
    expected, expected_thresholds = train_step(tiny_model(**fields))
    actual, thresholds = train_step(tiny_model(**fields), use_reentrant=use_reentrant)
    fresh = [layer.self_attn.mosa.router.threshold for layer in tiny_model(**fields).model.layers]
    for moved, expected_threshold, start in zip(thresholds, expected_thresholds, fresh, strict=True):
        torch.testing.assert_close(moved, expected_threshold)
        assert (moved != start).all()
    for name, gradient in expected.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_auxiliary_loss_is_refused_where_it_would_be_lost():
    # Reentrant checkpointing hands out router logits without a graph: their loss would train nothing.
    with pytest.raises(ValueError, match="use_reentrant"):
        train_step(tiny_model(mosa_router_aux_loss_coef=0.5), use_reentrant=True)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("selects", [True, False], ids=["some", "nothing_selected"])
def test_short_calls_leave_no_parameter_out_of_the_graph(form, num_tokens, selects):
    # Distributed training waits for the gradient of every parameter, be it zero.
    model = tiny_model(mosa_routing="threshold", mosa_include_first=False, **form).train()
    for layer in model.model.layers:
        layer.self_attn.mosa.router.threshold.fill_(-1e9 if selects else 1e9)
    model(torch.arange(1, num_tokens + 1)[None], use_cache=False).logits.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_auxiliary_loss_treats_packed_sequences_as_sequences():
    model = tiny_model(mosa_router_aux_loss_coef=0.5).train()
    input_ids = torch.randint(1, 97, (2, 10), generator=torch.Generator().manual_seed(0))
    apart = model(input_ids, labels=input_ids, use_cache=False).aux_loss
    input_ids, position_ids = input_ids.view(1, 20), torch.arange(10).repeat(2)[None]
    packed = model(input_ids, position_ids=position_ids, labels=input_ids, use_cache=False).aux_loss
    torch.testing.assert_close(packed, apart)


# --- several processes ---


def train_router_on_rank(rank: int, directory: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        hidden_states = torch.load(f"{directory}/hidden_states.pt")[rank]
        router, state = router_of(hidden_states, mosa_threshold_momentum=0.5)
        router.train()(hidden_states, state)
        # A call of one token chooses nothing freely: on rank 1 alone, it leaves the average to rank 0.
        short = hidden_states[:, :1] if rank == 1 else hidden_states
        router(short, build_state(short.shape[1], batch_size=1))
        torch.save(router.threshold, f"{directory}/threshold_{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_average_their_thresholds(tmp_path: Path):
    batches = torch.randn(2, 1, 16, 16)
    torch.save(batches, tmp_path / "hidden_states.pt")
    last = []
    for hidden_states in batches:
        router, state = router_of(hidden_states)
        last.append(select_by_expert_choice(router(hidden_states, state)[0].detach(), 4, 2, first=state.first)[1])
    torch.multiprocessing.start_processes(train_router_on_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = 0.5 * (0.5 * (last[0] + last[1]) / 2) + 0.5 * last[0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"threshold_{rank}.pt"), expected)
