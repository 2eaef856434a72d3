"""Which layer of a model is where. No module knows its own place: people take layers out, repeat and move them."""

import re
from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

Attention = TypeVar("Attention", bound=nn.Module)


def layer_of(name: str) -> int:
    """
    The place of the layer that a module lies in, counted from the model's first, by the module's name in the model.

    Raises:
        ValueError: for a module that lies in no list of layers.
    """
    if not (places := re.findall(r"(?:^|\.)layers\.(\d+)\.", name)):
        raise ValueError(f"`{name}` lies in no layer of a model: pass the whole model.")
    return int(places[-1])


def attention_modules(decoder: nn.Module, attention_class: type[Attention]) -> dict[int, Attention]:
    """Place of a layer → its attention module, for the layers of a decoder that have one."""
    return {
        place: module
        for place, layer in enumerate(cast(nn.ModuleList, decoder.layers))
        for module in layer.modules()
        if isinstance(module, attention_class)
    }


def check_numbered(modules: Mapping[int, nn.Module], num_layers: int) -> None:
    """
    Args:
        modules: see `attention_modules`.
        num_layers: of the model, and of a cache for it.

    Raises:
        ValueError: for attention modules of which two would keep their tokens in one layer of a cache, or one in none.
    """
    numbers = [cast(int, module.layer_idx) for module in modules.values()]
    if len(set(numbers)) < len(numbers) or any(number >= num_layers for number in numbers):
        raise ValueError(
            f"The attention modules have `layer_idx` {numbers}, by which they find their layer of a cache, of "
            f"{num_layers} layers. After layers were taken out, repeated or added, set `layer_idx` of each attention "
            "module to its place, and `config.num_hidden_layers` to the number of layers."
        )


def check_windows(modules: Mapping[int, nn.Module], is_sliding: list[bool]) -> None:
    """
    Args:
        modules: see `attention_modules`.
        is_sliding: of each layer of a cache, whether it forgets what has left a window.

    Raises:
        ValueError: for attention modules that read all tokens, whose layer of the cache forgets some.
    """
    for module in modules.values():
        layer_idx = cast(int, module.layer_idx)
        forgets = layer_idx < len(is_sliding) and is_sliding[layer_idx]
        if forgets and getattr(module, "sliding_window", 0) is None:
            raise ValueError(
                f"`layer_idx` {layer_idx} of an attention module without a sliding window is that of a layer "
                "with one, whose cache forgets what it would read. After layers were moved, set `layer_idx` of each "
                "attention module to its place, and make a new cache."
            )


def check_number(num_layers: int, config) -> None:
    """
    Raises:
        ValueError: for a model of fewer layers than its config says.
    """
    if num_layers < config.num_hidden_layers:
        raise ValueError(
            f"The model has {num_layers} layers, but `config.num_hidden_layers` is {config.num_hidden_layers}, so it "
            f"would be loaded with layers of random weights: set `config.num_hidden_layers = {num_layers}`."
        )
