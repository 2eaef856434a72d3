"""
How much a text's tokens matter when it is read again: what routers are fitted to predict. It is the importance of
KVzip+ (arXiv 2505.23416, normalised as in arXiv 2601.07891).

The second reading's weights come from the family's own eager attention. It is asked about a few queries at a time, and
what is kept of their weights is the strongest of each key: all weights of a layer at once would be by far the largest
tensors of a conversion.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..modeling.attention import eager_attention_of

NAME = "mosa_second_reading"  # of the attention function, while a text is read again
# Weights of a layer that are there at once. Tensors of more than 32 MB would be given back to the system and asked for
# again by every operation, which takes longer than what is done with them.
MOST_WEIGHTS = 1 << 21


class SecondReading:
    """
    What an attention module sees of a text that is read again.

    Attributes:
        size: `[T]` float32, ‖h_i‖ of what it receives; inf where that is 0.
        strongest: `[H, S]` float32, the largest a_ij / ‖h_i‖ of each head and key, over the queries so far.
    """

    size: torch.Tensor
    strongest: torch.Tensor

    def begin(self, hidden_states: torch.Tensor) -> None:
        """`[1, T, D]`, what the module receives."""
        size = hidden_states[0].float().norm(dim=-1)
        self.size = size.masked_fill(size == 0, torch.inf)  # padding's embedding: there is nothing to be relative to

    def see(self, weights: torch.Tensor, first: int) -> None:
        """`[1, H, Q, S]`, of the queries from the `first` on."""
        size = self.size[first : first + weights.shape[2], None]
        strongest = (weights[0] / size).amax(1)
        self.strongest = strongest if first == 0 else self.strongest.maximum(strongest)

    def importance(self, value: torch.Tensor, output_gram: torch.Tensor) -> torch.Tensor:
        """
        The largest a_ij · ‖W_O v_j‖ / ‖h_i‖ over the queries i and the heads of a group, of the first T keys j.

        Args:
            value: `[G, T, d]`.
            output_gram: `[G, R, d, d]`, W_O of each head times its transpose.

        Returns:
            `[T, G]` float32.
        """
        value = value.float()
        squared = torch.einsum("gtd,grde,gte->grt", value, output_gram, value)  # ‖W_O v‖²
        strongest = self.strongest[:, : value.shape[1]].unflatten(0, squared.shape[:2])
        return (strongest * squared.clamp_min(0).sqrt()).amax(1).T


def output_gram(projection: nn.Module, num_heads: int, head_dim: int, like: torch.Tensor) -> torch.Tensor:
    """
    W_O times its transpose for each head, `[H, d, d]` float32, of an output projection of whatever kind: it is asked
    for what it makes of unit vectors, on the device and in the dtype of `like`.
    """
    size = num_heads * head_dim
    weight = projection(torch.eye(size, dtype=like.dtype, device=like.device)[None])[0]
    if getattr(projection, "bias", None) is not None:
        weight = weight - projection(like.new_zeros(1, 1, size))[0]
    heads = weight.float().unflatten(0, (num_heads, head_dim))  # [H, d, D]
    return heads @ heads.transpose(1, 2)


@contextmanager
def second_readings(decoder: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[list[SecondReading]]:
    """
    What attention modules of a decoder see of a text that is read meanwhile, of a single row.

    Raises:
        ValueError: for a module whose family has no eager attention, which alone gives weights.
    """
    readings = [SecondReading() for _ in modules]
    for module in modules:
        eager_attention_of(module)
    implementation = decoder.config._attn_implementation
    for module, reading in zip(modules, readings, strict=True):
        setattr(module, NAME, reading)
    try:
        decoder.set_attn_implementation(NAME)
        with received(modules, lambda index, hidden_states: readings[index].begin(hidden_states)):
            yield readings
    finally:
        decoder.set_attn_implementation(implementation)
        for module in modules:
            delattr(module, NAME)


@contextmanager
def received(modules: Sequence[nn.Module], function: Callable[[int, torch.Tensor], Any]) -> Iterator[None]:
    """Call `function` with the index of an attention module and what it receives `[B, T, D]`, before it runs."""

    def hook(index):
        def call(module, args, kwargs):
            function(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return call

    handles = [module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def second_reading_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, None]:
    """
    The family's eager attention, block by block of queries; the module's `SecondReading` sees the weights.

    Args:
        module: the attention module.
        query: `[1, H, T, d]`.
        key, value: `[1, G, S, d]`.
        attention_mask: `[1, 1 or H, T, S]`, added to scores.
        options: of the family's eager attention function.

    Returns:
        output `[1, T, H, d]`, and no weights.
    """
    eager, reading = eager_attention_of(module), getattr(module, NAME, None)
    size = max(MOST_WEIGHTS // (query.shape[1] * key.shape[2]), 1)
    outputs = []
    for first in range(0, query.shape[2], size):
        block = slice(first, first + size)
        mask = None if attention_mask is None else attention_mask[:, :, block]
        output, weights = eager(module, query[:, :, block], key, value, mask, **options)
        outputs.append(output)
        if reading is not None:
            reading.see(weights, first)
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, second_reading_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
