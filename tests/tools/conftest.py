"""
What the tests of tools share: a tiny dense model on disk as people have them, and the same one converted. Every test
does with the converted model what it does with the original.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from mosa_hf import ConversionConfig, convert_checkpoint
from testing.tiny import byte_tokenizer, tiny_base

if find_spec("onnxruntime") is None:
    collect_ignore = ["test_export.py"]  # which also imports what the oldest Transformers lacks
ROOT = Path(__file__).parents[2]
TEXT = (
    "The tide came in before noon. A boat with two men went out to the red buoy, and came back with it at four.\n"
) * 40
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


class Folders(NamedTuple):
    """Model folders: a tiny Llama, its byte-level tokenizer with a chat template; and the same one converted."""

    original: Path
    converted: Path


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    model = tiny_base("llama", vocab_size=260, eos_token_id=257, pad_token_id=256, bos_token_id=258)
    model.save_pretrained(root / "original")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "original")
    convert_checkpoint(
        root / "original",
        root / "converted",
        ConversionConfig(sparsity=4, window=8),
        TEXT,
        num_windows=4,
        window_length=64,
    )
    return Folders(root / "original", root / "converted")


def states_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, as they are now."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def shell_environment() -> dict[str, str]:
    """Of a shell in which this environment's commands come first, and no hub is reached."""
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}


def plain_shell(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """
    Run a command as from a shell where nothing has imported `mosa_hf`, in this environment and without a hub; what it
    prints is in the result, and shown where it fails.
    """
    result = subprocess.run(
        [str(each) for each in arguments],
        env=shell_environment(),
        text=True,
        capture_output=True,
        timeout=options.pop("timeout", 300),
        **options,
    )
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result
