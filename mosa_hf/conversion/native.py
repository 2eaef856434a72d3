"""A Llama as the native model, whose heads are the paper's (docs/design.md, section 2): a start for healing."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from ..arguments import checked
from ..modeling.configuration import MosaConfig
from ..modeling.modeling_mosa import MosaForCausalLM
from ..modeling.thresholds import calibrate_thresholds
from .allocation import candidate_plan, choose_groups, mean_losses
from .calibration import RouterFit
from .configuration import ConversionConfig
from .convert import check_unwrapped, fits_for, plain_config
from .windows import calibration_ids

# The gate must be neutral right after conversion and still pass a gradient to the routers. Logits of the size b + ε z
# leave the gate at sigmoid(b) up to 1e-6, which W_O makes up for.
GATE_BIAS, GATE_SCALE = 8.0, 1e-3


@checked()
def convert_to_native(
    model: LlamaForCausalLM,
    conversion: ConversionConfig,
    calibration: torch.Tensor | Sequence[Any] | None = None,
    fits: Sequence[RouterFit | None] | None = None,
) -> MosaForCausalLM:
    """
    The native MoSA model with the weights of a Llama, copied: key/value groups become groups of the paper's heads, in
    which selected tokens attend to each other and others get nothing. That loses most of what the heads did: for
    experiments with healing. `convert_model` keeps a model working.

    Args:
        model: a `LlamaForCausalLM`, left as it was.
        conversion: what to produce, without a plan; its `window` has no meaning here and must be 0.
        calibration: token ids `[N, T]` that routers and thresholds are fitted on. May be left out for `sparsity=1`.
        fits: of routers that several conversions of one model share, see `convert_model`.

    Raises:
        ValueError: for another model, one with something around it, a plan or a window; and see `convert_model`.
    """
    if isinstance(model, nn.Module):
        check_unwrapped(model)
    if type(model) is not LlamaForCausalLM:
        raise ValueError(f"`model` must have the weights of a LlamaForCausalLM, not of a {type(model).__name__}.")
    if conversion.plan is not None or conversion.window:
        raise ValueError("The paper's heads have no window and one sparsity: leave out `plan` and set `window=0`.")
    config = model.config
    if calibration is not None:
        calibration = calibration_ids(calibration, config)
    base_config = plain_config(config)
    candidates = candidate_plan(base_config, conversion)
    if fits is not None or calibration is not None:
        fits = fits_for(model, conversion, base_config, candidates, calibration, fits)
    plan = choose_groups(conversion, candidates, None if fits is None else mean_losses(candidates, fits))
    converted = plan.sparse_pairs()
    native = MosaForCausalLM.from_pretrained(
        None,
        config=_native_config(config, conversion, converted),
        state_dict=_state_dict(model, converted, candidates.sparse_pairs(), fits),
        dtype=model.dtype,
        attn_implementation=config._attn_implementation,
    )
    native.config.mosa_conversion = {"source": config.name_or_path, "groups": [list(pair) for pair in converted]}
    native.generation_config = copy.deepcopy(model.generation_config)
    native = native.to(model.device).eval()
    if calibration is not None:
        calibrate_thresholds(native, calibration.split(1))
    return native


def _native_config(config, conversion: ConversionConfig, converted: list[tuple[int, int]]) -> MosaConfig:
    """Layers may differ in how many of their groups are converted."""
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
        mosa_include_first=conversion.include_first,
        mosa_routing="threshold",
        mosa_router_bias=True,
        per_layer_config={layer: own for layer, own in heads.items() if own != usual} or None,
    )
    return MosaConfig(**fields)


@torch.inference_mode(False)  # weights made there could never learn
def _state_dict(
    model: LlamaForCausalLM,
    converted: list[tuple[int, int]],
    fitted: list[tuple[int, int]],
    fits: Sequence[RouterFit | None] | None,
) -> dict[str, torch.Tensor]:
    """The weights of the converted model, by name; copies, so that training one model leaves the other as it is."""
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_groups = model.config.num_key_value_heads
    assert num_groups is not None  # `LlamaConfig` fills it in
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
        gate = torch.tensor(GATE_BIAS, dtype=torch.float32).sigmoid().to(output)
        state_dict[f"{prefix}mosa.o_proj"] = output[mosa] / gate
        if dense:
            state_dict[f"{prefix}o_proj.weight"] = output[dense].transpose(0, 1).flatten(1)
        elif f"{prefix}o_proj.bias" in state_dict:
            state_dict[f"{prefix}mosa.o_bias"] = state_dict.pop(f"{prefix}o_proj.bias")

        weight = output.new_zeros(len(mosa), output.shape[1], dtype=torch.float32)
        if fits is not None:
            fit, own = fits[layer], [[group for i, group in fitted if i == layer].index(group) for group in mosa]
            assert fit is not None
            weight = fit.weight[own]
        state_dict[f"{prefix}mosa.router.weight"] = weight * GATE_SCALE
        state_dict[f"{prefix}mosa.router.bias"] = weight.new_full((len(mosa),), GATE_BIAS)
        state_dict[f"{prefix}mosa.router.threshold"] = weight.new_full((len(mosa),), GATE_BIAS)
    return state_dict
