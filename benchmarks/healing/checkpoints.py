"""What a healing leaves on its way: checkpoints that can be scored, and what it logged."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, PreTrainedModel

from mosa_hf import load_routers
from testing import pretrained

from ..frontier.methods import Method
from . import page
from .recipe import Recipe, routers_folder


def methods(work: Path, recipe: Recipe) -> list[Method]:
    """What can be scored: the original, conversions before healing, and what the checkpoints hold."""
    base = pretrained.smollm2_directory()

    def original() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base).eval()

    def method(setting: str, step: int, multiplier: float = 1) -> Method:
        """A conversion with the adapters of a step, times `multiplier`; 0: without any."""
        window, sparsity = map(int, setting.split("/"))
        parameters: dict[str, Any] = {"window": window, "sparsity": sparsity, "tokens": recipe.tokens_until(step)}
        if multiplier != 1:
            parameters["adapters"] = multiplier

        def build() -> PreTrainedModel:
            model = load_routers(original(), routers_folder(work, setting))
            return adapted(model, checkpoint(work, step), multiplier) if step else model

        return Method("healed" if step else "converted", parameters, build)

    own, *others = recipe.settings
    # What healing ended with comes first: to score all of it takes a while.
    wanted = [(own, recipe.steps), *((setting, recipe.steps, times) for setting, times in recipe.elsewhere)]
    wanted += [(own, step) for step in sorted({0, *recipe.scored} - {recipe.steps})]
    wanted += [(setting, 0) for setting in others]
    whole = [each for each in wanted if not each[1] or is_whole(checkpoint(work, each[1]))]
    return [Method("original", {}, original, prompt="dense"), *(method(*each) for each in whole)]


def checkpoint(work: Path, step: int) -> Path:
    return work / "checkpoints" / f"checkpoint-{step}"


def is_whole(checkpoint: Path) -> bool:
    """Whether the trainer, which may be at work, has written all of it."""
    return (checkpoint / "trainer_state.json").exists()


def adapted(model: PreTrainedModel, folder: Path, multiplier: float = 1) -> PreTrainedModel:
    model = PeftModel.from_pretrained(model, folder)
    with rescale_adapter_scale(model, multiplier):
        return model.merge_and_unload().eval()


def logged(work: Path, recipe: Recipe, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what the healing logged, up to its last checkpoint."""
    states = sorted(
        (work / "checkpoints").glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    if not states:
        return []
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [
        {
            "method": "healing",
            "parameters": {
                "window": recipe.window,
                "sparsity": recipe.sparsity,
                "tokens": recipe.tokens_until(row["step"]),
            },
            "task": page.DIVERGENCE,
            "settings": {"tokens": recipe.tokens},
            "divergence": row["loss"],
            "selected": row["selected"],
            "learning_rate": row["learning_rate"],
            **origin,
        }
        for row in history
        if "loss" in row
    ]
