"""What a model remembers of a long context, and what that takes: the part of `mosa-evaluate` that scripts may call."""

from .memory import CacheMemory, filled_cache
from .report import PERPLEXITY, Subject, evaluate, summary, table
from .samples import fact_samples, text_samples
from .scoring import Continuation, Sample, Score, following, score

__all__ = [
    "PERPLEXITY",
    "CacheMemory",
    "Continuation",
    "Sample",
    "Score",
    "Subject",
    "evaluate",
    "fact_samples",
    "filled_cache",
    "following",
    "score",
    "summary",
    "table",
    "text_samples",
]
