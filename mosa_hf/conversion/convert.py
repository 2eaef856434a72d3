"""Conversion of a pretrained model in memory: groups of its attention become sparse (docs/design.md, section 6)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..arguments import checked
from ..modeling.configuration import AS_CONVERTED, MosaConfig, SparseGroupsConfig, sparse_config_of
from ..modeling.family import family_of
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.layers import check_own_forward, check_uncompiled
from ..modeling.router_files import check_has_sparse_groups
from ..modeling.sparse_models import SparsePreTrainedMixin, with_sparse_groups, without_sparse_groups
from ..modeling.thresholds import calibrate_thresholds
from .allocation import candidate_plan, choose_groups, fits_of, mean_losses, one_threshold
from .calibration import RouterFit, fit_routers, is_of_pictures
from .causality import check_reads_forwards
from .configuration import ConversionConfig
from .exactness import check_computes_the_same
from .windows import calibration_ids

# What names of weights say of what is around a model: pattern, what it is, and what to take instead.
WRAPPED = (
    (r"(^|\.)_orig_mod\.", "a model that `torch.compile` wraps", "what it wraps, `model._orig_mod`"),
    (r"(^|\.)_fsdp_wrapped_module\.", "a model that FSDP wraps", "the model itself, with its state dict gathered"),
    (r"^base_model\.model\.|\.lora_[AB]\b|\.base_layer\.", "a PEFT model", "`model.merge_and_unload()`"),
    (r"^module\.", "a model that DDP, DataParallel or DeepSpeed wraps", "what it wraps, `model.module`"),
)


@checked(model="`convert_checkpoint` takes names and folders", conversion="`ConversionConfig(sparsity=8)` is one")
def convert_model(
    model: PreTrainedModel,
    conversion: ConversionConfig,
    calibration: torch.Tensor | Sequence[Any] | None = None,
    fits: Sequence[RouterFit | None] | None = None,
) -> PreTrainedModel:
    """
    A model with sparse groups that shares every weight tensor with `model`, quantised ones too, and has routers fitted
    to the model's own attention. `model` itself is left as it was.

    Args:
        model: of a family in `mosa_hf.modeling.families`, with or without a head; or a model around such a decoder,
            as of pictures and text, which gets sparse groups and is left as it is in all else.
        conversion: what to produce.
        calibration: token ids `[N, T]`, N windows of the text that routers and thresholds are fitted on, which
            `calibration_windows` makes of texts and chats; or a list of the token ids of each document, which are read
            one after the other (`calibration_ids`); or, of a model of pictures and text, a list of what its processor
            makes of pictures and text, one by one. May be left out where every sparsity is 1 and nothing is selected.
        fits: what `fit_routers` gave for `candidate_plan` without a choice of groups, where several conversions of one
            model share it. Thresholds are set on `calibration` anyway.

    Returns:
        The converted model (`MosaLlamaForCausalLM` from `LlamaForCausalLM`, and so on), in eval mode. Its
        `config.mosa_conversion` records groups, losses and settings.

    Raises:
        ValueError: unsupported family, or one whose attention computes what sparse groups do not know (`exactness`), a
            model that is converted already, impossible group choice, or a calibration that is missing or no text of
            the model; the message names the remedy.
    """
    check_convertible(model)
    check_reads_forwards(model)
    of_pictures = is_of_pictures(calibration)
    if calibration is not None and not of_pictures:
        calibration = calibration_ids(calibration, model.config.get_text_config(decoder=True))
    family = family_of(model.config.model_type)
    family.sparse_class_of(type(model))
    base_config = plain_config(model.config)
    candidates = candidate_plan(base_config, conversion)
    if calibration is None and fits is None:
        choose_groups(conversion, candidates, None)  # raises what a text is needed for
    check_computes_the_same(model, candidates, family.config_class)
    if fits is not None or calibration is not None:
        fits = fits_for(model, conversion, base_config, candidates, calibration, fits)
    losses = None if fits is None else mean_losses(candidates, fits)
    plan = choose_groups(conversion, candidates, losses)
    if fits is not None and conversion.plan is None:
        plan = one_threshold(plan, candidates, fits)

    config = converted_config(model, plan, conversion)
    sparse_config_of(config).mosa_conversion = {
        "source": model.config.name_or_path,
        "settings": _settings(conversion),
        "groups": [list(pair) for pair in plan.sparse_pairs()],
        "losses": losses,
        "calibration": None if calibration is None else _amount(calibration),
    }
    converted = with_sparse_groups(model, config).eval()
    chosen = None if fits is None else fits_of(plan, candidates, fits)
    with torch.no_grad():
        for layer, router in converted.mosa_routers().items():
            router.weight.zero_()
            router.threshold.zero_()
            if chosen is not None:
                router.weight.copy_(chosen[layer].weight)
    if fits is not None and calibration is not None:
        # On the converted model: what its layers see differs a little from what the original's saw.
        windows = calibration if of_pictures else cast(torch.Tensor, calibration).split(1)
        windows = logging.tqdm(windows, desc="Setting thresholds", unit="window")
        calibrate_thresholds(converted, windows)
    return converted


def plain_config(config: PreTrainedConfig) -> SparseGroupsConfig:
    """The configuration of a base model's decoder before groups are chosen, see `candidate_plan`."""
    return sparse_config_of(family_of(config.model_type).config_class.from_base(config))


def fits_for(
    model: PreTrainedModel,
    conversion: ConversionConfig,
    base_config: SparseGroupsConfig,
    candidates: GroupPlan,
    calibration: torch.Tensor | Sequence[Any] | None,
    fits: Sequence[RouterFit | None] | None,
) -> list[RouterFit | None]:
    """
    The fits of a conversion's `candidates`: those that several conversions share, or of `calibration`.

    Raises:
        ValueError: for fits without the text that they are of.
    """
    if calibration is None:
        raise ValueError("`calibration` is needed to set thresholds: pass the token ids that `fits` are of.")
    if fits is not None:
        return fits_of(candidates, candidate_plan(base_config, ConversionConfig()), list(fits))
    return fit_routers(model, calibration, candidates, include_first=conversion.include_first)


def check_convertible(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: for a model with something around it, or that is compiled, and for one that has routers already.
    """
    if not isinstance(model, PreTrainedModel):
        check_unwrapped(model)
    check_own_forward(model)
    check_uncompiled(model, "convert it uncompiled, and compile the result")
    config = model.config.get_text_config(decoder=True)
    if isinstance(config, SparseGroupsConfig):
        raise ValueError(
            f"{type(model).__name__} is converted already: convert its base, `mosa_hf.to_dense(model)`, or "
            "change its plan when it is loaded (`mosa_plan`), and set thresholds for it (`calibrate_thresholds`)."
        )
    if isinstance(config, MosaConfig):
        raise ValueError(
            f"{type(model).__name__} is the native model, whose heads select tokens already: convert a model of a "
            "family of Transformers."
        )


def check_unwrapped(model: nn.Module) -> None:
    """
    Raises:
        ValueError: for a model whose weights have names that something around it or its layers gives.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern, what, remedy in WRAPPED:
        if any(map(re.compile(pattern).search, names)):
            raise ValueError(f"`model` is {what} ({type(model).__name__}): pass {remedy}.")


@checked()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """
    The base model of a converted one: the class of its family in Transformers, sharing every weight tensor with
    `model`, which is left as it was.

    Raises:
        ValueError: for a model without sparse groups.
    """
    check_has_sparse_groups(model)
    return without_sparse_groups(cast(SparsePreTrainedMixin, model))


def converted_config(model: PreTrainedModel, plan: GroupPlan, conversion: ConversionConfig) -> SparseGroupsConfig:
    """The configuration of `model` with the sparse groups of a plan, which is written out if it is not uniform."""
    config_class = family_of(model.config.model_type).config_class
    kinds = list(plan.sparse().values())
    usual = max(kinds, key=kinds.count)
    if conversion.plan is None:
        usual = SparseGroup(conversion.window, conversion.sparsity)
    fields = {
        "mosa_window": usual.window,
        "mosa_sparsity": usual.sparsity,
        "mosa_include_first": conversion.include_first,
        "mosa_routing": "threshold",
        **AS_CONVERTED,
    }
    config = config_class.from_base(model.config, **fields)
    if GroupPlan.of_config(config) != plan:
        config = config_class.from_base(model.config, **fields, mosa_plan=plan.to_list())
    return config


def _amount(calibration: torch.Tensor | Sequence[Any]) -> dict:
    """How much was read: windows, and tokens of the longest."""
    tokens = [each["input_ids"].shape[1] if isinstance(each, Mapping) else len(each) for each in calibration]
    return {"windows": len(tokens), "tokens": max(tokens)}


def _settings(conversion: ConversionConfig) -> dict:
    if conversion.plan is not None:
        return {"include_first": conversion.include_first}
    settings = {name: getattr(conversion, name) for name in ("sparsity", "window", "include_first")}
    return settings | {"num_groups": conversion.groups if isinstance(conversion.groups, int) else None}
