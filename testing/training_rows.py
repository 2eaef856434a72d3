"""Rows of tokens, as `Trainer` reads them."""

import torch


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch to learn from of rows of a `TensorDataset`."""
    input_ids = torch.stack([row[0] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}
