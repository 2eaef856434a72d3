"""A base model becomes one with sparse groups, and learns again what that cost: what scripts may call."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint import convert_checkpoint
from .configuration import ConversionConfig
from .convert import convert_model, to_dense
from .default_text import default_text
from .sources import Loading, find_source
from .texts import Text, read_text
from .windows import calibration_windows

if TYPE_CHECKING:
    from .healing import HealingTrainer, TokenWindows, teacher_of
    from .kvzap import load_kvzap
    from .native import convert_to_native

# What takes longer to import than a user of the package, who needs none of it, should wait.
LATER = {
    "HealingTrainer": "healing",
    "TokenWindows": "healing",
    "teacher_of": "healing",
    "load_kvzap": "kvzap",
    "convert_to_native": "native",
}

__all__ = [
    "ConversionConfig",
    "HealingTrainer",
    "Loading",
    "Text",
    "TokenWindows",
    "calibration_windows",
    "convert_checkpoint",
    "convert_model",
    "convert_to_native",
    "default_text",
    "find_source",
    "load_kvzap",
    "read_text",
    "teacher_of",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(f".{LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
