"""MoSA (Mixture of Sparse Attention) for Hugging Face Transformers. Importing this package registers the models."""

from .cache import cache_bytes
from .conversion import ConversionConfig, convert_checkpoint, convert_model
from .kernels import use_backend
from .modeling import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel
from .modeling.thresholds import calibrate_thresholds
from .modeling.tracing import trace_routing
from .registration import register

register()

__version__ = "0.1.0"

__all__ = [
    "ConversionConfig",
    "MosaConfig",
    "MosaForCausalLM",
    "MosaForSequenceClassification",
    "MosaModel",
    "cache_bytes",
    "calibrate_thresholds",
    "convert_checkpoint",
    "convert_model",
    "trace_routing",
    "use_backend",
]
