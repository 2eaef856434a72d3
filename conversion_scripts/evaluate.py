"""
What a model remembers of long contexts, and what that takes, beside its original. Also installed as `mosa-evaluate`.

    mosa-evaluate converted --text a.txt b.txt --facts 2 --output results.json

Of each text, slices are read: a context, and the tokens after it, whose perplexity is measured. Facts are five-digit
codes and a list of made-up words, hidden in a context and asked for. Bytes are those of the cache's live tensors after
all of it. Without --original, a converted model is compared with its own weights, all groups dense.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mosa_hf
from mosa_hf import load_routers, to_dense
from mosa_hf.evaluation import Subject, evaluate, fact_samples, table, text_samples
from mosa_hf.modeling.sparse_models import SparsePreTrainedMixin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory, or name on the Hub; with --routers the base model's")
    parser.add_argument("--routers", metavar="DIRECTORY", help="`save_routers`' or `mosa-heal`'s, with its adapter")
    parser.add_argument("--original", metavar="MODEL", help="what is compared with (default: see above)")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--context", type=int, default=3072, help="tokens read first (default: %(default)s)")
    parser.add_argument("--scored", type=int, default=512, help="tokens scored after them (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=4, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--facts", type=int, default=0, metavar="N", help="contexts with facts, of either kind, in the first text"
    )
    parser.add_argument("--dtype", default="auto", help="that models compute in (default: their own)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON to write; the same command goes on from it if interrupted"
    )
    options = parser.parse_args(arguments)
    try:
        print(table(run(options)["rows"]))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mosa-evaluate: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        is_kept = options.output is not None and options.output.exists()
        kept = f" {options.output} has what was measured: the same command goes on from it." if is_kept else ""
        print(f"Stopped.{kept}", file=sys.stderr)
        sys.exit(130)


def run(options: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folders_of(options.model)[-1])
    texts = {path.name: path.read_text(encoding="utf-8") for path in options.text}
    if len(texts) < len(options.text):
        raise ValueError("Two texts have one file name, which the table tells them by: rename one.")
    samples = []
    for name, text in texts.items():
        samples += text_samples(tokenizer, name, text, options.context, options.scored, options.slices)
    if options.facts:
        samples += fact_samples(tokenizer, next(iter(texts.values())), options.context, options.facts)
    settings = {**vars(options), "text": list(texts)}
    del settings["output"]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {each.__name__: each.__version__ for each in (mosa_hf, transformers, torch)},
        "settings": settings,
    }
    return evaluate(subjects(options), samples, options.output, about)


def subjects(options: argparse.Namespace) -> list[Subject]:
    """What the model is compared with, if anything, and the model."""
    used = folders_of(options.model)
    base, original = load(used[-1], options.dtype), None
    model = base if options.routers is None else load_routers(base, options.routers)
    if options.original is not None:
        original = Subject("original", load(options.original, options.dtype), identity([options.original]))
    elif options.routers is not None:
        original = Subject("original", base, identity(used))
    elif isinstance(model, SparsePreTrainedMixin):
        original = Subject("its weights, dense", to_dense(model), identity(used))
    if options.routers is not None:
        used = [options.routers, *used]
    if is_adapter(used[0]):
        model = PeftModel.from_pretrained(model, used[0])
    own = Subject(Path(used[0]).name, model.eval(), identity(used))
    return [own] if original is None else [original, own]


def load(name: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map="auto").eval()


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_NAME).is_file()


def folders_of(name: str) -> list[str]:
    """A model's directory, or name on the Hub; before it an adapter's, if that is what `name` is."""
    if is_adapter(name):
        return [name, PeftConfig.from_pretrained(name).base_model_name_or_path]
    return [name]


def identity(folders: list[str]) -> str:
    """What tells the files of directories from others, without reading them; of names on the Hub, the names."""
    files = [
        [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
        for folder in map(Path, folders)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(json.dumps([*folders, *files]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
