"""Which tokens the groups of a model selected, for those who study routing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..arguments import checked
from .layers import check_uncompiled, layer_of
from .router import MosaRouter, routers_of


@contextmanager
@checked()
def trace_routing(model: nn.Module) -> Iterator[dict[int, list[torch.Tensor]]]:
    """
    Record the selections of every call of `model` inside the `with` block.

    Yields:
        layer → one `[B, T, G]` bool tensor a call, on the CPU. Layers are counted from the first of the model.

    Raises:
        ValueError: if the model has no MoSA heads, is a part of one, or is compiled.

    ```python
    with trace_routing(model) as selected:
        model(input_ids)
    rate = selected[0][0].float().mean()
    ```
    """
    routers_of(model)  # that there are any
    check_uncompiled(model, "trace it uncompiled")
    layers = {  # of the routers too that an adapter replaces, until it is disabled
        module: layer_of(name, model) for name, module in model.named_modules() if isinstance(module, MosaRouter)
    }
    selections: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers.values()}
    hooks = [
        router.register_forward_hook(lambda module, args, output: selections[layers[module]].append(output[1].cpu()))
        for router in layers
    ]
    try:
        yield selections
    finally:
        for hook in hooks:
            hook.remove()
