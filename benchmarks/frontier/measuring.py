"""Methods at their suites: in this process, or in the environment of kvpress."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mosa_hf.evaluation import CacheMemory, Score, score
from testing.packages import SourceUnavailable, cached
from testing.packages import run as run_tool

from . import page
from .methods import Method, Models
from .results import Results, make_rows
from .tasks import Suite

ROOT = Path(__file__).parents[2]
KVPRESS = "kvpress==0.5.5"
# SmolLM2's chat template, of a user's text that the assistant repeats.
CHAT = ("<|im_start|>user\n", "\n\nRepeat the previous context exactly.<|im_end|>\n<|im_start|>assistant\n")


def measure_here(methods: list[Method], asked: list[Suite], results: Results, origin: dict[str, Any]) -> None:
    """Add what `results` lacks of methods that run in this process."""
    missing = [(method, [each for each in asked if results.lacks(method, each)]) for method in methods]
    total = sum(len(suite.samples) for _, lacking in missing for suite in lacking)
    with tqdm(total=total, desc="Frontier", unit="reading") as progress:
        for method, lacking in missing:
            if not lacking:
                continue
            progress.set_postfix_str(page.label(method.name, method.parameters))
            model = method.build()
            for suite in lacking:
                scores = []
                for sample in suite.samples:
                    scores += score(CacheMemory(model, sample.context), sample)
                    progress.update()
                results.add(make_rows(method, suite, scores, bytes_per_token(model), origin))


def bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in a model of dense groups like this one."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def measure_baselines(
    methods: list[Method],
    asked: list[Suite],
    results: Results,
    origin: dict[str, Any],
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add what `results` lacks of methods that `baselines.py` runs."""
    methods = [method for method in methods if any(results.lacks(method, suite) for suite in asked)]
    if not methods:
        return
    lacking = [[i for i, method in enumerate(methods) if results.lacks(method, suite)] for suite in asked]
    before, between = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in CHAT)
    job = {
        "model": str(models.directory),
        "methods": [{"name": method.name, "parameters": method.parameters} for method in methods],
        "suites": [
            {"samples": [sample.to_dict() for sample in suite.samples], "methods": own}
            for suite, own in zip(asked, lacking, strict=True)
            if own
        ],
        "text": {"windows": models.calibration.tolist(), "before": before, "between": between},
    }
    remaining = [suite for suite, own in zip(asked, lacking, strict=True) if own]
    for answer in baselines_answers(job):
        suite, method = remaining[answer["suite"]], methods[answer["method"]]
        scores = [Score(**each) for each in answer["scores"]]
        own_origin = {**origin, "versions": versions_of(answer)}
        if "threshold" in answer:
            own_origin["threshold"] = answer["threshold"]
        results.add(make_rows(method, suite, scores, bytes_per_token(models.original), own_origin))


def baselines_answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `baselines.py` answers to `job`, in the environment of kvpress."""
    try:
        python = kvpress_python()
    except SourceUnavailable as error:
        print(f"Left out, the baselines of kvpress: {error}")
        return
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), "-m", "benchmarks.frontier.baselines", str(path)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True
        )
        try:
            yield from map(json.loads, process.stdout)
            if process.wait() != 0:
                raise RuntimeError("The baselines failed: what they wrote is above.")
        finally:
            process.terminate()
            process.wait()


def versions_of(answer: dict[str, Any]) -> dict[str, str]:
    """What a baseline answered with, kvpress included."""
    return answer["versions"] | {"kvpress": KVPRESS.partition("==")[2]}


def kvpress_python() -> Path:
    """The Python of an environment with kvpress (Apache-2.0), which wants an older Transformers than this package."""

    def install(scratch: Path) -> Path:
        environment = scratch / "environment"
        run_tool(sys.executable, "-m", "venv", str(environment), folder=scratch)
        # torch first, so that what is given is found as for the package itself, and kvpress takes it as it is.
        for requirement in ("torch==2.13.0", KVPRESS):
            pip = (str(environment / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
            run_tool(*pip, "install", requirement, folder=scratch)
        return environment

    return cached(KVPRESS.replace("==", "-"), install) / "bin" / "python"
