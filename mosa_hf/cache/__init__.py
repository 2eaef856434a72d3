"""
The sparse KV cache (docs/design.md, section 4): real memory, not a mask. What no group selected, and has left the
window, is in no tensor.
"""

from .bytes import cache_bytes
from .layer import (
    CacheInForward,
    GroupSet,
    Routed,
    SparseLayer,
    SparseSpec,
    check_lengths,
    has_budget,
    is_upgraded,
    made_for,
    note_seen,
    num_cached_tokens,
    num_overflowed,
    seen_tokens,
    static_length,
    upgrade_cache,
    upstream_class,
)
from .states import set_store_state, states_below, store_state

__all__ = [
    "CacheInForward",
    "GroupSet",
    "Routed",
    "SparseLayer",
    "SparseSpec",
    "cache_bytes",
    "check_lengths",
    "has_budget",
    "is_upgraded",
    "made_for",
    "note_seen",
    "num_cached_tokens",
    "num_overflowed",
    "seen_tokens",
    "set_store_state",
    "states_below",
    "static_length",
    "store_state",
    "upgrade_cache",
    "upstream_class",
]
