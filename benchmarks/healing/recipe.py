"""What is healed, on which text, how long, and where it lies."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments

from mosa_hf import ConversionConfig, convert_checkpoint, save_routers
from mosa_hf.atomic_write import atomic_file
from mosa_hf.cli.healing_arguments import HealingArguments
from testing import corpora, pretrained

from ..frontier.methods import Models
from ..frontier.tasks import Size, Suite, word_runs

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


def prepare(work: Path, recipe: Recipe, size: Size, tokenizer: PreTrainedTokenizerBase, asked: list[Suite]) -> None:
    """Routers, converted model and text in `work`, as far as they are not there."""
    directory = pretrained.smollm2_directory()
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
        with atomic_file(work / "text.txt") as unfinished:
            unfinished.write_text(healing_text(held, size.characters), encoding="utf-8")


def routers_folder(work: Path, setting: str) -> Path:
    return work / f"routers-{setting.replace('/', '-')}"


def healed_folder(work: Path, recipe: Recipe) -> Path:
    return work / f"healed-{recipe.steps}"


def scored_passages(tokenizer: PreTrainedTokenizerBase, asked: list[Suite]) -> Iterator[str]:
    for suite in asked:
        for sample in suite.samples:
            yield tokenizer.decode(sample.context + sample.continuations[0].ids)


def healing_text(held: set[tuple[str, ...]], characters: int | None = None) -> str:
    """All `TEXTS`, but for the pieces that have a run of words in common with `held`; `characters` of each."""
    return "\n\n".join(
        piece
        for name, most in TEXTS.items()
        for piece in unseen_pieces(corpora.text(name)[:most][:characters], held, PIECE)
    )


def unseen_pieces(text: str, held: set[tuple[str, ...]], characters: int) -> Iterator[str]:
    """Paragraphs of `text` in pieces of more than `characters`, but for pieces with a run of words that is `held`."""
    piece: list[str] = []
    for paragraph in (text + "\n\n").split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > characters:
            joined, piece = "\n\n".join(piece), []
            if held.isdisjoint(word_runs(joined)):
                yield joined


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
