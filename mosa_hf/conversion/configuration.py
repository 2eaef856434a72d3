"""What a conversion should produce."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConversionConfig:
    """
    How to convert a pretrained model's key/value groups to MoSA groups (DESIGN section 6).

    Args:
        num_groups: How many of the model's key/value groups (summed over layers) to convert; None: all of them. Those
            that lose least attention on the calibration text are taken.
        sparsity: ρ of the converted groups (`mosa_sparsity`).
        query_tokens: Form of the converted heads (`mosa_query_tokens`). "all" keeps a pretrained model working;
            "selected" needs healing.
        window: `mosa_window` of the converted heads; must be 0 for form "selected".
        include_first: `mosa_include_first`.
        groups: Convert exactly these `(layer, group)` pairs instead of ranking.

    Raises:
        ValueError: naming the offending field.
    """

    num_groups: int | None = None
    sparsity: float = 8
    query_tokens: Literal["all", "selected"] = "all"
    window: int = 64
    include_first: bool = True
    groups: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self):
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"`num_groups` must be at least 1, or None for all groups, got {self.num_groups}.")
        if self.groups is not None and self.num_groups is not None:
            raise ValueError("`groups` and `num_groups` exclude each other: give the pairs or their number.")
        if self.groups is not None and len(set(self.groups)) != len(self.groups):
            raise ValueError("`groups` names a (layer, group) pair twice.")
        if self.sparsity < 1:
            raise ValueError(f"`sparsity` must be at least 1 (select every token), got {self.sparsity}.")
        if self.query_tokens not in ("all", "selected"):
            raise ValueError(f"`query_tokens` must be 'all' or 'selected', got {self.query_tokens!r}.")
        if self.window < 0 or (self.window and self.query_tokens == "selected"):
            raise ValueError(
                f"`window` must be 0 or more, and 0 for `query_tokens='selected'`; got {self.window} for "
                f"{self.query_tokens!r}."
            )
