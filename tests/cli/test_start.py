"""Commands answer before anything is imported that takes seconds."""

import subprocess
import sys

import pytest

import mosa_hf

COMMANDS = ("convert", "evaluate", "heal", "trace")
CODE = """
import sys
sys.argv = ["bin/mosa-{command}", "{option}"]
from mosa_hf.cli.{command} import main
try:
    main()
finally:
    assert not {{"torch", "transformers"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_answers_without_torch(command, option):
    code = CODE.format(command=command, option=option)
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert answer.startswith(
        f"usage: mosa-{command}" if option == "--help" else f"mosa-{command} {mosa_hf.__version__}"
    )


@pytest.mark.slow
def test_a_command_finds_the_public_names():
    code = 'import sys; sys.argv = ["bin/mosa-convert"]; import mosa_hf; assert "torch" not in sys.modules; '
    code += "from mosa_hf import MosaLlamaForCausalLM, convert_model; from transformers import MosaLlamaConfig"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
