"""
Heal a converted model on some text; starts under `accelerate launch` too.

    mosa-heal --model converted --text a.txt b.txt --destination healed --output_dir checkpoints --max_steps 1000

Every argument of Transformers' `TrainingArguments` is one of this command (--help-all lists them). A run that was
interrupted goes on from its last checkpoint in `--output_dir`; checkpoints of another model, text or kind of healing
are refused.
"""

import sys
from dataclasses import MISSING, fields

from .healing_arguments import HealingArguments
from .options import command_parser, one_line_errors, speak

WORDS = {"most_characters": "--text_characters"}  # what messages call by another name than this command's options have


def main(arguments: list[str] | None = None) -> None:
    own = command_parser("mosa-heal", __doc__)
    for each in fields(HealingArguments):
        is_needed, text = each.default is MISSING, each.metadata["help"].replace("%", "%%")
        own.add_argument(
            f"--{each.name}",
            required=is_needed,
            nargs="+" if each.name == "text" else None,
            default=None if is_needed else each.default,
            help=text if is_needed or each.default is None else f"{text} (default: {each.default})",
        )
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help", "--version"} & set(given):  # the whole parser takes as long as all of Transformers
        own.parse_args(given)
    speak()
    try:
        with one_line_errors(own.prog, own, WORDS):
            from .run_heal import heal, parse

            heal(*parse(given, __doc__))
    except KeyboardInterrupt as interrupt:
        sys.exit(f"mosa-heal: stopped. {interrupt or 'Nothing was written.'}")


if __name__ == "__main__":
    main()
