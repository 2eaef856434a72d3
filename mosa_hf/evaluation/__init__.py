"""
What a model remembers of a long context, and what that takes: the parts of `mosa-evaluate` and `mosa-trace` that
scripts may call.
"""

from .memory import CacheMemory, decoding_bytes, filled_cache
from .report import PERPLEXITY, Subject, evaluate, summary, table
from .samples import fact_samples, text_samples
from .scoring import Continuation, Sample, Score, following, score
from .tracing import TracedGroup, TracedText, trace_text

__all__ = [
    "PERPLEXITY",
    "CacheMemory",
    "Continuation",
    "Sample",
    "Score",
    "Subject",
    "TracedGroup",
    "TracedText",
    "decoding_bytes",
    "evaluate",
    "fact_samples",
    "filled_cache",
    "following",
    "score",
    "summary",
    "table",
    "text_samples",
    "trace_text",
]
