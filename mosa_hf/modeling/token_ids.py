"""What token ids of a text have to be, before a model reads them."""

import torch


def check_token_ids(input_ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """
    Args:
        input_ids: of any shape.
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
