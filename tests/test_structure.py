"""The house is as docs/design.md draws it: every file in its place, and imports that go one way."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests", "benchmarks", "testing", "conversion_scripts", "mosa_hf")
# From top to bottom, what the picture has to say, whoever draws it anew.
LAYERS = ["cli", "evaluation", "conversion", "modeling", "cache", "routing", "kernels"]
# What functions import: what not every user has.
OPTIONAL = {
    ("mosa_hf/modeling/generation.py", "transformers.cli.serving.utils"): "servers alone have and need it",
    ("mosa_hf/registration.py", "transformers.cli.serving"): "servers alone have and need it",
    ("mosa_hf/modeling/group_plan.py", "matplotlib.figure"): "it comes with the extra `plot`",
    ("mosa_hf/modeling/parallel.py", "transformers.distributed.tensor_parallel"): "some builds of torch lack it",
    ("mosa_hf/conversion/texts.py", "datasets"): "it comes with the extra `datasets`",
    ("mosa_hf/conversion/texts.py", "pyarrow"): "the same",
    ("mosa_hf/conversion/texts.py", "pyarrow.parquet"): "the same",
}


def drawn() -> list[Path]:
    """The folders and files of the picture, from top to bottom, relative to the root."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    picture = re.search(r"^```\n(tests/.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    found: list[Path] = []
    around: list[tuple[int, Path]] = []  # the folders that a line is in: indentation and path of each
    for line in filter(None, picture.splitlines()):
        indentation, first = len(line) - len(line.lstrip()), line.split()[0]
        around = [(depth, folder) for depth, folder in around if depth < indentation]
        folder = around[-1][1] if around else Path()
        if first.endswith("/"):
            folder /= first
            around.append((indentation, folder))
            found.append(folder)
        for name in re.findall(r"[\w<>/]+\.py\b", line):
            matches = sorted((ROOT / folder).glob(name.replace("<operation>", "*")))
            found += [path.relative_to(ROOT) for path in matches] or [folder / name]
    return found


class Import(NamedTuple):
    name: str  # of a module, or of something in one
    in_function: bool


def imports_of(path: Path, source: str) -> list[Import]:
    """All imports of a file, whose path is relative to the root, but those for type checkers."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join(filter(None, (*base, node.module)))
            yield from (Import(f"{base}.{alias.name}", in_function) for alias in node.names)
        else:
            in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_for_checkers = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for child in node.orelse if is_for_checkers else ast.iter_child_nodes(node):
                yield from visit(child, in_function)

    return list(visit(ast.parse(source), in_function=False))


def module_name(path: Path) -> str:
    """By which files import it."""
    parts = path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts
    return ".".join(parts)


DRAWN = drawn()
IMPORTS = {
    path.relative_to(ROOT): imports_of(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MODULES = {module_name(path): path for path in IMPORTS}
PACKAGE = [path for path in IMPORTS if path.parts[0] == "mosa_hf"]


def file_of(name: str) -> Path | None:
    """Our file that an imported name is, or is in; None for others' modules."""
    return MODULES.get(name) or MODULES.get(name.rpartition(".")[0])


def needed_by(path: Path) -> set[Path]:
    return {file_of(each.name) for each in IMPORTS[path]} - {None}


def place_of(path: Path) -> int:
    """Where the picture has what a file is in: of `mosa_hf` the folder or file in it, of others the whole folder."""
    return DRAWN.index(Path(*path.parts[: 2 if path.parts[0] == "mosa_hf" else 1]))


def test_what_is_drawn_is_there():
    assert [path for path in DRAWN if not (ROOT / path).exists()] == []
    assert len(set(DRAWN)) == len(DRAWN)
    assert [path.name for path in DRAWN if path.parts[1:] and path.name in LAYERS] == LAYERS


def test_every_module_is_drawn():
    assert {path for path in PACKAGE if path.name != "__init__.py"} - set(DRAWN) == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down(folder):
    paths = [path for path in IMPORTS if path.parts[0] == folder]
    upwards = [(path, each) for path in paths for each in needed_by(path) if place_of(each) < place_of(path)]
    assert upwards == []


def test_functions_import_what_is_optional():
    found = {
        (path.as_posix(), each.name.rpartition(".")[0])
        for path in IMPORTS
        if path.parts[0] == "mosa_hf" and path.parts[1] != "cli"
        for each in IMPORTS[path]
        if each.in_function and file_of(each.name) is None
    }
    assert found == OPTIONAL.keys()


def test_functions_import_nothing_of_ours():
    ours = [(path, each) for path in PACKAGE for each in IMPORTS[path] if file_of(each.name)]
    assert [(path, each.name) for path, each in ours if each.in_function and path.parts[1] != "cli"] == []


@pytest.mark.parametrize("command", ["convert", "evaluate", "heal", "trace"])
def test_commands_read_their_options_before_they_import_anything_large(command):
    """So that `--help` is quick wherever importing `mosa_hf` is."""
    path = Path(f"mosa_hf/cli/{command}.py")
    files = [path.with_name(f"{name}.py") for name in (command, "options", "healing_arguments")]
    above = [each.name for file in files for each in IMPORTS[file] if not each.in_function]
    large = [name for name in above if name.partition(".")[0] not in sys.stdlib_module_names]
    assert {file_of(name) for name in large} <= {*files, Path("mosa_hf/__init__.py")}
    later = {each.name.rpartition(".")[0] for each in IMPORTS[path] if each.in_function}
    assert later == {f"mosa_hf.cli.run_{command}"}


def arguments_of(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Of a function, of a class's `__init__`, or the fields of one without."""
    if isinstance(node, ast.ClassDef):
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if not inits:
            return {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
        (node,) = inits
    given = node.args
    return {
        each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if each
    }


def described_in(docstring: str) -> set[str]:
    """What the section of arguments has a line for."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    lines = re.findall(r"^    ([\w*`][\w*`, ]*)(?: \([^)]*\))?:", section[1] if section else "", re.MULTILINE)
    return {name.strip(" `*") for line in lines for name in line.split(",")}


def test_docstrings_describe_arguments_that_exist():
    found, num_described = [], 0
    for path in (path for folder in FOLDERS[1:] for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                described = described_in(ast.get_docstring(node) or "")
                num_described += len(described)
                found += [(str(path), node.name, name) for name in sorted(described - arguments_of(node))]
    assert found == [] and num_described > 400


def test_no_modules_need_each_other():
    """Counting what functions import, for that is how a circle hides."""
    circle = None
    try:
        TopologicalSorter({path: needed_by(path) for path in PACKAGE}).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle is None


SOURCE = """
import mosa_hf.kernels
from . import router
from .group_plan import GroupPlan
from ..cache import cache_bytes
if TYPE_CHECKING:
    from .family import Family
else:
    import torch
def draw():
    if True:
        from matplotlib.figure import Figure
"""


def test_every_kind_of_import_is_seen():
    found = imports_of(Path("mosa_hf/modeling/any.py"), SOURCE)
    modeling = ("mosa_hf.modeling.router", "mosa_hf.modeling.group_plan.GroupPlan")
    assert [each.name for each in found if not each.in_function] == [
        *("mosa_hf.kernels", *modeling, "mosa_hf.cache.cache_bytes", "torch")
    ]
    assert [each.name for each in found if each.in_function] == ["matplotlib.figure.Figure"]
    files = ("mosa_hf/modeling/router.py", "mosa_hf/modeling/group_plan.py", "mosa_hf/cache/__init__.py")
    assert [file_of(each.name) for each in found[1:4]] == list(map(Path, files))
