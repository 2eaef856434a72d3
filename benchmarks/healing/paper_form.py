"""
The paper's heads in a model that exists: groups of SmolLM2 swapped for them and healed, beside as many sparse groups.

    python -m benchmarks.healing.paper_form DIRECTORY
    python -m benchmarks.healing.paper_form DIRECTORY --steps 16 --groups 8 48
    python -m benchmarks.healing.paper_form DIRECTORY --time
    python -m benchmarks.healing.paper_form DIRECTORY --smoke

Both forms get the same routers, choose the same groups, and are trained alike: all weights but the routers, on the
divergence from the original, on the same windows of text in the same order. What was trained on is scored as
`benchmarks.frontier` scores conversions. `--time` times a training step and a decoding step of models that are there
already, in turns with the original's: run it alone.

All that is made lies in DIRECTORY; rows are appended to `paper_form.jsonl` as they are measured, and a row that is
there is not measured again: stop it when you like, and give more `--steps` to go on. `paper_form.md` shows them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mosa_hf import ConversionConfig, convert_model
from mosa_hf.atomic_write import atomic_directory, atomic_file
from mosa_hf.conversion import convert_to_native
from mosa_hf.conversion.healing import HealingTrainer, TokenWindows
from mosa_hf.evaluation import CacheMemory, filled_cache, score
from mosa_hf.modeling.router import routers_of
from testing import pretrained
from testing.markdown import markdown_table, wrapped

from .. import metrics
from ..frontier.measuring import bytes_per_token
from ..frontier.methods import Method, fits_of_all
from ..frontier.results import Results, make_rows
from ..frontier.tasks import Size, Suite, continuations_of_texts, word_runs
from ..provenance import about, origin_of
from ..speed.prompt import seconds_of
from .recipe import healing_text, scored_passages

ORIGINAL, PAPER, SPARSE = "original", "the paper's heads", "sparse groups"
TIMES = {"training": "a training step", "decoding": "a decoding step"}


@dataclass(frozen=True)
class Recipe:
    """
    What is swapped, and how long it is trained: `steps` of a window of `tokens`.

    paper, sparse: what groups become: of both, caches of about as many bytes.
    scored: steps after which models are scored, besides the last.
    decoded: steps that are timed of decoding.
    """

    groups: tuple[int, ...] = (8, 24, 48)
    paper: ConversionConfig = ConversionConfig(window=0, sparsity=6)
    sparse: ConversionConfig = ConversionConfig(window=256, sparsity=14)
    steps: int = 128
    scored: tuple[int, ...] = (0, 16, 64)
    tokens: int = 2048
    learning_rate: float = 1e-4
    rounds: int = 3
    decoded: int = 32

    def stages(self) -> list[int]:
        return [*(step for step in self.scored if step < self.steps), self.steps]

    def conversion(self, form: str, groups: int) -> ConversionConfig:
        return replace(self.paper if form == PAPER else self.sparse, groups=groups)


class Models:
    """The original, and both forms of it, before training and after."""

    def __init__(self, work: Path, recipe: Recipe, size: Size):
        directory = pretrained.smollm2_directory()
        self.work, self.recipe = work, recipe
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.original = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.original.config.name_or_path = directory.name
        # The frontier's own calibration text tells which passages are scored, so that its rows are of the same ones.
        frontier = metrics.calibration(self.tokenizer)
        self.asked = continuations_of_texts(self.tokenizer, frontier, size)
        self.calibration = metrics.calibration(self.tokenizer, size.windows, size.window)
        self.characters = size.characters

    @cached_property
    def _fits(self):
        return fits_of_all(self.original, self.calibration)

    @cached_property
    def examples(self) -> TokenWindows:
        path = self.work / "text.txt"
        if not path.exists():
            held = set().union(*map(word_runs, scored_passages(self.tokenizer, self.asked)))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as unfinished:
                unfinished.write_text(healing_text(held, self.characters), encoding="utf-8")
        return TokenWindows(self.tokenizer, [path.read_text(encoding="utf-8")], self.recipe.tokens)

    def folder(self, form: str, groups: int) -> Path:
        return self.work / f"{'paper' if form == PAPER else 'sparse'}-{groups}"

    def converted(self, form: str, groups: int) -> PreTrainedModel:
        """Before any training."""
        folder = self.folder(form, groups)
        if not folder.exists():
            convert: Callable[..., PreTrainedModel] = convert_to_native if form == PAPER else convert_model
            model = convert(self.original, self.recipe.conversion(form, groups), self.calibration, self._fits)
            with atomic_directory(folder) as unfinished:
                model.save_pretrained(unfinished)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def trained(self, form: str, groups: int, steps: int) -> PreTrainedModel:
        """After so many steps, which go on from the last checkpoint."""
        if not steps:
            return self.converted(form, groups)
        folder = self.folder(form, groups).with_suffix(".checkpoints")
        last = get_last_checkpoint(folder) if folder.exists() else None
        if last is not None and int(last.rpartition("-")[2]) == steps:
            return AutoModelForCausalLM.from_pretrained(last).eval()
        model = self.converted(form, groups)
        for router in routers_of(model):
            router.requires_grad_(False)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=self.recipe.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_steps=steps,
            save_total_limit=1,
            seed=0,
        )
        trainer = HealingTrainer(model, self.original, args=arguments, train_dataset=self.examples)
        trainer.train(resume_from_checkpoint=last)
        return model.eval()


def measure(models: Models, results: Results, origin: dict[str, Any]) -> None:
    """Add what `results` lacks: of all models before training, then of all after the first steps, and so on."""
    recipe, of_a_token = models.recipe, bytes_per_token(models.original)
    cells = list(product(recipe.stages(), recipe.groups, (PAPER, SPARSE)))

    def add(method: Method, build: Callable[[], PreTrainedModel]) -> None:
        lacking = [suite for suite in models.asked if results.lacks(method, suite)]
        model = build() if lacking else None
        for suite in lacking:
            scores = [each for sample in suite.samples for each in score(CacheMemory(model, sample.context), sample)]
            results.add(make_rows(method, suite, scores, of_a_token, origin))

    add(Method(ORIGINAL, {}, prompt="dense"), lambda: models.original)
    for stage, groups, form in tqdm(cells, desc="Healing and scoring", unit="model"):
        conversion = recipe.conversion(form, groups)
        parameters = {"groups": groups, "window": conversion.window, "sparsity": conversion.sparsity}
        parameters |= {"tokens": stage * recipe.tokens, "calibration": len(models.calibration)}
        add(Method(form, parameters), partial(models.trained, form, groups, stage))


def time_steps(models: Models, results: Results, origin: dict[str, Any]) -> None:
    """Add rows of how long steps take of both forms, relative to the original's, medians over rounds in turns."""
    recipe = models.recipe
    window, (sample, *_) = models.examples[0]["input_ids"][None], models.asked[0].samples
    context = torch.tensor([sample.context])
    for groups in recipe.groups:
        own = {ORIGINAL: models.original, **{form: models.converted(form, groups) for form in (PAPER, SPARSE)}}
        for what, call_of in (("training", training_step), ("decoding", decoding_steps)):
            calls = [call_of(model, window if what == "training" else context, recipe) for model in own.values()]
            seconds_of(calls, 1)
            base, *others = seconds_of(calls, recipe.rounds)
            rows = []
            for form, each in zip((PAPER, SPARSE), others, strict=True):
                ratio = median(ours / theirs for ours, theirs in zip(each, base, strict=True))
                settings = {"tokens": recipe.tokens if what == "training" else context.shape[1]}
                row = {"method": form, "parameters": {"groups": groups}, "task": TIMES[what], "settings": settings}
                rows.append({**row, "ratio": ratio, **origin})
            results.add(rows)


def training_step(model: PreTrainedModel, window: torch.Tensor, recipe: Recipe) -> Callable[[], object]:
    def call() -> None:
        model.train()
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return call


def decoding_steps(model: PreTrainedModel, context: torch.Tensor, recipe: Recipe) -> Callable[[], object]:
    def call() -> None:
        metrics.decode_speed(model, cache, context[:, -1:], recipe.decoded)

    cache = filled_cache(model.eval(), context)
    return call


def page(rows: list[dict[str, Any]], asked: list[Suite], recipe: Recipe) -> str:
    """Markdown: how it was measured, and a row for each model."""
    keys = {task: suite.all_settings for suite in asked for task in suite.tasks}
    scored = [row for row in rows if row["settings"] == keys.get(row["task"])]
    times = [row for row in rows if row["task"] in TIMES.values()]
    original = {row["task"]: row["perplexity"] for row in scored if row["method"] == ORIGINAL}
    found: dict[tuple[int, str, int], dict[str, dict[str, Any]]] = {}
    for row in scored:
        if row["method"] != ORIGINAL:
            given = row["parameters"]
            found.setdefault((given["groups"], row["method"], given["tokens"]), {})[row["task"]] = row
    table = [["groups", "", "healed on, tokens", "KV bytes", *keys], ["---:", "---", *["---:"] * (2 + len(keys))]]
    table.append(["", ORIGINAL, "", "1.000", *(f"{original[task]:.2f}" for task in keys if task in original)])
    for (groups, form, tokens), own in sorted(found.items()):
        share = sum(row["share"] for row in own.values()) / len(own)
        table.append([str(groups), form, f"{tokens:,}", f"{share:.3f}"])
        table[-1] += [_cell(own[task]["perplexity"], original[task]) if task in own else "" for task in keys]
    timed = [["groups", *(f"{form}, {what}" for what in TIMES.values() for form in (PAPER, SPARSE))]]
    timed.append(["---:"] * len(timed[0]))
    ratios = {(row["parameters"]["groups"], row["task"], row["method"]): row["ratio"] for row in times}
    for groups in sorted({groups for groups, *_ in ratios}):
        own_ratios = [ratios.get((groups, what, form)) for what in TIMES.values() for form in (PAPER, SPARSE)]
        timed.append([str(groups), *("" if each is None else f"{each:.2f}" for each in own_ratios)])
    return wrapped(
        PAGE.format(
            paper=f"sparsity {recipe.paper.sparsity:g}",
            sparse=f"window {recipe.sparse.window}, sparsity {recipe.sparse.sparsity:g}",
            tokens=recipe.tokens,
            facts=about(scored + times),
            table=markdown_table(table),
            timed=markdown_table(timed) if times else "Steps were not timed.",
        )
    )


def _cell(perplexity: float, original: float) -> str:
    return f"{perplexity:.2f} ({perplexity / original - 1:+.1%})"


PAGE = """# The paper's heads in a model that exists

Key/value groups of SmolLM2-135M-Instruct (90 in 30 layers) swapped for the paper's heads
(`conversion.convert_to_native`, {paper}), beside the same groups as sparse groups (`convert_model`, {sparse}), which
take about as many bytes. Both start from the same fitted routers, which stay; all other weights learn the original's
next-token distribution, float32, AdamW at a constant learning rate after four steps, a window of {tokens} tokens a
step, the same windows in the same order. Perplexity of 512 tokens after 3072 others, read through the model's own
cache; bytes are those of the live cache, as a share of the original's.

{facts}

{table}

Time of a step as a share of the original's, medians of turns in one process:

{timed}
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healing.paper_form",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", type=Path, metavar="DIRECTORY", help="of what is made; it may not exist yet")
    parser.add_argument("--steps", type=int, help=f"of {Recipe.tokens} tokens (default: {Recipe.steps})")
    parser.add_argument("--groups", type=int, nargs="+", help="that are swapped, of 90")
    parser.add_argument("--passages", type=int, default=4, help="of each text that is scored (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=Size.windows, help="of calibration text")
    parser.add_argument("--time", action="store_true", help="time steps of what is there, train nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which say nothing but that it runs")
    parser.add_argument("--output", type=Path, help="directory of the results; for --smoke a temporary one")
    options = parser.parse_args(arguments)
    recipe, size = Recipe(), Size(passages=options.passages, windows=options.windows)
    if options.smoke:
        recipe = Recipe((4,), steps=2, scored=(0,), tokens=64, rounds=1, decoded=2)
        size = Size(prompt=192, scored=32, passages=1, windows=2, window=128, characters=200_000)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    if options.groups is not None:
        recipe = replace(recipe, groups=tuple(options.groups))
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (Path(scratch) if options.smoke else Path(__file__).parents[1] / "results")
        run(options.work, recipe, size, output, origin_of("benchmarks.healing.paper_form", arguments), options.time)


def run(work: Path, recipe: Recipe, size: Size, output: Path, origin: dict[str, Any], is_timed: bool = False) -> None:
    models, results = Models(work, recipe, size), Results(output / "paper_form.jsonl")
    try:
        (time_steps if is_timed else measure)(models, results, origin)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    with atomic_file(output / "paper_form.md") as unfinished:
        unfinished.write_text(page(list(results.rows.values()), models.asked, recipe), encoding="utf-8")
    print((output / "paper_form.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
