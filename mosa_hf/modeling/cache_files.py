"""A filled cache on disk: one safetensors file, whose metadata say what is no tensor, and whose it is."""

import json
import os
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.configuration_utils import PreTrainedConfig

from ..arguments import checked
from ..atomic_write import atomic_file
from ..cache import SparseLayer, set_store_state, states_below, static_length, store_state, upstream_class
from ..compat import EMPTY_LAYERS
from .devices import execution_device
from .fingerprint import adapters_of, computation_of, model_fingerprint, numbers_fingerprint
from .forward_context import ForwardContextMixin

VERSION = 2
# Upstream's layers that can be written, and the numbers that they remember beside keys and values.
PLAIN_STATES: dict[type, tuple[str, ...]] = {
    DynamicLayer: (),
    DynamicSlidingWindowLayer: ("cumulative_length", "record_past"),
    StaticLayer: ("cumulative_length",),
    StaticSlidingWindowLayer: ("cumulative_length", "cumulative_length_int"),
    **dict.fromkeys(EMPTY_LAYERS, ()),
}


@checked()
def save_cache(past_key_values: Cache, path: str | os.PathLike, model: nn.Module) -> None:
    """
    Write a cache that `model` filled to one safetensors file, from which `load_cache` makes an equal one. A file that
    is there is replaced at once.

    Args:
        past_key_values: a `DynamicCache` or a `StaticCache`. The tokens and an attention mask are no part of it.
        path: of the file.
        model: the MoSA model, which the file then belongs to: its groups, weights, thresholds and dtype.

    Raises:
        ValueError: for a cache that is not of this model, holds half a call, or has layers that cannot be written; for
            a model that is split over processes, or remembers of pictures where the next token stands.
    """
    decoder = caching_decoder(model)
    check_positions(model)
    decoder.upgrade_cache(past_key_values)
    check_can_be_written(past_key_values)
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] = []
    for layer_idx, layer in enumerate(past_key_values.layers):
        states, own = layer_state(cast(CacheLayerMixin, layer))
        tensors |= {f"layers.{layer_idx}.{name}": own_memory(x) for name, x in states.items()}
        plain.append(own)
    is_static = past_key_values.is_compileable
    about = {
        "version": VERSION,
        "model": fingerprint_of(decoder),
        "max_cache_len": static_length(past_key_values) if is_static else None,
        "layers": plain,
    }
    text = json.dumps(about)
    with atomic_file(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata={"mosa_cache": text, "checksum": checksum(text, tensors)})


@checked()
def load_cache(path: str | os.PathLike, model: nn.Module) -> Cache:
    """
    The cache that `save_cache` wrote, on the devices where the layers of `model` compute.

    Args:
        path: of the file.
        model: the model that filled it, or an equal one.

    Returns:
        a `DynamicCache` or a `StaticCache`, as it was.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged, is no such file, or belongs to a model of another class, or of
            other groups, weights or dtype.
    """
    decoder, path = caching_decoder(model), Path(path)
    about, tensors = read_cache_file(path)
    check_fingerprint(path, about["model"], fingerprint_of(decoder))
    cache = empty_cache(about, decoder.config)
    decoder.upgrade_cache(cache)
    devices = layer_devices(decoder)
    try:
        for layer_idx, (layer, plain) in enumerate(zip(cache.layers, about["layers"], strict=True)):
            states = states_below(f"layers.{layer_idx}", tensors)
            states = {name: x.to(devices[layer_idx]) for name, x in states.items()}
            set_layer_state(cast(CacheLayerMixin, layer), states, plain)
        if tensors:
            raise ValueError(f"there are states of no layer: {sorted(tensors)}")
        decoder.upgrade_cache(cache)  # which looks at the lengths
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold what this model's cache does: {error}") from error
    return cache


# Whose it is


def caching_decoder(model: nn.Module) -> ForwardContextMixin:
    """
    The part of a model that caches are made for, within adapters or other wrappers.

    Raises:
        ValueError: for a model without MoSA, or one that is split over processes.
    """
    decoder = next((module for module in model.modules() if isinstance(module, ForwardContextMixin)), None)
    if decoder is None:
        raise ValueError(
            f"{type(model).__name__} is no MoSA model: keep the caches of other models by `torch.save`, or convert "
            "the model (`mosa_hf.convert_model`)."
        )
    if any((getattr(module, "_tp_size", None) or 1) > 1 for module in (model, decoder)):
        raise ValueError(
            "Each process of a tensor-parallel model has a part of its cache, and a file would be of one part: load "
            "the model without `tp_plan`, or let it read the text again."
        )
    return decoder


def check_positions(model: nn.Module) -> None:
    """
    Raises:
        ValueError: for a model that has read pictures, and remembers by how much positions are off since.
    """
    for module in model.modules():
        deltas = getattr(module, "rope_deltas", None)
        if isinstance(deltas, torch.Tensor) and bool((deltas != 0).any()):
            raise ValueError(
                f"{type(module).__name__} keeps of the pictures that it has read where the next token stands "
                "(`rope_deltas`), which is no part of a cache: `save_cache` writes caches of text alone. Keep both by "
                "`torch.save`."
            )


def fingerprint_of(decoder: ForwardContextMixin) -> dict[str, Any]:
    """What a cache depends on of the model that fills it, as JSON gives it back."""
    return {
        "class": type(decoder).__name__,
        "groups": json.loads(json.dumps(list(decoder.cache_specs().values()))),
        "dtype": str(decoder.dtype),
        "weights": [model_fingerprint(decoder), numbers_fingerprint(decoder)],
        "fields": computation_of(decoder.config),
        "adapters": adapters_of(decoder),
    }


def check_fingerprint(path: Path, was: dict[str, Any], own: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the file is of another model, saying in what it differs.
    """
    named = {name: f"{name} {was.get(name)}, and this one is of {own[name]}" for name in ("class", "dtype")}
    other = {
        **named,
        "groups": "other groups than this one's, in kind, window, sparsity, `mosa_cache_budget` or `mosa_cache_dtype`",
        "weights": "other weights or thresholds than this one's",
        "fields": "another configuration than this one's",
        "adapters": "other active adapters than this one's, or others' scales",
    }
    for name in own:  # in order: another class has other groups, too
        if was.get(name) != own[name]:
            raise ValueError(
                f"{path} is the cache of a model of {other[name]}: load the model that wrote it, or let this one read "
                "the text again."
            )


def layer_devices(decoder: ForwardContextMixin) -> dict[int, torch.device | str | int]:
    """Where each layer computes."""
    modules = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
    return {cast(int, module.layer_idx): execution_device(module) for module in modules if [*module.parameters()]}


# Layers


def check_can_be_written(cache: Cache) -> None:
    """
    Raises:
        ValueError: naming what cannot be written, and what to do.
    """
    if cache.offloading:
        raise ValueError("An offloaded cache cannot be written by `save_cache`: read the text with a `DynamicCache`.")
    for layer_idx, layer in enumerate(cache.layers):
        if upstream_class(layer) not in PLAIN_STATES:
            raise ValueError(
                f"Layer {layer_idx} is a {upstream_class(layer).__name__}, which `save_cache` cannot write: read the "
                "text with a `DynamicCache` or a `StaticCache`, or keep this cache by `torch.save`."
            )
    if cache.is_compileable and all(cache.is_sliding):
        raise ValueError(
            "A static cache whose layers all have a sliding window does not know how long it is, so `save_cache` "
            "cannot write it: read the text with a `DynamicCache`."
        )


def empty_cache(about: dict[str, Any], config: PreTrainedConfig) -> Cache:
    """A cache with layers of the kinds that were written."""
    kinds = [plain["kind"] for plain in about["layers"]]
    if about["max_cache_len"] is not None:
        return StaticCache(config=config, max_cache_len=about["max_cache_len"])
    cache = DynamicCache(config=config)
    if [type(layer).__name__ for layer in cache.layers] != kinds:  # one that was made without a config
        cache = DynamicCache()
        cache.layers = [DynamicLayer() for _ in kinds]
    return cache


def layer_state(layer: CacheLayerMixin) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a layer remembers, for `set_layer_state`: tensors by name, and what JSON can hold."""
    kind = upstream_class(layer)
    numbers = {name: int(getattr(layer, name)) for name in PLAIN_STATES[kind]}
    plain: dict[str, Any] = {"kind": kind.__name__, "states": numbers, "stores": []}
    tensors: dict[str, torch.Tensor] = {}
    if layer.keys is not None and layer.values is not None:
        tensors = {"keys": layer.keys, "values": layer.values}
    if kind is StaticLayer:  # what lies behind its tokens is never read
        length = numbers["cumulative_length"]
        tensors = {name: x[:, :, :length] for name, x in tensors.items()}
    if isinstance(layer, SparseLayer) and layer.seen is not None:
        tensors["seen"] = layer.seen
    for i, store in enumerate(layer.stores if isinstance(layer, SparseLayer) else ()):
        states, own = store_state(store)
        tensors |= {f"stores.{i}.{name}": x for name, x in states.items()}
        plain["stores"].append(own)
    return tensors, plain


def set_layer_state(layer: CacheLayerMixin, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """
    Let an empty layer remember what another one did, see `layer_state`. Takes what it knows out of `tensors`.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: for states that no layer like this can have had.
    """
    kind = upstream_class(layer)
    if kind.__name__ != plain["kind"] or set(PLAIN_STATES[kind]) != set(plain["states"]):
        raise ValueError(f"a {kind.__name__} cannot hold the states of a {plain['kind']}")
    stores = layer.stores if isinstance(layer, SparseLayer) else ()
    if isinstance(layer, SparseLayer) and layer.stores:
        layer.seen = tensors.pop("seen", None)
    for i, (store, own) in enumerate(zip(stores, plain["stores"], strict=True)):
        set_store_state(store, states_below(f"stores.{i}", tensors), own)
    if tensors:
        key, value = tensors.pop("keys"), tensors.pop("values")
        layer.lazy_initialization(key, value)
        if issubclass(kind, StaticLayer):
            assert layer.keys is not None and layer.values is not None
            layer.keys[:, :, : key.shape[2]], layer.values[:, :, : value.shape[2]] = key, value
        else:
            layer.keys, layer.values = key, value
    for name, number in plain["states"].items():
        if isinstance(held := getattr(layer, name), torch.Tensor):
            held.fill_(number)
        else:
            setattr(layer, name, type(held)(number))
    if tensors:
        raise ValueError(f"there are states that no layer has: {sorted(tensors)}")


# The file


def own_memory(states: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, which shares no memory with another one: safetensors refuses that."""
    return states.detach().to("cpu", copy=True).contiguous()


def checksum(about: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of all that a file says, eight hexadecimal digits."""
    crc = zlib.crc32(about.encode())
    for name in sorted(tensors):
        states = tensors[name]
        crc = zlib.crc32(f"{name} {states.dtype} {list(states.shape)}".encode(), crc)
        crc = zlib.crc32(states.flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def read_cache_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    What `save_cache` wrote beside tensors, and the tensors by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged, no such file, or of a later version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: `mosa_hf.save_cache` writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: safetensors gives parts of one mapping of the file, which would live as long as any of them.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or write it again.") from error
    if "mosa_cache" not in metadata:
        raise ValueError(f"{path} is not a file that `mosa_hf.save_cache` wrote.")
    if checksum(metadata["mosa_cache"], tensors) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged (its checksum is another one): copy or write it again.")
    about = json.loads(metadata["mosa_cache"])
    if (version := about.get("version")) != VERSION:
        raise ValueError(
            f"{path} has version {version} of the format, and this mosa_hf reads version {VERSION}: use the "
            "one that wrote it, or let the model read the text again."
        )
    return about, tensors
