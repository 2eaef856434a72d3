from .checkpoint import convert_checkpoint
from .configuration import ConversionConfig
from .convert import convert_model, to_dense
from .native import convert_to_native
from .windows import calibration_windows

__all__ = [
    "ConversionConfig",
    "calibration_windows",
    "convert_checkpoint",
    "convert_model",
    "convert_to_native",
    "to_dense",
]
