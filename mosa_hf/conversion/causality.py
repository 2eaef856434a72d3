"""Whether a model around a decoder lets it read a text forwards alone, as sparse groups can."""

import inspect
from typing import Any, cast

import torch
from transformers.modeling_utils import PreTrainedModel

from ..modeling.configuration import is_composite
from ..modeling.devices import input_device
from ..modeling.modes import evaluating

NUM_TOKENS = 12


def check_reads_forwards(model: PreTrainedModel) -> None:
    """
    Args:
        model: the original. One without weights (on the meta device), or that needs a picture, is not asked: its
            decoder refuses masks that let tokens read later ones.

    Raises:
        ValueError: for a model around a decoder in which tokens of a text read later ones, as in prefix-LMs.
    """
    if not is_composite(model.config) or model.device.type == "meta":
        return
    given = inspect.signature(model.base_model.forward).parameters.values()
    if any(
        each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        for each in given
        if each.name != "input_ids"
    ):
        return  # it reads no text without a picture
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, NUM_TOKENS + 1, device=input_device(model))[None] * 7 % size
    with evaluating(model), torch.no_grad():
        read = cast(Any, model.base_model)
        whole, part = (read(input_ids=x, use_cache=False)[0] for x in (ids, ids[:, : NUM_TOKENS // 2]))
    own = whole[:, : part.shape[1]].float()
    if float((own - part.float()).norm(dim=-1).max() / own.norm(dim=-1).max()) > 0.1:  # rounding is far less
        raise ValueError(
            f"{type(model).__name__} cannot have sparse groups, which are causal: its tokens read later ones of the "
            "prompt (a prefix-LM)."
        )
