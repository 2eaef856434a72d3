from .checkpoint import calibration_windows, convert_checkpoint
from .configuration import ConversionConfig
from .convert import convert_model

__all__ = ["ConversionConfig", "calibration_windows", "convert_checkpoint", "convert_model"]
