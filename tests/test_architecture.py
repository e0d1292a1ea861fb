"""The layout of the package: which package may import which, no cycles, and short functions."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tract_transfer

PACKAGE = Path(tract_transfer.__file__).parent
ROOT = PACKAGE.parent
# Top to bottom. A package imports from the levels below its own, and nothing beside or above.
LEVELS = [
    {"cli"},
    {"run"},
    {"build", "suite"},
    {"engine", "report", "detectron2"},
    {"data", "models", "evaluation", "config"},
    {"tract", "visualize", "registry", "files"},
]
LEVEL = {part: number for number, level in enumerate(LEVELS) for part in level}
MAX_ROOT_MODULES, MAX_FILES, MAX_LINES = 4, 123, 25_500
MAX_FUNCTION_LINES = 60


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(file): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted(PACKAGE.rglob("*.py"))
}
COMMANDS = sorted((ROOT / "tools").glob("*.py"))


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports anywhere in it, under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {name: (imported_names(tree) & TREES.keys()) - {name} for name, tree in TREES.items()}


def part_of(module: str) -> str:
    """The package or root module that a module is in; "" for the root and its `__main__`."""
    part = module.split(".")[1] if "." in module else ""
    return "" if part == "__main__" else part


def test_every_part_has_a_level_and_the_root_is_small():
    assert {part_of(name) for name in TREES} - {""} == set(LEVEL)
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_MODULES


def test_the_package_stays_small():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) <= MAX_FILES
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= MAX_LINES


@pytest.mark.parametrize("module", TREES)
def test_a_module_imports_only_from_levels_below(module):
    part = part_of(module)
    if part:  # the root's TrAct is imported on access: see below
        others = {part_of(name) for name in IMPORTS[module]} - {part, ""}
        assert {other for other in others if LEVEL[other] <= LEVEL[part]} == set()


def test_no_import_is_circular():
    # A package's __init__ may import its modules.
    graph = {
        name: {other for other in others if not name.startswith(f"{other}.")}
        for name, others in IMPORTS.items()
    }
    assert set(TopologicalSorter(graph).static_order()) == graph.keys()  # or CycleError names it


@pytest.mark.parametrize("module", TREES)
def test_functions_fit_a_screen(module):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(TREES[module]) if isinstance(node, functions)]
    long = {n.name: n.end_lineno - n.lineno + 1 for n in nodes}
    assert {name: lines for name, lines in long.items() if lines >= MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("module", TREES)
def test_every_module_has_a_docstring(module):
    assert ast.get_docstring(TREES[module])


def test_commands_are_shims():
    for file in COMMANDS:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 10, file.name


@pytest.mark.parametrize("module", TREES)
def test_figures_are_drawn_without_pyplot(module):
    """pyplot keeps every figure in a global and chooses a window system."""
    assert not any("pyplot" in name for name in imported_names(TREES[module]))


def loaded_by(code: str, modules: set[str]) -> list[str]:
    """Which of `modules` a fresh interpreter has imported after `code`."""
    program = f"import sys; {code}; print(*({modules} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


HEAVY = {"torchvision", "timm", "datasets", "matplotlib", "sklearn", "accelerate"}


@pytest.mark.parametrize("module", ["tract_transfer", "tract_transfer.config.schema"])
def test_importing_it_is_cheap(module):
    assert loaded_by(f"import {module}", {"torch", *HEAVY}) == []


def test_the_one_liner_needs_torch_alone():
    assert loaded_by("from tract_transfer import TrAct", {"pydantic", *HEAVY}) == []
