"""What `mosa-convert` does, see `convert.py`."""

import argparse
import shlex
from pathlib import Path

from ..api import ConversionConfig
from ..atomic_write import check_replaceable
from ..conversion import read_text
from ..conversion.checkpoint import check_can_convert, convert_files
from ..conversion.publishing import publish
from ..modeling.configuration import SparseGroupsConfig, sparse_config_of
from ..modeling.group_plan import GroupPlan, check_can_plot
from ..modeling.kv_share import planned_bytes
from ..modeling.model_card import LENGTHS, auto_class_name, megabytes
from .options import loading_of


def run(options: argparse.Namespace) -> None:
    destination = Path(options.destination)
    for file in filter(None, (options.save_plan, options.plot_plan)):
        check_replaceable(Path(file))
    if options.plot_plan:
        check_can_plot()
    given = {name: getattr(options, name) for name in ("plan", "groups", "sparsity", "window")}
    given = {name: value for name, value in given.items() if value is not None}
    conversion = ConversionConfig(**given) if given else None
    windows = {"num_windows": options.windows, "window_length": options.window_length}
    others = conversion, options.calibration, *windows.values()
    check_can_convert(destination, options.push_to_hub, options.token, options.routers, *others)
    text = read_text(options.calibration) if options.calibration else None
    written = {"routers_only": options.routers_only, "push_to_hub": options.push_to_hub}
    converted = convert_files(
        options.source, destination, conversion, text, options.routers, **windows, **written, **loading_of(options)
    )
    config = sparse_config_of(converted.config)
    plan = GroupPlan.of_config(config)
    if options.save_plan:
        plan.save(options.save_plan)
    if options.plot_plan:
        plan.plot(options.plot_plan)
    print(plan)
    if options.push_to_hub is not None:
        print(f"Uploaded to {publish(destination, options.push_to_hub, options.token)}.")
    auto = auto_class_name(type(converted))
    use = "`from_pretrained(base, routers=...)`" if options.routers_only else f"`{auto}.from_pretrained`"
    print(f"Wrote {destination}. Load it with `import mosa_hf` and {use}.")
    print(cache_line(config))
    where = [options.source, "--routers", str(destination)] if options.routers_only else [str(destination)]
    print(f"Next, to see what it remembers: mosa-evaluate {shlex.join(where)} --text YOUR_TEXT --facts 2")


def cache_line(config: SparseGroupsConfig) -> str:
    """What a cache holds before and after, by the plan."""
    parts = []
    for length in LENGTHS:
        before, after = planned_bytes(config, length)
        parts.append(f"{length // 1024} k tokens {megabytes(before)} -> {megabytes(after)}")
    return f"A sequence's cache, by the plan: {', '.join(parts)}"
