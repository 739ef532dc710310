"""The layout, read from the source: what a module imports, and what is done in one place only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ailab").rglob("*.py"))

# A module imports what stands on a floor below its own, or is in its own room. What `|` separates is on one floor. A name is that
# of a module in the hall, or of a folder for all that is in it.
FLOORS = """
errors | tree | rng | heap
types | signature | dist | pictures | compiler
registry | binding | stack | cuda_graph | losses | process
compile
config | optim | models | metrics | datasets
core | workdir
build | hooks
job | testing
fit | data | evaluate | predict | help | __main__
"""
LEVEL = {name.strip(): level for level, row in enumerate(FLOORS.split("\n")) for name in row.split("|") if name.strip()}
PURE = ("datasets", "models", "losses", "metrics")  # components: see also what little they may know
COMPONENT = {"heap", "tree", "types", "registry", "binding", "rng", "errors", "signature"}
LIMIT = 350  # lines: more is two ideas


def part(file: Path) -> str:
    """The name in the table of a source file."""
    return file.relative_to(ROOT / "ailab").parts[0].removesuffix(".py")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that is imported, at the top or in a function, but for type checkers alone."""
    skipped = {
        id(child)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(parsed(file)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            whole = node.module or ""
            modules = {"ailab": [f"ailab.{a.name}" for a in node.names if a.name != "__version__"]}.get(whole, [whole])
            yield from ((name, node.lineno) for name in modules)


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def ours(file: Path) -> list[str]:
    """The parts of ailab that a file imports, other than its own."""
    names = [name.split(".")[1] for name, _ in imported(file) if name.startswith("ailab.")]
    return sorted({n for n in names if n != part(file)})


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_imports_only_what_is_below_it(file: Path) -> None:
    """The table above holds, and components know nothing of a run."""
    if file == ROOT / "ailab" / "__init__.py":
        assert list(ours(file)) == []
        return
    mine = part(file)
    assert mine in LEVEL, f"{mine} has no row; put it where it belongs"
    above = [name for name in ours(file) if LEVEL[name] >= LEVEL[mine]]
    assert above == []
    if mine in PURE:
        assert [name for name in ours(file) if name not in COMPONENT] == []


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_processes_talk_in_one_place(file: Path) -> None:
    """dist/group.py and dist/collectives.py alone import torch.distributed; core/grad.py alone, DistributedDataParallel."""
    found = [(name, line) for name, line in imported(file) if name.startswith("torch.distributed")]
    assert not found or file.relative_to(ROOT / "ailab") in (Path("dist/group.py"), Path("dist/collectives.py"))
    assert "torch.distributed" not in {ast.unparse(n) for n in ast.walk(parsed(file)) if isinstance(n, ast.Attribute)}
    parallel = [name for name, _ in imported(file) if name.startswith("torch.nn.parallel")]
    assert not parallel or file.relative_to(ROOT / "ailab") == Path("core/grad.py")


@pytest.mark.parametrize("file", [f for f in MODULES if part(f) in ("core", "tree", "types")], ids=lambda f: f.stem)
def test_below_the_line_there_is_no_clock_no_file_and_no_print(file: Path) -> None:
    """What is traced, and what folds it, depends on its arguments alone."""
    assert {name.split(".")[0] for name, _ in imported(file)} & {"time", "datetime", "random", "os", "io", "logging"} == set()
    assert [(name, c.lineno) for name, c in calls(file) if name in ("open", "print", "input")] == []


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(file: Path) -> None:
    """No pickle, no eval, no torch.load but with weights_only=True; only the cfg file is executed."""
    assert {name.split(".")[0] for name, _ in imported(file)} & {"pickle", "dill", "cloudpickle", "marshal", "shelve"} == set()
    for name, call in calls(file):
        assert name != "eval"
        assert name != "exec" or file.relative_to(ROOT / "ailab") == Path("config/load.py")
        if name == "torch.load":
            assert [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"] == ["True"]


def test_a_file_is_one_idea() -> None:
    """No module has more than 350 lines, none is called utils, helpers or base_*."""
    long = {str(f.relative_to(ROOT)): n for f in MODULES if (n := len(f.read_text().splitlines())) > LIMIT}
    assert long == {}
    assert not {f.stem for f in MODULES} & {"utils", "helpers", "common", "misc"}


def test_a_function_fits_on_a_screen() -> None:
    """No function has more than 50 lines, its docstring aside."""
    long = {}
    for file in MODULES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (size := (body[-1].end_lineno or 0) - body[0].lineno + 1) > 50:
                    long[f"{file.relative_to(ROOT)}:{node.name}"] = size
    assert long == {}


@pytest.mark.parametrize(
    "module", ["ailab", "ailab.fit", "ailab.hooks, ailab.datasets, ailab.models, ailab.losses, ailab.metrics"]
)
def test_importing_is_cheap(module: str) -> None:
    """Nothing heavy is imported before it is used: not by ailab, by its command, or by its components."""
    heavy = ["wandb", "tensorboard", "torch.utils.tensorboard", "torchvision", "pandas", "torch._inductor.compile_fx", "PIL"]
    if module == "ailab":
        heavy.append("torch")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
