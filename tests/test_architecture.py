"""The plan of the house: who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tract_transfer

PACKAGE = Path(tract_transfer.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
CONFIG = {
    "config", "config_data", "config_file", "config_probe", "config_sections", "config_solver",
    "config_suite", "config_yaml",
}  # fmt: skip
BRIDGE = {
    "build",
    "build_batches",
    "build_data",
    "build_model",
    "build_probes",
    "build_suite",
    "build_weights",
    "check_args",
    "check_data",
    "check_streams",
    "detectron2_plugin",
    "export",
    "inspect_suite",
    "leaks",
    "model_card",
    "replay",
    "run",
    "run_probe",
    "run_training",
    "run_suite",
    "results",
    "trained",
}
ISLANDS = {
    "tract", "models", "data", "evaluation", "engine", "suite", "solver", "joined_optimizer",
    "visualize",
}  # fmt: skip
FOUNDATION = {"arguments", "exit_codes", "files", "flow_yaml", "redact", "registry"}
# What an island imports beside the foundation, the version and itself.
FERRIES = {"suite": {"visualize"}}


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in it; of ours, relative to us."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add(node.module)
            # `from tract_transfer import x` may import the module x.
            if node.module == "tract_transfer":
                found |= {f"tract_transfer.{alias.name}" for alias in node.names}
    return found


def ours(file: Path) -> set[str]:
    """The parts of the package that a file imports: `tract_transfer.data.images` -> `data`."""
    names = [name.split(".") for name in imports(file)]
    parts = {name[1] for name in names if name[0] == "tract_transfer" and len(name) > 1}
    return parts - {"__version__", "TrAct"}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_part_has_its_place():
    assert {part_of(file) for file in MODULES} == (
        ISLANDS | CONFIG | BRIDGE | FOUNDATION | {"__init__"}
    )


@pytest.mark.parametrize("file", [f for f in MODULES if part_of(f) in ISLANDS], ids=name_of)
def test_an_island_imports_the_foundation_and_itself(file):
    island = part_of(file)
    assert ours(file) <= FOUNDATION | {island} | FERRIES.get(island, set())


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_config_stops_at_the_bridge(file):
    if part_of(file) not in CONFIG | BRIDGE:
        assert not ours(file) & CONFIG
    if part_of(file) in CONFIG:
        assert ours(file) <= CONFIG | {"redact"}


def test_the_foundation_imports_nothing_of_ours():
    for name in FOUNDATION:
        assert ours(PACKAGE / f"{name}.py") == set()
    assert ours(PACKAGE / "__init__.py") == {"tract"}  # lazily: see below


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_figures_are_drawn_without_pyplot(file):
    """pyplot keeps every figure in a global and chooses a window system."""
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = [a.name for n in tree if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    assert not any("pyplot" in name for name in [*names, *imports(file)])


@pytest.mark.parametrize("file", [*MODULES, *TOOLS], ids=name_of)
def test_every_module_says_what_it_is_and_is_short(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 350


@pytest.mark.parametrize("module", ["tract_transfer", "tract_transfer.config"])
def test_importing_it_is_cheap(module):
    heavy = {"torch", "torchvision", "timm", "datasets", "matplotlib", "sklearn", "accelerate"}
    code = f"import sys, {module}; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_one_liner_needs_torch_alone():
    others = (
        "{'torchvision', 'timm', 'datasets', 'matplotlib', 'sklearn', 'accelerate', 'pydantic'}"
    )
    code = f"import sys; from tract_transfer import TrAct; print(*({others} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
