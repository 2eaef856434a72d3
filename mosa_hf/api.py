"""The public names of the package. Importing this module registers the models with Transformers and PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .cache import cache_bytes
from .kernels import use_backend
from .modeling import MosaConfig, MosaForCausalLM, MosaForSequenceClassification, MosaModel
from .modeling.group_plan import GroupPlan, SparseGroup
from .modeling.router_files import load_routers, save_routers
from .modeling.thresholds import calibrate_thresholds
from .registration import register

if TYPE_CHECKING:
    from .conversion import ConversionConfig, calibration_windows, convert_checkpoint, convert_model, to_dense
    from .modeling.cache_files import load_cache, save_cache
    from .modeling.routing_callback import RoutingCallback
    from .modeling.routing_trace import trace_routing

register()

# What a model that is loaded and run does without; who asks for a name waits for its import then.
LATER = {
    "ConversionConfig": ".conversion",
    "RoutingCallback": ".modeling.routing_callback",
    "calibration_windows": ".conversion",
    "convert_checkpoint": ".conversion",
    "convert_model": ".conversion",
    "load_cache": ".modeling.cache_files",
    "save_cache": ".modeling.cache_files",
    "to_dense": ".conversion",
    "trace_routing": ".modeling.routing_trace",
}

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


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
