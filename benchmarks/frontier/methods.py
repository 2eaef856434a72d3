"""
Memory against quality: what is lost for how many bytes of keys and values, by conversions and by their rivals.

    python -m benchmarks.frontier
    python -m benchmarks.frontier --converted DIRECTORY --routers DIRECTORY --plan FILE
    python -m benchmarks.frontier --smoke

SmolLM2-135M-Instruct reads a context; then the log-probability of what follows it is measured on unseen texts, and
whether facts in the context are found again (`mosa_hf/evaluation/retrieval.py`). Each method is measured as it would
decode, and its bytes at the end of what is scored. Conversions read the prompt as sparsely as all else; rivals by the
code of kvpress read it in full and prune it once.

Rows are appended to `frontier.jsonl` as they are measured, and a row that is there is not measured again: stop it when
you like and run it again. `frontier.md` and `frontier.png` show them.

All of it is meant to take less than half an hour on two quiet cores. It needs matplotlib; kvpress gets an environment
of its own, in the cache of `benchmarks/sources.py`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf import ConversionConfig, GroupPlan, convert_model, load_routers
from mosa_hf.conversion.allocation import candidate_plan
from mosa_hf.conversion.calibration import fit_routers
from mosa_hf.evaluation import CacheMemory, Score, score, summary
from mosa_hf.modeling.families import family_of
from mosa_hf.modeling.sparse_models import with_sparse_groups

from . import frontier_table, measure, sources
from .exercises import SMOKE, Exercise, Size, exercises
from .origin import origin_of

ROOT = Path(__file__).parent.parent
OURS = ("1024/8", "512/8", "256/8", "512/16", "128/4", "256/16")
WINDOWS = (1344, 896, 576)  # 0.375, 0.25 and 0.16 of the tokens
KEPT = (0.44, 0.25, 0.156)  # of the prompt
SELECTED = (0.355, 0.226, 0.129)  # by KVzap beyond a window of 128: about the bytes of our first three and last
# SmolLM2's chat template, of a user's text that the assistant repeats.
CHAT = ("<|im_start|>user\n", "\n\nRepeat the previous context exactly.<|im_end|>\n<|im_start|>assistant\n")


@dataclass(frozen=True)
class Method:
    """
    What is measured. `name` and `parameters` tell it from all others.

    build: the model; None for rivals, which run elsewhere.
    prompt: how it reads the prompt, "sparse" or "dense".
    frees_memory: whether what it drops is gone, or only masked.
    """

    name: str
    parameters: dict[str, Any]
    build: Callable[[], PreTrainedModel] | None = None
    prompt: str = "sparse"
    frees_memory: bool = True


class Results:
    """The rows of a file of JSON lines, which may not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {row_key(row): row for row in map(json.loads, lines)}

    def lacks(self, method: Method, exercise: Exercise) -> bool:
        return any(row_key(row) not in self.rows for row in self.heads(method, exercise))

    def heads(self, method: Method, exercise: Exercise) -> list[dict[str, Any]]:
        """What tells the rows of a method and an exercise from others."""
        head = {"method": method.name, "parameters": method.parameters, "settings": exercise.all_settings}
        return [{**head, "task": task} for task in exercise.tasks]

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows |= {row_key(row): row for row in rows}


def row_key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in ("method", "parameters", "task", "settings")], sort_keys=True)


class Models:
    """The original, and what is made of it. Routers are fitted once, when they are first needed."""

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase, size: Size):
        self.directory, self.size = directory, size
        self.original = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.calibration = measure.calibration(tokenizer, size.windows, size.window)
        self._converted: dict[ConversionConfig, PreTrainedModel] = {}

    @cached_property
    def _config(self):
        return family_of(self.original.config.model_type).config_class.from_base(self.original.config)

    @cached_property
    def _fits(self):
        return fit_routers(self.original, self.calibration, candidate_plan(self._config, ConversionConfig()))

    def converted(self, conversion: ConversionConfig) -> PreTrainedModel:
        if conversion not in self._converted:
            self._converted[conversion] = convert_model(self.original, conversion, self.calibration, self._fits)
        return self._converted[conversion]

    def window_alone(self, window: int) -> PreTrainedModel:
        return measure.first_token_and_window(with_sparse_groups(self.original, self._config), window)

    def methods(self, ours: list[str]) -> list[Method]:
        """The original, conversions of `ours`, "window/sparsity", and rivals that run here."""
        text = f"{len(self.calibration)} x {self.calibration.shape[1]}"
        methods = [Method("original", {}, lambda: self.original, prompt="dense")]
        conversions = [
            ConversionConfig(window=int(w), sparsity=float(s)) for w, s in (each.split("/") for each in ours)
        ]
        for conversion in conversions:
            parameters = {"window": conversion.window, "sparsity": conversion.sparsity, "calibration": text}
            methods.append(Method("ours", parameters, lambda conversion=conversion: self.converted(conversion)))
        if conversions:  # the rates of one of them: the default, if it is among them
            drawn = conversions[conversions.index(ConversionConfig()) if ConversionConfig() in conversions else 0]
            parameters = {"window": drawn.window, "sparsity": drawn.sparsity, "calibration": text}
            methods.append(
                Method("random selection", parameters, lambda: measure.random_selection(self.converted(drawn)))
            )
        return methods

    def given(self, converted: list[Path], routers: list[Path], plans: list[Path]) -> list[Method]:
        """Methods of folders and plans on disk, told from others of the same name by what they hold."""
        methods = []
        for folder in converted:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            parameters = {"folder": folder.name, "routers": digest_of(model)}
            methods.append(Method("converted", parameters, lambda model=model: model))
        for folder in routers:
            model = load_routers(self.original, folder).eval()
            parameters = {"folder": folder.name, "routers": digest_of(model)}
            methods.append(Method("routers", parameters, lambda model=model: model))
        for path in plans:
            conversion = ConversionConfig(plan=GroupPlan.load(path))
            digest = hashlib.sha256(json.dumps(conversion.plan.to_list()).encode()).hexdigest()[:12]
            parameters = {"file": path.name, "plan": digest}
            methods.append(Method("plan", parameters, lambda conversion=conversion: self.converted(conversion)))
        return methods


def digest_of(model: PreTrainedModel) -> str:
    """Of the routers of a model with sparse groups, and of its plan."""
    digest = hashlib.sha256(json.dumps(GroupPlan.of_config(model.config).to_list()).encode())
    for router in model.mosa_routers().values():
        for tensor in router.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def kvpress_methods(all_kept: Sequence[float] = KEPT, all_selected: Sequence[float] = SELECTED) -> list[Method]:
    """Rivals that `benchmarks/rivals.py` knows, each with several shares that it keeps."""
    pruning = [
        Method(name, {"kept": kept}, prompt="dense")
        for name in ("StreamingLLM", "SnapKV", "TOVA", "ExpectedAttention")
        for kept in all_kept
    ]
    masking = [
        Method("KVzap", {"window": 128, "selected": selected, "step": 16}, prompt="dense", frees_memory=False)
        for selected in all_selected
    ]
    return pruning + masking


def make_rows(
    method: Method, exercise: Exercise, scores: list[Score], bytes_per_token: int, origin: dict[str, Any]
) -> list[dict[str, Any]]:
    """
    A row for each task.

    Args:
        scores: of all continuations of the exercise.
        bytes_per_token: that the original's keys and values take.
        origin: how, when and with what it was measured.
    """
    rows = []
    for task in exercise.tasks:
        result = summary(task, scores)
        length = result.pop("length")
        rows.append(
            {
                "method": method.name,
                "parameters": method.parameters,
                "task": task,
                "share": result["kv_bytes"] / (length * bytes_per_token),
                **result,
                "prompt": method.prompt,
                "frees_memory": method.frees_memory,
                "settings": exercise.all_settings,
                **origin,
            }
        )
    return rows


def measure_here(methods: list[Method], asked: list[Exercise], results: Results, origin: dict[str, Any]) -> None:
    """Add what `results` lacks of methods that run in this process."""
    missing = [(method, [each for each in asked if results.lacks(method, each)]) for method in methods]
    total = sum(len(exercise.readings) for _, lacking in missing for exercise in lacking)
    with tqdm(total=total, desc="Frontier", unit="reading") as progress:
        for method, lacking in missing:
            if not lacking:
                continue
            progress.set_postfix_str(frontier_table.label(method.name, method.parameters))
            model = method.build()
            for exercise in lacking:
                scores = []
                for reading in exercise.readings:
                    scores += score(CacheMemory(model, reading.context), reading)
                    progress.update()
                results.add(make_rows(method, exercise, scores, bytes_per_token(model), origin))


def bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in a model of dense groups like this one."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def measure_rivals(
    methods: list[Method],
    asked: list[Exercise],
    results: Results,
    origin: dict[str, Any],
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add what `results` lacks of methods that `benchmarks/rivals.py` runs."""
    methods = [method for method in methods if any(results.lacks(method, exercise) for exercise in asked)]
    if not methods:
        return
    lacking = [[i for i, method in enumerate(methods) if results.lacks(method, exercise)] for exercise in asked]
    before, between = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in CHAT)
    job = {
        "model": str(models.directory),
        "methods": [{"name": method.name, "parameters": method.parameters} for method in methods],
        "exercises": [
            {"readings": [reading.to_dict() for reading in exercise.readings], "methods": own}
            for exercise, own in zip(asked, lacking, strict=True)
            if own
        ],
        "text": {"windows": models.calibration.tolist(), "before": before, "between": between},
    }
    remaining = [exercise for exercise, own in zip(asked, lacking, strict=True) if own]
    for answer in rivals_answers(job):
        exercise, method = remaining[answer["exercise"]], methods[answer["method"]]
        scores = [Score(**each) for each in answer["scores"]]
        own_origin = {**origin, "versions": answer["versions"] | {"kvpress": sources.KVPRESS.partition("==")[2]}}
        if "threshold" in answer:
            own_origin["threshold"] = answer["threshold"]
        results.add(make_rows(method, exercise, scores, bytes_per_token(models.original), own_origin))


def rivals_answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `benchmarks/rivals.py` answers to `job`, in the environment of kvpress."""
    try:
        python = sources.kvpress_python()
    except sources.SourceUnavailable as error:
        print(f"Left out, the rivals of kvpress: {error}")
        return
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), "-m", "benchmarks.rivals", str(path)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True
        )
        try:
            yield from map(json.loads, process.stdout)
            if process.wait() != 0:
                raise RuntimeError("The rivals failed: what they wrote is above.")
        finally:
            process.terminate()
            process.wait()


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="WINDOW/SPARSITY", help="conversions, of one fit")
    parser.add_argument("--converted", nargs="*", default=[], type=Path, metavar="DIRECTORY", help="`mosa-convert`'s")
    parser.add_argument("--routers", nargs="*", default=[], type=Path, metavar="DIRECTORY", help="`save_routers`'s")
    parser.add_argument("--plan", nargs="*", default=[], type=Path, metavar="FILE", help="`GroupPlan.save`'s")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="such as original, ours, SnapKV; all by default")
    parser.add_argument("--slices", type=int, help="of each text")
    parser.add_argument("--contexts", type=int, help="with facts, of each kind")
    parser.add_argument("--smoke", action="store_true", help="tiny settings, which say nothing but that it runs")
    parser.add_argument("--output", type=Path, help="directory of the results; for --smoke a temporary one")
    options = parser.parse_args(arguments)

    size = SMOKE if options.smoke else Size()
    chosen = {name: value for name in ("slices", "contexts") if (value := getattr(options, name)) is not None}
    size = replace(size, **chosen)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or (Path(scratch) if options.smoke else Path(__file__).parent / "results")
        ours = ["64/8"] if options.smoke else options.ours
        run(options, ours, size, output, origin_of("benchmarks.frontier", arguments))


def run(options: argparse.Namespace, ours: list[str], size: Size, output: Path, origin: dict[str, Any]) -> None:
    directory = sources.smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    models = Models(directory, tokenizer, size)
    here = models.methods(ours) + models.given(options.converted, options.routers, options.plan)
    here += [
        Method("sink + window", {"window": window}, lambda window=window: models.window_alone(window))
        for window in ([64] if options.smoke else WINDOWS)
    ]
    elsewhere = kvpress_methods((0.44,), (0.355,)) if options.smoke else kvpress_methods()
    if options.only is not None:
        if unknown := set(options.only) - {method.name for method in here + elsewhere}:
            raise SystemExit(f"--only: no such method: {', '.join(sorted(unknown))}")
        here, elsewhere = ([each for each in some if each.name in options.only] for some in (here, elsewhere))
    asked = exercises(tokenizer, models.calibration, size)
    results = Results(output / "frontier.jsonl")
    try:
        measure_here(here, asked, results, origin)
        measure_rivals(elsewhere, asked, results, origin, models, tokenizer)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept; the same command goes on from there.")
    keys = {task: exercise.all_settings for exercise in asked for task in exercise.tasks}
    rows = [row for row in results.rows.values() if row["settings"] == keys.get(row["task"])]
    if rows:
        frontier_table.write(rows, output)
        print((output / "frontier.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
