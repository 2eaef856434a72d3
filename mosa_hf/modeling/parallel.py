"""
Tensor parallelism: every process holds its share of a layer's key/value groups, or the one that all heads of latent
attention read.
"""

from typing import TYPE_CHECKING

from torch import nn
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from ..compat import shards_heads
from .latent_attention import LatentAttentionMixin
from .sparse_groups import SparseGroupsMixin

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SparseGroupsParallel(TensorParallelLayer):
    """
    Style of an attention module whose projections are column-parallel. The router is the same in all processes, which
    take from its logits what concerns their groups; so each has its part of their gradient.
    """

    def install_forward(self, module: nn.Module, mesh: "DeviceMesh") -> nn.Module:
        """
        Raises:
            ValueError: if the processes cannot have the same number of groups.
        """
        from transformers.distributed.tensor_parallel import _AllReduceBackward  # builds without `distributed` lack it

        if not isinstance(module, SparseGroupsMixin):  # a layer without sparse groups
            return module
        if not isinstance(module, LatentAttentionMixin):  # whose heads, wherever they are, read the same latents
            num_groups, size = module.mosa_groups.num_groups, mesh.size()
            if num_groups % size:
                raise ValueError(
                    f"`tp_plan`: {size} processes cannot share {num_groups} key/value groups evenly; start as many as "
                    "divide them."
                )
            module.mosa_groups = module.mosa_groups.of_rank(mesh.get_local_rank(), num_groups // size)
        group = mesh.get_group()
        module.mosa_router.register_forward_hook(
            lambda router, args, output: (_AllReduceBackward.apply(output[0], group), output[1])
        )
        return module


def sparse_groups_plan(decoder: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """What sparse groups add to the tensor-parallel plan of a decoder: nothing if it splits no attention heads."""
    splits_latent_heads = any(name.endswith(".kv_b_proj") and style == "colwise" for name, style in plan.items())
    if not (shards_heads(plan) or splits_latent_heads):
        return {}
    names = [name for name, module in decoder.named_modules() if isinstance(module, SparseGroupsMixin)]
    return dict.fromkeys(map(replace_layer_number_by_wildcard, names), "sparse_groups")


def register_style() -> None:
    """Make the style known to Transformers."""
    ALL_PARALLEL_STYLES.register("sparse_groups", SparseGroupsParallel())  # type: ignore[arg-type]  # holds no functions
