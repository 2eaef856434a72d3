"""What a checkpoint gives a model, checked while Transformers loads it: whole files, and every router."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import (
    LoadStateDictConfig,
    LoadStateDictInfo,
    PreTrainedModel,
    _add_variant,
    _get_resolved_checkpoint_files,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from ..safetensors_files import FLOATING, TensorHeader, loaded_headers
from .router import MosaRouter

if TYPE_CHECKING:
    from transformers.utils.hub import DownloadKwargs

    Model = PreTrainedModel  # the mixin's: of whatever class
else:
    Model = object

STATE_DICT = "`state_dict`"  # where the weights come from, in errors
OTHER_CONFIG = (
    "Load it with the fields that it was saved with (`mosa_plan`, `mosa_router_bias`, `mosa_router_hidden_size`)."
)
OF_THE_FOLDER = ("cache_dir", "proxies", "revision", "subfolder", "token")  # where its files are looked for


class CheckedLoadingMixin(Model):
    """
    For every model class of this package. Upstream resolves files, names and shapes; what it has resolved is looked
    at in the two steps in which it loads them, so that what is checked is what is loaded, wherever it comes from.
    """

    router_remedy: ClassVar[str]  # what makes a base model one with routers, for errors

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, but routers are never initialised anew: without those that it was saved
        with, a model selects other tokens.

        Raises:
            FileNotFoundError, ValueError: for a weight file that is missing, truncated or damaged, by name.
            ValueError: for routers that are missing, of another shape, not of a floating dtype, or not finite.
        """
        try:
            with torch.inference_mode(False):  # buffers made there could not follow while routers learn
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except Exception:
            check_chosen_files(pretrained_model_name_or_path, kwargs)  # upstream may read one first, and names none
            raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        check_router_values(model, pretrained_model_name_or_path or STATE_DICT)
        return loaded

    @classmethod
    def _load_pretrained_model(
        cls,
        model: PreTrainedModel,
        state_dict: dict[str, torch.Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        *args,
        **kwargs,
    ):
        headers = loaded_headers(checkpoint_files or [] if state_dict is None else state_dict)
        check_router_dtypes(model, headers, load_config.weight_mapping or [])
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @classmethod
    def _finalize_model_loading(
        cls, model: PreTrainedModel, load_config: LoadStateDictConfig, loading_info: LoadStateDictInfo
    ) -> LoadStateDictInfo:
        check_router_names(model, load_config.pretrained_model_name_or_path or STATE_DICT, loading_info)
        return super()._finalize_model_loading(model, load_config, loading_info)


def check_chosen_files(source: str | os.PathLike | None, options: Mapping[str, Any]) -> None:
    """
    Check the files that upstream chooses for `from_pretrained(source, **options)`, as far as they are on this machine.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    if source is None or options.get("gguf_file") is not None:
        return
    config = options.get("config")
    where = {name: options[name] for name in OF_THE_FOLDER if name in options} | {"local_files_only": True}
    try:
        if isinstance(config, PreTrainedConfig):
            named = getattr(config, "transformers_weights", None)
        else:  # a directory or name of its own, or the model's
            named = PreTrainedConfig.get_config_dict(config or source, **where)[0].get("transformers_weights")
        files, _ = _get_resolved_checkpoint_files(
            source,
            options.get("variant"),
            options.get("gguf_file"),
            options.get("use_safetensors"),
            user_agent=None,
            is_remote_code=True,  # which is to say: do not ask the Hub to convert pickled weights
            transformers_explicit_filename=named,
            download_kwargs=cast("DownloadKwargs", where),
        )
    except OSError:  # there are none, which upstream says in its own words
        return
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:  # of an index
        names = [_add_variant(name, options.get("variant")) for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)]
        folder = Path(source, options.get("subfolder") or "")
        names = [named] if named else names[options.get("use_safetensors") is False :]
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        raise ValueError(
            f"{path} cannot be read as an index of weight files ({error!r}): copy or download it again."
        ) from error
    loaded_headers(files or [])


def router_tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → tensor of every router in a model, those too that an adapter has put aside."""
    return {
        f"{module_name}.{name}": tensor
        for module_name, module in model.named_modules()
        if isinstance(module, MosaRouter)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def check_router_dtypes(model: PreTrainedModel, headers: dict[str, TensorHeader], mapping: list) -> None:
    """
    Args:
        model: that is about to be loaded.
        headers: of the tensors that it is loaded from.
        mapping: upstream's, from names on disk to the model's.

    Raises:
        ValueError: for a router whose numbers are no floating-point numbers, which upstream would cast.
    """
    suspects = {name: header for name, header in headers.items() if header.dtype not in FLOATING}
    if not suspects:  # as a rule
        return
    mapping, state = copy.deepcopy(mapping), model.state_dict()  # a renaming notes that it was used
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    targets = router_tensors_of(model)
    for name, header in suspects.items():
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target in targets or name in targets:
            check_router_dtype(header.file or STATE_DICT, name, header.dtype)


def check_router_dtype(where: str | os.PathLike, name: str, dtype: str) -> None:
    """
    Args:
        where: file, or what else the router comes from.
        name: of one of its tensors.
        dtype: as safetensors names it.

    Raises:
        ValueError: for a dtype that is none of `FLOATING`.
    """
    if dtype not in FLOATING:
        raise ValueError(
            f"{where}: {name} has dtype {dtype}, which is none of {', '.join(sorted(FLOATING))}. Routers are not "
            "quantised: save the model again with its own."
        )


def check_router_value(where: str | os.PathLike, name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: for NaN, and for infinite numbers; but a threshold may be infinite: of a group that selects
            everything, or nothing.
    """
    if tensor.isnan().any() or (not name.endswith(".threshold") and not tensor.isfinite().all()):
        raise ValueError(f"{where}: {name} has NaN or infinite values. Save or convert the model again.")


@torch.no_grad()
def check_router_values(model: PreTrainedModel, where: str | os.PathLike) -> None:
    """`check_router_value` of all routers of a model, offloaded ones and parts of distributed ones too."""
    for module_name, module in model.named_modules():
        if not isinstance(module, MosaRouter):
            continue
        try:
            with align_module_device(module):  # from where Accelerate keeps it meanwhile
                tensors = module.state_dict()
        except ValueError as error:  # of an offloaded tensor upstream does not compare the shape
            raise ValueError(f"{where}: {module_name}: {error} {OTHER_CONFIG}") from error
        for name, tensor in tensors.items():
            if tensor.device.type == "meta":  # in a process that is given its weights later
                continue
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            check_router_value(where, f"{module_name}.{name}", whole)


def check_router_names(model: PreTrainedModel, where: str | os.PathLike, info: LoadStateDictInfo) -> None:
    """
    Args:
        model: that was loaded, but for what upstream initialises.
        where: name or directory of the checkpoint.
        info: upstream's, of what it found.

    Raises:
        ValueError: for a router's tensor that the checkpoint lacks, has in another shape, or has in vain.
    """
    routers = router_tensors_of(model)
    if missing := sorted(routers.keys() & info.missing_keys):
        more = f" and {len(missing) - 1} more tensors of routers" if missing[1:] else ""
        raise ValueError(
            f"{where} lacks {missing[0]}{more}, and new routers select at random. If it is a base model, "
            f"{model.router_remedy}; if a saved one, copy or save it again. {OTHER_CONFIG} To train from scratch, "
            "build the model from its config (`AutoModelForCausalLM.from_config`)." + _other_names(info)
        )
    for name, shape, expected in sorted(info.mismatched_keys):
        if name in routers:
            raise ValueError(
                f"{where}: {name} has shape {tuple(shape)}, but the model and its plan need {tuple(expected)}. "
                f"{OTHER_CONFIG} `ignore_mismatched_sizes` does not make new routers."
            )
    modules = {name.rpartition(".")[0] for name in routers}
    for name in sorted(info.unexpected_keys):
        if name.rpartition(".")[0] in modules:
            raise ValueError(
                f"{where} has {name}, without which its router selects other tokens, and which the config does not "
                f"ask for. {OTHER_CONFIG}"
            )


def _other_names(info: LoadStateDictInfo) -> str:
    """What may be a router under another name."""
    others = sorted(name for name in info.unexpected_keys if "mosa" in name or "router" in name)
    if not others:
        return ""
    return f" It has {others[0]}, which the model has not: if that is a router, rename it by `key_mapping`."
