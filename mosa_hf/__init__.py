"""MoSA (Mixture of Sparse Attention) for Hugging Face Transformers. Importing this package registers the models."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names, and `MosaLlamaConfig`, `MosaLlamaForCausalLM`, ... of every decoder of Transformers."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    if name in ("conversion", "evaluation"):  # packages with public names of their own
        return import_module(f".{name}", __name__)
    api = import_module(".api", __name__)
    if name == "__all__" or name in api.__all__:
        return getattr(api, name)
    if name.startswith("Mosa"):
        return import_module(".modeling.families", __name__).class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The commands `mosa-...` read what is typed before they import what takes seconds; what they then run imports it.
if not Path(sys.argv[0]).stem.startswith("mosa-"):
    import_module(".api", __name__)
