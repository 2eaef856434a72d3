"""
Heal a converted model on some text. Also installed as the command `mosa-heal`; starts under `accelerate launch` too.

    mosa-heal --model converted --text a.txt b.txt --destination healed --output_dir checkpoints --max_steps 1000

Every argument of Transformers' `TrainingArguments` is one of this command. A run that was interrupted goes on from its
last checkpoint in `--output_dir`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from mosa_hf.conversion.annealing import RateAnnealing
from mosa_hf.conversion.healing import HealingTrainer, TokenWindows, teacher_of
from mosa_hf.conversion.windows import spread
from mosa_hf.modeling.router_files import check_has_sparse_groups, write_routers
from mosa_hf.whole_files import check_absent, whole_directory

RATE_WINDOWS = 8  # of the text, on which rates are measured that are to fall


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
    checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        model.config.mosa_gate_slope, model.config.mosa_threshold_momentum = 0.0, 1.0
        with whole_directory(destination) as unfinished:
            if healing.learn == "full":
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            else:
                if healing.learn == "lora":
                    student.save_pretrained(unfinished)
                write_routers(model, unfinished, healing.model)
        print(f"Wrote {destination}.")


if __name__ == "__main__":
    main()
