"""
Which decoder types of Transformers can have sparse groups, found by trying each of them on a tiny model:
`python -m testing.families TYPE ...` prints what is found, `--output docs/families.md` writes the table of all.
"""

import argparse
import re
import textwrap
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from mosa_hf.atomic_write import atomic_file

from .decoders import BESIDE_STOCK, decoder_types, is_wrapper
from .family_contract import CHECKS, Findings, check_decoder
from .tiny import FAMILIES
from .tiny_multimodal import TYPES

HEAD = """# Which models can have sparse groups

Every decoder of Transformers whose layers have causal softmax attention that calls `ALL_ATTENTION_FUNCTIONS`, with
keys and values of its own. Nothing is listed in the code: classes are made from Transformers' own when they are first
asked for, and every conversion checks on a few tokens that, with every token selected, the converted model computes
what the original does, with a cache and without one. A model of which that does not hold is refused.

This table is written by `make families` (Transformers {version}, torch {torch}), from tiny models with random weights
of every type for which Transformers has a causal LM. Each that passes was compared with the original at ρ = 1, with a
cache and without; read at once and token by token; generated from with a cache and without; saved and loaded by its
Auto class; converted as files; padded on the left; and converted with routers fitted to a text. "More" marks those
that the tests put through everything else that a model can do, beside the original: static caches, beams, prompt
lookup, `crop`, compilation, LoRA, training, tensor parallelism where Transformers has a plan.

Of {decoders} types that have a causal LM and are no model around one, {passed} pass. Layers: those that can be sparse,
of the tiny model's. The others keep what bounds their cache already (a sliding window, a recurrent state), or share
keys and values.

| type | layers | more |
|---|---|---|
{table}

## Models of pictures or sound, and text

`convert_model` and `mosa-convert` take them whole: the language model gets sparse groups, all else stays. Tiny models
of these {num_multimodal} types were compared with the original at ρ = 1, generated from with a cache and without,
saved and loaded by their Auto classes, converted with routers fitted to a text, and trained, each with a picture or a
sound (`tests/modeling/test_multimodal.py`). Others that `AutoModelForMultimodalLM` loads are made in the same way, if
nothing refuses them, and were not tested with either. Tested:

{multimodal}.

Gemma 3 lets the tokens of a picture read each other both ways, in layers with sparse groups too: it reads text alone,
and a picture is refused. Prefix-LMs (PaliGemma) are refused.

## Refused, and why

{refused}
"""


def findings_of(model_type: str) -> Findings:
    """What `check_decoder` finds; what goes wrong on the way is a finding, too."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return check_decoder(model_type)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[::-1][:4]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return Findings(model_type, failed={"error": f"{type(error).__name__}: {error} ({where})"})


def find(types: Iterable[str], jobs: int = 1) -> Iterable[Findings]:
    """What is found of each type, in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(findings_of, types)


def page(found: list[Findings]) -> str:
    """The text of docs/families.md."""
    decoders = [each for each in found if not (each.reason and is_wrapper(each.model_type))]
    passed = [each for each in decoders if each.passes]
    more = {*FAMILIES, *BESIDE_STOCK}
    table = [
        f"| {each.model_type} | {each.layers[0]} of {each.layers[1]} | {'x' if each.model_type in more else ''} |"
        for each in passed
    ]
    reasons: dict[str, list[str]] = {}
    for each in decoders:
        if not each.passes:
            reasons.setdefault(_reason(each), []).append(each.model_type)
    refused = [
        textwrap.fill(f"- {', '.join(types)}: {reason}", 119, subsequent_indent="  ", break_on_hyphens=False)
        for reason, types in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        passed=len(passed),
        decoders=len(decoders),
        table="\n".join(table),
        refused="\n".join(refused),
        num_multimodal=len(TYPES),
        multimodal="\n".join(textwrap.wrap(", ".join(TYPES), 119)),
    )


def _reason(findings: Findings) -> str:
    """Why a type is refused, in a few words."""
    if findings.reason is None:
        return "not tested: " + "; ".join(f"{name} {what}" for name, what in findings.failed.items())[:100]
    return (
        re.sub(r" \(\w+Error: (.*)", r"; \1", findings.reason.split(": ", 1)[-1])
        .split(". ")[0]
        .split(": ")[0]
        .rstrip(".")
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m testing.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; by default all that have a causal LM")
    parser.add_argument("--output", type=Path, help="file for the table of all types")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    if options.output and options.types:
        parser.error("--output writes the table of all types: name none")
    found = []
    for each in find(options.types or decoder_types(), options.jobs):
        found.append(each)
        verdict = "passes" if each.passes else "refused" if each.reason else "FAILS"
        print(f"{each.model_type}: {verdict}, {each.layers[0]} of {each.layers[1]} layers", end="")
        print(f"; {each.reason or each.failed}" if not each.passes else "", flush=True)
    assert set().union(*(each.failed for each in found)) <= {*CHECKS, "error"}
    if options.output:
        with atomic_file(options.output) as unfinished:
            unfinished.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
