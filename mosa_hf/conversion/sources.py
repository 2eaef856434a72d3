"""Where a model comes from: a folder, a GGUF file, or a name on the Hub, whose files are then fetched."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..arguments import checked
from ..safetensors_files import weight_map

logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter_config.json"  # PEFT's
CARD_NAME = "README.md"
# What goes along with a model's weights and config.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "emoji.json",
    "tekken.json",
    "*.tiktoken",
    "*.model",  # of sentencepiece
    "chat_template*",
    "*processor_config.json",
    f"{CHAT_TEMPLATE_DIR}/*",
    "LICENSE*",
    "NOTICE*",
)
LICENSE_FIELDS = ("license", "license_name", "license_link")  # of the front matter of a model card


class Loading(TypedDict, total=False):
    """
    How a base model is found and loaded, in the words of `from_pretrained`.

    revision: branch, tag or commit of a model on the Hub.
    token: for private and gated models; by default that of `hf auth login`.
    dtype: that the model computes in while routers are fitted, "auto" for that of its weights. Files stay as they are.
    device_map: where it computes meanwhile, as "cuda" or "auto"; by default the CPU.
    """

    revision: str | None
    token: str | bool | None
    dtype: str | torch.dtype
    device_map: str | int | torch.device | dict[str, Any] | None


def check_loading(given: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: for what `Loading` does not have.
    """
    if unknown := sorted(given.keys() - Loading.__annotations__.keys()):
        raise TypeError(f"{', '.join(unknown)}: no such argument; there are {', '.join(Loading.__annotations__)}.")


@dataclass(frozen=True)
class Source:
    """
    A model's files on this machine.

    Args:
        path: a folder, or a GGUF file.
        name: of the model: on the Hub, or of the folder or file.
        commit: of the Hub's; None for files that were given.
    """

    path: Path
    name: str
    commit: str | None = None

    def about(self) -> dict[str, Any]:
        """What a conversion records of its base: name, commit and license, as far as they are known."""
        about: dict[str, Any] = {"source": self.name}
        if self.commit is not None:
            about["commit"] = self.commit
        if license := self.license():
            about["license"] = license
        return about

    def copy_companions(self, destination: Path) -> None:
        """Copy what goes along with a model's weights and config into a folder."""
        for file in sorted({file for pattern in COMPANIONS for file in self.path.glob(pattern) if file.is_file()}):
            target = destination / file.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

    def license(self) -> dict[str, str]:
        """The license that the model card names in its front matter; empty if none."""
        card = self.path / CARD_NAME
        if not card.is_file():
            return {}
        try:
            found = metadata_load(card) or {}
        except Exception as error:  # a damaged card is no reason not to convert
            logger.warning("%s has no front matter that can be read (%s): its license is not copied.", card, error)
            return {}
        return {name: found[name] for name in LICENSE_FIELDS if isinstance(found.get(name), str)}


@checked()
def find_source(model: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Source:
    """
    The files of a model, fetched into the Hub's cache if it is a name there: weights in safetensors, config, tokenizer
    and what belongs to it. `HF_HUB_OFFLINE=1` takes what is in the cache.

    Args:
        model: a folder, a `.gguf` file, a name on the Hub, or a name and a GGUF file there, `owner/name/file.gguf`.
        revision, token: see `Loading`.

    Raises:
        FileNotFoundError: for what is neither there nor on the Hub, a private or gated model without a token that may
            read it, and a model without safetensors weights; the message names the remedy.
        ValueError: for a `revision` of what is not on the Hub.
    """
    path, name = Path(model), os.fspath(model)
    if path.exists():
        if revision is not None:
            raise ValueError(f"`revision` is of a model on the Hub, but {name} is a file or folder: leave it out.")
        return Source(path, path.resolve().name)
    is_gguf = path.suffix == ".gguf"
    could_be_a_name = len(path.parts) == 3 if is_gguf else len(path.parts) <= 2
    if path.is_absolute() or name.startswith(".") or not could_be_a_name:
        raise FileNotFoundError(f"{name} does not exist: give a model directory, a .gguf file, or a name on the Hub.")
    where: dict[str, Any] = {"revision": revision, "token": token}
    try:
        if is_gguf:
            repository = "/".join(path.parts[:2])
            file = Path(hf_hub_download(repository, path.name, **where))
            return Source(file, repository, file.parent.name)
        return _snapshot(name, where)
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is a gated model: ask for access on its page, then `hf auth login`, or pass a `token`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no `revision` {revision!r} on the Hub.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} does not exist: it is no folder here, and on the Hub there is no such model, or it is "
            "private and the `token` may not read it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, the Hub cannot be reached, and its cache does not have all of the model: give "
            f"a folder, or go online (HF_HUB_OFFLINE=0). {error}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: the model on the Hub has no such file. {error}") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{name} could not be fetched from the Hub: {error}") from error


def _snapshot(name: str, where: dict[str, Any]) -> Source:
    """A model of the Hub: first what says which files have its weights, then those alone."""
    about = [CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_NAME, CARD_NAME, *COMPANIONS]
    logger.info("Looking %s up on the Hub", name)
    folder = Path(snapshot_download(name, allow_patterns=about, **where))
    where = where | {"revision": folder.name}  # the same commit
    weights = [SAFE_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weights = sorted(set(weight_map(folder).values()))
    snapshot_download(name, allow_patterns=weights, **where)
    if not (folder / ADAPTER_NAME).is_file() and not all((folder / file).is_file() for file in weights):
        raise FileNotFoundError(
            f"{name} has no safetensors weights on the Hub. Try the `revision` of a pull request that adds them "
            "(refs/pr/1, for instance); or load the model with Transformers, `save_pretrained`, and convert that."
        )
    return Source(folder, name, folder.name)
