"""
What healing brings back: quality of a conversion against the tokens of text that it was healed on.

    python -m benchmarks.heal DIRECTORY
    torchrun --nproc-per-node 2 -m benchmarks.heal DIRECTORY    # the same steps, shared by two processes
    python -m benchmarks.heal DIRECTORY --score
    python -m benchmarks.heal DIRECTORY --smoke

SmolLM2-135M-Instruct is converted to few bytes and healed with adapters, as `mosa-heal` does it; some of the
checkpoints on the way are scored as `benchmarks.frontier` scores conversions, on the same passages. The text that it
is healed on shares no passage with these; one of them is of a kind that healing has never seen.

All that is made lies in DIRECTORY: stop it when you like and give the same directory to go on; with more `--steps`, a
finished healing goes on too. `--score` heals nothing and scores the checkpoints that are there, so that it can run
beside the healing. Rows are appended to
`heal.jsonl` as they are measured, and a row that is there is not measured again; `heal.md` and `heal.png` show them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from mosa_hf.conversion_scripts.heal import HealingArguments, heal
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from mosa_hf import ConversionConfig, convert_checkpoint, load_routers, save_routers
from mosa_hf.whole_files import whole_file

from . import heal_page, measure, sources
from .exercises import SMOKE, Exercise, Size, continuations_of_texts, word_runs
from .frontier import Method, Models, Results, measure_here, row_key
from .origin import origin_of

# Characters of each at most. The first is of a kind that is scored.
TEXTS = {"python_docs": None, "shakespeare": 1_500_000, "encyclopaedia": None, "python_topics": None}
PIECE = 6000  # characters of text, at least, that are left out together


@dataclass(frozen=True)
class Recipe:
    """The conversion that is healed, `window` and `sparsity`, and how long: `steps` of `examples` of `tokens` each."""

    window: int = 256
    sparsity: int = 14
    steps: int = 248
    examples: int = 2
    tokens: int = 2048
    save_steps: int = 8
    scored: tuple[int, ...] = (16, 32, 64, 128)  # steps after which it is scored, besides the last
    # Where the last adapters are tried too, and what they are multiplied by: less where there is less to heal.
    elsewhere: tuple[tuple[str, float], ...] = (("512/10", 0.7), ("512/10", 1), ("1024/10", 0.5), ("1024/10", 1))

    @property
    def settings(self) -> list[str]:
        """Window/sparsity: its own, then those that the last adapters are tried at."""
        return list(dict.fromkeys((f"{self.window}/{self.sparsity}", *(setting for setting, _ in self.elsewhere))))

    def tokens_until(self, step: int) -> int:
        return step * self.examples * self.tokens


def prepare(work: Path, recipe: Recipe, size: Size, tokenizer: PreTrainedTokenizerBase, asked: list[Exercise]) -> None:
    """Routers, converted model and text in `work`, as far as they are not there."""
    directory = sources.smollm2_directory()
    models = Models(directory, tokenizer, size)
    models.original.config.name_or_path = directory.name
    held = set().union(*map(word_runs, scored_passages(tokenizer, asked)))
    if not held.isdisjoint(set().union(*map(word_runs, tokenizer.batch_decode(models.calibration)))):
        raise ValueError("Routers would be fitted on passages that are scored: choose another number of windows.")
    for setting in recipe.settings:
        if not (folder := routers_folder(work, setting)).exists():
            window, sparsity = setting.split("/")
            save_routers(models.converted(ConversionConfig(window=int(window), sparsity=float(sparsity))), folder)
    if not (converted := work / "converted").exists():
        convert_checkpoint(directory, converted, routers=routers_folder(work, recipe.settings[0]))
    if not (work / "text.txt").exists():
        with whole_file(work / "text.txt") as unfinished:
            unfinished.write_text(healing_text(held, size.characters), encoding="utf-8")


def routers_folder(work: Path, setting: str) -> Path:
    return work / f"routers-{setting.replace('/', '-')}"


def healed_folder(work: Path, recipe: Recipe) -> Path:
    return work / f"healed-{recipe.steps}"


def scored_passages(tokenizer: PreTrainedTokenizerBase, asked: list[Exercise]) -> Iterator[str]:
    for exercise in asked:
        for reading in exercise.readings:
            yield tokenizer.decode(reading.context + reading.continuations[0].ids)


def healing_text(held: set[tuple[str, ...]], characters: int | None = None) -> str:
    """All `TEXTS`, but for the pieces that have a run of words in common with `held`; `characters` of each."""
    kept = []
    for name, most in TEXTS.items():
        piece: list[str] = []
        for paragraph in (sources.text(name)[:most][:characters] + "\n\n").split("\n\n"):
            piece.append(paragraph)
            if sum(map(len, piece)) > PIECE:
                joined, piece = "\n\n".join(piece), []
                if held.isdisjoint(word_runs(joined)):
                    kept.append(joined)
    return "\n\n".join(kept)


def training(work: Path, recipe: Recipe) -> tuple[HealingArguments, TrainingArguments]:
    """
    The arguments of `mosa-heal`.

    Raises:
        ValueError: if the examples of a step cannot be shared out evenly among the processes.
    """
    num_processes = PartialState().num_processes
    if recipe.examples % num_processes:
        raise ValueError(f"{num_processes} processes cannot share {recipe.examples} examples a step: start fewer.")
    healing = HealingArguments(
        model=str(work / "converted"),
        destination=str(healed_folder(work, recipe)),
        text=[str(work / "text.txt")],
        window_length=recipe.tokens,
    )
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.examples // num_processes,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        bf16=True,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_steps=recipe.save_steps,
        seed=0,
    )
    return healing, arguments


def methods(work: Path, recipe: Recipe) -> list[Method]:
    """What can be scored: the original, conversions before healing, and what the checkpoints hold."""
    base = sources.smollm2_directory()

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
            "task": heal_page.DIVERGENCE,
            "settings": {"tokens": recipe.tokens},
            "divergence": row["loss"],
            "selected": row["selected"],
            "learning_rate": row["learning_rate"],
            **origin,
        }
        for row in history
        if "loss" in row
    ]


def asked_of(row: dict[str, Any], asked: list[Exercise]) -> bool:
    """Whether a row answers one of these exercises."""
    return any(row["task"] in each.tasks and row["settings"] == each.all_settings for each in asked)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="DIRECTORY", help="of what is made; it may not exist yet")
    parser.add_argument("--score", action="store_true", help="score the checkpoints that are there, heal nothing")
    parser.add_argument(
        "--steps", type=int, help=f"of {Recipe.examples} x {Recipe.tokens} tokens (default: {Recipe.steps})"
    )
    parser.add_argument("--windows", type=int, help="of calibration text (default: 12)")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which say nothing but that it runs")
    parser.add_argument("--output", type=Path, help="directory of the results; for --smoke a temporary one")
    options = parser.parse_args(arguments)
    recipe, size = Recipe(), Size()
    if options.smoke:
        recipe = Recipe(64, 8, steps=4, tokens=64, save_steps=1, scored=(1, 2), elsewhere=(("128/8", 0.5),))
        size = SMOKE
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (Path(scratch) if options.smoke else Path(__file__).parent / "results")
        run(options, recipe, size, output, origin_of("benchmarks.heal", arguments))


def run(options: argparse.Namespace, recipe: Recipe, size: Size, output: Path, origin: dict[str, Any]) -> None:
    work = options.work
    tokenizer = AutoTokenizer.from_pretrained(sources.smollm2_directory())
    # The frontier's own calibration text tells which passages are scored, so that its rows are of the same ones.
    asked = continuations_of_texts(tokenizer, measure.calibration(tokenizer, size.windows, size.window), size)
    processes = PartialState(cpu=True)
    is_done = options.score or healed_folder(work, recipe).exists()
    healing = None if is_done else training(work, recipe)
    with processes.main_process_first():
        prepare(work, recipe, replace(size, windows=options.windows or size.windows), tokenizer, asked)
    if healing is not None:
        heal(*healing)
    if not processes.is_main_process:
        return
    results, frontier = Results(output / "heal.jsonl"), Results(output / "frontier.jsonl")
    found = logged(work, recipe, origin)
    found += [row for row in frontier.rows.values() if row["method"] == "original" and asked_of(row, asked)]
    results.add([row for row in found if row_key(row) not in results.rows])
    try:
        measure_here(methods(work, recipe), asked, results, origin)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    heal_page.write(list(results.rows.values()), output)
    print((output / "heal.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
