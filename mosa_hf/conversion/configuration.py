"""What a conversion should produce."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from ..modeling.group_plan import GroupPlan, SparseGroup


@dataclass(frozen=True)
class ConversionConfig:
    """
    Which key/value groups of a pretrained model become sparse, and how (docs/design.md, section 6). Layers with a
    sliding window stay dense in any case.

    Args:
        sparsity: ρ: one token in ρ is selected, taken over all sparse groups. One threshold serves them all, so groups
            whose tokens matter more select more of them.
        window: tokens that a query reads in any case, itself included.
        groups: The `(layer, group)` pairs that become sparse; or their number, summed over layers: those that lose
            least on the calibration text are taken. None: all groups.
        include_first: always select the first token (`mosa_include_first`).
        plan: What each group becomes, or the path of a file that `GroupPlan.save` wrote. `sparsity`, `window` and
            `groups` are then left alone.

    Raises:
        FileNotFoundError: for a plan that does not exist.
        ValueError: naming the field.
    """

    sparsity: float = 8
    window: int = 512
    groups: int | tuple[tuple[int, int], ...] | None = None
    include_first: bool = True
    plan: GroupPlan | str | os.PathLike | None = None

    def __post_init__(self):
        if not isinstance(self.include_first, bool):
            raise ValueError(f"`include_first` must be True or False, got {self.include_first!r}.")
        if self.plan is not None:
            if not isinstance(self.plan, GroupPlan | str | os.PathLike):
                raise ValueError(
                    f"`plan` must be a `GroupPlan` or the path of one, got a {type(self.plan).__name__}: "
                    "`GroupPlan.from_list` reads lists."
                )
            unset = ConversionConfig()
            if given := [
                each for each in ("sparsity", "window", "groups") if getattr(self, each) != getattr(unset, each)
            ]:
                raise ValueError(f"`plan` says what every group is: leave out `{'`, `'.join(given)}`.")
            if not isinstance(self.plan, GroupPlan):
                object.__setattr__(self, "plan", GroupPlan.load(self.plan))
            return
        SparseGroup(window=self.window, sparsity=self.sparsity)
        if isinstance(self.groups, int) and not isinstance(self.groups, bool):
            if self.groups < 1:
                raise ValueError(f"`groups` must be at least 1, or None for all groups, got {self.groups}.")
        elif self.groups is not None:
            try:
                pairs = tuple(tuple(pair) for pair in cast(Iterable, self.groups))
            except TypeError as error:
                raise ValueError(f"`groups` must be a number or (layer, group) pairs, got {self.groups!r}.") from error
            if not pairs:
                raise ValueError("`groups` names no (layer, group) pair: leave it out for all groups.")
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"`groups` must be a number or (layer, group) pairs, got {self.groups!r}.")
            if len(set(pairs)) != len(pairs):
                raise ValueError("`groups` names a (layer, group) pair twice.")
            object.__setattr__(self, "groups", pairs)

    def selects(self) -> bool:
        """Whether anything is selected, so that routers are to be fitted on a text: not where every sparsity is 1."""
        if isinstance(self.plan, GroupPlan):
            return any(group.sparsity != 1 for group in self.plan.sparse().values())
        return self.sparsity != 1 or isinstance(self.groups, int)
