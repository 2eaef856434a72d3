"""The routers of whole models: which tokens they select, and how thresholds follow what they see in training."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mosa_hf import trace_routing
from mosa_hf.modeling.router import MosaRouter, routers_of
from mosa_hf.routing import select_by_expert_choice, select_by_threshold

from ..conftest import FORMS, Form, sparse_form, tiny_model
from ..contract import random_ids, training_step

ROUTINGS = ["expert_choice", "threshold"]


def routed(model: nn.Module, input_ids: torch.Tensor, **options) -> list[tuple]:
    """Logits and selection of every router in a forward call."""
    outputs = []
    hooks = [r.register_forward_hook(lambda _, args, output: outputs.append(output)) for r in routers_of(model)]
    model(input_ids, **options)
    for hook in hooks:
        hook.remove()
    return outputs


def choice(logits: torch.Tensor, router: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_by_expert_choice`, group by group."""
    first = torch.zeros(logits.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    parts = [
        select_by_expert_choice(logits.detach()[..., [group]], sparsity, router.min_tokens, first=first)
        for group, sparsity in enumerate(router.sparsity)
    ]
    return torch.cat([part[0] for part in parts], dim=-1), torch.cat([part[1] for part in parts])


def followed(
    threshold: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor, last: torch.Tensor, momentum: float
) -> torch.Tensor:
    """
    Where a call moves thresholds: by 1 - momentum, by more the further they are from selecting as many tokens as are
    chosen, and by 0.9 where that is a quarter or more.
    """
    num_selected, num_chosen = ((each[:, 1:]).sum((0, 1)) for each in (logits >= threshold, chosen))
    follow = ((num_selected / num_chosen - 1).abs() / 0.25).clamp(max=0.9).clamp(min=1 - momentum)
    return (1 - follow) * threshold + follow * last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_thresholds_are_moving_averages_of_training_calls(form, routing, dtype):
    """Calls with gradients and without a cache: neither evaluation nor generation in training mode counts."""
    model, input_ids = form.model(mosa_routing=routing).to(dtype), random_ids(2, 24)
    routers = routers_of(model)
    for router in routers:
        router.threshold.normal_(generator=torch.Generator().manual_seed(0))
    before = [router.threshold.clone() for router in routers]
    model.eval()(input_ids)
    model.train()
    with torch.no_grad():
        model(input_ids, use_cache=False)
    if routing == "threshold":
        model(input_ids, use_cache=True)
        model.generate(input_ids, max_new_tokens=3)
    assert all(map(torch.equal, before, [router.threshold for router in routers]))

    for _ in range(2):
        outputs = routed(model, input_ids, use_cache=False)
        for router, threshold, (logits, selected) in zip(routers, before, outputs, strict=True):
            chosen, last = choice(logits, router)
            first = torch.arange(24).expand(2, -1) == 0
            assert logits.dtype == router.threshold.dtype == torch.float32
            by_threshold = select_by_threshold(logits, threshold, first=first)
            assert torch.equal(selected, chosen if routing == "expert_choice" else by_threshold)
            expected = followed(threshold, logits, chosen, last, momentum=0.99)
            torch.testing.assert_close(router.threshold, expected, rtol=1e-5, atol=1e-6)
        before = [router.threshold.clone() for router in routers]


def test_a_plain_training_loop_is_told_that_thresholds_stay(form, monkeypatch):
    """Transformers' configs have `use_cache` on."""
    model, messages = form.model().train(), []
    monkeypatch.setattr("mosa_hf.modeling.router.logger.warning_once", messages.append)
    model(random_ids(2, 24), use_cache=False)
    with torch.no_grad():
        model(random_ids(2, 24))
    model.eval()(random_ids(2, 24))
    assert not messages
    model.train()(random_ids(2, 24))
    assert messages and "pass `use_cache=False`" in messages[0]


def test_thresholds_stay_where_no_token_was_chosen_freely(form):
    model = form.model().train()
    before = [router.threshold.clone() for router in routers_of(model)]
    outputs = routed(model, random_ids(2, 1), use_cache=False)  # of one token, the first
    assert all(selected.all() for _, selected in outputs)
    assert all(map(torch.equal, before, [router.threshold for router in routers_of(model)]))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_sparsity_one_selects_every_real_token(form, routing):
    plan = {} if form is FORMS["native"] else {"mosa_plan": None}
    fields = {"mosa_sparsity": 1, "mosa_routing": routing, "mosa_inference_routing": routing, **plan}
    model, mask = form.model(**fields), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    for router in routers_of(model):
        router.threshold.fill_(1e9)
    for training in (False, True):
        for _, selected in routed(model.train(training), random_ids(2, 5), attention_mask=mask, use_cache=False):
            assert torch.equal(selected, mask.bool()[..., None].expand_as(selected))


@pytest.mark.parametrize("include_first", [True, False])
def test_the_first_token_is_selected_on_demand_only(form, include_first):
    model = form.model(mosa_include_first=include_first)
    for router in routers_of(model):
        router.threshold.fill_(1e9)
    with trace_routing(model) as selections:
        model.generate(random_ids(2, 5), max_new_tokens=3)
    for prefill, *steps in selections.values():
        assert prefill[:, 0].all() == include_first and not prefill[:, 1:].any()
        assert not any(step.any() for step in steps)


def test_logits_are_float32_whatever_the_model_computes_in(form):
    model, input_ids = form.model(mosa_router_bias=True), random_ids(2, 24)
    for router in routers_of(model):
        nn.init.normal_(router.bias)
    expected, selected = routed(model, input_ids)[0]  # the input of the first router is not yet rounded
    with torch.autocast("cpu", torch.bfloat16):
        outputs = routed(model, input_ids)
    assert all(logits.dtype == torch.float32 for logits, _ in outputs)
    if form is not FORMS["native"]:
        return
    model, inputs = model.bfloat16(), []
    hook = routers_of(model)[0].register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    logits, _ = routed(model, input_ids)[0]
    hook.remove()
    router = routers_of(model)[0]
    torch.testing.assert_close(logits, inputs[0].float() @ router.weight.float().T + router.bias.float())


# --- the auxiliary loss of the native model ---


def test_auxiliary_loss_is_refused_where_it_would_be_lost():
    # Reentrant checkpointing hands out router logits without a graph: their loss would train nothing.
    with pytest.raises(ValueError, match="use_reentrant"):
        training_step(tiny_model(mosa_router_aux_loss_coef=0.5), use_reentrant=True)


def test_auxiliary_loss_treats_packed_sequences_as_sequences():
    model, input_ids = tiny_model(mosa_router_aux_loss_coef=0.5).train(), random_ids(2, 10)
    apart = model(input_ids, labels=input_ids, use_cache=False).aux_loss
    input_ids, position_ids = input_ids.view(1, 20), torch.arange(10).repeat(2)[None]
    packed = model(input_ids, position_ids=position_ids, labels=input_ids, use_cache=False).aux_loss
    torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("selects", [True, False], ids=["some", "nothing_selected"])
def test_short_calls_leave_no_parameter_out_of_the_graph(form, num_tokens, selects):
    # Distributed training waits for the gradient of every parameter, be it zero.
    model = form.model(mosa_routing="threshold", mosa_include_first=False).train()
    for router in routers_of(model):
        router.threshold.fill_(-torch.inf if selects else torch.inf)
    logits = model(torch.arange(1, num_tokens + 1)[None], use_cache=False).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# --- several processes ---


def train_on_rank(rank: int, directory: str, form: Form) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        model = form.model(mosa_threshold_momentum=0.5).train()
        batch = torch.load(f"{directory}/batches.pt")[rank]
        model(batch, use_cache=False)
        # A call of one token chooses nothing freely: on rank 1 alone, it leaves the average to rank 0.
        model(batch[:, :1] if rank == 1 else batch, use_cache=False)
        torch.save([router.threshold for router in routers_of(model)], f"{directory}/thresholds_{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_average_their_thresholds(tmp_path: Path):
    form = FORMS["native"]  # routes by expert choice: no layer sees what thresholds became
    batches, model = random_ids(2, 1, 16), form.model().train()
    torch.save(batches, tmp_path / "batches.pt")
    start = [router.threshold.clone() for router in routers_of(model)]
    seen = []  # by process and layer: logits, what is chosen of them, and the last one of these
    for batch in batches:
        logits = [each for each, _ in routed(model, batch, use_cache=False)]
        pairs = zip(logits, routers_of(model), strict=True)
        seen.append([(each.detach(), *choice(each, router)) for each, router in pairs])
    torch.multiprocessing.start_processes(train_on_rank, (str(tmp_path), form), nprocs=2, start_method="forkserver")
    for layer, (threshold, one, two) in enumerate(zip(start, *seen, strict=True)):
        both = [torch.cat(states) for states in zip(one[:2], two[:2], strict=True)]
        expected = followed(threshold, *both, (one[2] + two[2]) / 2, momentum=0.5)
        expected = followed(expected, *one, momentum=0.5)
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"thresholds_{rank}.pt")[layer], expected)


def test_a_router_that_fsdp_wraps_biases_by_the_threshold_that_it_selected_by():
    """Not by the one that the call has moved it to."""
    model = sparse_form(mosa_gate_slope=1.0, mosa_threshold_momentum=0.9).model().train()
    ids = random_ids(2, 24)
    expected = copy.deepcopy(model)(ids, labels=ids, use_cache=False).loss
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={MosaRouter})
        options = {"auto_wrap_policy": policy, "device_id": torch.device("cpu"), "use_orig_params": True}
        wrapped = FullyShardedDataParallel(model, **options)
        assert torch.equal(wrapped(ids, labels=ids, use_cache=False).loss, expected)
    finally:
        dist.destroy_process_group()
