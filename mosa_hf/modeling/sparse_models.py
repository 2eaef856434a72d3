"""Models with sparse groups: a family's own classes, whose attention modules route (docs/design.md, section 2)."""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..compat import CACHE, takes_cache
from .configuration import SparseGroupsConfig, is_composite, sparse_config_of
from .devices import execution_device, offloaded_weights
from .family import PREFIX, Family, family_of
from .forward_context import ForwardContextMixin, shared_by_place, uncompiled_if_cache_grows
from .group_plan import GroupPlan, SparseGroup
from .key_center import mean_rotation
from .layers import (
    attention_modules,
    check_number,
    check_own_forward,
    decoder_of,
    layer_of,
    layers_of,
    num_places,
    passes_keywords,
)
from .loading import CheckedLoadingMixin
from .parallel import sparse_groups_plan
from .remote_code import InstalledCodeModelMixin
from .router import MosaRouter, init_router, named_routers
from .sparse_groups import SparseGroupsMixin, sparse_attention_class

if TYPE_CHECKING:

    class FamilyModel(PreTrainedModel):
        """What the mixins rely on: what every class of a family has, once it is one of ours."""

        config: SparseGroupsConfig

else:
    FamilyModel = object


class SparsePreTrainedMixin(CheckedLoadingMixin, InstalledCodeModelMixin, FamilyModel):
    """Before every class of a family, base model and heads alike: builds, initialises and checks the routers."""

    # Selection compares logits with thresholds: half precision would make ties of them.
    _keep_in_fp32_modules_strict = ["mosa_router"]
    router_remedy = (
        "convert it (`mosa_hf.convert_model`, `mosa_hf.convert_checkpoint`), or load it with "
        "`from_pretrained(..., routers=...)`"
    )
    family: ClassVar[Family]  # `families` sets it

    def __init__(self, config: SparseGroupsConfig, *args, **kwargs):
        own = sparse_config_of(config)
        own.fit_layers()
        if own.output_attentions:
            own.check_attentions()
        super().__init__(config, *args, **kwargs)
        add_sparse_groups(self, config)

    def __reduce__(self) -> tuple:
        # By the base's class, which any process finds: ours may not have been made there.
        return _blank_model, (type(self).family.name, type(self).__name__), self.__getstate__()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `CheckedLoadingMixin.from_pretrained`; routers that no gradient reaches are frozen."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        freeze_idle_routers(loaded[0] if isinstance(loaded, tuple) else loaded)  # with `output_loading_info`
        return loaded

    def save_pretrained(self, *args, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, with a config that says what the layers are now."""
        cast(SparseModelMixin, decoder_of(self)).update_config()
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Upstream looks for experts in the source of the class's own file.
        return cls.family.base_model_class._can_set_experts_implementation()

    @classmethod
    def is_custom_code(cls) -> bool:
        # All weights are initialised by upstream's own code, which knows what was loaded. Of other people's code
        # upstream skips modules without parameters, of which some families initialise the buffers of others.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MosaRouter):
            init_router(module, getattr(sparse_config_of(self.config), "initializer_range", 0.02))

    def mosa_routers(self) -> dict[int, MosaRouter]:
        """Layer, counted from the first → its router in force, for the layers that have sparse groups."""
        return {layer_of(name, self): router for name, router in named_routers(self)}


class SparseModelMixin(ForwardContextMixin, SparsePreTrainedMixin):
    """Before a family's base model."""

    config: SparseGroupsConfig
    built_layers: list[tuple[SparseGroup | None, ...]]  # what its layers were when `config.mosa_plan` was of them
    drops_keywords: bool  # whether attention modules are not called with what the decoder is called with

    @property
    def base_class(self) -> type[PreTrainedModel]:
        """The family's own class."""
        return cast(type[PreTrainedModel], type(self).__bases__[-1])

    @property
    def takes_masks_by_layer_type(self) -> bool:
        """Whether the family's forward takes a dict of prepared masks, which its code asks for."""
        return "dict" in inspect.unwrap(self.base_class.forward).__code__.co_names

    def layer_plans(self) -> list[tuple[SparseGroup | None, ...]]:
        """What the groups of each layer are."""
        modules = attention_modules(self, SparseGroupsMixin)
        last = self.config.num_hidden_layers - 1
        return [
            modules[place].mosa_plan if place in modules else (None,) * self.config.num_groups_of(min(place, last))
            for place in range(num_places(self))
        ]

    def update_config(self) -> None:
        """
        Let `config.mosa_plan` say what each layer is, after layers were taken out, added or moved; saving and
        `generate` do it.

        Raises:
            ValueError: for fewer layers than `config.num_hidden_layers`, or `layer_types` of other layers.
        """
        config, plans = self.config, self.layer_plans()
        check_number(len(plans), config)
        has_moved = plans != self.built_layers
        if not has_moved and (config.mosa_plan is None or len(config.mosa_plan) == config.num_hidden_layers):
            return
        plan = GroupPlan(tuple(plans[: config.num_hidden_layers]))
        config.check_plan(plan)
        if config.mosa_plan is not None or GroupPlan.of_config(config) != plan:
            config.mosa_plan = plan.to_list()
        self.built_layers = plans

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        assert self._tp_plan is not None  # upstream's makes one
        self._tp_plan.update(sparse_groups_plan(self, self._tp_plan))

    @uncompiled_if_cache_grows
    @takes_cache
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As the family's forward; `output_attentions` is refused where a layer has no attention weights to give."""
        if kwargs.get("output_attentions", self.config.output_attentions):
            self.update_config()
            self.config.check_attentions()
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        context, past_key_values, _ = self.begin_forward(
            tokens, attention_mask, position_ids, past_key_values, use_cache, kwargs
        )
        if self.config.mosa_cache_dtype is not None:
            context = context._replace(mean_rotation=mean_rotation(self, tokens))
        if position_ids is not None:  # else the family counts, some by the mask
            kwargs["position_ids"] = position_ids
        shared: AbstractContextManager[None] = nullcontext()
        if self.drops_keywords:
            self.check_checkpointing()
            shared = shared_by_place(context)
        else:
            kwargs["mosa_context"] = context
        with shared:
            return super().forward(
                input_ids=input_ids,
                attention_mask=self.mask_of_dense_layers(attention_mask),
                **{CACHE: past_key_values},
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

    def check_checkpointing(self) -> None:
        """
        Raises:
            ValueError: for gradient checkpointing in a family whose layers pass no keyword arguments on: when they
                run again, they would not know of which forward.
        """
        if self.training and getattr(self, "gradient_checkpointing", False):
            raise ValueError(
                f"Layers of {self.base_class.__name__} do not pass on what they are called with, so that gradient "
                "checkpointing would recompute other selections: call `gradient_checkpointing_disable()`."
            )


@lru_cache
def makes_masks_of_positions(forward: Callable) -> bool:
    """Whether the forward of a decoder hands position ids to what makes its masks, which finds packed sequences."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Call) and "mask" in ast.unparse(node.func):
            names = {each.arg for each in node.keywords}
        else:
            continue
        if {"attention_mask", "position_ids"} <= names:
            return True
    return False


def _blank_model(model_type: str, class_name: str) -> PreTrainedModel:
    """An object of a class of the family of a base's model type, for pickle to fill."""
    model_class = next(each for each in family_of(model_type).classes() if each.__name__ == class_name)
    return object.__new__(model_class)


def freeze_idle_routers(model: SparsePreTrainedMixin) -> None:
    """Loading makes new parameters, which all want gradients: freeze the routers again that none reaches."""
    if not sparse_config_of(model.config).mosa_gate_slope:
        for router in model.mosa_routers().values():
            router.requires_grad_(False)


def add_sparse_groups(model: SparsePreTrainedMixin, config: SparseGroupsConfig) -> None:
    """
    Give a model of a class in `families`, whose modules are still the base family's, its sparse groups: its decoder
    and the attention modules of the layers that have any become their MoSA classes, with new routers.
    """
    decoder, config = decoder_of(model), sparse_config_of(config)
    around = _around(decoder, model)
    for each in around:
        if not isinstance(each, SparsePreTrainedMixin):  # a decoder in another model is of a family of its own
            _set_class(each, family_of(each.config.model_type.removeprefix(PREFIX)).sparse_class_of(type(each)))
    decoder = cast(SparseModelMixin, decoder)
    is_new = not any(isinstance(module, SparseGroupsMixin) for module in decoder.modules())
    if is_new:
        plans = config.layer_groups()
        for layer, module in attention_modules(decoder).items():
            plan = plans[layer]
            if any(plan):
                _set_class(module, sparse_attention_class(cast(Any, type(module))))
                cast(SparseGroupsMixin, module).add_sparse_groups(config, plan)
        decoder.built_layers = decoder.layer_plans()
        decoder.packs_by_positions = makes_masks_of_positions(decoder.base_class.forward)
        layers = {type(layer) for layer in layers_of(decoder) or ()}
        decoder.drops_keywords = not all(passes_keywords(each.forward) for each in (decoder.base_class, *layers))
    for each in reversed(around if is_new else around[:1]):  # from the inside out, as they are built
        each.post_init()


def _around(decoder: PreTrainedModel, model: nn.Module) -> list[PreTrainedModel]:
    """The decoder of a model and what wraps it, from the outside in."""
    return [each for each in model.modules() if isinstance(each, PreTrainedModel) and decoder in each.modules()]


def with_sparse_groups(model: PreTrainedModel, config: SparseGroupsConfig) -> PreTrainedModel:
    """
    A model with sparse groups and freshly initialised routers whose weights, quantised ones too, are in the memory of
    those of `model`, see `_shared_copy`. `model` is left as it was.

    Args:
        model: of a family in `families`, base model or with any head; or a model around one.
        config: `family.config_class.from_base(model.config, ...)`.

    Raises:
        ValueError: for a class that has no MoSA class.
    """
    family = family_of(model.config.model_type)
    converted = cast(SparsePreTrainedMixin, _shared_copy(model, config, family.sparse_class_of(type(model))))
    for module in converted.modules():
        cast(Any, module)._is_hf_initialized = True
    # Routers made in inference mode could never learn; and heads are tied or not, whatever the config says of them.
    with torch.inference_mode(False), init.no_tie_weights():
        add_sparse_groups(converted, config)
        for module in converted.modules():
            if isinstance(module, SparseGroupsMixin):
                module.mosa_router.to(execution_device(module)).train(module.training)
    _forget_untied(converted)
    return converted


def without_sparse_groups(model: SparsePreTrainedMixin) -> PreTrainedModel:
    """The base family's model that shares the weights of `model`, which is left as it was: only routers go."""
    base = _shared_copy(model, model.config.to_base(), model.family.base_class_of(type(model)))
    decoder = cast(SparseModelMixin, decoder_of(base))
    del decoder.built_layers, decoder.packs_by_positions, decoder.drops_keywords
    for module in decoder.modules():
        if isinstance(module, SparseGroupsMixin):
            del module.mosa_router
            for name in ("mosa_plan", "mosa_groups", "mosa_budget", "mosa_cache_dtype", "mosa_gate_slope"):
                delattr(module, name)
            _set_class(module, type(module).__bases__[-1])
            module.config = sparse_config_of(base.config)  # of the base: without fields of ours
    for each in reversed(_around(decoder, base)):
        if isinstance(each, SparsePreTrainedMixin):
            _set_class(each, each.family.base_class_of(type(each)))
        each.__dict__.pop("_keep_in_fp32_modules_strict", None)
        with init.no_init_weights():  # which are in the model's memory: modules that it was given later would be new
            each.post_init()
    _forget_untied(base)
    return base


def _forget_untied(model: PreTrainedModel) -> None:
    """Leave out of what is tied, by the config, which weights are not one: as upstream does where it loads such."""
    for each in _around(decoder_of(model), model):
        weights = dict(each.named_parameters(remove_duplicate=False))
        tied = each.all_tied_weights_keys.items()
        each.all_tied_weights_keys = {one: other for one, other in tied if weights.get(one) is weights.get(other)}


def _shared_copy(model: PreTrainedModel, config, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """
    A copy of the modules, not of their weights, with another config and class. Parameters are its own, in the memory
    of the model's: what replaces their content (another size, dtype or device), freezes them or adds up their
    gradients concerns one model; what writes into that memory (an optimizer's step, a merged adapter) both.

    Raises:
        ValueError: see `check_own_forward`.
    """
    check_own_forward(model)
    memo: dict[int, Any] = {id(tensor): own_parameter(tensor) for tensor in model.parameters()}
    memo |= {id(tensor): tensor for tensor in model.buffers()}
    memo |= {id(weights): weights for weights in offloaded_weights(model)}
    memo |= {id(old): new for old, new in zip(_configs(model.config), _configs(config), strict=True)}
    result = copy.deepcopy(model, memo)
    decoder_of(result).__dict__.pop("_cache_made_for", None)  # of other groups
    _set_class(result, model_class)
    return result


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A model's config, and those of its parts that it holds."""
    parts = [getattr(config, name) for name in config.sub_configs] if is_composite(config) else []
    return [config, *(each for each in parts if each is not None)]


def own_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory; the same one if it is of a class of its own, such as quantised ones."""
    if type(parameter) is not nn.Parameter:
        return parameter
    with torch.inference_mode(parameter.is_inference()):  # outside of it, none that wants gradients could be made
        own = nn.Parameter(parameter.detach(), parameter.requires_grad)
    own.__dict__.update(parameter.__dict__)
    return own


def _set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Make `module` one of another class, also where Accelerate's hooks (`device_map`) remember its forward."""
    module.__class__ = module_class
    if "_old_forward" in module.__dict__:
        cast(Any, module)._old_forward = MethodType(module_class.forward, module)
    if isinstance(module, PreTrainedModel):  # as its construction does; else `output_hidden_states` gives none
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)
