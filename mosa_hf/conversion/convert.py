"""Conversion of a pretrained model in memory: whole key/value groups become MoSA groups (DESIGN section 6)."""

import copy
from collections import Counter
from dataclasses import asdict

import torch
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from ..modeling import MosaConfig, MosaForCausalLM
from ..modeling.thresholds import calibrate_thresholds
from .calibration import RouterFit, fit_routers
from .configuration import ConversionConfig

# Families whose decoder is Llama's own: model_type of the source → class it converts to.
CONVERTIBLE = {"llama": MosaForCausalLM}

# Form "selected": its gate must be neutral right after conversion and still pass a gradient to the routers. Logits of
# the size b + ε z leave the gate at sigmoid(b) up to 1e-6, which W_O makes up for.
GATE_BIAS, GATE_SCALE = 8.0, 1e-3


def convert_model(
    model: PreTrainedModel, conversion: ConversionConfig, calibration: torch.Tensor | None = None
) -> MosaForCausalLM:
    """
    A MoSA model with the weights of `model`: converted groups copy their heads' projections and get a router fitted to
    the model's own attention. `model` itself is left as it was.

    Args:
        model: a causal LM of a family in `CONVERTIBLE`.
        conversion: what to produce.
        calibration: token ids `[N, T]`, N windows of the text that routers and thresholds are fitted on; see
            `calibration_windows`. May be left out for `sparsity=1`, where nothing is selected.

    Returns:
        The converted model, in eval mode, with the dtype and device of `model`. Its
        `config.mosa_conversion` records groups, scores and settings.

    Raises:
        ValueError: unsupported family, impossible group choice, or missing calibration; the message names the remedy.
    """
    check_family(model.config.model_type)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no language-modeling head: load it with `AutoModelForCausalLM`.")
    config = model.config
    num_layers, num_groups = config.num_hidden_layers, config.num_key_value_heads
    pairs = [(layer, group) for layer in range(num_layers) for group in range(num_groups)]
    if conversion.num_groups is not None and conversion.num_groups > len(pairs):
        raise ValueError(
            f"`num_groups={conversion.num_groups}`: the model has {num_layers} x {num_groups} key/value groups."
        )
    if unknown := sorted(set(conversion.groups or ()) - set(pairs)):
        raise ValueError(f"`groups` names {unknown}, but the model has layers < {num_layers}, groups < {num_groups}.")
    fits = None
    if calibration is not None:
        fits = fit_routers(
            model,
            calibration,
            sparsity=conversion.sparsity,
            window=conversion.window,
            include_first=conversion.include_first,
        )
    elif conversion.sparsity != 1:
        raise ValueError("`calibration` is needed to fit routers: pass token ids [windows, tokens] of some text.")
    converted = choose_groups(conversion, pairs, fits)

    mosa_config = converted_config(config, conversion, converted)
    mosa_config.mosa_conversion = {
        "source": config.name_or_path,
        "settings": {name: value for name, value in asdict(conversion).items() if name != "groups"},
        "groups": [list(pair) for pair in converted],
        "scores": None if fits is None else [[round(x, 6) for x in fit.kept_mass.tolist()] for fit in fits],
        "calibration": None if calibration is None else {"windows": len(calibration), "tokens": calibration.shape[1]},
    }
    state_dict = converted_state_dict(model, conversion, converted, fits)
    mosa_model = CONVERTIBLE[config.model_type].from_pretrained(
        None,
        config=mosa_config,
        state_dict=state_dict,
        dtype=model.dtype,
        attn_implementation=config._attn_implementation,
    )
    mosa_model.generation_config = copy.deepcopy(model.generation_config)
    mosa_model = mosa_model.to(model.device).eval()
    if calibration is not None:
        # Again on the converted model: what its layers see differs a little from what the original's saw.
        calibrate_thresholds(mosa_model, tqdm(calibration.split(1), desc="Setting thresholds", unit="window"))
    return mosa_model


def check_family(model_type: str) -> None:
    """
    Raises:
        ValueError: if models of this type cannot be converted.
    """
    if model_type not in CONVERTIBLE:
        raise ValueError(
            f"Models of type {model_type!r} cannot be converted; supported: {sorted(CONVERTIBLE)}. Conversion copies "
            "weights head by head, so a family whose attention differs needs its own MoSA class."
        )


def choose_groups(
    conversion: ConversionConfig, pairs: list[tuple[int, int]], fits: list[RouterFit] | None
) -> list[tuple[int, int]]:
    """Those of all `(layer, group)` pairs to convert: the ones named, or those that keep most of their attention."""
    if conversion.groups is not None:
        return sorted(conversion.groups)
    if conversion.num_groups in (None, len(pairs)):
        return pairs
    if fits is None:
        raise ValueError("`calibration` is needed to rank groups: pass it, or name the `groups`.")
    ranked = sorted(pairs, key=lambda pair: -float(fits[pair[0]].kept_mass[pair[1]]))
    return sorted(ranked[: conversion.num_groups])


def converted_config(config, conversion: ConversionConfig, converted: list[tuple[int, int]]) -> MosaConfig:
    """The configuration of the converted model; layers may differ in how many of their groups are converted."""
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "quantization_config"):
        fields.pop(name, None)
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    num_mosa = Counter(layer for layer, _ in converted)
    heads = {}
    for layer in range(config.num_hidden_layers):
        num_dense = config.num_key_value_heads - num_mosa[layer]
        heads[layer] = {
            "num_attention_heads": num_dense * heads_per_group,
            "num_key_value_heads": num_dense,
            "num_mosa_heads": num_mosa[layer] * heads_per_group,
            "num_mosa_key_value_heads": num_mosa[layer],
        }
    usual = max(heads.values(), key=list(heads.values()).count)
    fields.update(
        **usual,
        head_dim=config.head_dim,
        mosa_sparsity=conversion.sparsity,
        mosa_query_tokens=conversion.query_tokens,
        mosa_window=conversion.window,
        mosa_include_first=conversion.include_first,
        mosa_routing="threshold",
        mosa_router_bias=conversion.query_tokens == "selected",
        per_layer_config={layer: own for layer, own in heads.items() if own != usual} or None,
    )
    return MosaConfig(**fields)


def converted_state_dict(
    model: PreTrainedModel,
    conversion: ConversionConfig,
    converted: list[tuple[int, int]],
    fits: list[RouterFit] | None,
) -> dict[str, torch.Tensor]:
    """The weights of the converted model, by name; copies, so that training one model leaves the other as it is."""
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_groups = model.config.num_key_value_heads
    for layer in range(model.config.num_hidden_layers):
        mosa = [group for group in range(num_groups) if (layer, group) in converted]
        if not mosa:
            continue
        dense = [group for group in range(num_groups) if group not in mosa]
        prefix = f"model.layers.{layer}.self_attn."
        for name in ("q", "k", "v"):
            for kind, mosa_name in (("weight", f"mosa.{name}_proj"), ("bias", f"mosa.{name}_bias")):
                tensor = state_dict.pop(f"{prefix}{name}_proj.{kind}", None)
                if tensor is None:
                    continue
                groups = tensor.unflatten(0, (num_groups, -1))
                state_dict[prefix + mosa_name] = groups[mosa]
                if dense:
                    state_dict[f"{prefix}{name}_proj.{kind}"] = groups[dense].flatten(0, 1)
        output = state_dict.pop(f"{prefix}o_proj.weight").unflatten(1, (num_groups, -1)).transpose(0, 1)  # [G, D, R d]
        state_dict[f"{prefix}mosa.o_proj"] = output[mosa]
        if dense:
            state_dict[f"{prefix}o_proj.weight"] = output[dense].transpose(0, 1).flatten(1)
        elif f"{prefix}o_proj.bias" in state_dict:
            state_dict[f"{prefix}mosa.o_bias"] = state_dict.pop(f"{prefix}o_proj.bias")

        if fits is None:
            weight = output.new_zeros(len(mosa), output.shape[1], dtype=torch.float32)
            threshold = weight.new_zeros(len(mosa))
        else:
            weight, threshold = fits[layer].weight[mosa], fits[layer].threshold[mosa]
        if conversion.query_tokens == "selected":
            weight, threshold = weight * GATE_SCALE, threshold * GATE_SCALE + GATE_BIAS
            state_dict[f"{prefix}mosa.router.bias"] = torch.full_like(threshold, GATE_BIAS)
            state_dict[f"{prefix}mosa.o_proj"] = output[mosa] / torch.tensor(GATE_BIAS).sigmoid().to(output)
        state_dict[f"{prefix}mosa.router.weight"] = weight
        state_dict[f"{prefix}mosa.router.threshold"] = threshold
    return state_dict
