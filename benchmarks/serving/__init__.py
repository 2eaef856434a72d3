"""Converted models in vLLM beside their original, at equal cache memory."""
