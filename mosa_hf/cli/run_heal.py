"""What `mosa-heal` does, see `heal.py`."""

from logging import getLogger
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..atomic_write import atomic_directory, check_absent, check_replaceable
from ..conversion import read_text
from ..conversion.healing import HealingTrainer, TokenWindows, teacher_of
from ..conversion.sources import CARD_NAME, find_source
from ..modeling.configuration import AS_CONVERTED, sparse_config_of
from ..modeling.model_card import model_card
from ..modeling.router_files import base_name, check_has_sparse_groups, write_routers
from ..modeling.sparse_models import SparsePreTrainedMixin
from ..modeling.token_ids import check_num_tokens
from .healing_arguments import HealingArguments
from .healing_checkpoints import ABOUT_NAME, about, last_checkpoint, last_whole
from .models import auto_class_of, check_has_model
from .options import hub_of

logger = getLogger(__name__)


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
    check_steps(training)
    for name in filter(None, (healing.model, healing.original)):
        check_has_model(name)
    text = read_text(healing.text, healing.text_characters)
    logger.info("Text: %s, %s characters", text.name, f"{text.num_characters:,}")
    # Routers that learn get a gradient, and thresholds that follow them.
    gate = {"mosa_gate_slope": 1.0, "mosa_threshold_momentum": 0.99} if healing.learn == "routers" else {}
    hub = hub_of(healing)
    auto_class = auto_class_of(healing.model, **hub)
    model = auto_class.from_pretrained(healing.model, dtype=healing.dtype, **hub, **gate)
    check_has_sparse_groups(model)
    what = "an example (`window_length`)"
    check_num_tokens(healing.window_length, model.config, what, "set a smaller `window_length`")
    original = None if healing.original is None else original_of(healing, model)
    tokenizer = AutoTokenizer.from_pretrained(healing.model, **hub)
    source = find_source(healing.model, **hub) if healing.learn == "full" else None  # of a model that is written whole
    belongs_to = about(healing, model, original, text)
    checkpoint = last_checkpoint(Path(str(training.output_dir)), belongs_to, training.should_save)
    model.requires_grad_(healing.learn == "full")
    for router in cast(SparsePreTrainedMixin, model).mosa_routers().values():
        router.requires_grad_(healing.learn == "routers")
    teacher, student = teacher_of(model) if original is None else original, cast(PreTrainedModel, model)
    examples = TokenWindows(tokenizer, text.documents, healing.window_length)
    check_whole_batch(training, len(examples))
    set_seed(training.seed)  # adapters start at random
    if healing.learn == "lora":
        # What `AutoPeftModelForCausalLM` finds the base by, which it loads as a language model alone.
        task = "CAUSAL_LM" if auto_class is AutoModelForCausalLM else None
        adapter = LoraConfig(task_type=task, r=healing.lora_rank, target_modules="all-linear")
        student = cast(PreTrainedModel, get_peft_model(model, adapter))
    trainer = HealingTrainer(
        student,
        teacher,
        args=training,
        train_dataset=examples,
        top_k=healing.top_k,
        cache_length=healing.cache_length,
    )
    try:
        if checkpoint is None or not go_to_end(trainer, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is damaged ({error}): remove it, and the one before is used.") from error
    except KeyboardInterrupt:
        reached = last_whole(Path(str(training.output_dir)))
        where = f"goes on from {reached}" if reached else "begins anew: checkpoints are written every `--save_steps`"
        raise KeyboardInterrupt(f"The same command {where}.") from None
    if trainer.is_world_process_zero():
        config = sparse_config_of(model.config)
        for name, value in AS_CONVERTED.items():
            setattr(config, name, value)
        known = config.mosa_conversion or {}
        record = {"learn": healing.learn, "steps": trainer.state.global_step, "text": text.name, "sha256": text.sha256}
        if "healing" in known:
            record["after"] = known["healing"]
        config.mosa_conversion = {**known, "healing": record}
        with atomic_directory(destination) as unfinished:
            if source is not None:
                source.copy_companions(unfinished)
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                card = model_card(config, type(model), base_name(model.config), is_routers=False)
                (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
            else:
                if healing.learn == "lora":
                    student.save_pretrained(unfinished)
                write_routers(model, unfinished)
        print(f"Wrote {destination}.")


def check_steps(training: TrainingArguments) -> None:
    """
    Raises:
        ValueError: for a training without a step.
    """
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(
            f"`--max_steps` must be at least 1, got {training.max_steps}; without it, `--num_train_epochs` counts."
        )
    if training.max_steps == -1 and not training.num_train_epochs > 0:
        raise ValueError(f"`--num_train_epochs` must be more than 0, got {training.num_train_epochs}.")


def check_whole_batch(training: TrainingArguments, num_examples: int) -> None:
    """
    Raises:
        ValueError: for fewer examples than a batch has, where such a batch is dropped.
    """
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and num_examples < batch:
        raise ValueError(
            f"The text has {num_examples} examples of `window_length` tokens, fewer than a batch of {batch}, which "
            "`--dataloader_drop_last` drops: set a smaller `--per_device_train_batch_size`, or give more text."
        )


def original_of(healing: HealingArguments, model: PreTrainedModel) -> PreTrainedModel:
    """What `--original` names, or is the original of, in the dtype of the converted model."""
    name, hub = str(healing.original), {} if healing.token is None else {"token": healing.token}
    original = auto_class_of(name, **hub).from_pretrained(name, dtype=model.dtype, **hub).requires_grad_(False).eval()
    return teacher_of(original) if isinstance(original, SparsePreTrainedMixin) else original


def go_to_end(trainer: HealingTrainer, checkpoint: str) -> bool:
    """Load a checkpoint of the last step, after which `Trainer` would take one more; False for any other."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    is_last = 0 < trainer.args.max_steps <= state.global_step
    if is_last:
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    return is_last
