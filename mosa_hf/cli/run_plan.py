"""What `mosa-plan` does, see `plan.py`."""

import argparse
import logging
import shlex
import shutil

from ..api import calibration_windows
from ..atomic_write import check_absent
from ..conversion import default_text, find_source, read_text
from ..conversion.checkpoint import load_source, tokenizer_of
from ..conversion.planning import Found, PlanningConfig, measured_texts, search_plan
from ..modeling.group_plan import check_can_plot
from .options import loading_of

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    if options.plot:
        check_can_plot()
    found = plan(options)
    if options.plot:
        found.plan.plot(options.plot, options.tokens)
    print(found.plan)
    print(found)
    print(f"Wrote {options.destination}, for `mosa-convert --plan`.")
    text = f" --calibration {shlex.join(options.text)}" if options.text else ""
    print(f"Next: mosa-convert {options.source} converted --plan {options.destination}{text}")


def plan(options: argparse.Namespace) -> Found:
    destination = options.destination
    check_absent(destination)
    planning = PlanningConfig(share=options.share, num_tokens=options.tokens, rounds=options.rounds)
    text = read_text(options.text) if options.text else default_text()
    logger.info("Text: %s, %s characters", text.name, f"{text.num_characters:,}")
    loading = loading_of(options)
    source = find_source(options.source, revision=options.revision, token=options.token)
    tokenizer = tokenizer_of(source.path)
    calibration = calibration_windows(tokenizer, text.documents, options.windows, options.window_length)
    texts = measured_texts(tokenizer, text.documents, options.texts, options.tokens)
    model = load_source(source, **loading)
    unfinished = destination.with_name(f"{destination.name}.search")
    found = search_plan(model, planning, calibration, texts, directory=unfinished)
    if options.uniform:
        found.uniform.save(options.uniform)
    found.plan.save(destination)
    shutil.rmtree(unfinished)
    return found
