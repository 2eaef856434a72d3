"""vLLM's own models with sparse groups: their attention layers are replaced when a model is made."""

import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import extract_layer_index

from ..modeling.configuration import SparseGroupsConfig
from ..modeling.family import family_of
from ..modeling.group_plan import GroupPlan, sparse_among
from ..modeling.loading import OTHER_CONFIG, check_router_value
from ..modeling.router import MosaRouter
from ..modeling.router_files import read_routers
from .arena import ARENA, Group
from .attention import ArenaLayer, SparseAttention
from .engine_config import ROUTERS, settings_of
from .pages import check_memory
from .spec import BLOCK_SIZE, ArenaSpec
from .supported import SUPPORTED

ROUTER = "mosa_router"  # of an attention module, in checkpoints
SERVED_ROUTER = "attn.router"  # here


def local_groups(groups: tuple[Any, ...], rank: int, size: int) -> range:
    """Which of a layer's key/value heads the tensor-parallel worker `rank` of `size` has, as vLLM deals them out."""
    if len(groups) >= size:
        number = len(groups) // size
        return range(rank * number, (rank + 1) * number)
    first = rank * len(groups) // size  # several workers have the same one
    return range(first, first + 1)


if TYPE_CHECKING:

    class ServedModel(nn.Module):
        """What every model class of vLLM's has."""

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""): ...

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None: ...

else:
    ServedModel = nn.Module


class SparseGroupsModel(ServedModel):
    """Before a model class of vLLM's, see `sparse_model_class`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: SparseGroupsConfig = vllm_config.model_config.hf_config
        plan = GroupPlan.of_config(config).layers
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.mosa_source = vllm_config.model_config.model
        self.mosa_config = config
        self.mosa_routers: dict[int, tuple[str, MosaRouter]] = {}  # by layer: its attention's name, and the router
        context = vllm_config.compilation_config.static_forward_context
        sliding: dict[int, int | None] = {}
        attentions: dict[int, SparseAttention] = {}
        for name, module in list(self.named_modules()):
            attention = getattr(module, "attn", None)
            if not isinstance(attention, Attention):
                continue
            layer = extract_layer_index(name)
            del context[attention.layer_name]
            sliding[layer] = attention.sliding_window
            own = local_groups(plan[layer], rank, size)
            groups = [_group(plan, sliding, config, layer, index) for index in own]
            sparse = sparse_among(plan[layer])
            columns = {own.index(index): sparse.index(index) for index in sparse if index in own}
            router = None
            if sparse:
                rates = [kind.sparsity for kind in plan[layer] if kind is not None]
                router = MosaRouter(config, rates, config.mosa_router_hidden_size).requires_grad_(False)
                self.mosa_routers[layer] = name, router
            module.attn = attentions[layer] = SparseAttention(attention, groups, columns, layer, router)
            module.register_forward_pre_hook(_router_hook(module), with_kwargs=True)
        if sorted(attentions) != list(range(len(plan))):
            raise ValueError(f"{type(self).__name__}: attention of layers {sorted(attentions)}, plan of {len(plan)}.")
        ranks = [
            [
                [_group(plan, sliding, config, layer, index) for index in local_groups(plan[layer], each, size)]
                for layer in range(len(plan))
            ]
            for each in range(size)
        ]
        arena = _arena(vllm_config, ranks, rank)
        arena.attentions = [attentions[layer] for layer in range(len(plan))]
        context[ARENA] = arena

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Raises:
            ValueError: for routers that are missing, of another shape or dtype, or not finite.
        """
        found: set[str] = set()
        folder = getattr(self.mosa_config, ROUTERS, None)
        loaded = super().load_weights(self._others(weights, None if folder else found)) or set()
        if folder is not None:
            base = self.mosa_config.to_base()
            _, file = read_routers(family_of(base.model_type), base, folder)
            for name, weight in load_file(file).items():
                self._load_router(name, weight, found)
        for name, router in self.mosa_routers.values():
            for part in router.state_dict():
                if f"{name}.{SERVED_ROUTER}.{part}" not in found:
                    raise ValueError(
                        f"{self.mosa_source} lacks {name}.{ROUTER}.{part}: it has a `mosa_plan`, but not its routers. "
                        "Copy or convert it again (`mosa-convert`)."
                    )
        return loaded | found

    def _others(
        self, weights: Iterable[tuple[str, torch.Tensor]], found: set[str] | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All but routers, which are loaded and noted in `found`; None: others take their place."""
        for name, weight in weights:
            if f".{ROUTER}." not in name:
                yield name, weight
            elif found is not None:
                self._load_router(name, weight, found)

    @torch.no_grad()
    def _load_router(self, name: str, weight: torch.Tensor, found: set[str]) -> None:
        part = name.rpartition(".")[2]
        own, router = self.mosa_routers.get(extract_layer_index(name), (None, None))
        target = None if router is None else router.state_dict(keep_vars=True).get(part)
        if target is None:
            raise ValueError(f"{self.mosa_source} has {name}, which the config does not ask for. {OTHER_CONFIG}")
        if not weight.is_floating_point() or target.shape != weight.shape:
            raise ValueError(
                f"{self.mosa_source}: {name} has shape {tuple(weight.shape)} and dtype {weight.dtype}, but the model "
                f"and its plan need {tuple(target.shape)} of floating-point numbers. {OTHER_CONFIG}"
            )
        check_router_value(self.mosa_source, name, weight)
        # While a model is loaded anew, what it had is elsewhere: only loaders that vLLM has set reach the new memory.
        getattr(target, "weight_loader", default_weight_loader)(target, weight)
        found.add(f"{own}.{SERVED_ROUTER}.{part}")


def _group(
    plan: tuple[tuple[Any, ...], ...],
    sliding: dict[int, int | None],
    config: SparseGroupsConfig,
    layer: int,
    index: int,
) -> Group:
    return Group.of_plan(plan[layer][index], sliding[layer], config.mosa_cache_budget)


def _router_hook(module: nn.Module):
    """Routes before an attention module's forward, whose arguments families name alike and order as they like."""
    name = "hidden_states"
    place = list(inspect.signature(module.forward).parameters).index(name)

    def route(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cast(SparseAttention, module.attn).route(kwargs[name] if name in kwargs else args[place])

    return route


def _arena(vllm_config: VllmConfig, ranks: list[list[list[Group]]], rank: int) -> ArenaLayer:
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    settings = settings_of(vllm_config)
    if len({len(groups) for groups in ranks[rank]}) > 1:
        raise ValueError("`num_key_value_heads` differs by layer, which vLLM's own caches do not know either.")
    spec = ArenaSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=1,
        head_size=model.get_head_size(),
        dtype=model.dtype,
        ranks=tuple(tuple(each.shape() for groups in layers for each in groups) for layers in ranks),
        num_rows=scheduler.max_num_seqs,
        max_len=model.max_model_len,
        reserve=settings.reserve,
        slack=settings.slack,
    )
    device = torch.empty(0).device  # where vLLM makes weights
    check_memory(model.get_head_size(), device)
    return ArenaLayer(
        ranks[rank], model.get_head_size(), model.max_model_len, scheduler.max_num_batched_tokens, spec, device
    )


def sparse_model_class(base: type[nn.Module]) -> type[nn.Module]:
    """A model class of vLLM's with sparse groups: `MosaLlamaForCausalLM` of `LlamaForCausalLM`."""
    return type(f"Mosa{base.__name__}", (SparseGroupsModel, base), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """vLLM looks classes up here."""
    architecture = name.removeprefix("Mosa")
    if architecture == name or architecture not in SUPPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"vllm.model_executor.models.{SUPPORTED[architecture]}")
    globals()[name] = found = sparse_model_class(getattr(module, architecture))
    return found
