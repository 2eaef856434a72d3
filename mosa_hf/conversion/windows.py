"""A text as windows of tokens: what routers are fitted on, and what healing learns from."""

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """
    All windows of `length` tokens of a text, one after the other: token ids `[N, T]`. What is left at the end is
    dropped.

    Raises:
        ValueError: for a text of less than one window, or a window of no token.
    """
    if length < 1:
        raise ValueError(f"`window_length` must be at least 1, got {length}.")
    input_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(input_ids) < length:
        raise ValueError(
            f"The text has {len(input_ids)} tokens, fewer than one window of {length}: give more text, or set a "
            "smaller `window_length`."
        )
    return cut(input_ids, length)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, num_windows: int = 12, window_length: int = 1024
) -> torch.Tensor:
    """
    At most `num_windows` windows of `window_length` tokens, spread evenly over `text`: token ids `[N, T]`.

    Raises:
        ValueError: if the text is shorter than one window, and for numbers below 1.
    """
    if num_windows < 1:
        raise ValueError(f"`num_windows` must be at least 1, got {num_windows}.")
    return spread(token_windows(tokenizer, text, window_length), num_windows)


def cut(input_ids: torch.Tensor, length: int) -> torch.Tensor:
    """`input_ids` [T] as windows `[N, length]`, without what is left at the end."""
    return input_ids[: len(input_ids) // length * length].view(-1, length)


def spread(windows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of `windows` [N, T], spread evenly over them."""
    return windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]
