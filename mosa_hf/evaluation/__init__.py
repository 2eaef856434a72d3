"""What a model remembers of a long context, and what that takes: the part of `mosa-evaluate` that scripts may call."""

from .memory import CacheMemory, filled_cache
from .readings import fact_readings, text_readings
from .report import PERPLEXITY, Subject, evaluate, summary, table
from .scoring import Continuation, Reading, Score, following, score

__all__ = [
    "PERPLEXITY",
    "CacheMemory",
    "Continuation",
    "Reading",
    "Score",
    "Subject",
    "evaluate",
    "fact_readings",
    "filled_cache",
    "following",
    "score",
    "summary",
    "table",
    "text_readings",
]
