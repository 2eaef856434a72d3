"""
Converted models in vLLM: a plugin that vLLM finds by its entry point (docs/serving.md). Nothing else of this package
imports it, and it imports vLLM only where vLLM has loaded it.
"""
