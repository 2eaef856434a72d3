"""Commands of docs/benchmarks.md that no other test runs: small, from a plain shell, to their ends."""

import sys

import pytest

from .conftest import plain_shell

pytestmark = pytest.mark.tools

COMMANDS = {
    "benchmarks.gpu": "--smoke --parts decoding --output {folder}",
    "benchmarks.speed.calibration": "--width 32 --tokens 64 --windows 1 --layers 1 2",
    "benchmarks.speed.kernels": "--cases smoke-attention smoke-decode smoke-heads --seconds 0.01",
    "benchmarks.speed.latent_decode": "--length 64 --turns 1",
    "benchmarks.speed.training": "--shapes 1,64,4,8 --rounds 1",
    "benchmarks.frontier.picture": "--output {folder}/frontier.png",
}


@pytest.mark.parametrize("module", COMMANDS)
def test_it_runs(module, tmp_path):
    plain_shell(sys.executable, "-m", module, *COMMANDS[module].format(folder=tmp_path).split())
