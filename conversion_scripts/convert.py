"""Give a pretrained model on disk sparse key/value groups. Also installed as the command `mosa-convert`."""

import argparse
import sys
from pathlib import Path

from mosa_hf import ConversionConfig, convert_checkpoint
from mosa_hf.modeling.group_plan import check_can_plot


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="model directory, or a .gguf file")
    parser.add_argument("destination", help="directory to create; it appears only when it is whole")
    parser.add_argument("--plan", metavar="FILE", help="JSON plan of which groups are sparse, and how")
    parser.add_argument("--groups", type=int, help="groups that become sparse, over all layers (default: all)")
    parser.add_argument("--sparsity", type=float, help="select one token in this many, over all groups (default: 8)")
    parser.add_argument("--window", type=int, help="recent tokens that are always read (default: 512)")
    parser.add_argument("--routers", metavar="DIRECTORY", help="ready routers, in place of a plan and calibration")
    parser.add_argument("--routers-only", action="store_true", help="write routers alone, not the model")
    parser.add_argument(
        "--calibration", nargs="+", type=Path, metavar="FILE", help="UTF-8 text that routers are fitted on"
    )
    parser.add_argument("--windows", type=int, default=12, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--save-plan", metavar="FILE", help="write the plan to a JSON file")
    parser.add_argument("--plot-plan", metavar="FILE", help="draw the plan as a heat map (PNG; needs matplotlib)")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("plan", "groups", "sparsity", "window")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if options.plot_plan:
            check_can_plot()
        plan = convert_checkpoint(
            options.source,
            options.destination,
            ConversionConfig(**given) if given or options.routers is None else None,
            options.calibration and "\n\n".join(path.read_text(encoding="utf-8") for path in options.calibration),
            routers=options.routers,
            routers_only=options.routers_only,
            num_windows=options.windows,
            window_length=options.window_length,
        )
        if options.save_plan:
            plan.save(options.save_plan)
        if options.plot_plan:
            plan.plot(options.plot_plan)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mosa-convert: {' '.join(str(error).split())}")
    print(plan)
    use = "`from_pretrained(base, routers=...)`" if options.routers_only else "`AutoModelForCausalLM.from_pretrained`"
    print(f"Wrote {options.destination}. Load it with `import mosa_hf` and {use}.")


if __name__ == "__main__":
    main()
