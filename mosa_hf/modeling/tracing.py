"""Which tokens the groups of a model selected, for those who study routing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .router import MosaRouter
from .thresholds import mosa_routers


@contextmanager
def trace_routing(model: nn.Module) -> Iterator[dict[int, list[torch.Tensor]]]:
    """
    Record the selections of every call of `model` inside the `with` block.

    Yields:
        layer index → one `[B, T, G]` bool tensor a call, on the CPU.

    Raises:
        ValueError: if the model has no MoSA heads.

    ```python
    with trace_routing(model) as selected:
        model(input_ids)
    rate = selected[0][0].float().mean()
    ```
    """
    selections: dict[int, list[torch.Tensor]] = {router.layer_idx: [] for router in mosa_routers(model)}
    hooks = [
        router.register_forward_hook(lambda module, args, output: selections[module.layer_idx].append(output[1].cpu()))
        for router in model.modules()
        if isinstance(router, MosaRouter)  # those too that an adapter replaces, until it is disabled
    ]
    try:
        yield selections
    finally:
        for hook in hooks:
            hook.remove()
