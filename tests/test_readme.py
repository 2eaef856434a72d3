"""The first page: its commands and its first example run as they stand, with a model that is tiny and lies here."""

import re
import shlex
import tomllib
from pathlib import Path
from pydoc_data.topics import topics

from mosa_hf.cli.convert import main as mosa_convert
from testing.tiny import SENTENCES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_code_comes_early():
    lines = README.splitlines()
    assert lines.index("```python") < 40 and "mosa-convert " in "\n".join(lines[:40])


def test_the_first_example_runs(text_model, tmp_path, monkeypatch, capsys):
    """What the command before it wrote, and nothing else, is there."""
    code, *_ = blocks("python")
    name, model, folder = shlex.split(blocks("bash")[1])
    assert name == "mosa-convert" and model.count("/") == 1  # a name on the Hub
    assert set(re.findall(r'from_pretrained\("([^"]+)"\)', code)) == {folder}
    monkeypatch.chdir(tmp_path)
    small = ["--windows", "2", "--window-length", "128", "--window", "64"]  # like the model
    mosa_convert([str(text_model), folder, *small])
    monkeypatch.setitem(topics, "specialnames", SENTENCES[:600])  # thousands of bytes would take long
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    before, after = re.findall(r"^(\w+), \d+\.\d MB:", printed, re.MULTILINE)
    assert (before, after) == ("original", "converted")


def test_its_commands_are_installed():
    """Every command of ours that a page shows is one of the package, and takes the options that the page gives it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"\bmosa-[a-z]+", page.read_text(encoding="utf-8"))}
    assert shown - {"mosa-hf"} == project["scripts"].keys()
