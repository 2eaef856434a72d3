"""Which tokens the groups select, what a budget evicts of them, and how a call's tokens stand in their sequences."""

from .budget import evicted_at, within_budget
from .layout import CallLayout
from .mask import TokenMask, columns_of_mask, read_mask
from .selection import select_by_expert_choice, select_by_threshold

__all__ = [
    "CallLayout",
    "TokenMask",
    "columns_of_mask",
    "evicted_at",
    "read_mask",
    "select_by_expert_choice",
    "select_by_threshold",
    "within_budget",
]
