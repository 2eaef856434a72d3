"""Which tokens the groups select, what a budget evicts of them, and how a call's tokens stand in their sequences."""

from .budget import evicted_at, within_budget
from .layout import CallLayout, valid_tokens
from .selection import select_by_expert_choice, select_by_threshold

__all__ = [
    "CallLayout",
    "evicted_at",
    "select_by_expert_choice",
    "select_by_threshold",
    "valid_tokens",
    "within_budget",
]
