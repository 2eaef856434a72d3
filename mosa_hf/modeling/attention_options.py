"""Keyword arguments of a model call on their way to attention functions: which of them routed attention knows."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import TransformersKwargs, logging

from ..routing.layout import CallLayout
from ..routing.mask import POSSIBLE

logger = logging.get_logger(__name__)

# What Transformers' own attention functions take by name changes what they compute.
TAKEN = frozenset(
    name
    for function in (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)
# Of these, "mosa" knows what a family's own code passes.
KNOWN = frozenset(("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "softcap", "s_aux"))
# Implementations that compute what attention is, each in its way; and the beginnings of their names.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "mosa")
VARIANTS = ("flash_attention_", "paged|", "kernels-community/")
# What Transformers passes through attention to others, or says there again; `generate` lets all that stops it through.
PASSED_ON = frozenset(
    (*TransformersKwargs.__annotations__, "cache_position", "position_embeddings", "tokenizer", "assistant_tokenizer")
)


def check_options(options: Mapping[str, Any], known: frozenset[str] = frozenset()) -> None:
    """
    Args:
        options: keyword arguments.
        known: those that the caller computes with.

    Raises:
        ValueError: for an option that would change the scores of dense heads alone: routed attention does not know it.
            For fields of the config, which no call changes.
    """
    if fields := sorted(name for name in options if name.startswith("mosa_")):
        raise ValueError(
            f"`{'`, `'.join(fields)}`: no argument of a call. Fields of the config are set where a model is made: "
            f"`from_pretrained(..., {fields[0]}=...)`."
        )
    if options.get("is_causal") is False:
        raise ValueError(f"`is_causal` is False. {POSSIBLE}")
    for name, value in options.items():
        if value is None or name in PASSED_ON or name in known:
            continue
        # Of names that nobody knows, only what could be added to scores is suspected.
        could_count = (isinstance(value, torch.Tensor) and value.is_floating_point()) or callable(value)
        if (name in TAKEN and name != "is_causal") or could_count:
            raise ValueError(
                f"`{name}` would change attention scores, but routed attention does not know it: leave it out, or use "
                "the model without routing: `mosa_hf.to_dense(model)`."
            )


def warn_of_own_implementation(name: str) -> None:
    """Say so if dense heads call an attention function of the user's own, whose scores routed attention has not."""
    if name not in IMPLEMENTATIONS and not name.startswith(VARIANTS):
        logger.warning_once(
            f"`attn_implementation={name!r}` is a function of your own. Dense heads call it; routed attention has "
            "kernels of its own, and does not know what it changes."
        )


def check_sequence_lengths(options: Mapping[str, Any], layout: CallLayout) -> None:
    """
    Raises:
        ValueError: for `cu_seq_lens_q`, by which flash attention packs sequences, of others than the call's own.
    """
    starts = options.get("cu_seq_lens_q")
    if starts is None:
        return
    if layout.segment is None:
        own = [0]
    else:
        own = (layout.segment.diff(dim=1, prepend=layout.segment[:, :1] - 1) != 0).flatten().nonzero()[:, 0].tolist()
    if starts.tolist()[:-1] != own:
        raise ValueError(
            f"`cu_seq_lens_q` packs sequences that begin at {starts.tolist()[:-1]}, but by `position_ids` and "
            f"`attention_mask` they begin at {own}: pass `position_ids` that restart where they do, no mask, and "
            "`use_cache=False`."
        )
