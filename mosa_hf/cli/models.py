"""Models that commands read with, by folder or name."""

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import (
    CONFIG_NAME,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from ..modeling.configuration import is_composite
from ..modeling.router_files import ROUTERS_CONFIG_NAME
from .options import default_device_map


def load(name: str, options: argparse.Namespace, revision: str | None = None) -> PreTrainedModel:
    where = {"token": options.token} | ({} if revision is None else {"revision": revision})
    auto_class = auto_class_of(name, **where)
    return auto_class.from_pretrained(
        name, dtype=options.dtype, device_map=options.device_map or default_device_map(), **where
    ).eval()


def auto_class_of(name: str, **hub: str | None) -> Any:
    """
    The Auto class that loads a language model, or one of pictures or sound and text, which reads text alone too.

    Raises:
        ValueError: for a folder that has no model.
    """
    check_has_model(name)
    config_class = type(AutoConfig.from_pretrained(name, **hub))
    if is_composite(config_class):
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if config_class in auto_class._model_mapping:
                return auto_class
    return AutoModelForCausalLM


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_NAME).is_file()


def folders_of(name: str) -> list[str]:
    """A model's directory, or name on the Hub; before it an adapter's, if that is what `name` is."""
    if is_adapter(name):
        return [name, PeftConfig.from_pretrained(name).base_model_name_or_path]
    check_has_model(name)
    return [name]


def check_has_model(name: str) -> None:
    """
    Raises:
        ValueError: for a folder of an adapter or of routers, without the model that they are for.
    """
    if is_adapter(name):
        raise ValueError(
            f"{name} has an adapter ({ADAPTER_CONFIG_NAME}), without the model that it is for: load both (a healed "
            "one as its README.md says), `merge_and_unload()`, save the result with the tokenizer, and name what you "
            "saved, in `mosa-heal` beside `--original`."
        )
    if (Path(name) / ROUTERS_CONFIG_NAME).is_file() and not (Path(name) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{name} has routers ({ROUTERS_CONFIG_NAME}), without the model that they are for: name that, with these "
            "as `--routers` where a command has it; or load both (`from_pretrained(base, routers=...)`), save the "
            "result with the tokenizer, and name what you saved."
        )
