"""Parameters of routers that no gradient reaches: several processes wait for one of every parameter that wants it."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, PreTrainedModel

from ..conftest import FORMS, Form
from ..contract import check_same_step, random_ids, training_step

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
IDS = random_ids(2, 12)
IDLE = {"mosa_gate_slope": 0.0}


@pytest.fixture
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def everything(form: Form, **fields) -> PreTrainedModel:
    return form.model(**fields).requires_grad_(True).train()


def adapted(form: Form, **lora):
    """As docs/tools.md has it, but for a gate that passes routers a gradient."""
    return get_peft_model(form.model(**IDLE), LoraConfig(task_type="CAUSAL_LM", r=2, **lora)).train()


def unselective(form: Form) -> PreTrainedModel:
    """With a cache, no group selects anything."""
    model = everything(form, mosa_routing="threshold", mosa_include_first=False)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(torch.inf)
    return model


def infinite(form: Form) -> PreTrainedModel:
    """Logits are beyond float32: 0 times them would be no number."""
    model = everything(form, **IDLE, mosa_threshold_momentum=1.0)
    with torch.no_grad():
        for router in model.mosa_routers().values():
            router.weight.fill_(3e38)
    return model


def whole(model, **options) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False, **options).logits


def on_a_cache(model, size: int) -> torch.Tensor:
    """The last `size` tokens: those before are cached without gradients, as for a prompt that is not learned."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :-size], past_key_values=cache)
    return model(IDS[:, -size:], past_key_values=cache).logits


def checkpointed(model, use_reentrant: bool) -> torch.Tensor:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return whole(model)


def evaluated(model) -> torch.Tensor:
    return whole(model.eval())


SPARSE, NATIVE = FORMS["sparse"], FORMS["native"]
ALL = [
    [{"window": 2, "sparsity": 1}] * 3,
    [{"window": 2, "sparsity": 1}, None, {"window": 2, "sparsity": 4}],
    [None] * 3,
]
CASES = {
    "every weight": (partial(everything, SPARSE, **IDLE), whole),
    "of MLPs": (partial(everything, SPARSE, **IDLE, mosa_router_hidden_size=4, mosa_router_bias=True), whole),
    "expert choice": (partial(everything, SPARSE, **IDLE, mosa_routing="expert_choice"), whole),
    "groups of all tokens": (partial(everything, SPARSE, **IDLE, mosa_plan=ALL), whole),
    "a budget": (partial(everything, SPARSE, **IDLE, mosa_cache_budget=2), whole),
    "infinite logits": (partial(infinite, SPARSE), whole),
    "chunks": (partial(everything, SPARSE, **IDLE), partial(on_a_cache, size=4)),
    "one token": (partial(everything, SPARSE, **IDLE), partial(on_a_cache, size=1)),
    "one token, with a gate": (partial(everything, SPARSE), partial(on_a_cache, size=1)),
    "evaluation, with a gate": (partial(everything, SPARSE), evaluated),
    "checkpointing": (partial(everything, SPARSE, **IDLE), partial(checkpointed, use_reentrant=False)),
    "reentrant": (partial(everything, SPARSE, **IDLE), partial(checkpointed, use_reentrant=True)),
    "saved routers": (partial(adapted, SPARSE, target_modules="all-linear", modules_to_save=["mosa_router"]), whole),
    "adapted routers": (partial(adapted, SPARSE, target_modules=[], target_parameters=["mosa_router.weight"]), whole),
    "native": (partial(everything, NATIVE, mosa_routing="threshold", mosa_router_bias=True), whole),
    "native, evaluation": (partial(everything, NATIVE), evaluated),
    "native, chunks": (partial(unselective, NATIVE), partial(on_a_cache, size=4)),
    "native, one token": (partial(unselective, NATIVE), partial(on_a_cache, size=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_wants_a_gradient_gets_one(name, process_group):
    make, compute = CASES[name]
    model = make()
    compute(model).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert gradients and [name for name, each in gradients.items() if each is None] == []
    idle = [name for name in gradients if "mosa_router" in name]
    assert (name == "infinite logits") or all(each.isfinite().all() for each in gradients.values())
    assert not any(gradients[name].any() for name in idle)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_no_other_gradient_changes(slope, request):
    """Of a step in one process that is alone, where idle routers have none."""
    model = everything(SPARSE, mosa_gate_slope=slope)
    alone = training_step(model)
    request.getfixturevalue("process_group")
    several = training_step(model)
    idle = [name for name, gradient in alone[1].items() if gradient is None]
    assert len(idle) == (0 if slope else 2)
    assert all(not several[1][name].any() for name in idle)
    gradients = {name: gradient for name, gradient in alone[1].items() if name not in idle}
    check_same_step(several, (alone[0], gradients, alone[2]))


def train_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name in ("every weight", "saved routers"):
            torch.save(trained_in_parallel(rank, name), f"{folder}/{name}_{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained_in_parallel(rank: int, name: str) -> dict[str, torch.Tensor]:
    # DDP's object goes before its process group: as the last one that holds it, it may wait for gloo's thread forever.
    model = CASES[name][0]()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):  # the second forward is the one that DDP refuses
        optimizer.zero_grad()
        parallel(input_ids=IDS[[rank]], labels=IDS[[rank]], use_cache=False).loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.slow  # two processes
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes share a CPU")
def test_two_processes_train(tmp_path: Path):
    """The original's kind of step: processes agree, what learns has moved, and idle routers are as they were."""
    torch.multiprocessing.start_processes(train_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for name in ("every weight", "saved routers"):
        before = CASES[name][0]().state_dict()
        one, two = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(one[key], two[key]) for key in before)
        moved = {key for key in before if not torch.equal(one[key], before[key])}
        assert moved and not any("mosa_router" in key for key in moved)
