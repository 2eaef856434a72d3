"""lm-eval on its command line and from Python: log-likelihoods, multiple choice and generation, in any batch size."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import plain_shell

pytestmark = pytest.mark.tools
lm_eval = pytest.importorskip("lm_eval")

SENTENCES = (
    "The tide came in before noon. A boat with two men went out to the red buoy, and came back with it at four.",
    "A boat.",
    "Nobody had seen the lamp since the storm of the autumn before, when the keeper left the island with his dog.",
    "The rope was wet, and the knots in it could not be opened again until the sun had been on them for a day.",
    "Two men went out at four; one came back.",
)
DOCUMENTS = [
    {
        "context": sentence[: len(sentence) // 2],
        "rest": sentence[len(sentence) // 2 :][:20],
        "choices": [" a red buoy", " noon, and then the tide came in", " no"],
        "gold": number % 3,
    }
    for number, sentence in enumerate(SENTENCES)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {name}
doc_to_text: "{{{{context}}}}"
"""
TASKS = {
    "loglikelihood": 'doc_to_target: "{{rest}}"\nmetric_list: [{metric: acc}]\n',
    "multiple_choice": "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n",
    "generate_until": 'doc_to_target: "{{rest}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {max_gen_toks: 12, until: ["."], do_sample: false}\n',
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks, and the data that they read."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, rest in TASKS.items():
        (root / f"{name}.yaml").write_text(TASK.format(name=name, data=root / "data.jsonl") + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(root / "modules"))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets")
        yield root


def evaluate(folder: Path, tasks: Path, batch_size: int | str) -> dict:
    """From Python, on a model that is in memory."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folder)
    wrapped = HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size, max_batch_size=8
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(wrapped, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def responses(samples: list[dict]) -> list:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [response for sample in samples for (response,) in sample["resps"]]


def check_same(name: str, found: list, expected: list) -> None:
    if name == "generate_until":
        assert found == expected and len(expected) == len(DOCUMENTS) and all(expected)
        return
    assert len(found) == len(expected) == len(DOCUMENTS) * (3 if name == "multiple_choice" else 1)
    for (log_likelihood, greedy), (expected_log_likelihood, expected_greedy) in zip(found, expected, strict=True):
        assert log_likelihood == pytest.approx(expected_log_likelihood, abs=1e-3)
        assert greedy == expected_greedy


@pytest.mark.parametrize("which", ["original", "converted"])
def test_batches(which, folders, tasks):
    folder = getattr(folders, which)
    alone = evaluate(folder, tasks, 1)["samples"]
    for batch_size in (4, "auto"):
        together = evaluate(folder, tasks, batch_size)["samples"]
        for name in TASKS:
            check_same(name, responses(together[name]), responses(alone[name]))


def test_command_line(folders, tasks, tmp_path):
    """From a plain shell; the answers and metrics are those that the model in memory gives."""

    def command_line(folder: Path) -> None:
        shell = ["lm_eval", "--model", "hf", "--tasks", ",".join(TASKS), "--include_path", tasks, "--batch_size", "4"]
        arguments = f"pretrained={folder},trust_remote_code=True"
        plain_shell(*shell, "--model_args", arguments, "--log_samples", "--output_path", tmp_path / folder.name)

    with ThreadPoolExecutor() as threads:
        list(threads.map(command_line, folders))
    answers = []
    for folder in folders:
        expected = evaluate(folder, tasks, 4)
        (results,) = (tmp_path / folder.name).rglob("results_*.json")
        metrics = json.loads(results.read_text())["results"]
        for name in TASKS:
            for metric in ("exact_match",) if name == "generate_until" else ("acc",):
                assert metrics[name][f"{metric},none"] == expected["results"][name][f"{metric},none"]
            (samples,) = (tmp_path / folder.name).rglob(f"samples_{name}_*.jsonl")
            found = responses([json.loads(line) for line in samples.read_text().splitlines()])
            if name != "generate_until":  # written as strings
                found = [(float(log_likelihood), greedy == "True") for log_likelihood, greedy in found]
            check_same(name, found, responses(expected["samples"][name]))
            answers.append(found)
    assert answers[: len(TASKS)] != answers[len(TASKS) :]  # something was selected
