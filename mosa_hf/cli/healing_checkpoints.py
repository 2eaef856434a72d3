"""Where a healing that was interrupted goes on from, and what its checkpoints are of."""

import json
import re
from logging import getLogger
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..api import GroupPlan
from ..atomic_write import atomic_file
from ..conversion import Text
from ..modeling.configuration import sparse_config_of
from ..modeling.fingerprint import model_fingerprint
from .healing_arguments import HealingArguments

logger = getLogger(__name__)

ABOUT_NAME = "healing.json"  # in `--output_dir`: what its checkpoints are of
# Fields that change what a model with one plan and its weights computes.
COMPUTED_WITH = ("mosa_cache_budget", "mosa_cache_dtype", "mosa_include_first", "mosa_routing")


def about(
    healing: HealingArguments, model: PreTrainedModel, original: PreTrainedModel | None, text: Text
) -> dict[str, Any]:
    """What a checkpoint of a healing belongs to."""
    config, settings = sparse_config_of(model.config), ("learn", "lora_rank", "window_length", "top_k")
    return {
        "model": model_fingerprint(model),
        "original": None if original is None else model_fingerprint(original),
        "plan": GroupPlan.of_config(model.config).to_list(),
        "config": {name: getattr(config, name) for name in COMPUTED_WITH},
        "dtype": str(model.dtype),
        "text": text.sha256[:16],
        **{name: getattr(healing, name) for name in settings},
    }


def last_checkpoint(directory: Path, about: dict[str, Any], writes: bool) -> str | None:
    """
    The checkpoint in `directory` to go on from. What it is `about` is noted there for the next time, by the process
    that `writes`.

    Raises:
        ValueError: for one of another healing, or of another training.
    """
    checkpoint = last_whole(directory)
    path = directory / ABOUT_NAME
    if checkpoint is not None and not path.exists():
        raise ValueError(
            f"{checkpoint} is not of `mosa-heal`, which would have written {ABOUT_NAME} beside it: set another "
            "`--output_dir`."
        )
    if checkpoint is not None:
        known = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in about.items() if known.get(name) != value]:
            raise ValueError(
                f"{checkpoint} is of a healing with another `{'`, `'.join(changed)}`: set another `--output_dir`, or "
                "remove this one."
            )
    if writes:
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def last_whole(directory: Path) -> str | None:
    """The last checkpoint in `directory` that was written to its end: the trainer's state is what comes last."""
    numbers = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in directory.glob("*"))
    for _, path in sorted(((int(number[1]), path) for number, path in numbers if number is not None), reverse=True):
        if (path / TRAINER_STATE_NAME).is_file():
            return str(path)
        logger.warning("%s was left unfinished, and is not used.", path)
    return None
