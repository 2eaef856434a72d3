"""Convert a pretrained model on disk to MoSA. Also installed as the command `mosa-convert`."""

import argparse
import sys
from pathlib import Path

from mosa_hf import ConversionConfig, convert_checkpoint


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="model directory, or a .gguf file")
    parser.add_argument("destination", help="directory to create; it appears only when it is whole")
    parser.add_argument(
        "--calibration", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 text that routers are fitted on"
    )
    parser.add_argument("--groups", type=int, help="key/value groups to convert, over all layers (default: all)")
    parser.add_argument(
        "--sparsity", type=float, default=8, help="select one token in this many (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=64, help="recent tokens always read (default: %(default)s)")
    parser.add_argument(
        "--query-tokens", choices=("all", "selected"), default="all", help="form of the converted heads"
    )
    parser.add_argument("--windows", type=int, default=24, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        conversion = ConversionConfig(
            num_groups=options.groups,
            sparsity=options.sparsity,
            query_tokens=options.query_tokens,
            window=options.window if options.query_tokens == "all" else 0,
        )
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.calibration)
        convert_checkpoint(
            options.source, options.destination, conversion, text or None, options.windows, options.window_length
        )
    except (OSError, ValueError) as error:
        sys.exit(f"mosa-convert: {error}")
    print(f"Wrote {options.destination}. Load it with `import mosa_hf` and `AutoModelForCausalLM.from_pretrained`.")


if __name__ == "__main__":
    main()
