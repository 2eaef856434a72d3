"""A base model becomes one with sparse groups, and learns again what that cost: what scripts may call."""

from .annealing import RateAnnealing
from .checkpoint import convert_checkpoint
from .configuration import ConversionConfig
from .convert import convert_model, to_dense
from .default_text import default_text
from .healing import HealingTrainer, TokenWindows, teacher_of
from .kvzap import load_kvzap
from .native import convert_to_native
from .planning import Found, PlanningConfig, measured_texts, search_plan
from .sources import Loading, find_source
from .texts import Text, read_text
from .windows import calibration_windows

__all__ = [
    "ConversionConfig",
    "Found",
    "HealingTrainer",
    "Loading",
    "PlanningConfig",
    "RateAnnealing",
    "Text",
    "TokenWindows",
    "calibration_windows",
    "convert_checkpoint",
    "convert_model",
    "convert_to_native",
    "default_text",
    "find_source",
    "load_kvzap",
    "measured_texts",
    "read_text",
    "search_plan",
    "teacher_of",
    "to_dense",
]
