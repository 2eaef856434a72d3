"""What `mosa-trace` does."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..evaluation import TracedText, trace_text
from ..modeling.router_files import load_routers


def run(options: argparse.Namespace) -> TracedText:
    """
    Trace the text of `options`, as `mosa_hf.cli.trace` reads them, and write the page.

    Raises:
        OSError, ValueError: for files that cannot be read, and as `trace_text` does.
    """
    text = options.text.read_text(encoding="utf-8")  # before a model is loaded
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, device_map="auto").eval()
    if options.routers is not None:
        model = load_routers(model, options.routers)
    traced = trace_text(model, tokenizer, text, options.tokens)
    traced.save(options.html)
    return traced
