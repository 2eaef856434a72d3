"""What `mosa-evaluate` does, see `evaluate.py`."""

import argparse
import datetime
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file, extract_commit_hash

import mosa_hf

from ..api import load_routers, to_dense
from ..atomic_write import atomic_file, check_replaceable
from ..conversion import read_text
from ..conversion.sources import CARD_NAME
from ..evaluation import Subject, evaluate, fact_samples, table, text_samples
from ..modeling.model_card import with_measured
from ..modeling.router_files import ROUTERS_CONFIG_NAME
from ..modeling.sparse_models import SparsePreTrainedMixin
from .models import folders_of, is_adapter, load
from .options import hub_of

MODELS = ("model", "routers", "original", "revision")  # options that say which models are measured


def run(options: argparse.Namespace) -> None:
    # What is wrong with the files to write is said before the long work.
    card = Path(options.routers or options.model) / CARD_NAME
    if options.card and not card.is_file():
        raise FileNotFoundError(f"`--card` writes into the model card of a folder, but there is no {card}.")
    text = with_measured(card.read_text(encoding="utf-8"), "") if options.card else ""
    for file in (options.output, card if options.card else None):
        if file is not None:
            check_replaceable(file)
    if options.output is not None:
        check_same_models(options)
    result = measured(options)
    print(table(result["rows"]))
    if options.card:
        with atomic_file(card) as unfinished:
            unfinished.write_text(with_measured(text, in_words(result)), encoding="utf-8")
        print(f"Wrote it into {card}.")


def check_same_models(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for an output that has the rows of other models, which would be lost.
    """
    if not options.output.exists():
        return
    try:
        content = json.loads(options.output.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or "scores" not in content:
        return  # it is no file of an evaluation, as `evaluate` will say
    known = content.get("settings") or {}  # none in what Python wrote
    if changed := [name for name in MODELS if known.get(name) != getattr(options, name)]:
        raise ValueError(
            f"{options.output} is of an evaluation with another `{'`, `'.join(changed)}`: choose another `output`, or "
            "remove this one."
        )


def in_words(result: dict[str, Any]) -> str:
    """For a model card: the table, and how it was measured."""
    settings, versions = result["settings"], result["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{table(result['rows'])}\n\n`mosa-evaluate`, {result['date']}: {settings['slices']} slices of each text, "
        f"{settings['scored']} tokens scored after {settings['context']};\n{settings['dtype']} dtype, {used}.\n"
    )


def measured(options: argparse.Namespace) -> dict[str, Any]:
    hub = hub_of(options)
    tokenizer = AutoTokenizer.from_pretrained(folders_of(options.model)[-1], **hub)
    read = [read_text(name) for name in options.text]
    texts = {text.name: text.as_string(tokenizer) for text in read}
    if len(texts) < len(read):
        raise ValueError("Two texts have one file name, which the table tells them by: rename one.")
    samples = []
    for name, text in texts.items():
        samples += text_samples(tokenizer, name, text, options.context, options.scored, options.slices)
    if options.facts:
        samples += fact_samples(tokenizer, next(iter(texts.values())), options.context, options.facts)
    settings = {**vars(options), "text": list(texts)}
    del settings["output"], settings["token"]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "settings": settings,
    }
    return evaluate(subjects(options), samples, options.output, about)


def subjects(options: argparse.Namespace) -> list[Subject]:
    """What the model is compared with, if anything, and the model."""
    used = folders_of(options.model)
    base, original = load(used[-1], options, options.revision), None
    model = base if options.routers is None else load_routers(base, options.routers, token=options.token)
    if options.original is not None:
        loaded = load(options.original, options)
        original = Subject("original", loaded, identity([options.original], loaded))
    elif options.routers is not None:
        original = Subject("original", base, identity(used, base))
    elif isinstance(model, SparsePreTrainedMixin):
        original = Subject("its weights, dense", to_dense(model), identity(used, base))
    if options.routers is not None:
        used = [options.routers, *used]
    known = identity(used, base, routers_commit(options))
    if is_adapter(used[0]):
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, used[0]))
    own = Subject(Path(used[0]).name, model.eval(), known)
    return [own] if original is None else [original, own]


def identity(folders: list[str], loaded: PreTrainedModel, commit: str | None = None) -> str:
    """
    What tells a model from others, and how it computes: its directories' files, without reading them, or names and
    commits on the Hub; dtype and devices of the last one of `folders`, as it was `loaded`; and versions. `commit`: of
    routers on the Hub.
    """
    files = [
        [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
        for folder in map(Path, folders)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD_NAME  # which computes nothing
    ]
    devices = sorted({each.device.type for each in loaded.parameters()})
    computes = [str(loaded.dtype), devices, versions()]
    commits = [getattr(loaded.config, "_commit_hash", None), commit]
    return hashlib.sha256(json.dumps([*folders, *files, commits, computes]).encode()).hexdigest()[:16]


def routers_commit(options: argparse.Namespace) -> str | None:
    """The commit of routers on the Hub; None of a directory's, and where there are none."""
    if options.routers is None or Path(options.routers).is_dir():
        return None
    return extract_commit_hash(cached_file(options.routers, ROUTERS_CONFIG_NAME, token=options.token), None)


def versions() -> dict[str, str]:
    return {each.__name__: each.__version__ for each in (mosa_hf, transformers, torch)}
