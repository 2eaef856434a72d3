"""The public names of the package. Importing them registers the models with Transformers and PEFT."""

from .cache import cache_bytes
from .conversion import ConversionConfig, calibration_windows, convert_checkpoint, convert_model, to_dense
from .kernels import use_backend
from .modeling import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel
from .modeling.cache_files import load_cache, save_cache
from .modeling.group_plan import GroupPlan, SparseGroup
from .modeling.router_files import load_routers, save_routers
from .modeling.routing_callback import RoutingCallback
from .modeling.routing_trace import trace_routing
from .modeling.thresholds import calibrate_thresholds
from .registration import register

register()

__all__ = [
    "ConversionConfig",
    "GroupPlan",
    "MosaConfig",
    "MosaForCausalLM",
    "MosaForSequenceClassification",
    "MosaModel",
    "RoutingCallback",
    "SparseGroup",
    "cache_bytes",
    "calibrate_thresholds",
    "calibration_windows",
    "convert_checkpoint",
    "convert_model",
    "load_cache",
    "load_routers",
    "save_cache",
    "save_routers",
    "to_dense",
    "trace_routing",
    "use_backend",
]
