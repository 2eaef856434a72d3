from .checkpoint import convert_checkpoint
from .configuration import ConversionConfig
from .convert import convert_model, to_dense
from .default_text import default_text
from .native import convert_to_native
from .sources import Loading, find_source
from .texts import Text, read_text
from .windows import calibration_windows

__all__ = [
    "ConversionConfig",
    "Loading",
    "Text",
    "calibration_windows",
    "convert_checkpoint",
    "convert_model",
    "convert_to_native",
    "default_text",
    "find_source",
    "read_text",
    "to_dense",
]
