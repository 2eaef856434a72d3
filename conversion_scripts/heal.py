"""
Heal a converted model on some text. Also installed as the command `mosa-heal`; starts under `accelerate launch` too.

    mosa-heal --model converted --text a.txt b.txt --destination healed --output_dir checkpoints --max_steps 1000

Every argument of Transformers' `TrainingArguments` is one of this command. A run that was interrupted goes on from its
last checkpoint in `--output_dir`; checkpoints of another model, text or kind of healing are refused.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from mosa_hf import GroupPlan
from mosa_hf.atomic_write import atomic_directory, atomic_file, check_absent
from mosa_hf.conversion.annealing import RateAnnealing
from mosa_hf.conversion.healing import HealingTrainer, TokenWindows, teacher_of
from mosa_hf.conversion.windows import spread
from mosa_hf.modeling.fingerprint import model_fingerprint
from mosa_hf.modeling.router_files import check_has_sparse_groups, write_routers

RATE_WINDOWS = 8  # of the text, on which rates are measured that are to fall
ABOUT_NAME = "healing.json"  # in `--output_dir`: what its checkpoints are of


@dataclass
class HealingArguments:
    model: str = field(metadata={"help": "directory of a converted model"})
    destination: str = field(metadata={"help": "directory to create; it appears only when it is whole"})
    text: list[str] = field(metadata={"help": "UTF-8 text files"})
    learn: Literal["lora", "full", "routers"] = field(
        default="lora",
        metadata={"help": "what learns: adapters (routers and adapters are written), all weights, or routers alone"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    window_length: int = field(default=1024, metadata={"help": "tokens of an example"})
    anneal_steps: int = field(
        default=0, metadata={"help": "steps over which groups go from selecting all tokens to their rates"}
    )
    cache_length: int = field(
        default=4096, metadata={"help": "log the share of keys and values that a cache keeps of this many tokens"}
    )
    top_k: int | None = field(default=None, metadata={"help": "compare the teacher's most likely tokens only"})


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((HealingArguments, TrainingArguments), description=__doc__)
    healing, training = parser.parse_args_into_dataclasses(arguments)
    try:
        heal(healing, training)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mosa-heal: {' '.join(str(error).split())}")


def heal(healing: HealingArguments, training: TrainingArguments) -> None:
    destination = Path(healing.destination)
    check_absent(destination)
    text = "\n\n".join(Path(path).read_text(encoding="utf-8") for path in healing.text)
    # Routers that learn get a gradient, and thresholds that follow them.
    gate = {"mosa_gate_slope": 1.0, "mosa_threshold_momentum": 0.99} if healing.learn == "routers" else {}
    model = AutoModelForCausalLM.from_pretrained(healing.model, **gate)
    check_has_sparse_groups(model)
    tokenizer = AutoTokenizer.from_pretrained(healing.model)
    checkpoint = last_checkpoint(Path(training.output_dir), about(healing, model, text), training.should_save)
    model.requires_grad_(healing.learn == "full")
    for router in model.mosa_routers().values():
        router.requires_grad_(healing.learn == "routers")
    student, teacher = model, teacher_of(model)
    examples = TokenWindows(tokenizer, text, healing.window_length)
    callbacks = []
    if healing.anneal_steps:  # measured before anything learns, so that a run that goes on has the same thresholds
        text_of_rates = logging.tqdm(spread(examples.windows, RATE_WINDOWS).split(1), desc="Reading rates")
        callbacks.append(RateAnnealing(model, text_of_rates, healing.anneal_steps))
    set_seed(training.seed)  # adapters start at random
    if healing.learn == "lora":
        student = get_peft_model(model, LoraConfig(r=healing.lora_rank, target_modules="all-linear"))
    trainer = HealingTrainer(
        student,
        teacher,
        args=training,
        train_dataset=examples,
        callbacks=callbacks,
        top_k=healing.top_k,
        cache_length=healing.cache_length,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        model.config.mosa_gate_slope, model.config.mosa_threshold_momentum = 0.0, 1.0
        with atomic_directory(destination) as unfinished:
            if healing.learn == "full":
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            else:
                if healing.learn == "lora":
                    student.save_pretrained(unfinished)
                write_routers(model, unfinished, healing.model)
        print(f"Wrote {destination}.")


def about(healing: HealingArguments, model: PreTrainedModel, text: str) -> dict[str, Any]:
    """What a checkpoint of a healing belongs to."""
    settings = ("learn", "lora_rank", "window_length", "anneal_steps", "top_k")
    return {
        "model": model_fingerprint(model),
        "plan": GroupPlan.of_config(model.config).to_list(),
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        **{name: getattr(healing, name) for name in settings},
    }


def last_checkpoint(directory: Path, about: dict[str, Any], writes: bool) -> str | None:
    """
    The checkpoint in `directory` to go on from. What it is `about` is noted there for the next time, by the process
    that `writes`.

    Raises:
        ValueError: for one of another healing.
    """
    checkpoint = get_last_checkpoint(directory) if directory.is_dir() else None
    path = directory / ABOUT_NAME
    if checkpoint is not None and path.exists():
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


if __name__ == "__main__":
    main()
