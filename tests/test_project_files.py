"""The files that others' tools read: workflows, the citation, what a distribution holds."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import mosa_hf

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_there_is(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    ran = []
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            ran += [step.get("run", "").replace("${{ matrix.target }}", each) for each in matrix.get("target", [""])]
    made = {target for line in ran for target in re.findall(r"\bmake ([\w-]+)", line)}
    assert made <= make_targets()
    assert path.name != "nightly.yml" or make_targets() - made == {"clean", "lint"}  # which `make test` does


def test_the_serving_environment_has_what_every_test_needs():
    """It does not install the extra `test`, yet `conftest.py` is read there, too."""
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    needed = imported & set(PROJECT["optional-dependencies"]["test"])
    installed = re.split(r"==.*\n|\n", (ROOT / "tests" / "serving.txt").read_text(encoding="utf-8"))
    assert {"hypothesis", "pytest"} <= needed <= set(installed)


def test_publishing_has_no_token():
    publish = read(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and "secrets." not in str(publish)


def test_the_citation_names_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["license"] == PROJECT["license"] and citation["repository-code"] == PROJECT["urls"]["Source"]
    paper = citation["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2505.00315" and len(paper["authors"]) == 3


def test_pre_commit_has_a_linter_like_ours():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", repository["rev"])


def test_the_bug_report_asks_for_what_is_needed():
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")
    fields = {each["id"]: each.get("validations", {}).get("required", False) for each in form["body"] if "id" in each}
    assert all(fields[name] for name in ("code", "happens", "expected", "versions"))


def test_the_version_is_in_one_place():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    files = subprocess.run(
        ["git", "ls-files", "*.toml", "*.cfg", "*.cff", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    names = files.stdout.split() or ["mosa_hf/__init__.py"]  # none where there is no git
    pattern = re.compile(
        rf"^\s*(?:__version__|version)\s*[=:]\s*[\"']?{re.escape(mosa_hf.__version__)}\b", re.MULTILINE
    )
    found = [name for name in names if (ROOT / name).is_file() and pattern.search((ROOT / name).read_text("utf-8"))]
    assert found == ["mosa_hf/__init__.py"]
