"""Two processes compute what one does: tensor parallelism and FSDP2, on the CPU, of every family."""

import copy
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing import get_context, start_processes
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

import mosa_hf  # noqa: F401  registers the models, in the other processes too
from testing.tiny import EVERY_FAMILY, FAMILIES, random_tokens

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes share a CPU"),
    pytest.mark.slow,  # two processes for each family
]

BATCH = {"input_ids": random_tokens(2, 24, seed=3), "attention_mask": torch.ones(2, 24).long()}
BATCH["attention_mask"][0, :5] = 0
CHUNKS = (9, 1, 1, 6, 1, 1, 5)
TOKENS = random_tokens(2, 24, seed=4)  # no padding: both rows weigh the same in the loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of each family; one has MLPs for routers."""
    from .test_families import sparse_model

    path = tmp_path_factory.mktemp("parallel")
    for family in FAMILIES:
        model = sparse_model(family, router_size=8 if family == "qwen3" else None)
        copy.deepcopy(model).save_pretrained(path / family)
    return path


@pytest.fixture(scope="module")
def tensor_parallel(folder) -> dict:
    return in_two_processes(by_tensors, folder)


@pytest.fixture(scope="module")
def data_parallel(folder) -> dict:
    return in_two_processes(by_data, folder)


def in_two_processes(function, folder: Path) -> dict:
    """What `function(rank, folder)` returns in the first process."""
    get_context("forkserver").set_forkserver_preload([__name__])
    start_processes(run, (function, folder), nprocs=2, start_method="forkserver")
    return torch.load(folder / f"{function.__name__}.pt")


def run(rank: int, function, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    store = f"file://{folder}/{function.__name__}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    try:
        results = function(rank, folder)
        if rank == 0:
            torch.save(results, folder / f"{function.__name__}.pt")
    finally:
        dist.destroy_process_group()


def by_tensors(rank: int, folder: Path) -> dict:
    results = {}
    for family in FAMILIES:
        model = load(folder, family, tp_size=2)
        groups = {
            name: module.mosa_groups.num_groups
            for name, module in model.named_modules()
            if hasattr(module, "mosa_groups")
        }
        results[family] = (groups, evaluated(model), trained(model, TOKENS))
    return results


def by_data(rank: int, folder: Path) -> dict:
    """A row of the batch each."""
    return {family: trained(load(folder, family, fsdp_size=2), TOKENS[rank : rank + 1]) for family in FAMILIES}


def load(folder: Path, family: str, **sizes) -> PreTrainedModel:
    options = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(folder / family, **options)
    if family == "olmoe":  # upstream clips in place, which has no gradient in tensor parallelism
        model.config.clip_qkv = None
    return model


@torch.no_grad()
def evaluated(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of a padded batch at once and in chunks on a cache, and what is generated from it."""
    ids, mask = BATCH.values()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache, chunks, end = DynamicCache(config=model.config), [], 0
    for size in CHUNKS:
        start, end = end, end + size
        output = model(ids[:, start:end], mask[:, :end], position_ids[:, start:end], past_key_values=cache)
        chunks.append(output.logits)
    real = mask.bool()
    return {
        "logits": model(ids, mask, position_ids, use_cache=False).logits[real],
        "chunks": torch.cat(chunks, dim=1)[real],
        "generated": model.generate(**BATCH, max_new_tokens=6, do_sample=False),
        "static": model.generate(**BATCH, max_new_tokens=6, do_sample=False, cache_implementation="static"),
    }


def trained(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a step, and thresholds after it."""
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in gradients.items()}
    return results | {name: buffer for name, buffer in model.named_buffers() if name.endswith("threshold")}


def check_gradients(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys() and any("router.weight" in name for name in expected)
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradients[name] - gradient).abs().max() < 1e-4 * scale, name


@EVERY_FAMILY
def test_tensor_parallel(family, folder, tensor_parallel):
    groups, evaluation, training = tensor_parallel[family]
    model = load(folder, family)
    shares = "sparse_groups" in model.tp_plan.values()
    whole = ("deepseek_v3", "gpt_oss", "olmo2", "olmoe", "phi3")  # whose plans do not split the heads
    assert shares == (family not in whole)
    splits = shares and model.config.num_groups > 1  # all heads of latent attention read one group
    assert set(groups.values()) == {model.config.num_groups // (2 if splits else 1)}
    expected = evaluated(model)
    for name in ("logits", "chunks"):
        assert (evaluation[name] - expected[name]).abs().max() < 1e-4, name
    assert torch.equal(evaluation["generated"], expected["generated"])
    assert torch.equal(evaluation["static"], expected["generated"])
    check_gradients(training, trained(model, TOKENS))


@EVERY_FAMILY
def test_fully_sharded_data_parallel(family, folder, data_parallel):
    gradients, expected = data_parallel[family], trained(load(folder, family), TOKENS)
    for name in [name for name in expected if name.endswith("threshold")]:  # follow the mean of the processes'
        del gradients[name], expected[name]
    check_gradients(gradients, expected)
