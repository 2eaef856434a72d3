"""SmolLM2-135M and its conversion, made once for all processes of a test run."""

import os
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from mosa_hf import ConversionConfig, convert_checkpoint
from testing import corpora, pretrained
from testing.packages import SourceUnavailable


def fetched(fetch, *arguments):
    """What a function of `testing` gives; where it is out of reach, a skipped test. Processes wait for each other."""
    try:
        with FileLock(Path(tempfile.gettempdir()) / "mosa_hf_sources.lock"):
            return fetch(*arguments)
    except SourceUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(fetched(pretrained.smollm2_directory))


@pytest.fixture(scope="session")
def original():
    return AutoModelForCausalLM.from_pretrained(fetched(pretrained.smollm2_directory))


@pytest.fixture(scope="session")
def converted_directory(tmp_path_factory):
    """60 of 90 groups, with a window that short prompts leave, calibrated on documentation and literature."""
    literature = fetched(corpora.text, "shakespeare")
    topics = corpora.text("python_topics")
    # As much of the one as of the other: windows are spread evenly over the text.
    text = topics + "\n\n" + literature[: len(topics)]
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    destination = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not destination.exists():
            conversion = ConversionConfig(groups=60, window=64)
            windows = {"num_windows": 8, "window_length": 320}
            convert_checkpoint(fetched(pretrained.smollm2_directory), destination, conversion, text, **windows)
    return destination


@pytest.fixture(scope="session")
def converted(converted_directory):
    return AutoModelForCausalLM.from_pretrained(converted_directory)
