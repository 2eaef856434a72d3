"""
Search for what each key/value group of a model should become, so that its cache takes a given share of the original's
bytes. Also installed as the command `mosa-plan`.

    mosa-plan path/to/base plan.json --share 0.25 --text a.txt b.txt
    mosa-convert path/to/base converted --plan plan.json --calibration a.txt b.txt

What was measured is kept beside the plan until the plan is written: the same command goes on from there.
"""

import argparse
import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf.atomic_write import check_absent
from mosa_hf.conversion import calibration_windows
from mosa_hf.conversion.planning import Found, PlanningConfig, measured_texts, search_plan
from mosa_hf.modeling.group_plan import check_can_plot


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="model directory")
    parser.add_argument("destination", type=Path, help="JSON file to write, which `mosa-convert --plan` reads")
    parser.add_argument("--share", type=float, required=True, help="of the bytes of the original's cache")
    parser.add_argument("--tokens", type=int, default=4096, help="that are in the cache (default: %(default)s)")
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 text like that which it will read"
    )
    parser.add_argument(
        "--texts", type=int, default=3, help="stretches of it that plans are measured on (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="exchanges that are tried (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=12, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens of one (default: %(default)s)")
    parser.add_argument(
        "--uniform", type=Path, metavar="FILE", help="write the best uniform plan too, to compare with"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the plan as a heat map (PNG; needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        if options.plot:
            check_can_plot()
        found = plan(options)
        if options.plot:
            found.plan.plot(options.plot, options.tokens)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mosa-plan: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("mosa-plan: stopped. What was measured is kept; the same command goes on from there.")
    print(found.plan)
    print(found)
    print(f"Wrote {options.destination}, for `mosa-convert --plan`.")


def plan(options: argparse.Namespace) -> Found:
    destination = options.destination
    check_absent(destination)
    planning = PlanningConfig(share=options.share, num_tokens=options.tokens, rounds=options.rounds)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.text)
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    calibration = calibration_windows(tokenizer, text, options.windows, options.window_length)
    texts = measured_texts(tokenizer, text, options.texts, options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    unfinished = destination.with_name(f"{destination.name}.search")
    found = search_plan(model, planning, calibration, texts, directory=unfinished)
    if options.uniform:
        found.uniform.save(options.uniform)
    found.plan.save(destination)
    shutil.rmtree(unfinished)
    return found


if __name__ == "__main__":
    main()
