"""
What `test_processes.py` starts with `accelerate launch`: trains models in two processes on the CPU, each on its half
of the data, and saves them.

    accelerate launch --config_file fsdp2.yaml parallel_training.py OUTPUT MODEL...

The models go to OUTPUT, in folders of their names, with `logits.pt`: what they compute before they are saved.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import mosa_hf  # noqa: F401  registers the models

ACCUMULATION = 2


def main(output: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    assert accelerator.num_processes == 2
    shards = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if shards:  # Accelerate takes FSDP for something that GPUs do: on a CPU it has to be told again
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
    for folder in folders:
        train(accelerator, shards, folder, output / folder.name)
    accelerator.end_training()


def train(accelerator: Accelerator, shards: bool, folder: Path, output: Path) -> None:
    tokens = torch.randint(2, 256, (16, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(tokens, batch_size=2))
    check_wrapped(accelerator, model, shards)

    thresholds = {name: states for name, states in model.named_buffers() if name.endswith("threshold")}
    before = {name: states.clone() for name, states in thresholds.items()}
    learns = any("router" in name and parameter.requires_grad for name, parameter in model.named_parameters())
    model.train()
    for ids in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    for name, threshold in thresholds.items():
        assert torch.equal(threshold, before[name]) != learns, f"{name}: follows its router's logits where that learns"
        assert torch.equal(*accelerator.gather(threshold[None])), f"{name} differs between the processes"

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        output, is_main_process=accelerator.is_main_process, state_dict=state_dict
    )
    if accelerator.is_main_process:
        torch.save(logits, output / "logits.pt")
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def check_wrapped(accelerator: Accelerator, model: torch.nn.Module, shards: bool) -> None:
    if not shards:
        assert isinstance(model, DistributedDataParallel)
        return
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        sizes = torch.tensor([parameter.to_local().numel()])
        dist.all_reduce(sizes)
        assert sizes == parameter.numel(), name


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
