"""Configurations: what every router has, the native MoSA model, and families with sparse groups."""

import copy
import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import logging

from .group_plan import GroupPlan, SparseGroup
from .remote_code import InstalledCodeConfigMixin

logger = logging.get_logger(__name__)

OF_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")  # of what `to_dict` gives
# Upstream's types of layers whose attention reads all tokens, alone or beside a recurrent part.
GLOBAL = ("full_attention", "hybrid")
# What `per_layer_config` of the native model may set: the rest is the whole model's.
PER_LAYER_FIELDS = (
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "num_mosa_heads",
    "num_mosa_key_value_heads",
    "mosa_sparsity",
    "mosa_include_first",
    "mosa_min_tokens",
    "mosa_threshold_momentum",
    "mosa_cache_budget",
    "mosa_router_bias",
)


if TYPE_CHECKING:

    class DecoderConfig(PreTrainedConfig):
        """What a mixin relies on: fields that the configuration of every decoder has."""

        hidden_size: int = 0
        num_attention_heads: int = 0
        num_hidden_layers: int = 0
        max_position_embeddings: int = 0

else:
    DecoderConfig = object


class ConfigView:
    """A config that is another one in all but what a subclass sets."""

    def __init__(self, config: PreTrainedConfig):
        self.model_config = config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


@dataclass(kw_only=True, repr=False)
class RoutingConfig(InstalledCodeConfigMixin, DecoderConfig):
    """
    How tokens are selected (docs/design.md, section 3); mixed into the configuration of every model with routers.

    Args:
        mosa_sparsity (`float`):
            ρ ≥ 1: a group selects one token in ρ.
        mosa_include_first (`bool`, defaults to `True`):
            Always select the first token of a sequence (the attention sink).
        mosa_min_tokens (`int`, defaults to 2):
            `"expert_choice"` selects at least this many tokens of a sequence.
        mosa_routing (`str`):
            How `model.train()` selects. `"expert_choice"`: the highest logits of the whole sequence (not causal).
            `"threshold"`: the logits at or above the group's learned threshold (causal).
        mosa_inference_routing (`str`, defaults to `"threshold"`):
            How `model.eval()` selects. `"expert_choice"` reproduces the paper's teacher-forced figures; `generate`
            refuses it.
        mosa_threshold_momentum (`float`, defaults to 0.99):
            Momentum of the moving average of a group's K-th largest logit, which becomes its threshold while routers
            train; it follows faster while the group is off its rate. 1: thresholds stay as they are, so that routing
            changes with the weights alone (what conversion writes, since thresholds were set on text).
        mosa_router_bias (`bool`, defaults to `False`):
            Whether routers have a bias.
        mosa_cache_budget (`int`, *optional*):
            Hard cap on the selected tokens that each row and group remembers, those in the window included: beyond
            it, the lowest router logit (to bfloat16's precision, ties to the earlier token) is evicted first; the
            first token never is, under `mosa_include_first`. It is part of the function that the model computes, with
            a cache or without, in training too.
        mosa_cache_dtype (`str`, *optional*):
            How the keys and values that sparse groups keep, windows included, are stored: `"int8"`, codes with a scale
            for each key and each value; by default in the model's dtype. Keys and values of sparse groups are rounded
            to it with a cache or without, in training too, where gradients pass as if they were not.
        mosa_conversion (`dict`, *optional*):
            What a converted checkpoint was made from. Informative; never read by the model.
    """

    mosa_sparsity: int | float = 8
    mosa_include_first: bool = True
    mosa_min_tokens: int = 2
    mosa_routing: Literal["expert_choice", "threshold"] = "threshold"
    mosa_inference_routing: Literal["expert_choice", "threshold"] = "threshold"
    mosa_threshold_momentum: int | float = 0.99
    mosa_router_bias: bool = False
    mosa_cache_budget: int | None = None
    mosa_cache_dtype: str | None = None
    mosa_conversion: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Does what `PreTrainedConfig.from_dict` does, which looks at none of the fields that `kwargs` (those of
        `from_pretrained`) change.

        Raises:
            StrictDataclassError: for a `mosa_*` field out of range.
            ValueError: for one that there is not, or that the model would not read, see
                `SparseGroupsConfig.check_read`; for more layers than those of `mosa_plan`.
        """
        cls._check_names(kwargs)
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).fit_layers()
        if given := [name for name in kwargs if name.startswith("mosa_")]:
            config = result[0] if isinstance(result, tuple) else result
            config.validate()
            config.check_read(given)
            config.warn_of_thresholds(given, config_dict)
        return result

    def sparsities(self) -> list[float]:
        """ρ of everything that may differ in it, in order."""
        return [self.mosa_sparsity]

    def warn_of_thresholds(self, names: Collection[str], saved: Mapping[str, Any]) -> None:
        """
        Say so if `names`, fields that someone has set of a model that was `saved` with others, change a ρ: thresholds
        are what selects, and come with the model. Under 1, which selects every token, none is asked.
        """
        if self.mosa_inference_routing != "threshold" or not {"mosa_sparsity", "mosa_plan"} & set(names):
            return
        before = copy.copy(self)
        sparsity = saved.get("mosa_sparsity", type(self).mosa_sparsity)  # defaults are not saved
        vars(before).update(mosa_plan=saved.get("mosa_plan"), mosa_sparsity=sparsity)
        pairs = zip(before.sparsities(), self.sparsities(), strict=False)
        if other := [(old, new) for old, new in pairs if new not in (old, 1)]:
            logger.warning_once(
                f"`{'` and `'.join(names)}` asks for a sparsity of {other[0][1]} in place of {other[0][0]}, but the "
                "thresholds that are loaded were set for that, and select what they selected. Set them anew on text: "
                "`mosa_hf.calibrate_thresholds(model, [input_ids])`."
            )

    def check_read(self, names: Collection[str]) -> None:
        """Whether this model reads the fields `names`, which someone has set of it: it reads all."""

    @classmethod
    def _check_names(cls, names: Iterable[str]) -> None:
        """Raise a ValueError for a `mosa_*` field that there is not: upstream takes any name for an attribute."""
        if unknown := sorted(name for name in names if name.startswith("mosa_") and not hasattr(cls, name)):
            known = [field.name for field in fields(cls) if field.name.startswith("mosa_")]
            raise ValueError(f"`{'`, `'.join(unknown)}`: {cls.__name__} has no such field; it has {', '.join(known)}.")

    def check_routing(self) -> None:
        """
        Raises:
            ValueError: for a field out of range, or that there is not, by name.
        """
        self._check_names(vars(self))
        if not 1 <= self.mosa_sparsity < math.inf:
            raise ValueError(
                f"`mosa_sparsity` must be finite and at least 1 (select every token), got {self.mosa_sparsity}."
            )
        if self.mosa_min_tokens < 1:
            raise ValueError(f"`mosa_min_tokens` must be at least 1, got {self.mosa_min_tokens}.")
        if not 0 <= self.mosa_threshold_momentum <= 1:
            raise ValueError(f"`mosa_threshold_momentum` must be in [0, 1], got {self.mosa_threshold_momentum}.")
        if self.mosa_cache_budget is not None and not 1 <= self.mosa_cache_budget < 2**63:
            raise ValueError(
                f"`mosa_cache_budget` must be at least 1 and below 2**63, or None to keep every selected token, got "
                f"{self.mosa_cache_budget}."
            )
        if self.mosa_cache_dtype not in (None, "int8"):
            raise ValueError(
                f"`mosa_cache_dtype` must be 'int8', or None for the model's dtype, got {self.mosa_cache_dtype!r}."
            )

    @abstractmethod
    def fit_layers(self) -> None:
        """Drop what the config says of layers beyond `num_hidden_layers`, which someone has lowered."""

    @abstractmethod
    def has_attentions(self, layer_idx: int) -> bool:
        """Whether a layer computes a matrix of attention weights that `output_attentions=True` could return."""

    def check_attentions(self) -> None:
        """
        Raises:
            ValueError: if `output_attentions=True` would leave out a layer.
        """
        if missing := [layer for layer in range(self.num_hidden_layers) if not self.has_attentions(layer)]:
            raise ValueError(
                f"`output_attentions=True`: layers {missing} have no matrix of attention weights, as each of their "
                "groups reads tokens of its own. `mosa_hf.trace_routing(model)` records which tokens those are; "
                "`mosa_hf.to_dense(model)` is a converted model's original, with all of its weights."
            )


@dataclass(kw_only=True, repr=False)
class SparseGroupsConfig(RoutingConfig):
    """
    A family's configuration with sparse key/value groups (docs/design.md, section 2): `MosaLlamaConfig` is this and
    `LlamaConfig`. A sparse group keeps the selected tokens and the last `mosa_window` tokens. Fields of
    `RoutingConfig`, and:

    Args:
        mosa_window (`int`, defaults to 64):
            A query also reads the keys at most `mosa_window - 1` tokens behind it, selected or not.
        mosa_plan (`list`, *optional*):
            What each key/value group of each layer is: `None` (dense), or `{"window": ..., "sparsity": ...}`; see
            `GroupPlan`. By default every group of every layer with global attention is sparse, with `mosa_window` and
            `mosa_sparsity`. Layers with a sliding window are always dense.
        mosa_gate_slope (`float`, defaults to 1.0):
            While training, the scores of selected keys beyond the window are biased by log σ(slope · (z − θ)), which
            passes a gradient to the routers. 0: no bias, training and evaluation compute the same function, and
            routers are frozen (what conversion writes).
        mosa_router_hidden_size (`int`, *optional*):
            Units of a hidden layer (GELU) that the routers of a layer share. By default routers are linear.
    """

    mosa_window: int = 64
    mosa_plan: list[Any] | None = None
    mosa_gate_slope: int | float = 1.0
    mosa_router_hidden_size: int | None = None

    @classmethod
    def from_base(cls, config: PreTrainedConfig, **fields) -> "SparseGroupsConfig":
        """
        The configuration of a base model with sparse groups.

        Args:
            config: of the base model.
            fields: `mosa_*` fields.

        Raises:
            ValueError: for a base whose config asks for attention weights that it would lose.
        """
        own = cls(**{**fields_of(config), **fields})
        own._attn_implementation_internal = config._attn_implementation
        own._experts_implementation_internal = getattr(config, "_experts_implementation", None)
        own.name_or_path = config.name_or_path
        if own.output_attentions:
            own.check_attentions()
        return own

    def to_base(self) -> PreTrainedConfig:
        """The configuration of the base model: the same, without the `mosa_*` fields."""
        values = {name: value for name, value in fields_of(self).items() if not name.startswith("mosa_")}
        base = base_config_class(type(self))(**values)
        base._attn_implementation_internal = self._attn_implementation
        base._experts_implementation_internal = getattr(self, "_experts_implementation", None)
        base.name_or_path = self.name_or_path
        return base

    @property
    def num_groups(self) -> int:
        """Key/value groups of a layer, of the layer with most of them."""
        return max(self.num_groups_of(layer) for layer in range(self.num_hidden_layers))

    def num_groups_of(self, layer_idx: int) -> int:
        """Key/value groups of a layer: heads that a cache has of it."""
        layer = self.per_layer_config[layer_idx] if self.is_heterogeneous else self
        if getattr(layer, "kv_lora_rank", None):  # of latent attention, whose heads share what is cached
            return 1
        if getattr(layer, "multi_query", False):
            return 1
        return getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads

    def stays_dense(self, layer_idx: int) -> bool:
        """Whether a layer has to stay dense, see `why_dense`."""
        return self.why_dense(layer_idx) is not None

    def why_dense(self, layer_idx: int) -> str | None:
        """What keeps a layer from having sparse groups; None if nothing does."""
        return self._why_dense(layer_idx, get_layer_types_and_kwargs(self)[0])

    def _why_dense(self, layer_idx: int, kinds: list[str]) -> str | None:
        """`why_dense`, of layers of these types, which take a while to find."""
        if self._shares_keys(layer_idx):
            return "layers share its keys and values"
        if self._is_repeated(layer_idx):
            return "it runs several times, with another layer of the cache each time"
        if layer_idx in (getattr(self, "cross_attention_layers", None) or ()):
            return "its attention reads pictures"
        kind = kinds[layer_idx]
        if "sliding" in kind or "chunked" in kind:
            return "its attention has a sliding window"
        return None if kind in GLOBAL else f"it is of type {kind!r}, not of global attention"

    def _is_repeated(self, layer_idx: int) -> bool:
        """Whether a layer is in the section that a model runs in a loop (Dory)."""
        first, number = getattr(self, "n_input_layers", 0), getattr(self, "n_recurrent_layers", None)
        return number is not None and first <= layer_idx < first + number

    def _shares_keys(self, layer_idx: int) -> bool:
        """Whether a layer reads the keys and values of an earlier one, or a later one may read this one's."""
        if (modes := getattr(self, "kv_sharing_modes", None)) is not None:
            return modes[layer_idx] is not None
        num_shared = getattr(self, "num_kv_shared_layers", None)  # of the last layers; before Transformers 5.21
        if not num_shared:
            return False
        first, types = self.num_hidden_layers - num_shared, cast(Any, self).layer_types
        return layer_idx >= first or types[layer_idx] not in types[layer_idx + 1 : first]

    def dense_layers(self) -> list[int]:
        """
        The layers that have to stay dense.

        Raises:
            ValueError: if `layer_types` is of other layers.
        """
        self._check_layer_types()
        return [layer for layer, reason in enumerate(self._reasons()) if reason is not None]

    def _check_layer_types(self) -> None:
        """
        Raises:
            ValueError: if `layer_types` is of other layers.
        """
        types = getattr(self, "layer_types", None)
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` names {len(types)} layers, but the model has {self.num_hidden_layers}: set "
                "`config.layer_types` to those of its layers."
            )

    def _reasons(self) -> list[str | None]:
        """`why_dense` of each layer."""
        kinds = get_layer_types_and_kwargs(self)[0]
        return [self._why_dense(layer, kinds) for layer in range(self.num_hidden_layers)]

    def check_plan(self, plan: GroupPlan) -> None:
        """
        Raises:
            ValueError: for a plan that does not fit, see `GroupPlan.validate`.
        """
        self._check_layer_types()
        plan.validate([self.num_groups_of(i) for i in range(self.num_hidden_layers)], self._reasons())

    def fit_layers(self) -> None:
        """
        As `RoutingConfig.fit_layers`.

        Raises:
            ValueError: for more layers than those of the plan.
        """
        if self.mosa_plan is None or len(self.mosa_plan) == self.num_hidden_layers:
            return
        if len(self.mosa_plan) < self.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}, but `mosa_plan` names the groups of "
                f"{len(self.mosa_plan)} layers: pass a `mosa_plan` of all layers too."
            )
        self.mosa_plan = self.mosa_plan[: self.num_hidden_layers]

    def groups_of_layer(self, layer_idx: int) -> tuple[SparseGroup | None, ...]:
        """What each key/value group of a layer is; None: dense."""
        return self.layer_groups()[layer_idx]

    def layer_groups(self) -> tuple[tuple[SparseGroup | None, ...], ...]:
        """`groups_of_layer` of each layer."""
        if self.mosa_plan is not None:
            return GroupPlan.from_list(self.mosa_plan).layers
        group = SparseGroup(window=self.mosa_window, sparsity=self.mosa_sparsity)
        return tuple(
            (group if reason is None else None,) * self.num_groups_of(layer)
            for layer, reason in enumerate(self._reasons())
        )

    def sparsities(self) -> list[float]:
        """Of each sparse group."""
        return [group.sparsity for groups in self.layer_groups() for group in groups if group is not None]

    def has_attentions(self, layer_idx: int) -> bool:
        return not any(self.groups_of_layer(layer_idx))

    def check_attentions(self) -> None:
        super().check_attentions()
        raise ValueError(
            f"`output_attentions=True`: a {type(self).__name__.removesuffix('Config')} model whose groups are all "
            "dense records no attention weights either: `mosa_hf.to_dense(model)` does."
        )

    def check_read(self, names: Collection[str]) -> None:
        """
        Raises:
            ValueError: if `names`, fields that someone has set of this model, has one in whose place a plan counts.
        """
        ignored = [name for name in ("mosa_window", "mosa_sparsity") if name in names]
        if ignored and self.mosa_plan is not None:
            raise ValueError(
                f"`{'` and `'.join(ignored)}` would change nothing: this model has a `mosa_plan`, which says what "
                "each group is. Change that: `GroupPlan.of_config(config)` gives it, and `mosa_plan=plan.to_list()` "
                "takes it; another sparsity needs other thresholds (`mosa_hf.calibrate_thresholds`)."
            )

    def validate_sparse_groups(self):
        """Part of `@strict`-powered validation."""
        self.check_routing()
        if self.mosa_window < 0:
            raise ValueError(f"`mosa_window` must not be negative, got {self.mosa_window}.")
        if not 0 <= self.mosa_gate_slope < math.inf:
            raise ValueError(f"`mosa_gate_slope` must be finite and not negative, got {self.mosa_gate_slope}.")
        if self.mosa_router_hidden_size is not None and self.mosa_router_hidden_size < 1:
            raise ValueError(
                f"`mosa_router_hidden_size` must be at least 1, or None for linear routers, got "
                f"{self.mosa_router_hidden_size}."
            )
        # "vision" is of the layers with a sliding window, and of pictures alone.
        if getattr(self, "use_bidirectional_attention", None) not in (None, False, "vision"):
            raise ValueError(
                "`use_bidirectional_attention` does not fit sparse groups, which are causal: encoders, and prefix-LMs "
                "such as PaliGemma, read a text both ways."
            )
        if getattr(self, "add_cross_attention", False):
            raise ValueError(
                "`add_cross_attention` does not fit sparse groups: such layers read an encoder, which has no routers."
            )
        if self.mosa_cache_dtype is not None and getattr(self, "kv_lora_rank", None):
            raise ValueError(
                "`mosa_cache_dtype` does not fit latent attention (`kv_lora_rank`), which stores what heads expand: "
                "leave it out."
            )
        if self.mosa_plan is not None:
            self.check_plan(GroupPlan.from_list(self.mosa_plan))


def base_config_class(config_class: type) -> type[PreTrainedConfig]:
    """The class of Transformers that one of ours was made of."""
    return next(each for each in config_class.__mro__[1:] if each.__dict__.get("model_type"))


# What makes routers stay as they are, and thresholds those of the calibration text, also if routers are trained.
AS_CONVERTED: dict[str, Any] = {"mosa_gate_slope": 0.0, "mosa_threshold_momentum": 1.0}


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says, without what belongs to its class."""
    return {name: value for name, value in config.to_dict().items() if name not in OF_THE_CLASS}


def is_composite(config: Any) -> bool:
    """Whether a config, or a class of configs, is of a model around a language model."""
    return "text_config" in (config.sub_configs or {})


def sparse_config_of(config: PreTrainedConfig) -> SparseGroupsConfig:
    """What says which groups of a model's decoder are sparse: the config itself, or the `text_config` in it."""
    return cast(SparseGroupsConfig, config.get_text_config(decoder=True))


@strict
class MosaConfig(RoutingConfig, LlamaConfig):
    r"""
    Configuration of the native MoSA model: a Llama-shaped decoder whose layers mix ordinary (dense) attention heads
    with the paper's MoSA heads, in which selected tokens attend to each other (docs/design.md, section 2).

    Every `LlamaConfig` field keeps its name and meaning; `num_attention_heads`, `num_key_value_heads` and
    `sliding_window` describe the dense heads only, and `attention_dropout` acts on them only. `head_dim` is shared by
    both kinds of heads. Fields of `RoutingConfig`, with `mosa_sparsity` 16 and `mosa_routing` "expert_choice" by
    default, and:

    Args:
        num_mosa_heads (`int`, defaults to 28):
            MoSA query heads per layer.
        num_mosa_key_value_heads (`int`, *optional*):
            MoSA groups per layer: one router, one key head and one value head each. Defaults to `num_mosa_heads`.
        mosa_router_aux_loss_coef (`float`, defaults to 0.0):
            Weight of a binary cross-entropy that pushes the score of selected tokens above 0.5 and of others below.
            In training any loss that is made of the hidden states carries it.
        sliding_window (`int`, *optional*):
            Window of the dense heads; `None` means global attention. May differ by layer through `per_layer_config`.

    Per-layer differences go through Transformers' `per_layer_config`, e.g.
    `per_layer_config={0: {"num_mosa_heads": 0, "num_mosa_key_value_heads": 0}}`.

    Raises:
        `StrictDataclassClassValidationError`, `StrictDataclassFieldValidationError` or `ValueError` when the config is
        built, naming the offending field.

    ```python
    >>> from mosa_hf import MosaConfig, MosaForCausalLM

    >>> config = MosaConfig(hidden_size=512, num_attention_heads=4, head_dim=64, num_mosa_heads=32, mosa_sparsity=32)
    >>> model = MosaForCausalLM(config)
    ```
    """

    model_type = "mosa"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss"]  # by `Trainer`

    num_attention_heads: int = 4
    head_dim: int | None = 128
    sliding_window: int | None = None
    num_mosa_heads: int = 28
    num_mosa_key_value_heads: int | None = None
    mosa_sparsity: int | float = 16
    mosa_routing: Literal["expert_choice", "threshold"] = "expert_choice"
    mosa_router_aux_loss_coef: int | float = 0.0

    def __post_init__(self, **kwargs):
        if self.num_mosa_key_value_heads is None:
            self.num_mosa_key_value_heads = self.num_mosa_heads
        if self.head_dim is None and self.num_attention_heads == 0:
            raise ValueError("`head_dim` must be given when `num_attention_heads` is 0: it cannot be derived.")
        super().__post_init__(**kwargs)

    def fit_layers(self) -> None:
        if self.is_heterogeneous:
            own = self._heterogeneity_spec.per_layer_overrides
            if max(own, default=0) >= self.num_hidden_layers:
                self.per_layer_config = {i: fields for i, fields in own.items() if i < self.num_hidden_layers}

    def has_attentions(self, layer_idx: int) -> bool:
        """Those of the dense heads, which are all that is returned of a layer."""
        return self.per_layer_config[layer_idx].num_attention_heads > 0

    def validate_architecture(self):
        """Part of `@strict`-powered validation: refuses impossible combinations, layer by layer."""
        if self.is_heterogeneous:
            for layer_idx, layer_config in enumerate(self.per_layer_config):
                try:
                    layer_config.validate_architecture()
                except ValueError as error:
                    raise ValueError(f"`per_layer_config`, layer {layer_idx}: {error}") from error
            if shared := sorted(set(self.per_layer_attributes or ()).difference(PER_LAYER_FIELDS)):
                raise ValueError(
                    f"`per_layer_config` sets {shared}, which all layers share. Set it for the whole model; only "
                    f"{', '.join(PER_LAYER_FIELDS)} may differ by layer."
                )
            return

        _validate_groups(self, "num_attention_heads", "num_key_value_heads")
        _validate_groups(self, "num_mosa_heads", "num_mosa_key_value_heads")
        if self.num_attention_heads == 0 and self.num_mosa_heads == 0:
            raise ValueError(
                "`num_attention_heads` and `num_mosa_heads` are both 0: a layer needs a head of either kind."
            )
        if self.head_dim is None or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be a positive even number (rotary embeddings pair it), got {self.head_dim}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"`sliding_window` must be at least 1, or None for global attention, got {self.sliding_window}."
            )
        self.check_routing()
        if self.mosa_cache_dtype is not None:
            raise ValueError(
                "`mosa_cache_dtype` is of sparse groups, and the paper's heads keep what they select in the model's "
                "dtype: leave it out."
            )
        if not 0 <= self.mosa_router_aux_loss_coef < math.inf:
            raise ValueError(
                f"`mosa_router_aux_loss_coef` must be finite and not negative, got {self.mosa_router_aux_loss_coef}."
            )


def _validate_groups(config: MosaConfig, heads: str, key_value_heads: str) -> None:
    """Query heads must divide evenly over key/value heads, and both may only be 0 together."""
    num_heads, num_key_value_heads = getattr(config, heads), getattr(config, key_value_heads)
    if num_heads < 0 or num_key_value_heads < 0:
        raise ValueError(
            f"`{heads}` and `{key_value_heads}` must not be negative, got {num_heads}, {num_key_value_heads}."
        )
    if (num_heads == 0) != (num_key_value_heads == 0) or (num_heads and num_heads % num_key_value_heads):
        raise ValueError(
            f"`{heads}` ({num_heads}) must be a multiple of `{key_value_heads}` ({num_key_value_heads}); "
            "set both where a layer differs."
        )


__all__ = ["MosaConfig", "RoutingConfig", "SparseGroupsConfig", "is_composite", "sparse_config_of"]
