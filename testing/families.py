"""
Which decoder types of Transformers can have sparse groups, found by trying each: `python -m testing.families TYPE ...`
prints what is found of some, `python -m testing.families --output docs/families.md` writes the table of all.
"""

import argparse
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed

from .decoders import decoder_types
from .family_contract import Findings


def findings_of(model_type: str) -> Findings:
    """What `check_decoder` finds; also what goes wrong on the way."""
    import torch
    import transformers

    from .family_contract import check_decoder

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return check_decoder(model_type)
    except Exception as error:
        where = " < ".join(
            f"{x.filename.rsplit('/', 1)[-1]}:{x.lineno}" for x in traceback.extract_tb(error.__traceback__)[::-1][:4]
        )
        return Findings(model_type, failed={"error": f"{type(error).__name__}: {str(error)[:300]} @ {where}"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="of models; default: all")
    parser.add_argument("--output")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    found = {}
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=None) as pool:
        futures = [pool.submit(findings_of, each) for each in options.types or decoder_types()]
        for future in as_completed(futures):
            each = future.result()
            found[each.model_type] = each
            print(
                each.model_type,
                "PASS" if each.passes else "REFUSED" if each.reason else "FAIL",
                each.layers,
                each.reason or each.failed or "",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
