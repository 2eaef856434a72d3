"""What `mosa-trace` does, see `trace.py`."""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer

from ..api import load_routers
from ..atomic_write import check_replaceable
from ..conversion import read_text
from ..evaluation import trace_text
from ..modeling.token_ids import most_tokens
from .models import folders_of, is_adapter, load
from .options import TRACED_TOKENS, hub_of


def run(options: argparse.Namespace) -> None:
    """Trace the text of `options`, write the page, and say so."""
    check_replaceable(Path(options.html))
    hub = hub_of(options)
    text = read_text(options.text)  # before a model is loaded
    used = folders_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(used[-1], **hub)
    model = load(used[-1], options, options.revision)
    if options.routers is not None:
        model, used = load_routers(model, options.routers, token=options.token), [options.routers, *used]
    if is_adapter(used[0]):
        model = PeftModel.from_pretrained(model, used[0]).merge_and_unload()
    tokens = min(TRACED_TOKENS, most_tokens(model.config)) if options.tokens is None else options.tokens
    traced = trace_text(model, tokenizer, text.as_string(tokenizer), int(tokens))
    traced.save(options.html)
    last = len(traced.pieces) - 1
    share = traced.in_cache(last)[:, : last + 1].float().mean()
    print(f"After {last + 1:,} tokens, {len(traced.groups)} sparse groups hold {share:.1%} of what they have read.")
    print(f"Wrote {options.html}: open it in a browser.")
