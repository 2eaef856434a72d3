"""How the tokens of a model call stand in their sequences: padding, packing, positions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import find_packed_sequence_indices

from ..kernels.capture import is_captured
from .mask import TokenMask


@dataclass
class CallLayout:
    """
    How the tokens of one model call stand in their sequences, in a form that does not depend on padding. The layers
    share it.

    Attributes:
        position: `[B, T]` int64, the number of real tokens before a token in its row, cached ones included.
        valid: `[B, T]` bool, False on padding; None without padding.
        segment: `[B, T]` int64, packed sequences; None for one sequence a row.
        first: `[B, T]` bool, the first token of each sequence; None if it is known that none is among these.
        order, inverse: `[B, T]` int64, the permutation that moves a row's padding to its left, and back. None where
            padding already is on the left.
        num_tokens: `[B]` int64, the real tokens of a row, cached ones and these; None: not counted.
        copies: on other devices.
    """

    position: torch.Tensor
    valid: torch.Tensor | None
    segment: torch.Tensor | None
    first: torch.Tensor | None
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    num_tokens: torch.Tensor | None = None
    copies: dict[torch.device, "CallLayout"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        inputs_embeds: torch.Tensor,
        mask: TokenMask,
        position_ids: torch.Tensor,
        num_cached_tokens: torch.Tensor | None,
        may_be_packed: bool,
        may_look: bool = True,
        may_begin: bool = True,
        counts: bool = False,
    ) -> "CallLayout":
        """
        Args:
            inputs_embeds: `[B, T, D]`, for its shape and device.
            mask: what the user's mask says of the call's tokens.
            position_ids: `[B or 1, T]`; a restart marks a packed sequence if `may_be_packed`.
            num_cached_tokens: `[B]` int64, real tokens that the cache has seen; None for no cache or an empty one.
            may_be_packed: Transformers' rule: neither a mask nor a cache was given.
            may_look: whether what is done may depend on data.
            may_begin: whether the first token of a sequence may be among these.
            counts: whether `num_tokens` is asked for, once for all layers of a cache.
        """
        batch_size, num_tokens = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        valid, segment = (x if x is None else x.to(device).expand(batch_size, -1) for x in (mask.valid, mask.segment))
        order = inverse = None
        if valid is None:
            position = torch.arange(num_tokens, device=device).expand(batch_size, -1)
        else:
            position = (valid.long().cumsum(1) - 1).clamp(min=0)
            # A GPU is waited for once a call, lest every layer moves all that it reads.
            if num_tokens > 1 and (not may_look or bool((valid[:, :-1] & ~valid[:, 1:]).any())):
                order, inverse = padding_first(valid)

        first: torch.Tensor | None
        if not may_begin:
            first = None
        elif segment is not None:
            first = position == segment
        elif may_be_packed:
            segment = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
            first = position == 0 if segment is None else segment.diff(dim=1, prepend=segment[:, :1] - 1) != 0
        else:
            first = position == 0
        if num_cached_tokens is not None:
            num_cached_tokens = num_cached_tokens.to(device, copy=True)[:, None]  # a cache counts on
            position = position + num_cached_tokens
            first = None if first is None else first & (num_cached_tokens == 0)
        if first is not None and valid is not None:
            first = first & valid
        total: torch.Tensor | None = None
        if counts:
            total = torch.full((batch_size,), num_tokens, device=device) if valid is None else valid.sum(1)
            total = total if num_cached_tokens is None else total + num_cached_tokens[:, 0]
        looks = num_tokens == 1 and device.type == "cpu" and not is_captured()
        if first is not None and looks and not first.any():
            first = None  # nothing for every layer's router to look at
        return cls(position, valid, segment, first, order, inverse, total)

    def to(self, device: torch.device) -> "CallLayout":
        """This layout on the device of a layer; it is copied there once."""
        if self.position.device == device:
            return self
        if device not in self.copies:
            states = {name: x for name, x in vars(self).items() if name != "copies"}
            moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in states.items()}
            self.copies[device] = CallLayout(**moved)
        return self.copies[device]

    def pad_left(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """`states` `[B, ..., T, ...]`, T at `dim`, with each row's padding moved to its left."""
        return states if self.order is None else _move(states, self.order, dim)

    def pad_back(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """What `pad_left` moved, where it was."""
        return states if self.inverse is None else _move(states, self.inverse, dim)


def _move(states: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """Reorder the tokens of `states` [B, ..., T, ...], T at `dim`, by `order` [B, T]."""
    shape = [1] * states.ndim
    shape[0], shape[dim] = order.shape
    return states.gather(dim, order.view(shape).expand(*states.shape))


def padding_first(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The permutation of each row of `valid` [B, T] bool that brings what is False to its left and changes nothing else,
    and the one that takes it back: `[B, T]` int64. A stable sort, which not all targets of an export have.
    """
    valid = valid.long()  # not all of them add up booleans either
    num_padding = (1 - valid).cumsum(1)
    inverse = torch.where(valid == 1, num_padding[:, -1:] + valid.cumsum(1), num_padding) - 1
    slot = torch.arange(valid.shape[1], device=valid.device).expand_as(inverse)
    return torch.zeros_like(inverse).scatter(1, inverse, slot), inverse
