"""
What keys are stored without as 8-bit entries (docs/design.md, section 4): the key that a projection's bias makes of
nothing, averaged over positions. It changes no attention, and takes with it what a scale would be wasted on.
"""

import inspect
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from transformers.modeling_utils import PreTrainedModel

from ..kernels.capture import is_captured
from .devices import at_hand, execution_device
from .layers import function_of_family

NUM_POSITIONS = 1024  # that are averaged over, spread evenly over all that the model has


class MeanRotation(NamedTuple):
    """Cosines and sines `[1, 1, d]` of a decoder's rotary embedding, each averaged over positions."""

    cos: torch.Tensor
    sin: torch.Tensor


class HeldRotation(NamedTuple):
    """A mean rotation, and of which frequencies it is: they may be replaced (`model.to(dtype)`) or written to."""

    rotation: MeanRotation
    frequencies: torch.Tensor
    version: int

    def is_of(self, frequencies: torch.Tensor, device: torch.device) -> bool:
        is_same = self.frequencies is frequencies and self.version == version_of(frequencies)
        return is_same and self.rotation.cos.device == device


@torch.no_grad()
def mean_rotation(decoder: PreTrainedModel, tokens: torch.Tensor) -> MeanRotation | None:
    """Of a decoder on the device of `tokens`; None if it has no rotary embedding, or one of more than positions."""
    rotary: Any = getattr(decoder, "rotary_emb", None)
    frequencies: torch.Tensor | None = getattr(rotary, "inv_freq", None)
    if frequencies is None or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return None
    if getattr(rotary, "rope_type", None) in ("dynamic", "longrope"):  # which would take these for a call's positions
        return None
    held: HeldRotation | None = None if is_captured() else decoder.__dict__.get("_mean_rotation")
    if held is not None and held.is_of(frequencies, tokens.device):
        return held.rotation
    most: int | None = getattr(decoder.config, "max_position_embeddings", None)
    if most is None:
        return None
    positions = torch.arange(0, most, max(1, most // NUM_POSITIONS), device=tokens.device)[None]
    like = torch.empty(0, dtype=torch.float32, device=tokens.device)
    with torch.inference_mode(False):  # it is kept, and training may follow
        found = rotary(like, positions)
    if not isinstance(found, tuple):  # Llama 4's are complex numbers
        return None
    found = MeanRotation(*(each.mean(1, keepdim=True) for each in found))
    if not is_captured():
        decoder.__dict__["_mean_rotation"] = HeldRotation(found, frequencies, version_of(frequencies))
    return found


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def key_center(module: Any, rotation: MeanRotation | None, num_groups: int) -> torch.Tensor | None:
    """
    Of an attention module with `num_groups` key/value groups: `[G, 1, d]`. None without a bias of the keys alone, and
    where scores are not compared by their differences alone: under a softcap, or beside sinks.
    """
    projection: Any = getattr(module, "k_proj", None)
    bias = None if getattr(projection, "bias", None) is None else at_hand(projection, "bias")
    apply = rotary_function(cast(Hashable, type(module)))
    is_shifted = getattr(module, "sinks", None) is not None or getattr(module, "attn_logit_softcapping", None)
    if rotation is None or apply is None or is_shifted or not isinstance(bias, torch.Tensor) or bias.is_meta:
        return None
    if any(hasattr(module, name) for name in ("k_norm", "k_layernorm", "key_layernorm")):
        return None
    own = bias.to_local() if hasattr(bias, "to_local") else bias
    if projection.bias.is_meta:
        own = own.to(execution_device(projection))
    if own.numel() != num_groups * module.head_dim:
        return None
    key, rotary_dim = own.detach().float().view(1, num_groups, 1, -1), rotation.cos.shape[-1]
    turning = key[..., :rotary_dim]
    _, turned = apply(turning, turning, *(each.to(key.device) for each in rotation))
    return torch.cat((turned, key[..., rotary_dim:]), dim=-1)[0]


@lru_cache
def rotary_function(attention_class: Any) -> Callable | None:
    """What rotates the queries and keys of a family's attention, if it has the usual form."""
    function = function_of_family(attention_class, "apply_rotary_pos_emb")
    is_usual = function is not None and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]
    return function if is_usual else None
