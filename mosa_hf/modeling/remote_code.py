"""
The file beside a saved model through which Transformers loads it where `mosa_hf` was not imported, given
`trust_remote_code=True`: it imports the installed package, and says what to install where there is none.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from ..atomic_write import atomic_file

MODULE = "modeling_mosa_hf"
CODE = '''"""The code of this model is the package mosa-hf: `pip install mosa-hf`."""

from mosa_hf import {names}

__all__ = [{quoted}]
'''


if TYPE_CHECKING:  # what the mixin relies on
    ConfigBase = PreTrainedConfig
else:
    ConfigBase = object


class InstalledCodeConfigMixin(ConfigBase):
    """Belongs to a configuration whose classes are those of this package."""

    remote_classes: ClassVar[dict[str, str]] = {}  # "AutoModel" → the name of its class; `registration` fills it

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Does what upstream's does, and writes the file that loads the model by `trust_remote_code=True`."""
        self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in self.remote_classes.items()}
        names = sorted(set(self.remote_classes.values()))
        code = CODE.format(names=", ".join(names), quoted=", ".join(f'"{name}"' for name in names))
        with atomic_file(Path(save_directory) / f"{MODULE}.py") as unfinished:
            unfinished.write_text(code, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # last: without a config nothing loads

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: saving would copy the package's own files beside the model."""


class InstalledCodeModelMixin:
    """Belongs to a model of this package."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: saving would copy the package's own files beside the model."""
