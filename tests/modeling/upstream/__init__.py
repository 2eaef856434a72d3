"""
Transformers' own test suites, importable: `from tests.modeling.upstream.test_modeling_common import ModelTesterMixin`.

The suites come from the source distribution of the installed Transformers (Apache-2.0), fetched once into the cache of
`testing.packages`. It leaves out some modules that they import; those lie here, as small as the suites allow.

Raises:
    SourceUnavailable: on import, if the source distribution cannot be fetched.
"""

import tarfile
from pathlib import Path

from transformers import __version__

from testing.packages import cached, pip_download

NAME = f"transformers-{__version__}"


def fetch(scratch: Path) -> Path:
    """The folder of test suites, in `scratch`."""
    requirement = f"transformers=={__version__}"
    with tarfile.open(pip_download(requirement, scratch, "--no-binary", "transformers")) as sdist:
        suites = [member for member in sdist.getmembers() if member.name.startswith(f"{NAME}/tests/")]
        sdist.extractall(scratch, suites, filter="data")
    (scratch / NAME / "tests/__init__.py").touch()  # left out of the distribution, but one suite reads it
    return scratch / NAME / "tests"


__path__.append(str(cached(f"{NAME}-tests", fetch)))
