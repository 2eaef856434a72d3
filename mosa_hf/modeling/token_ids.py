"""What token ids of a text have to be, before a model reads them."""

import math

import torch
from transformers.configuration_utils import PreTrainedConfig


def check_token_ids(input_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """
    Args:
        input_ids: of any shape.
        vocab_size: of the model.
        name: of the argument that they were given as.

    Raises:
        ValueError: for numbers that are no token ids of a vocabulary of `vocab_size`.
    """
    if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
        raise ValueError(f"`{name}` has dtype {input_ids.dtype}; pass token ids, which are integers (torch.long).")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(
            f"`{name}` has token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the vocabulary of the "
            f"model has {vocab_size}: make them with the model's own tokenizer, without -100 for what is no token."
        )


def check_no_padding(input_ids: torch.Tensor, pad_token_id: int | None, name: str) -> None:
    """
    Args:
        input_ids: `[N, T]`, without an attention mask.
        pad_token_id: of the model, if that is no token of texts (an end of text may be one).
        name: of the argument that they were given as.

    Raises:
        ValueError: for rows that begin or end with several padding tokens, which would be calibrated on as text.
    """
    if pad_token_id is None or input_ids.ndim != 2 or input_ids.shape[1] < 3:
        return
    is_pad = input_ids == pad_token_id
    if bool((is_pad[:, :2].all(1) | is_pad[:, -2:].all(1)).any()):
        raise ValueError(
            f"`{name}` has rows that begin or end with the padding token ({pad_token_id}), which would count as text: "
            "pass a list of the token ids of each document, without padding."
        )


def most_tokens(config: PreTrainedConfig) -> float:
    """How many tokens a model with `config`, or the language model in it, reads at most; inf: any number."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def check_num_tokens(
    num_tokens: int, config: PreTrainedConfig, what: str, remedy: str, model: str = "The model"
) -> None:
    """
    Args:
        num_tokens: that are read at once.
        config: of the model that reads them.
        what: has so many.
        remedy: what to do about it.
        model: what it is called.

    Raises:
        ValueError: for more tokens than the model has positions for.
    """
    if num_tokens > (most := most_tokens(config)):
        raise ValueError(
            f"{model} reads at most {most} tokens (`max_position_embeddings`), fewer than the {num_tokens} of {what}: "
            f"{remedy}."
        )


def padding_token(config: PreTrainedConfig) -> int | None:
    """The token that can only be padding; None if there is none, or it may also end a text."""
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    return None if pad is None or pad in (ends if isinstance(ends, list) else [ends]) else pad
