"""The commands that README and docs show: ours run as they stand, on a tiny model; others in their own tests."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest

from mosa_hf.cli import convert, evaluate, heal, trace

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAIN = {f"mosa-{each.__name__.rpartition('.')[2]}": each.main for each in (convert, evaluate, heal, trace)}
# What makes a command small; of an option that is given twice the last counts.
SMALL = {
    "mosa-convert": "--windows 2 --window-length 640",
    "mosa-heal": "--max_steps 2 --window_length 64 --report_to none --use_cpu",
    "mosa-evaluate": "--context 900 --scored 32 --slices 1",
    "mosa-trace": "--tokens 64",
}
# What a page takes as given, which the README or another page made.
GIVEN = {"evaluating.md": "converted", "tracing.md": "smollm2-mosa"}
# Where commands run that are not ours, or that take long.
ELSEWHERE = {
    "python -m benchmarks.cache_dtype": "tests/benchmarks/test_frontier.py",
    "python -m benchmarks.frontier --model": "tests/benchmarks/test_any_model.py",
    "python -m benchmarks.frontier": "tests/benchmarks/test_frontier.py",
    "python -m benchmarks.frontier.baselines": "benchmarks/frontier/measuring.py",  # which starts it, for kvpress
    "python -m benchmarks.frontier.picture": "tests/tools/test_benchmarks.py",
    "python -m benchmarks.gpu": "tests/tools/test_benchmarks.py",
    "python -m benchmarks.healing": "tests/benchmarks/test_healing.py",
    "python -m benchmarks.healing.mixed_text": "tests/benchmarks/test_healing.py",
    "python -m benchmarks.healing.paper_form": "tests/benchmarks/test_healing.py",
    "python -m benchmarks.leak": "tests/benchmarks/test_leak.py",
    "python -m benchmarks.pretrain": "tests/benchmarks/test_pretrain.py",
    "python -m benchmarks.serving.client": "benchmarks/serving/load.py",  # which starts it, as its server
    "python -m benchmarks.serving.engine": "benchmarks/serving/contenders.py",  # which starts it, for each
    "python -m benchmarks.serving.throughput": "tests/vllm/test_benchmark.py",
    "python -m benchmarks.speed.calibration": "tests/tools/test_benchmarks.py",
    "python -m benchmarks.speed.compile_kernels": "tests/kernels/test_triton_compile.py",
    "python -m benchmarks.speed.compile_training": "tests/tools/test_compiled_training.py",
    "python -m benchmarks.speed.decode": "tests/benchmarks/test_frontier.py",
    "python -m benchmarks.speed.kernels": "tests/tools/test_benchmarks.py",
    "python -m benchmarks.speed.latent_decode": "tests/tools/test_benchmarks.py",
    "python -m benchmarks.speed.prompt": "tests/benchmarks/test_prompt.py",
    "python -m benchmarks.speed.training": "tests/tools/test_benchmarks.py",
    "python -m tests.emulated_gpu": "tests/emulated_gpu/test_costs.py",
    "lm_eval": "tests/tools/test_lm_eval.py",
    "transformers serve": "tests/tools/test_serve.py",
    "transformers chat": "tests/tools/test_serve.py",
    "accelerate launch": "tests/tools/test_processes.py",
    "make VENV=path/to/your/environment demo": "tests/benchmarks/test_frontier.py",
    "make demo": "tests/benchmarks/test_frontier.py",
    "make test": ".ci/run",
    "make fresh": ".github/workflows/nightly.yml",
    "make tools": ".github/workflows/nightly.yml",
    "make serving": ".github/workflows/nightly.yml",
    "make families": ".github/workflows/nightly.yml",
    "vllm": "tests/vllm/test_server.py",
    "vllm serve BASE": "tests/vllm/test_tokens.py",
    "pip install": "tests/test_packaging.py",
}
PROGRAM = re.compile(rf"(?:{'|'.join([*MAIN, *ELSEWHERE, 'python -m', 'make', 'transformers'])})(?!\S)")
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Shown(NamedTuple):
    """A command on a page."""

    page: str
    line: str
    in_text: bool  # in a sentence, where it may name what it is about alone

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def shown() -> Iterator[Shown]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, block in FENCE.findall(text):
            lines = block.splitlines() if language == "bash" else []
            yield from (Shown(page.name, line, in_text=False) for line in lines if shlex.split(line, comments=True))
        for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            if PROGRAM.match(" ".join(code.split())):
                yield Shown(page.name, " ".join(code.split()), in_text=True)


SHOWN = list(shown())
OURS = [each for each in SHOWN if each.words[0] in MAIN and not each.in_text]


@pytest.mark.parametrize("page", dict.fromkeys(each.page for each in OURS))
def test_the_commands_of_a_page_run(page, text_model, tmp_path, monkeypatch):
    """One after the other, as somebody who follows the page types them, with its names of models and texts."""
    monkeypatch.chdir(tmp_path)
    for name in ("path/to/base", "HuggingFaceTB/SmolLM2-135M-Instruct"):  # a folder comes before a name on the Hub
        Path(name).parent.mkdir(parents=True)
        Path(name).symlink_to(text_model)
    for name in ("some_text.txt", "a.txt", "b.txt"):
        Path(name).write_text(topics["specialnames"][:8000], encoding="utf-8")
    if page in GIVEN:
        convert.main(["path/to/base", GIVEN[page], *SMALL["mosa-convert"].split()])
    for each in OURS:
        if each.page == page:
            before = set(Path().iterdir())
            name, *arguments = each.words
            MAIN[name]([*arguments, *SMALL[name].split()])
            made = {path.name for path in set(Path().iterdir()) - before}
            assert made & {*each.words}, f"{each.line!r} wrote nothing that it names, but {made}"


@pytest.mark.parametrize("command", MAIN)
def test_options_that_sentences_name_are_there(command, capsys):
    with pytest.raises(SystemExit):
        MAIN[command](["--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    named = [each.words for each in SHOWN if each.in_text and each.words[0] == command]
    assert {word for words in named for word in words if word.startswith("--")} <= known


def source_of(module: str) -> str:
    """The text of what `python -m module` runs."""
    path = ROOT.joinpath(*module.split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def test_every_other_command_runs_somewhere():
    """Where the table says: that file names the program; options that pages give stand there or in its source."""
    others = [each for each in SHOWN if each.words[0] not in MAIN]
    assert len(others) > 30
    for each in others:
        program = max((name for name in ELSEWHERE if f"{each.line} ".startswith(f"{name} ")), key=len, default=None)
        assert program, f"{each.page} shows {each.line!r}, which runs nowhere"
        where = (ROOT / ELSEWHERE[program]).read_text(encoding="utf-8")
        assert re.search(rf"(?<!\w){re.split(r'[ .]', program)[-1]}\b", where, re.IGNORECASE), each
        if program.startswith("python -m"):
            where += source_of(each.words[2])
        options = [word for word in each.words if word.startswith("--")]
        assert [each for each in options if each not in where and each[2:].replace("-", "_") not in where] == [], each
