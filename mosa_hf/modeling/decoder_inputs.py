"""What the decoder of a model of pictures and text is given, once what is around it has looked at the pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .configuration import is_composite
from .devices import input_device
from .layers import decoder_of

# Of what a processor makes, what a decoder reads by itself, and which tokens are of a picture; what a collator adds.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


class _Recorded(Exception):
    """The decoder has been called, and nobody wants its output."""


def has_pictures(inputs: Any) -> bool:
    """Whether these are a model's inputs with more than text: a mapping, such as a processor makes."""
    return isinstance(inputs, Mapping) and any(inputs[name] is not None for name in inputs if name not in OF_TEXT)


@torch.no_grad()
def decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The keyword arguments of the decoder's call, without cache: embeddings of tokens and pictures, positions, and what
    else a family hands on.

    Args:
        model: around a decoder, converted or not.
        inputs: of one row, as its processor makes them.

    Raises:
        ValueError: for a model that takes no pictures, for several rows, for padding, and for masks by which a picture
            is read both ways.
    """
    if not is_composite(model.config):
        raise ValueError(
            f"There is {', '.join(name for name in inputs if name not in OF_TEXT)}, but {type(model).__name__} reads "
            "text alone: pass `input_ids` and `attention_mask`."
        )
    device, decoder, found = input_device(model), decoder_of(model), dict[str, Any]()
    own = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if len(own["input_ids"]) != 1:
        raise ValueError(f"`input_ids` has {len(own['input_ids'])} rows: pass what the processor makes one by one.")

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)
        raise _Recorded

    hook = decoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model.base_model(**own, use_cache=False)
    except _Recorded:
        pass
    finally:
        hook.remove()
    masks = found.pop("attention_mask", None)
    if not all(map(_is_causal, masks.values() if isinstance(masks, Mapping) else [masks])):
        raise ValueError(
            f"{type(model).__name__} reads a picture both ways in some of its layers, of which routers cannot learn: "
            "calibrate on text."
        )
    if own.get("attention_mask") is not None and not bool(own["attention_mask"].all()):
        raise ValueError("`attention_mask` hides padding: pass what the processor makes one by one, without padding.")
    for name in ("cache", "past_key_values", "use_cache", "return_dict"):
        found.pop(name, None)
    return found | {"attention_mask": torch.ones_like(own["input_ids"])}  # or positions might say what is packed


def _is_causal(mask: torch.Tensor | None) -> bool:
    """Whether no token reads a later one, by a mask as a decoder is given it."""
    if mask is None or mask.ndim != 4:
        return True
    visible = mask if mask.dtype == torch.bool else mask == 0
    return not bool(visible.triu(1).any())


def continued(inputs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """`decoder_inputs` of the same text and pictures read once more, behind `num_tokens` tokens of them."""
    if (mask := inputs.get("attention_mask")) is not None:
        inputs = {**inputs, "attention_mask": mask.new_ones(len(mask), num_tokens + mask.shape[1])}
    position_ids = inputs.get("position_ids")
    if position_ids is None:  # the decoder counts
        return inputs
    behind = position_ids.clone()
    if position_ids.ndim == 3 and len(position_ids) == 4:  # of text, which counts tokens; and of pictures
        behind[0] += num_tokens
        behind[1:] += position_ids[1:].max() + 1
    else:
        behind += position_ids.max() + 1
    return {**inputs, "position_ids": behind}
