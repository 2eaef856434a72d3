"""Wheel and source distribution: an index would take them, and each works where nothing else of the repository is."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mosa_hf

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real  # builds, and asks an index for what it builds with


def run(*command: str | Path, **options) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """Built by an environment of their own, of the files that git has: nothing else that lies here gets in."""
    for module in ("build", "twine"):
        pytest.importorskip(module, reason="pip install 'mosa-hf[dist]'")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():  # not one that is about to be removed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", output, source)
    run(sys.executable, "-m", "twine", "check", "--strict", *output.iterdir())
    return {"wheel": next(output.glob("*.whl")), "sdist": next(output.glob("*.tar.gz"))}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_its_commands_answer(kind, distributions, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", distributions[kind])
    # What it depends on, from here. Packages that are installed as links stay behind: they have files of their own.
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (purelib / "dependencies.pth").write_text("\n".join(here), encoding="utf-8")
    quiet = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}}
    found = run(python, "-c", "import mosa_hf; print(mosa_hf.__file__, mosa_hf.__version__)", **quiet).split()
    assert Path(found[0]).is_relative_to(environment) and found[1] == mosa_hf.__version__

    listing = "import importlib.metadata as m; print(*m.distribution('mosa-hf').entry_points.names)"
    commands = run(python, "-c", listing, **quiet).split()
    assert {"mosa-convert", "mosa-evaluate", "mosa-heal", "mosa-trace"} <= set(commands)
    for name in commands:
        if name.startswith("mosa-"):
            assert name in run(environment / "bin" / name, "--help", **quiet)
            version = run(environment / "bin" / name, "--version", **quiet)
            assert version.split() == [name, mosa_hf.__version__]
    page = "from mosa_hf.evaluation import TracedText; print(len(TracedText('', [], [], []).page()))"
    assert int(run(python, "-c", page, **quiet)) > 5000  # a file that is no module


def names_in(path: Path) -> list[str]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def test_they_hold_the_package_and_no_more(distributions):
    for kind, path in distributions.items():
        names = [name for name in names_in(path) if name]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        assert not folders & {"tests", "testing", "benchmarks", "docs", "notebooks", ".github"}, kind
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mosa_hf").rglob("*.py")}
        assert modules <= set(names), kind
        assert {"mosa_hf/py.typed", "mosa_hf/__init__.pyi", "mosa_hf/evaluation/trace_page.html"} <= set(names)


def test_the_index_shows_where_things_are(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert {"Source", "Issues", "Changelog", "Documentation"} <= set(
        re.findall(r"^Project-URL: (\w+),", metadata, re.M)
    )
    assert "Description-Content-Type: text/markdown" in metadata and "\nAuthor: " in metadata
    assert len(re.findall(r"^Classifier: ", metadata, re.M)) > 5
