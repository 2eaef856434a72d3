"""Routers that KVzap (arXiv 2601.07891) published, linear ones and MLPs: they predict the same importance as ours."""

import json
import math
import os

import torch
from safetensors.torch import load_file
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..arguments import checked
from ..modeling.configuration import AS_CONVERTED
from ..modeling.family import family_of
from ..modeling.group_plan import GroupPlan, SparseGroup
from ..modeling.loading import check_router_value
from ..modeling.sparse_models import with_sparse_groups
from .convert import plain_config


@checked()
@torch.no_grad()
def load_kvzap(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    threshold: float,
    window: int = 128,
    sparsity: float = 4,
    include_first: bool = True,
) -> PreTrainedModel:
    """
    A model with sparse groups that shares the weights of `model` and keeps the tokens whose predicted log importance
    reaches `threshold`. KVzap's own code reads the prompt dense and masks what it drops; here the prompt is read as
    decoded tokens read, and what is dropped is in no memory.

    Args:
        model: that the predictor was trained for; every layer has global attention.
        directory: with `config.json` and `model.safetensors`, or its name on the Hub ("nvidia/KVzap-linear-...",
            "nvidia/KVzap-mlp-...").
        threshold: one for all groups. Theirs are between -6 (keeps more) and -3.
        window: recent tokens that are always read.
        sparsity: ρ as far as it is known: static caches have capacity for twice this share.
        include_first: select the first token in any case. KVzap leaves that to its predictor.

    Raises:
        OSError: if a file is missing.
        ValueError: for a predictor of another model, for tensors that are missing, of another shape or not finite, and
            for a `threshold` that is NaN.
    """
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number, got NaN.")
    config_file, weights_file = (cached_file(os.fspath(directory), name) for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME))
    assert config_file is not None and weights_file is not None  # else it has raised
    with open(config_file, encoding="utf-8") as file:
        settings = json.load(file)
    plain = plain_config(model.config)
    num_layers, num_groups = plain.num_hidden_layers, plain.num_groups
    shape = {"input_dim": plain.hidden_size, "output_dim": num_groups, "n_modules": num_layers}
    if wrong := [name for name, size in shape.items() if settings.get(name) != size]:
        raise ValueError(
            f"{directory} is of another model: `{wrong[0]}` is {settings.get(wrong[0])}, not {shape[wrong[0]]}."
        )
    plan = GroupPlan.uniform(num_layers, num_groups, SparseGroup(window, sparsity))
    plain.check_plan(plan)
    config = family_of(model.config.model_type).config_class.from_base(
        model.config,
        mosa_window=window,
        mosa_sparsity=sparsity,
        **AS_CONVERTED,
        mosa_include_first=include_first,
        mosa_router_hidden_size=settings.get("hidden_dim"),
        mosa_conversion={"source": model.config.name_or_path, "kvzap": str(directory), "threshold": threshold},
    )
    converted = with_sparse_groups(model, config).eval()
    tensors = load_file(weights_file)
    for layer, router in converted.mosa_routers().items():
        targets = {"weight": router.weight, "bias": router.threshold}
        if router.hidden_weight is not None:  # names of an `nn.Sequential`
            targets = {f"2.{name}": target for name, target in targets.items()}
            targets |= {"0.weight": router.hidden_weight, "0.bias": router.hidden_bias}
        for name, target in targets.items():
            tensor = tensors.get(f"layers.{layer}.{name}")
            if tensor is None or tensor.shape != target.shape:
                found = "no" if tensor is None else f"{list(tensor.shape)} as"
                raise ValueError(
                    f"{weights_file} has {found} layers.{layer}.{name}, which must be {list(target.shape)}."
                )
            check_router_value(weights_file, f"layers.{layer}.{name}", tensor)
            target.copy_(tensor)
        router.threshold.copy_(threshold - router.threshold)  # z + b >= t, and no bias to keep
    return converted
