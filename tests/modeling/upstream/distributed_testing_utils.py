"""Processes of the distributed suites: on the CPU, over gloo."""

import os
from collections.abc import Callable
from unittest import SkipTest

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(n)(function)(*args)` runs `function(rank, *args)` in n processes that can reach each other."""

    def with_function(function: Callable) -> Callable:
        def run(*args) -> None:
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, args, world_size, store.port), world_size)

        return run

    return with_function


def _run_rank(rank: int, function: Callable, args: tuple, world_size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    if torch.accelerator.is_available():
        raise SkipTest("these processes share a CPU; models would go to the accelerator")
    # Forks of a process that has only imported things: as safe as spawning, without 5 s of imports each time.
    imports = ["mosa_hf", f"{__package__}.test_fsdp_mixin"]
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(imports)
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to choose on the CPU."""
