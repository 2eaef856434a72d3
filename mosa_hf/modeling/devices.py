"""Where a model computes, also if Accelerate keeps its weights elsewhere (`device_map`, offloading), and in what."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel


def is_distributed() -> bool:
    """Whether processes, be it one, train a model together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def num_processes() -> int:
    """That train one model together."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as configs and options have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its inputs; the CPU if its weights are offloaded, for hooks move inputs then."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def execution_device(module: nn.Module) -> torch.device | str | int:
    """Where a module with weights computes."""
    for each in module.modules():
        if (device := getattr(getattr(each, "_hf_hook", None), "execution_device", None)) is not None:
            return device
    device = next(module.parameters()).device
    return "cpu" if device.type == "meta" else device


def at_hand(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of `module` itself, from where Accelerate keeps it meanwhile if it is offloaded."""
    tensor = getattr(module, name)
    kept = next(_weights_of_hooks(module), None) if tensor.is_meta else None
    return tensor if kept is None else kept[name]


def offloaded_weights(model: nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """What hooks of Accelerate read a model's weights from, in memory or on disk."""
    for module in model.modules():
        yield from _weights_of_hooks(module)


def _weights_of_hooks(module: nn.Module) -> Iterator[Mapping[str, torch.Tensor]]:
    """`offloaded_weights` of a module itself."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (weights := getattr(each, "weights_map", None)) is not None:
            yield weights
