"""Where users look: the public names, and that pages and notebooks use no others."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

import mosa_hf

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "mosa_hf": """
        ConversionConfig GroupPlan MosaConfig MosaForCausalLM MosaForSequenceClassification MosaModel RoutingCallback
        SparseGroup cache_bytes calibrate_thresholds calibration_windows convert_checkpoint convert_model load_cache
        load_routers save_cache save_routers to_dense trace_routing use_backend
    """,
    "mosa_hf.conversion": """
        ConversionConfig HealingTrainer Loading Text TokenWindows calibration_windows convert_checkpoint
        convert_model convert_to_native default_text find_source load_kvzap read_text teacher_of to_dense
    """,
    "mosa_hf.evaluation": """
        PERPLEXITY CacheMemory Continuation Sample Score Subject TracedGroup TracedText decoding_bytes evaluate
        fact_samples filled_cache following score summary table text_samples trace_text
    """,
}
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("module", PUBLIC)
def test_these_are_public(module):
    """Whoever adds a name, or takes one away, says so here; classes of families aside, which come with families."""
    here = importlib.import_module(module)
    of_families = {name for name in here.__all__ if re.fullmatch(r"Mosa[A-Z0-9]\w+", name)} - {
        *("MosaConfig", "MosaForCausalLM", "MosaForSequenceClassification", "MosaModel")
    }
    assert set(here.__all__) - of_families == set(PUBLIC[module].split())
    assert len(set(here.__all__)) == len(here.__all__)
    for name in PUBLIC[module].split():
        each = getattr(here, name)
        assert inspect.getdoc(each) or not callable(each), f"{name} has no docstring"


def test_the_reference_has_them_all():
    """docs/api.md, which `make docs` fills from docstrings."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {
        module: set(re.findall(r"^        - (\w+)$", part, re.MULTILINE))
        for module, part in re.findall(r"^::: (\S+)\n(.*?)(?=^::: |\Z)", page, re.MULTILINE | re.DOTALL)
    }
    names = {module: set(names.split()) for module, names in PUBLIC.items()}
    assert listed.keys() == names.keys()
    assert all(
        listed[module] == own - (names["mosa_hf"] if module != "mosa_hf" else set()) for module, own in names.items()
    )


def sources() -> dict[str, str]:
    """Python that pages and notebooks show, by where it is; what is no Python of its own (a line of `%`) left out."""
    found = {}
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for i, code in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            found[f"{page.name}, {i}"] = code
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                found[f"{notebook.name}, {i}"] = re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE)
    return found


def names_of(code: str) -> set[tuple[str, str]]:
    """Names of ours that code asks for: module, name."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mosa_hf":
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "__name__") for alias in node.names if alias.name.partition(".")[0] == "mosa_hf"}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in PUBLIC:
            found.add((ast.unparse(node.value), node.attr))
    return found


def is_public(module: str, name: str) -> bool:
    if module not in PUBLIC:
        return False
    submodule = f"{module}.{name}" in PUBLIC
    of_family = module == "mosa_hf" and re.match("Mosa[A-Z]", name) and hasattr(mosa_hf, name)
    return submodule or of_family or name in ("__name__", "__version__", *importlib.import_module(module).__all__)


def test_pages_and_notebooks_use_public_names_alone():
    used = {where: names_of(code) for where, code in sources().items()}
    assert len(set.union(*used.values())) > 20
    assert [(where, *each) for where, names in used.items() for each in names if not is_public(*each)] == []


def test_a_private_name_is_found():
    code = (
        "import mosa_hf.cache\nfrom mosa_hf.modeling.group_plan import SparseGroup\nmosa_hf.registration.register()\n"
    )
    assert names_of(code) == {
        ("mosa_hf.cache", "__name__"),
        ("mosa_hf.modeling.group_plan", "SparseGroup"),
        ("mosa_hf", "registration"),
    }
    assert not any(is_public(*each) for each in names_of(code))


def test_the_version_is_a_number_that_pip_knows():
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:\.dev\d+|rc\d+)?", mosa_hf.__version__)
