"""What an attention mask can say to attention that routes, and the refusal of everything else."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

HIDDEN = -1e4  # an additive mask hides a key by this or less: what models of BERT's time add

POSSIBLE = (
    "Routed attention is causal: a mask may hide padding (2-D `[batch, length]`, or 4-D as Transformers makes it) or "
    "keep packed sequences apart (4-D, block-diagonal and causal, for a prompt without cached tokens; `position_ids` "
    "that restart do the same, with `use_cache=False`). For other masks use the model without routing: "
    "`mosa_hf.to_dense(model)`."
)


class TokenMask(NamedTuple):
    """
    What a mask says of a call's tokens.

    Attributes:
        valid: `[B or 1, T]` bool, False on padding; None: no padding.
        segment: `[B or 1, T]` int64, of each token, how many real tokens its row has before its packed sequence; None:
            one sequence a row.
        seen: `[B or 1, S]` bool, `valid` of all tokens so far, this call's included; None: none of them is padding.
    """

    valid: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    seen: torch.Tensor | None = None


class NotCausal(ValueError):
    """A mask lets tokens read others than sparse groups can."""


def read_mask(
    attention_mask: Any,
    batch_size: int,
    num_tokens: int,
    past_length: int = 0,
    past_seen: torch.Tensor | None = None,
    is_cached: bool = False,
) -> TokenMask:
    """
    Args:
        attention_mask: as the user gave it: None, 2-D `[B, S]` (0 on padding), or 4-D `[B or 1, H or 1, T, S]` (bool,
            or float with 0 for keys that are read and large negative numbers for those that are not).
        batch_size, num_tokens: B and T of the call.
        past_length: tokens that are cached already.
        past_seen: `TokenMask.seen` of these.
        is_cached: whether there is a cache, whose masks may have columns for tokens to come.

    Raises:
        ValueError: for a mask of another shape, and for one that says anything else than which tokens are padding and
            which sequences are packed, or something else of the cached tokens than was said when they came.
    """
    if attention_mask is None:
        if past_seen is not None and not past_seen.all():
            raise ValueError(
                "The cache holds padded rows, whose padding it has not stored: pass the `attention_mask` of all "
                "tokens so far, cached ones included."
            )
        return TokenMask()
    length = past_length + num_tokens
    _check_shape(attention_mask, batch_size, num_tokens, length, is_cached)
    if attention_mask.ndim == 4:
        return _read_pairs(attention_mask, batch_size, num_tokens, past_length, past_seen)
    if attention_mask.shape[1] > length:
        attention_mask = attention_mask[:, :length]
    # Decoding steps with padding are kept as few operations as a look at their own column took.
    if (past_seen is None or not past_length) and attention_mask.all():
        return TokenMask()
    seen = attention_mask.to(torch.bool, copy=True)
    if past_length:
        _check_past(seen[:, :past_length], past_seen)
    valid = seen[:, past_length:] if past_length else seen
    all_valid = all(map(all, valid.tolist())) if num_tokens == 1 else bool(valid.all())
    return TokenMask(None if all_valid else valid, None, seen)


def columns_of_mask(
    attention_mask: Any, batch_size: int, num_tokens: int, past_length: torch.Tensor | int | None
) -> TokenMask:
    """
    As `read_mask` where nothing may depend on what the mask holds: in a graph, and on a device that nobody waits for.

    Args:
        attention_mask: `[B, columns]`, or None.
        batch_size, num_tokens: B and T of the call.
        past_length: where the call's tokens begin in a mask over a static cache; None: they are its last ones.

    Raises:
        ValueError: for any but a 2-D mask: what a 4-D one says has to be looked at.
    """
    if attention_mask is None:
        return TokenMask()
    _check_shape(attention_mask, batch_size, num_tokens, num_tokens, is_cached=True)
    if attention_mask.ndim != 2:
        raise ValueError(
            "A compiled or exported MoSA model, and one with a static cache on a GPU, takes 2-D masks alone, since it "
            "cannot look at what a 4-D mask says: pass `[batch, length]`."
        )
    if past_length is None:
        return TokenMask(attention_mask[:, -num_tokens:].bool())
    columns = past_length + torch.arange(num_tokens, device=attention_mask.device)
    return TokenMask(attention_mask.index_select(1, columns).bool())


def _check_shape(mask: Any, batch_size: int, num_tokens: int, length: int, is_cached: bool) -> None:
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`attention_mask` must be a tensor, not a {type(mask).__name__}. {POSSIBLE}")
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"`attention_mask` must be 2-D [batch, length] or 4-D [batch, 1, queries, keys], got {tuple(mask.shape)}."
        )
    if mask.shape[-1] < length:
        raise ValueError(
            f"`attention_mask` covers {mask.shape[-1]} tokens, fewer than the {length} that there are, cached ones "
            "included. If PEFT's prompt tuning generates from a padded batch, pass `use_cache=False`: it feeds its "
            "prompt again with every token."
        )
    if mask.shape[-1] > length and not is_cached:
        raise ValueError(f"`attention_mask` covers {mask.shape[-1]} tokens, but {length} are passed.")
    # Sizes are compared one by one: a compiler takes tuples of sizes that it does not know to differ.
    has_rows = mask.shape[0] == batch_size or (mask.ndim == 4 and mask.shape[0] == 1)
    if not has_rows or (mask.ndim == 4 and mask.shape[2] != num_tokens):
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, which does not fit {batch_size} rows of {num_tokens} "
            "tokens."
        )


def _check_past(seen: torch.Tensor, past_seen: torch.Tensor | None) -> None:
    """What a mask says of cached tokens `[B, S]` is what was said when they came."""
    if past_seen is None:
        is_same = bool(seen.all())
    else:
        if past_seen.shape[1] < seen.shape[1]:  # of what a graph has added since, nothing is known
            seen = seen[:, : past_seen.shape[1]]
        is_same = torch.equal(seen, past_seen)
    if not is_same:
        raise ValueError(
            "`attention_mask` hides tokens that are cached already, or shows some that were padding when they came. A "
            "cache of selected tokens cannot take that back: pass the mask that they came with, and then that of the "
            f"new tokens. {POSSIBLE}"
        )


def _read_pairs(
    mask: torch.Tensor, batch_size: int, num_tokens: int, past_length: int, past_seen: torch.Tensor | None
) -> TokenMask:
    """`read_mask` of a 4-D mask, maybe of one row for all. A token that does not read itself is padding."""
    visible = _visible(mask)  # [B, T, S]
    length = past_length + num_tokens
    own = visible[..., past_length:length]  # [B, T, T]
    valid = own.diagonal(dim1=1, dim2=2)  # [B, T]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=mask.device).tril()
    readable = causal & valid[:, None]  # [B, T, T], by a query if there is one sequence a row
    # A query that reads n tokens of its row's first m, itself the m-th, is in a sequence that starts behind m - n.
    start = (valid.cumsum(1) - (own & readable).sum(2)).masked_fill(~valid, 0).cummax(1).values
    segment = start if past_length == 0 and bool((start != 0).any()) else None
    expected = readable
    if segment is not None:
        expected = readable & (segment[:, :, None] == segment[:, None])

    past = visible.new_ones(len(visible), past_length) if past_seen is None else past_seen.to(visible.device)
    if past.shape[1] < past_length:  # of what a graph has added since, nothing is known but what is said now
        past = torch.cat((past, visible[:, -1, past.shape[1] : past_length].expand(len(past), -1)), dim=1)
    past, valid = past.expand(batch_size, -1), valid.expand(batch_size, -1)
    cached, rest = past[:, None].expand(-1, num_tokens, -1), readable.new_zeros(1, 1, 1)
    rest = rest.expand(batch_size, num_tokens, visible.shape[2] - length)  # columns of tokens to come

    def differs_from(pairs: torch.Tensor) -> torch.Tensor:
        return visible ^ torch.cat((cached, pairs.expand(batch_size, -1, -1), rest), dim=2)

    is_right = ~differs_from(expected).any(2)  # [B, T]
    # What padding reads counts for nothing, as long as it says nothing else of the tokens.
    is_idle = ~valid & (~(differs_from(readable) & visible).any(2) | visible.all(2))
    if not bool((is_right | is_idle).all()):
        raise NotCausal(f"`attention_mask` is 4-D and says more than can be honoured. {POSSIBLE}")
    all_valid = bool(valid.all())
    seen = None if past_seen is None and all_valid else torch.cat((past, valid), dim=1)
    return TokenMask(None if all_valid else valid, segment, seen)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """`[B, T, S]` bool of a 4-D mask: which keys a query reads, the same for all heads."""
    if mask.dtype == torch.bool:
        visible = mask
    elif mask.is_floating_point():
        visible = mask == 0
        if not bool((visible | (mask <= HIDDEN)).all()):
            raise ValueError(
                "`attention_mask` is 4-D and adds to scores: of a float mask, 0 keeps a key and a large negative "
                f"number (such as `torch.finfo(dtype).min`) hides it; other numbers are refused. {POSSIBLE}"
            )
    else:
        raise ValueError(f"`attention_mask` is 4-D of {mask.dtype}: make it bool, True for keys that are read.")
    if visible.shape[1] != 1 and bool((visible != visible[:, :1]).any()):
        raise ValueError(f"`attention_mask` differs by head. {POSSIBLE}")
    return visible[:, 0]


def added_to_scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of bools as eager attention adds it to scores; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def check_same_padding(
    masks: Mapping[str, Any], valid: torch.Tensor | None, num_tokens: int, past_length: int
) -> None:
    """
    Args:
        masks: by layer type. One of a sliding layer may cover the last tokens alone.
        valid: `TokenMask.valid` of the sparse layers' own.
        num_tokens: T of the call.
        past_length: tokens that a cache holds before it.

    Raises:
        ValueError: for a 4-D mask that says of other tokens of the call that they are padding.
    """
    for name, mask in masks.items():
        if name == "full_attention" or not isinstance(mask, torch.Tensor) or mask.ndim != 4:
            continue
        visible = _visible(mask)  # [B or 1, T, S]
        start = min(past_length, visible.shape[2] - num_tokens)
        own = visible[..., start : start + num_tokens].diagonal(dim1=1, dim2=2)
        if not bool((own == (True if valid is None else valid)).all()):
            raise ValueError(
                f"`attention_mask[{name!r}]` says of other tokens than 'full_attention' that they are padding: make "
                "both of one 2-D mask (`transformers.masking_utils.create_masks_for_generate`)."
            )
