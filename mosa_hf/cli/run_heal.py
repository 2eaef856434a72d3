"""What `mosa-heal` does, see `heal.py`."""

import json
from logging import getLogger
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..api import GroupPlan
from ..atomic_write import atomic_directory, atomic_file, check_absent, check_replaceable
from ..conversion import Text, read_text
from ..conversion.healing import HealingTrainer, TokenWindows, teacher_of
from ..conversion.sources import CARD_NAME
from ..modeling.configuration import sparse_config_of
from ..modeling.fingerprint import model_fingerprint
from ..modeling.model_card import model_card
from ..modeling.router_files import base_name, check_has_sparse_groups, write_routers
from ..modeling.sparse_models import SparsePreTrainedMixin
from .healing_arguments import HealingArguments
from .models import auto_class_of
from .options import hub_of

logger = getLogger(__name__)

ABOUT_NAME = "healing.json"  # in `--output_dir`: what its checkpoints are of
# Fields that change what a model with one plan and its weights computes.
COMPUTED_WITH = ("mosa_cache_budget", "mosa_cache_dtype", "mosa_include_first", "mosa_routing")


def parse(arguments: list[str], description: str) -> tuple[HealingArguments, TrainingArguments]:
    """What was typed; `--help-all` lists all of it and ends the command."""
    kinds: Any = (HealingArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, prog="mosa-heal", description=description)
    parser.add_argument("--help-all", action="help", help="show these arguments, Transformers' too")
    return cast(tuple[HealingArguments, TrainingArguments], parser.parse_args_into_dataclasses(arguments))


def heal(healing: HealingArguments, training: TrainingArguments) -> None:
    destination = Path(healing.destination)
    check_absent(destination)
    check_replaceable(Path(str(training.output_dir)) / ABOUT_NAME)
    text = read_text(healing.text, healing.text_characters)
    logger.info("Text: %s, %s characters", text.name, f"{text.num_characters:,}")
    # Routers that learn get a gradient, and thresholds that follow them.
    gate = {"mosa_gate_slope": 1.0, "mosa_threshold_momentum": 0.99} if healing.learn == "routers" else {}
    hub = hub_of(healing)
    model = auto_class_of(healing.model, **hub).from_pretrained(healing.model, dtype=healing.dtype, **hub, **gate)
    check_has_sparse_groups(model)
    tokenizer = AutoTokenizer.from_pretrained(healing.model, **hub)
    checkpoint = last_checkpoint(Path(str(training.output_dir)), about(healing, model, text), training.should_save)
    model.requires_grad_(healing.learn == "full")
    for router in cast(SparsePreTrainedMixin, model).mosa_routers().values():
        router.requires_grad_(healing.learn == "routers")
    teacher, student = teacher_of(model), cast(PreTrainedModel, model)
    examples = TokenWindows(tokenizer, text.documents, healing.window_length)
    set_seed(training.seed)  # adapters start at random
    if healing.learn == "lora":
        student = cast(
            PreTrainedModel, get_peft_model(model, LoraConfig(r=healing.lora_rank, target_modules="all-linear"))
        )
    trainer = HealingTrainer(
        student,
        teacher,
        args=training,
        train_dataset=examples,
        top_k=healing.top_k,
        cache_length=healing.cache_length,
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        reached = get_last_checkpoint(training.output_dir)
        where = f"goes on from {reached}" if reached else "begins anew: checkpoints are written every `--save_steps`"
        raise KeyboardInterrupt(f"The same command {where}.") from None
    if trainer.is_world_process_zero():
        config = sparse_config_of(model.config)
        config.mosa_gate_slope, config.mosa_threshold_momentum = 0.0, 1.0
        record = {"learn": healing.learn, "steps": trainer.state.global_step, "text": text.name, "sha256": text.sha256}
        config.mosa_conversion = {**(config.mosa_conversion or {}), "healing": record}
        with atomic_directory(destination) as unfinished:
            if healing.learn == "full":
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                card = model_card(config, type(model), base_name(model.config), is_routers=False)
                (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
            else:
                if healing.learn == "lora":
                    student.save_pretrained(unfinished)
                write_routers(model, unfinished)
        print(f"Wrote {destination}.")


def about(healing: HealingArguments, model: PreTrainedModel, text: Text) -> dict[str, Any]:
    """What a checkpoint of a healing belongs to."""
    config, settings = sparse_config_of(model.config), ("learn", "lora_rank", "window_length", "top_k")
    return {
        "model": model_fingerprint(model),
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
    checkpoint = get_last_checkpoint(directory) if directory.is_dir() else None
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
