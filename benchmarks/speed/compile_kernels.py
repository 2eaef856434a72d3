"""
Compiles every Triton kernel ahead of time for GPUs that need not be there, and tells what each one takes of them.

`python -m benchmarks.speed.compile_kernels` prints a table and writes it to `benchmarks/results/kernels_compiled.md`;
with `--output -` it prints only, and with `--only` it keeps the page's other rows. With `--missing` it compiles what
the page has no row of, so that one which was stopped goes on. `--in-turn` compiles each kernel for one target instead
of all and prints only, in less time. It fails if a kernel spills registers or needs more shared memory than a block
can have.
"""

import argparse
import contextlib
import datetime
import importlib
import io
import itertools
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does anyway, but says so in a warning

import triton  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import mosa_hf.kernels  # noqa: E402
from mosa_hf.atomic_write import atomic_file  # noqa: E402
from mosa_hf.kernels.triton_builds import KernelBuild  # noqa: E402
from testing.markdown import wrapped  # noqa: E402

RESULTS = Path(__file__).parent.parent / "results" / "kernels_compiled.md"
# Target, and the shared memory that one block can have there, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90a": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Compiled(NamedTuple):
    """What one kernel takes of one target."""

    kernel: str
    target: str
    num_warps: int
    registers: int  # of a thread
    spills: int  # bytes stored to memory for want of registers on NVIDIA, registers stored on AMD
    shared_memory: int  # bytes of a block
    shared_memory_limit: int
    date: str

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared_memory <= self.shared_memory_limit


def production_builds() -> list[list[KernelBuild]]:
    """Those of every Triton file of the kernels; of one name where backends differ."""
    package = mosa_hf.kernels
    builds = []
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.rpartition(".")[2].startswith("triton"):
            file = importlib.import_module(module.name)
            if hasattr(file, "production_builds"):
                builds += file.production_builds()
    return [list(alike) for _, alike in itertools.groupby(builds, lambda build: build.name)]


def compile_build(build: KernelBuild, target_name: str) -> Compiled:
    """Compile one build."""
    target, shared_memory_limit = TARGETS[target_name]
    types = {name: kind.partition(":") for name, kind in build.signature.items()}
    # Tensors start at multiples of 16 bytes, as the JIT finds out when it launches.
    multiples = [name for name, (kind, _, multiple) in types.items() if kind.startswith("*") or multiple == "16"]
    names = build.function.arg_names
    source = ASTSource(
        fn=build.function,
        signature={name: types[name][0] if name in types else "constexpr" for name in names},
        constexprs=build.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # ptxas says nothing of kernels that are in the cache
        triton.knobs.nvidia.dump_ptxas_log = True
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        registers, spills = (
            _number(r"Used (\d+) registers", log.getvalue()),
            _number(r"(\d+) bytes spill stores", log.getvalue()),
        )
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spills = (
            _number(r"\.vgpr_count:\s+(\d+)", assembly),
            _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        )
    return Compiled(
        build.name,
        target_name,
        build.num_warps,
        registers,
        spills,
        compiled.metadata.shared,
        shared_memory_limit,
        str(datetime.date.today()),
    )


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def compile_all(
    targets: list[str], only: str = "", in_turn: bool = False, known: Collection[tuple[str, str]] = ()
) -> Iterator[Compiled]:
    """
    Every build in whose name the regular expression `only` is found, for each of the `targets`, but for those that
    are `known`, by name and target; `in_turn`: for one of them, so that each target gets its share of every kind of
    kernel.
    """
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        builds = [each for each in production_builds() if re.search(only, each[0].name)]
        for i, alike in enumerate(tqdm(builds, desc="Compiling", unit="kernel")):
            # Kinds of a kernel follow each other in threes, variants of it in nines: going by i alone, or by threes
            # alone, would give some of them the same target at every head size.
            turn = (i + i // 3 + i // 9) % len(targets)
            for target in targets[turn : turn + 1] if in_turn else targets:
                if (alike[0].name, target) not in known:
                    backend = TARGETS[target][0].backend
                    yield compile_build(next(each for each in alike if each.backend in (None, backend)), target)


def earlier(path: Path) -> dict[tuple[str, str], Compiled]:
    """The rows of the page at `path`, by kernel and target."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[1] in TARGETS:
            kernel, target, *numbers, memory, date = cells
            size, limit = round(float(memory) * 1024), TARGETS[target][1]
            found[kernel, target] = Compiled(kernel, target, *map(int, numbers), size, limit, date)
    return found


def with_earlier(rows: list[Compiled], path: Path) -> list[Compiled]:
    """`rows`, and those of the page at `path` that were compiled before, in the order of what there is to compile."""
    found = earlier(path) | {(row.kernel, row.target): row for row in rows}
    wanted = [(alike[0].name, target) for alike in production_builds() for target in TARGETS]
    return [found[each] for each in wanted if each in found]


def markdown(rows: list[Compiled]) -> str:
    lines = [
        "| kernel | target | warps | registers | spills | shared memory, KiB | compiled |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.kernel} | {row.target} | {row.num_warps} | {row.registers} | {row.spills} "
        f"| {row.shared_memory / 1024:.1f} | {row.date} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_page(rows: list[Compiled], path: Path) -> None:
    table = markdown(with_earlier(rows, path))
    text = (
        "# Triton kernels, compiled ahead of time\n\n"
        f"`python -m benchmarks.speed.compile_kernels`, Triton {triton.__version__}, bfloat16 where no other dtype is "
        "named. Registers are those of one thread. The command leaves what it did not compile anew: rows of another "
        "day are of that day's kernels, and builds that are not here were not compiled yet. Nothing here was run on a "
        "GPU.\n\n" + table
    )
    with atomic_file(path) as unfinished:
        unfinished.write_text(wrapped(text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="compile the kernels whose name this regular expression finds")
    parser.add_argument("--in-turn", action="store_true", help="compile each kernel for one of the targets, in turn")
    parser.add_argument("--missing", action="store_true", help="compile what the page lacks")
    parser.add_argument("--output", default=str(RESULTS), help="file for the table; '-' for none")
    arguments = parser.parse_args()
    rows, path = [], Path(arguments.output)
    known = earlier(path) if arguments.missing else {}
    for row in compile_all(arguments.targets, arguments.only, arguments.in_turn, known):
        rows.append(row)
        if arguments.output != "-" and not arguments.in_turn:  # as soon as it is known: all of them take an hour
            write_page(rows, path)
    print(markdown(rows))
    unfit = [row for row in rows if not row.fits]
    for row in unfit:
        print(f"{row.kernel} does not fit {row.target}: {row}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
