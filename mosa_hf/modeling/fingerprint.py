"""Which model it is that unfinished work, or a cache, on disk is of."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .devices import at_hand

NUMBERS = 64  # of a tensor: all of a large model's would take long to read


def model_fingerprint(model: PreTrainedModel) -> str:
    """
    Sixteen hexadecimal digits of the names, shapes and first numbers of all parameters and buffers; of distributed
    ones without the numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        numbers = [] if tensor.is_meta else tensor.detach().flatten()[:NUMBERS].cpu().double().tolist()
        digest.update(f"{name} {list(tensor.shape)}: {numbers}\n".encode())
    return digest.hexdigest()[:16]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """
    All parameters and buffers, from where Accelerate keeps those that are offloaded, and what quantised ones consist
    of, each once; in place of distributed ones, of which each process has another part, their shapes alone.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # one tensor, but two while it is offloaded
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        if tied.get(name) not in tensors:
            owner, _, own = name.rpartition(".")
            yield from _plain(name, at_hand(model.get_submodule(owner), own) if tensor.is_meta else tensor)


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The ordinary tensors that one of a class of its own consists of; itself, if it is one."""
    if isinstance(tensor, DTensor):
        yield name, torch.empty(tensor.shape, device="meta")
    elif hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their bytes
# Fields of a config that every config has, or that say nothing of what a model computes in evaluation.
COMMON = re.compile(
    r"auto_map|use_cache|initializer_range|\w+_token_id|\w+_dropout|pretraining_tp|"
    r"mosa_(conversion|gate_slope|plan|routing|sparsity|threshold_momentum|window)"
)


@torch.no_grad()
def numbers_fingerprint(model: nn.Module) -> str:
    """
    Sixteen hexadecimal digits of all numbers, read as integers: a sum of the rows of each tensor, the i-th times i. It
    is the same on every device, and while weights are offloaded. What is distributed does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        if not tensor.is_meta and tensor.numel():
            words = tensor.detach().contiguous().flatten().view(WORDS[tensor.element_size()])
            rows = words.view(len(tensor) if tensor.ndim else 1, -1).sum(-1, dtype=torch.int64)
            total = (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()
            digest.update(f"{name}: {int(total)}\n".encode())
    return digest.hexdigest()[:16]


def computation_of(config: PreTrainedConfig) -> dict[str, str]:
    """What a config says of the computation beside the plan, by field, as JSON."""
    common = PreTrainedConfig().to_dict().keys()
    return {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in config.to_dict().items()
        if name not in common and not COMMON.fullmatch(name)
    }


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Which of PEFT's adapters are at work in which module, and by how much."""
    return {
        name: [list(module.active_adapters), module.disable_adapters, str(getattr(module, "scaling", None))]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
