"""What converted models need of vLLM's configuration, and what of it they refuse: called while vLLM reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from transformers.configuration_utils import PreTrainedConfig
from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_hf_text_config

from ..modeling.configuration import SparseGroupsConfig
from ..modeling.devices import dtype_name
from ..modeling.family import family_of
from ..modeling.router_files import read_routers
from .spec import Reserve

CONNECTOR, CONNECTOR_MODULE = "ArenaConnector", "mosa_hf.vllm.feedback"
ROUTERS = "mosa_routers"  # of `--hf-overrides`: the folder of routers for a base model


@dataclass(frozen=True)
class Settings:
    """Ours, from `--additional-config`."""

    reserve: Reserve
    slack: float


def settings_of(vllm_config: VllmConfig) -> Settings:
    """
    Raises:
        ValueError: for a `mosa_*` entry that is unknown or out of range.
    """
    given = {name: x for name, x in dict(vllm_config.additional_config or {}).items() if name.startswith("mosa_")}
    reserve = given.pop("mosa_reserve", "feedback")
    # With feedback it is but an estimate of what fits; a rate that is too low costs tokens.
    slack = given.pop("mosa_slack", 1.5 if reserve == "rate" else 1.1)
    if given:
        raise ValueError(f"`additional_config` has {sorted(given)}: there are `mosa_reserve` and `mosa_slack`.")
    if reserve not in get_args(Reserve):
        raise ValueError(f"`mosa_reserve` must be one of {', '.join(get_args(Reserve))}, got {reserve!r}.")
    if isinstance(slack, bool) or not isinstance(slack, int | float) or not 1 <= slack < 1000:
        raise ValueError(f"`mosa_slack` must be a number from 1 on, got {slack!r}.")
    return Settings(reserve, float(slack))


class ConvertedModelConfig(ModelConfig):
    """
    vLLM's, whose default for prefix caching is off, so that whoever turns it on is told. vLLM asks this property for
    the default before a model's own hooks for configuration, and answers yes for all decoders: a hook alone could not
    tell a user's yes from that one, and would have to turn it off without a word.
    """

    @property
    def is_prefix_caching_supported(self) -> bool:
        return False


class ConvertedConfig(VerifyAndUpdateConfig):
    """Of all models in `supported.SUPPORTED`."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        base = _base_hook(model_config.architecture)
        if base is not None:
            base.verify_and_update_model_config(model_config)
        config = model_config.hf_config
        folder = vars(config).pop(ROUTERS, None)
        if isinstance(config, SparseGroupsConfig):
            _check_overrides(config, model_config.hf_overrides)
        if folder is not None or not isinstance(config, SparseGroupsConfig):
            config = _with_routers(model_config, config, folder)
        if getattr(config, "mosa_inference_routing", "threshold") != "threshold":
            raise ValueError(
                "`mosa_inference_routing` is 'expert_choice', which reads the future: vLLM generates. Set it to "
                "'threshold' in the model's config.json."
            )
        if getattr(config, "mosa_cache_dtype", None) is not None:
            raise ValueError(
                f"`mosa_cache_dtype` is {config.mosa_cache_dtype!r}, but in vLLM entries are stored as the model "
                "computes them: leave it out of the model's config.json, or use the model in Transformers."
            )
        model_config.__class__ = ConvertedModelConfig  # nothing of vLLM asks the model's class in its place

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        base = _base_hook(vllm_config.model_config.architecture)
        if base is not None:
            base.verify_and_update_config(vllm_config)
        check(vllm_config)
        settings_of(vllm_config)
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_both"
        )


def check(vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: for an option that sparse groups cannot compute with, by name.
    """
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    refused = {
        "runner": (model.runner_type != "generate", "they generate text. Serve the original for embeddings"),
        "enable_prefix_caching": (
            cache.enable_prefix_caching,
            "slots of the sparse cache are used again, so a prefix is not there any more. Leave it out, or pass "
            "`--no-enable-prefix-caching`",
        ),
        "speculative_config": (
            vllm_config.speculative_config is not None,
            "tokens that are rejected have overwritten others by then. Leave it out",
        ),
        "pipeline_parallel_size": (
            parallel.pipeline_parallel_size > 1,
            "all layers share one arena of blocks. Use `--tensor-parallel-size` or `--data-parallel-size`",
        ),
        "decode_context_parallel_size": (
            parallel.decode_context_parallel_size > 1,
            "a request's tokens lie on one worker. Use `--tensor-parallel-size`",
        ),
        "kv_transfer_config": (
            vllm_config.kv_transfer_config is not None and vllm_config.kv_transfer_config.kv_connector != CONNECTOR,
            "its place is taken by what tells the scheduler how much requests hold. Leave it out",
        ),
        "cache_dtype": (
            cache.cache_dtype not in ("auto", dtype_name(model.dtype)),
            f"entries are stored as the model computes them ({dtype_name(model.dtype)}). Leave it out",
        ),
        "enable_dbo": (parallel.use_ubatching, "a step is read in one batch. Leave it out"),
        "kv_offloading_size": (
            cache.kv_offloading_size is not None,
            "its connector takes the place of what tells the scheduler how much requests hold. Leave it out",
        ),
        "max_model_len": (
            model.original_max_model_len == -1,
            "what requests reserve is planned for a length before vLLM knows how much memory there is. Name a length",
        ),
        "clip_qkv": (
            getattr(model.hf_config, "clip_qkv", None) is not None,
            "vLLM's own model leaves it out. Use the model in Transformers",
        ),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise ValueError(f"`{name}`: models with sparse groups do not work with it: {why}.")
    budget = getattr(model.hf_config, "mosa_cache_budget", None)
    if settings_of(vllm_config).reserve == "budget" and budget is None:
        raise ValueError(
            "`mosa_reserve` is 'budget', but the model has no `mosa_cache_budget`: set one in its config.json, or use "
            "'feedback'."
        )


def _base_hook(architecture: str) -> type[VerifyAndUpdateConfig] | None:
    return MODELS_CONFIG_MAP.get(architecture.removeprefix("Mosa"))


def _check_overrides(config: SparseGroupsConfig, overrides: Any) -> None:
    """
    Raises:
        StrictDataclassError, ValueError: for `mosa_*` fields in `--hf-overrides`, which vLLM sets as attributes, that
            `from_pretrained` would refuse.
    """
    config.validate()
    if isinstance(overrides, Mapping):
        config.check_read([name for name in overrides if name.startswith("mosa_")])


def _with_routers(model_config: ModelConfig, config: PreTrainedConfig, folder: str | None) -> SparseGroupsConfig:
    """
    Give a model's configuration the sparse groups of the `folder` of routers that `--hf-overrides` names, in place of
    its own if it has any.

    Raises:
        FileNotFoundError, ValueError: for a base without routers, and see `read_routers`.
    """
    base = config.to_base() if isinstance(config, SparseGroupsConfig) else config
    if folder is None:
        raise ValueError(
            f"{model_config.model} is a base model without routers. Convert it (`mosa-convert`), or name one that "
            f'`save_routers` wrote: `--hf-overrides \'{{"architectures": ["{model_config.architecture}"], '
            f'"{ROUTERS}": "FOLDER"}}\'`.'
        )
    own, _ = read_routers(family_of(base.model_type), base, folder)
    own.architectures = [model_config.architecture]
    setattr(own, ROUTERS, folder)
    model_config.hf_config = own
    model_config.hf_text_config = get_hf_text_config(own)
    return cast(SparseGroupsConfig, own)
