"""
The sparse KV cache (docs/design.md, section 4): real memory, not a mask. What no group selected, and has left the
window, is in no tensor.
"""

from .bytes import cache_bytes
from .layer import (
    GroupSet,
    Routed,
    SparseLayer,
    SparseSpec,
    is_upgraded,
    num_cached_tokens,
    num_overflowed,
    upgrade_cache,
)

__all__ = [
    "GroupSet",
    "Routed",
    "SparseLayer",
    "SparseSpec",
    "cache_bytes",
    "is_upgraded",
    "num_cached_tokens",
    "num_overflowed",
    "upgrade_cache",
]
