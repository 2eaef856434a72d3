"""Routers on their own: a folder of a few MB that makes a base model one with sparse groups."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from ..arguments import check_argument, checked
from ..atomic_write import atomic_directory
from ..safetensors_files import file_headers
from .configuration import SparseGroupsConfig, sparse_config_of
from .devices import at_hand
from .family import Family, family_of
from .group_plan import GroupPlan
from .layers import decoder_of
from .loading import check_router_dtype, check_router_value
from .model_card import model_card
from .router import MosaRouter, named_routers
from .sparse_models import SparseModelMixin, SparsePreTrainedMixin, with_sparse_groups, without_sparse_groups

ROUTERS_NAME = "mosa_routers.safetensors"
ROUTERS_CONFIG_NAME = "mosa_config.json"
MOSA_FIELDS = tuple(field.name for field in fields(SparseGroupsConfig) if field.name.startswith("mosa_"))
OF_THE_HUB = ("cache_dir", "token", "local_files_only", "force_download", "proxies")  # same for base and routers
# That older folders lack, and mean the default of.
LATER_FIELDS = ("mosa_cache_dtype", "mosa_router_hidden_size")


@checked()
def save_routers(model: PreTrainedModel, directory: str | os.PathLike, base_model: str | None = None) -> None:
    """
    Write the routers of a model with sparse groups, what they select, and a model card. The base model's weights are
    not written.

    Args:
        model: with sparse groups; of one with an adapter, the routers in force.
        directory: to create. It appears when it is whole, or not at all.
        base_model: name of the base model, by default the one that the model was converted from.

    Raises:
        FileExistsError: if `directory` exists.
        NotADirectoryError, PermissionError: if it cannot be made.
        ValueError: for a model without sparse groups.
    """
    with atomic_directory(Path(directory)) as unfinished:
        write_routers(model, unfinished, base_model)


def write_routers(
    model: PreTrainedModel, directory: Path, base_model: str | None = None, place: str | None = None
) -> None:
    """
    The files of `save_routers`, into a directory that exists, perhaps with an adapter in it; `place`: the name that it
    will have on the Hub.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_has_sparse_groups(model)
    sparse = cast(SparsePreTrainedMixin, model)
    cast(SparseModelMixin, decoder_of(sparse)).update_config()
    config = sparse_config_of(sparse.config)
    if not GroupPlan.of_config(config).sparse_pairs():
        raise ValueError(
            "`mosa_plan` leaves every group dense, so that there are no routers to save: `mosa_hf.to_dense(model)` is "
            "the same model without them."
        )
    base_model = base_model or base_name(sparse.config)
    content = {
        "model_type": sparse.config.model_type,
        "base_model": base_model,
        "num_hidden_layers": config.num_hidden_layers,
        "num_groups": config.num_groups,
        "hidden_size": config.hidden_size,
        **{name: getattr(config, name) for name in MOSA_FIELDS},
    }
    save_file(router_tensors(model), directory / ROUTERS_NAME, metadata={"format": "pt"})
    has_adapter = (directory / ADAPTER_CONFIG_NAME).is_file()
    card = model_card(config, type(model), base_model, is_routers=True, has_adapter=has_adapter, place=place)
    (directory / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    (directory / ROUTERS_CONFIG_NAME).write_text(text, encoding="utf-8")


@checked()
def load_routers(model: PreTrainedModel, directory: str | os.PathLike, **fields: Any) -> PreTrainedModel:
    """
    A model with sparse groups that shares the weights of `model`, which is left as it was.

    Args:
        model: the base model, or one with sparse groups, whose routers are then left out.
        directory: that `save_routers` wrote, its weight file, or its name on the Hub.
        fields: `mosa_*` fields of the config that shall differ from those saved with the routers, such as
            `mosa_gate_slope=1.0` to train them. And how the Hub is asked: `token`, `cache_dir` and the others that
            `from_pretrained` has for that.

    Raises:
        FileNotFoundError: if there is no such directory, or a file of it is missing.
        ValueError: for damaged files, for routers of another model, for a model with adapters around it, and for
            `fields` that are unknown, out of range or would change nothing.
    """
    if is_adapted(model):
        raise ValueError(
            f"`model` is a PEFT model ({type(model).__name__}): load the routers into its base, and the adapter onto "
            "what that gives (`PeftModel.from_pretrained(load_routers(base, ...), adapter)`); or pass "
            "`model.get_base_model()`, in which the adapter stays, or `model.merge_and_unload()`."
        )
    hub = {name: fields.pop(name) for name in OF_THE_HUB if name in fields}
    return _with_routers(model, directory, fields, hub)


def _with_routers(
    model: PreTrainedModel, directory: str | os.PathLike, fields: dict[str, Any], hub: dict[str, Any]
) -> PreTrainedModel:
    """`load_routers`; `hub`: how the Hub is asked for a folder, see `OF_THE_HUB`."""
    if unknown := sorted(fields.keys() - set(MOSA_FIELDS)):
        raise ValueError(f"{', '.join(unknown)}: no such field; there are {', '.join(MOSA_FIELDS)}.")
    if isinstance(model, SparsePreTrainedMixin):
        model = without_sparse_groups(model)
    config, weights_file = read_routers(family_of(model.config.model_type), model.config, directory, fields, hub)
    converted = with_sparse_groups(model, config)
    _set_router_tensors(converted, weights_file)
    return converted


def read_routers(
    family: Family,
    base: PreTrainedConfig,
    directory: str | os.PathLike,
    fields: dict[str, Any] | None = None,
    hub: dict[str, Any] | None = None,
) -> tuple[Any, Path]:
    """
    What a folder of routers makes of a base model.

    Args:
        family: of the base model.
        base: the base model's config.
        directory, fields: see `load_routers`.
        hub: how the Hub is asked for a folder, see `OF_THE_HUB`.

    Returns:
        the config with sparse groups, and the file with the routers' tensors.

    Raises:
        FileNotFoundError, ValueError: see `load_routers`.
    """
    hub, fields = hub or {}, fields or {}
    config_file, weights_file = (_router_file(directory, name, hub) for name in (ROUTERS_CONFIG_NAME, ROUTERS_NAME))
    saved = _read_settings(config_file, family.config_class.from_base(base))
    try:
        config = family.config_class.from_base(base, **(saved | fields))
        sparse_config_of(config).check_read(fields.keys())
        sparse_config_of(config).warn_of_thresholds(fields.keys(), saved)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{config_file}: {error}") from error
    return config, weights_file


if TYPE_CHECKING:
    Model = PreTrainedModel  # the mixin's: of whatever class
else:
    Model = object


class RouterFilesMixin(Model):
    """Before every model class of a family: loads the base with routers beside it."""

    family: ClassVar[Family]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, routers=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, and:

        Args:
            routers: directory that `save_routers` wrote, or its name on the Hub. The first argument then is the base
                model's, which is loaded as its own class loads it.

        Raises:
            FileNotFoundError, ValueError: for damaged weight files, and for routers that are missing or damaged.
        """
        if routers is not None:
            check_argument("routers", routers, str | os.PathLike, "pass what `save_routers` wrote, or its name")
            return load_with_routers(cls, pretrained_model_name_or_path, routers, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


def load_with_routers(
    model_class: type[RouterFilesMixin], base: str | os.PathLike, routers: str | os.PathLike, **kwargs: Any
) -> Any:
    """
    `model_class.from_pretrained(base, routers=routers, **kwargs)`: the base model as its own class loads it, with
    routers.

    Args:
        model_class: of a family in `families`.
        base: directory or name of the base model, or of one with sparse groups, whose routers are then left out.
        routers: see `load_routers`.
        kwargs: of the base class' `from_pretrained`, and the fields that `load_routers` takes.

    Raises:
        FileNotFoundError, ValueError: see `load_routers`; also for a base of another family.
    """
    family = model_class.family
    hub = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):  # a directory or name of its own, or the model's
        where = {name: kwargs[name] for name in ("revision", "subfolder", "gguf_file") if name in kwargs}
        config = AutoConfig.from_pretrained(base if config is None else config, **hub, **where)
    classes = {family.name: family.base_class_of(model_class), family.config_class.model_type: model_class}
    if config.model_type not in classes:
        raise ValueError(
            f"{base} is a {config.model_type!r} model, but {model_class.__name__} needs a {family.name!r} model."
        )
    fields = {name: kwargs.pop(name) for name in MOSA_FIELDS if name in kwargs}
    loaded: Any = classes[config.model_type].from_pretrained(base, **kwargs)
    if kwargs.get("output_loading_info"):
        return _with_routers(loaded[0], routers, fields, hub), loaded[1]
    return _with_routers(loaded, routers, fields, hub)


def router_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The routers' tensors, by the names that they have in a model with a head."""
    return {
        name: at_hand(router, part).detach().cpu().contiguous()
        for name, (router, part) in _parts_of_routers(model).items()
    }


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether a model has PEFT's wrapper around it."""
    return bool(getattr(model, "peft_config", None)) and hasattr(model, "merge_and_unload")


def check_has_sparse_groups(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: for a model without sparse groups.
    """
    if is_adapted(model):
        raise ValueError(
            f"{type(model).__name__} has adapters around it: merge them (`merge_and_unload()`), or pass the model "
            "within (`get_base_model()`)."
        )
    if not isinstance(model, SparsePreTrainedMixin):
        raise ValueError(
            f"{type(model).__name__} has no sparse groups. Convert a model first: `mosa_hf.convert_model`."
        )


def base_name(config: PreTrainedConfig) -> str:
    """Name or directory of the model that a model was converted from; empty if unknown."""
    return (sparse_config_of(config).mosa_conversion or {}).get("source") or config.name_or_path or ""


def _parts_of_routers(model: PreTrainedModel) -> dict[str, tuple[MosaRouter, str]]:
    """The routers' parameters and buffers, by the names that they have in a model with a head."""
    return {
        f"{model.base_model_prefix}.{module_name}.{name}": (router, name)
        for module_name, router in named_routers(model.base_model)
        for name in router.state_dict(keep_vars=True)
    }


def _router_file(directory: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """The path of a file of a router folder, downloaded if it is one of the Hub."""
    path = Path(directory)
    if path.is_file():
        path = path.parent
    if not path.exists() and not path.is_absolute() and len(path.parts) <= 2:
        try:
            cached = cached_file(os.fspath(directory), name, **hub)
        except OSError as error:
            raise FileNotFoundError(f"{directory} is neither a folder nor a Hub name with {name}: {error}") from error
        assert cached is not None  # else it has raised
        return Path(cached)
    if not (path / name).is_file():
        raise FileNotFoundError(f"{path} has no {name}: give a folder that `save_routers` wrote.")
    return path / name


def _read_settings(path: Path, like: PreTrainedConfig) -> dict[str, Any]:
    """The `mosa_*` fields of a router folder, whose other entries have to describe a model `like` the one at hand."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    for name in ("model_type", "num_hidden_layers", "num_groups", "hidden_size"):
        config = like if name == "model_type" else sparse_config_of(like)
        if content.pop(name, None) != (expected := getattr(config, name)):
            raise ValueError(f"{path}: these routers are of another model; `{name}` of this one is {expected!r}.")
    content.pop("base_model", None)
    if unknown := sorted(content.keys() - set(MOSA_FIELDS)):
        raise ValueError(f"{path} has unknown fields: {', '.join(unknown)}.")
    if missing := sorted(set(MOSA_FIELDS) - set(LATER_FIELDS) - content.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    return content


@torch.no_grad()
def _set_router_tensors(model: PreTrainedModel, path: Path) -> None:
    """
    Fill a model's routers from a file.

    Raises:
        ValueError: naming the tensor that is missing, unknown, of another shape or dtype, or not finite.
    """
    headers = file_headers(path)
    targets = {name: getattr(router, part) for name, (router, part) in _parts_of_routers(model).items()}
    for name in sorted(headers.keys() | targets.keys()):
        if name not in headers:
            raise ValueError(f"{path} lacks {name}.")
        if name not in targets:
            raise ValueError(f"{path} has {name}, which is no router of the plan.")
        header, shape = headers[name], tuple(targets[name].shape)
        if header.shape != shape:
            raise ValueError(f"{path}: {name} has shape {header.shape}, but the model and the plan need {shape}.")
        check_router_dtype(path, name, header.dtype)
    for name, tensor in load_file(path).items():
        check_router_value(path, name, tensor)
        targets[name].copy_(tensor)
