"""Converted models in vLLM beside their original, at equal cache memory."""

MARK = "MEASURED "  # before what an engine's process says to the one that started it
