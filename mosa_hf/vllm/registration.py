"""Tells vLLM of the models that it can serve with sparse groups, and of their cache."""

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from . import refused
from .engine_config import ConvertedConfig
from .spec import ArenaManager, ArenaSpec
from .supported import SUPPORTED

MODELS = "mosa_hf.vllm.models"  # vLLM imports it when it makes a model: it may not load torch before it forks


def register() -> None:
    """May be called again."""
    # The built-in specs register on first use, but only as long as nothing else has.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager)
    for each in SUPPORTED:
        ModelRegistry.register_model(f"Mosa{each}", f"{MODELS}:Mosa{each}")
        MODELS_CONFIG_MAP[f"Mosa{each}"] = ConvertedConfig
    others = refused.register(
        lambda name: (
            f"{name} cannot be served: vLLM's attention of that model is not one that sparse groups are known to work "
            f"in. Supported are {', '.join(f'Mosa{each}' for each in SUPPORTED)}; `mosa_hf.to_dense` gives back the "
            "original, and `transformers serve` takes any converted model."
        )
    )
    for found in others:
        MODELS_CONFIG_MAP[found.__name__] = refusing(found.reason)


def refusing(reason: str) -> type[VerifyAndUpdateConfig]:
    """What refuses a model while vLLM reads its configuration, before it makes anything."""

    class RefusedConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            raise ValueError(reason)

    return RefusedConfig
