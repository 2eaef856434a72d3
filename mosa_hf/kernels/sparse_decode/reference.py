"""The specification of a decoding step: one query a row and head reads a whole range of a cache."""

import torch

from ..attend import attend
from ..entries import PackedKeyValues


def sparse_decode(
    query: torch.Tensor,
    packed: PackedKeyValues,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention of one token a row.

    Args:
        query: `[B, G, R, d]`, rotated.
        packed: what each row and group reads, all of it: the token's own key included, nothing that it must not read.
            `packed.evicted_at` is None.
        scale, softcap, sinks: as in `sparse_attention`.

    Returns:
        `[B, G, R, d]`; zero where a range is empty.
    """
    keys = packed.pad()
    if keys is None:
        return query.new_zeros(*query.shape[:-1], packed.value.shape[-1])
    assert keys.valid is not None  # `pad` spells it out
    mask = keys.valid[:, :, None]  # [B, G, 1, S]
    return attend(query[:, :, :, None], keys.key, keys.value, mask, None, scale, softcap, sinks)[:, :, :, 0]
