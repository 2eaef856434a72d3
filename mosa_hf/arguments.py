"""What public functions are called with: what is mistaken for something else is refused before anything is done."""

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")

# By the type in an annotation, what an argument must be. Of annotations with another type nothing is asked.
KINDS: dict[Any, str] = {
    Cache: "a `DynamicCache` or a `StaticCache`",
    Collection: "a list",
    Iterable: "a list",
    Mapping: "a mapping",
    NoneType: "None",
    PreTrainedModel: "a model with a config, as `from_pretrained` loads it",
    PreTrainedTokenizerBase: "a tokenizer, as `AutoTokenizer.from_pretrained` loads it",
    dict: "a dict",
    float: "a number",
    int: "an integer",
    nn.Module: "a model, as `from_pretrained` loads it",
    os.PathLike: "a path",
    str: "a string",
    torch.Tensor: "a tensor",
}


def checked(**remedies: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """
    A function whose arguments are checked by their annotations when it is called, see `check_argument`.

    Args:
        remedies: what to do instead, by argument; by default, how the function is called.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
        annotations = {
            each.name: each.annotation
            for each in parameters
            if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        }
        usual = f"call `{function.__qualname__.removesuffix('.__init__')}({', '.join(annotations)})`"

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in annotations:
                    check_argument(name, value, annotations[name], remedies.get(name, usual))
            return function(*args, **kwargs)

        return call

    return decorate


def check_argument(name: str, value: Any, annotation: Any, remedy: str) -> None:
    """
    Args:
        name: of the argument.
        value: what was passed.
        annotation: of the argument. What is to be a `list` may be another collection, but not an empty one.
        remedy: what to do instead.

    Raises:
        ValueError: for what is of another kind.
    """
    kinds = _kinds_in(annotation)
    names_nothing = os.PathLike in kinds and isinstance(value, str) and not value
    if not names_nothing and any(_is(value, kind) for kind in kinds):
        return
    if descriptions := _described(annotation):
        shown = repr(value)
        if len(shown) > 60 or "\n" in shown:
            shown = f"an object of class {type(value).__name__}"
        raise ValueError(f"`{name}` must be {descriptions}, got {shown}: {remedy}.")


def _kinds_in(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that there is."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _described(annotation: Any) -> str | None:
    """What an argument must be; None if nothing is asked of it."""
    parts: list[str] = []
    for kind in _kinds_in(annotation):
        plain = get_origin(kind) or kind
        if plain is list:
            parts.append(f"a list of one or more, each {_described(get_args(kind)[0])}")
        elif plain in KINDS:
            parts.append(KINDS[plain])
        elif isinstance(plain, type) and plain.__module__.startswith("mosa_hf."):
            parts.append(f"a `{plain.__name__}`")
        else:
            return None
    return " or ".join(dict.fromkeys(parts))


def _is(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    if plain is PreTrainedModel:  # adapters and other wrappers hand on its config
        return isinstance(value, nn.Module) and hasattr(value, "config")
    if plain is Cache:  # an `EncoderDecoderCache` has none of its own
        return isinstance(value, Cache) and hasattr(value, "layers")
    if plain is list:
        kinds = _kinds_in(get_args(kind)[0])
        is_list = isinstance(value, Collection) and not isinstance(value, str | Mapping) and len(value) > 0
        return is_list and all(any(_is(each, own) for own in kinds) for each in value)
    if plain in (int, float):
        return isinstance(value, Integral if plain is int else Real) and not isinstance(value, bool)
    return isinstance(value, plain) if isinstance(plain, type) else True
