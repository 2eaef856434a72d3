"""
Where the decoder of a model is, its layers and their attention. They are found by what they do, whatever a family
calls them; and no module knows its own place: people take layers out, repeat and move them.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from types import MethodType
from typing import Any, TypeVar, cast, overload

from accelerate.utils.other import is_compiled_module
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .configuration import is_composite

# What families call the projection of an attention module from heads to hidden states.
OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj", "Wo", "wo", "output_linear", "final_linear")

Attention = TypeVar("Attention", bound=nn.Module)


def function_of_family(module_class: type, name: str) -> Callable | None:
    """The function `name` beside a class of Transformers, with our mixins or without, in the module of its family."""
    found = (getattr(sys.modules[each.__module__], name, None) for each in module_class.__mro__)
    return next((function for function in found if function is not None), None)


@cache
def calls_attention_interface(module_class: Any) -> bool:
    """Whether the forward of a class of Transformers, with our mixins or without, calls an attention function."""
    for each in module_class.__mro__:
        if "forward" in vars(each) and not each.__module__.startswith("mosa_hf."):
            code = getattr(inspect.unwrap(vars(each)["forward"]), "__code__", None)
            return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    return False


def check_own_forward(model: nn.Module) -> None:
    """
    Raises:
        ValueError: where something has set the `forward` of a module that a copy of another class would still run; but
            for Accelerate's hooks (`device_map`), and for methods (of kernels) of modules whose class stays.
    """
    for name, module in model.named_modules():
        own = vars(module).get("forward")
        if own is None or "_hf_hook" in vars(module):
            continue
        changes = isinstance(module, PreTrainedModel) or is_attention(module)
        is_method = isinstance(own, MethodType) and own.__self__ is module  # which is copied with its module
        if changes or not is_method:
            place = f"model.{name}.forward" if name else "model.forward"
            raise ValueError(
                f"`{place}` is not that of {type(module).__name__}: something has set it, such as `torch.compile` or "
                f"`Accelerator.prepare`. `del {place}` first, and set it again on the result."
            )


def check_uncompiled(model: nn.Module, remedy: str) -> None:
    """
    Raises:
        ValueError: for a model of which a part is compiled: graphs pass hooks over. `remedy` is what to do instead.
    """
    if any(is_compiled_module(each) or each._compiled_call_impl is not None for each in model.modules()):
        raise ValueError(f"`model` is compiled, and its graphs pass over what is recorded here: {remedy}.")


def is_attention(module: nn.Module) -> bool:
    """Whether a module of a decoder is the causal self-attention of a layer, by Transformers' own code or ours."""
    if vars(module).get("layer_idx") is None or not calls_attention_interface(cast(Any, type(module))):
        return False
    if type(module).__module__.startswith("mosa_hf."):  # if it is not causal any more, its attention refuses that
        return True
    return type(module).__module__.startswith("transformers.") and getattr(module, "is_causal", True) is not False


@cache
def passes_keywords(forward: Callable, callee: str | None = None) -> bool:
    """
    Whether a function hands keyword arguments that it does not know on to what it calls.

    Args:
        forward: the function.
        callee: the name of that; None: whatever it calls.
    """
    function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body[0]
    if not isinstance(function, ast.FunctionDef) or (unknown := function.args.kwarg) is None:
        return False
    return any(
        keyword.arg is None and ast.unparse(keyword.value) == unknown.arg
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and callee in (None, ast.unparse(node.func))
        for keyword in node.keywords
    )


def layers_of(decoder: nn.Module) -> nn.ModuleList | None:
    """The list of a decoder's layers; None if it has none with attention, as what wraps a decoder."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and any(is_attention(module) for module in child.modules()):
            return child
    return None


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """
    The part of a model that runs the layers: mostly `model.base_model`. Of a model around a language model it is a
    part of that.

    Raises:
        ValueError: if none has layers with attention that can be sparse.
    """
    outer = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    if outer is not None and is_composite(outer.config):
        model = outer.get_decoder()  # what looks at pictures has layers, too
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and layers_of(module) is not None:
            return module
    raise ValueError(
        f"{type(model).__name__} has no layers with causal attention that calls Transformers' "
        "`ALL_ATTENTION_FUNCTIONS`: pass a model as Transformers loads it, without replaced attention modules."
    )


def output_projection_of(module: nn.Module) -> nn.Module:
    """
    The projection of an attention module from heads to hidden states.

    Raises:
        ValueError: if it has no known name.
    """
    for name in OUTPUT_PROJECTIONS:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise ValueError(
        f"{type(module).__name__} has no output projection of a known name ({', '.join(OUTPUT_PROJECTIONS)}), which "
        "calibration needs: add its name to `OUTPUT_PROJECTIONS` of `mosa_hf/modeling/layers.py`."
    )


def attention_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    """The lists that each layer has of its attention modules, if it has several (LongCat); else no list."""
    lists = [
        child
        for layer in layers_of(decoder) or ()
        for child in layer.children()
        if isinstance(child, nn.ModuleList) and len(child) and is_attention(child[0])
    ]
    if len({len(each) for each in lists}) > 1 or len(lists) not in (0, len(layers_of(decoder) or ())):
        raise ValueError(
            f"Layers of {type(decoder).__name__} have different numbers of attention modules, so that none of them "
            "has a place of its own."
        )
    return lists


def num_places(decoder: nn.Module) -> int:
    """How many places for attention the layers of a decoder have: one each, or as many as there are in a layer."""
    return sum(map(len, attention_lists(decoder))) or len(layers_of(decoder) or ())


def layer_of(name: str, model: nn.Module) -> int:
    """
    The place of the layer that a module lies in, counted from the model's first, by the module's name in the model.
    Where layers have several attention modules, each of them counts.

    Raises:
        ValueError: for a module that lies in no list of layers.
    """
    if not (places := re.findall(r"(?:^|\.)(\d+)(?=\.)", name)):
        raise ValueError(f"`{name}` lies in no layer of a model: pass the whole model.")
    lists = attention_lists(decoder_of(model))
    return int(places[0]) * len(lists[0]) + int(places[1]) if lists else int(places[0])


@overload
def attention_modules(decoder: nn.Module, attention_class: type[Attention]) -> dict[int, Attention]: ...
@overload
def attention_modules(decoder: nn.Module, attention_class: None = None) -> dict[int, Any]: ...
def attention_modules(decoder: nn.Module, attention_class: type[Attention] | None = None) -> dict[int, Any]:
    """
    Place of a layer → its attention module, for the layers of a decoder that have one; see `layer_of`.

    Args:
        decoder: see `decoder_of`.
        attention_class: of the modules; None: whatever `is_attention` finds.
    """
    parts: list[nn.Module] = [part for each in attention_lists(decoder) for part in each]
    return {
        place: module
        for place, part in enumerate(parts or layers_of(decoder) or ())
        for module in part.modules()
        if (is_attention(module) if attention_class is None else isinstance(module, attention_class))
    }


def check_numbered(modules: Mapping[int, nn.Module], num_layers: int) -> None:
    """
    Args:
        modules: see `attention_modules`.
        num_layers: of the model, and of a cache for it.

    Raises:
        ValueError: for attention modules of which two would keep their tokens in one layer of a cache, or one in none.
    """
    numbers = [cast(int, module.layer_idx) for module in modules.values()]
    if len(set(numbers)) < len(numbers) or any(number >= num_layers for number in numbers):
        raise ValueError(
            f"The attention modules have `layer_idx` {numbers}, by which they find their layer of a cache, of "
            f"{num_layers} layers. After layers were taken out, repeated or added, set `layer_idx` of each attention "
            "module to its place, and `config.num_hidden_layers` to the number of layers."
        )


def check_windows(modules: Mapping[int, nn.Module], is_sliding: list[bool]) -> None:
    """
    Args:
        modules: see `attention_modules`.
        is_sliding: of each layer of a cache, whether it forgets what has left a window.

    Raises:
        ValueError: for attention modules that read all tokens, whose layer of the cache forgets some.
    """
    for module in modules.values():
        layer_idx = cast(int, module.layer_idx)
        forgets = layer_idx < len(is_sliding) and is_sliding[layer_idx]
        if forgets and getattr(module, "sliding_window", 0) is None:
            raise ValueError(
                f"`layer_idx` {layer_idx} of an attention module without a sliding window is that of a layer "
                "with one, whose cache forgets what it would read. After layers were moved, set `layer_idx` of each "
                "attention module to its place, and make a new cache."
            )


def check_number(num_layers: int, config) -> None:
    """
    Raises:
        ValueError: for a model of fewer layers than its config says.
    """
    if num_layers < config.num_hidden_layers:
        raise ValueError(
            f"The model has {num_layers} layers, but `config.num_hidden_layers` is {config.num_hidden_layers}, so it "
            f"would be loaded with layers of random weights: set `config.num_hidden_layers = {num_layers}`."
        )
