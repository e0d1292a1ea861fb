"""Links, commands, configs and the reading list of the documentation are valid and complete."""

import ast
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tract_transfer.cli.main import COMMANDS
from tract_transfer.config.schema import (
    ClassificationConfig,
    DetectionConfig,
    known_keys,
    load_config,
)
from tract_transfer.config.suite import load_suite
from tract_transfer.evaluation import EVALUATORS, protocols_of
from tract_transfer.models import DETECTORS
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.rpn import RpnOptions

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMAND = re.compile(r"^ {4}tract-transfer ([\w-]+) (.+)$", re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [(tool, shlex.split(words)) for tool, words in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_of_commands_load(page):
    for command, words in commands(page):
        assert command in COMMANDS
        if "--config-file" not in words:
            continue
        file = words[words.index("--config-file") + 1]
        if file.endswith(("recipe.yaml", "stripes.yaml")):  # written before it, on the page
            continue
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        (load_suite if command == "suite" else load_config)(file, overrides)


def test_readme_has_training_and_suite_commands():
    assert {command for command, _ in commands(ROOT / "README.md")} >= {"train", "suite"}


def linked(page: str, heading: str, until: str = "\n## ") -> list[Path]:
    """Return the files that a section of a page links to, in order."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(heading)[2].partition(until)[0]
    return [
        (ROOT / page).parent.joinpath(link).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)
    ]


def imports_of(file: Path) -> set[str]:
    """Return the modules of tract_transfer that a file imports, also through package inits."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tract_transfer"):
            names.add(node.module)
            package = ROOT / node.module.replace(".", "/") / "__init__.py"
            if package.exists() and package != file:
                names |= imports_of(package)
    return names


def test_reading_list_follows_a_run():
    main = linked("docs/architecture.md", "## Follow a run", "For detection")
    assert main == linked("README.md", "follow a classification run through")[:7]
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in main]
    assert sum(lines) < 1200, dict(zip([file.name for file in main], lines, strict=True))
    detection = linked("docs/architecture.md", "For detection, replace", "## Contracts")
    for files in (main[1:-1], [*main[1:4], *detection]):
        imported = imports_of(ROOT / "tract_transfer/cli/train.py")
        for file in files:
            module = str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
            assert module in imported, f"no file before it in the list imports {module}"
            imported |= imports_of(file)
    assert "tract_transfer.cli.train" in imports_of(main[0])
    load_config(main[-1])
    text = main[1].read_text(encoding="utf-8")
    calls = ["preflight(", "build_data(", "build_trainer(", "trainer.train()", "write_results("]
    positions = [text.index(call, text.index("def run(")) for call in calls]
    assert positions == sorted(positions)


def test_readme_quotes_rows_of_cpu_demo():
    def rows(page: str) -> set[tuple[str, ...]]:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\", "")
        lines = [line.strip() for line in text.splitlines()]
        return {tuple(c.strip() for c in line.split("|")) for line in lines if line[:1] == "|"}

    quoted = rows("README.md") & rows("docs/reference/cpu_demo.md")
    tasks = {row[1] for row in quoted}
    assert tasks >= {"pretrain", "cifar100", "flowers102", "stanford_cars", "voc"}


# The guides to training and detection: their configs load, and they name every option.

GUIDES = {
    name: (ROOT / f"docs/guides/{name}.md").read_text(encoding="utf-8")
    for name in ("training", "detection")
}


def blocks(guide: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", GUIDES[guide], re.DOTALL)


def load(folder: Path, base: str, *texts: str):
    """Load a config made of texts of a guide, on top of a base unless it is empty."""
    path = folder / "config.yaml"
    path.write_text("".join([f"_BASE_: {ROOT / base}\n" if base else "", *texts]))
    return load_config(path)


def test_configs_of_guides_load(tmp_path):
    recipe, stream = blocks("training")
    config = load(tmp_path, "", recipe)
    assert config.solver.end_factor * config.solver.lr == 1e-5
    assert config.solver.warmup_start * config.solver.lr == 1e-6
    assert config.data.repeats == 3
    data = load(tmp_path, "configs/quickstart/pretrain.yaml", stream).data
    assert data.train.streaming
    assert (data.cache, data.shuffle_rows, data.readers) == ("none", 2048, 8)
    config = load(tmp_path, "configs/detection/r18_fpn_voc07.yaml", *blocks("detection"))
    assert config.data.repeat_threshold == 0.01


@pytest.mark.parametrize(("name", "defaults"), [("rpn", RpnOptions()), ("box", BoxOptions())])
def test_every_option_of_a_detector_is_shown_with_its_default(name, defaults):
    shown = yaml.safe_load(blocks("detection")[1])["model"]["detector"]["args"][name]
    assert shown == {
        option: list(value) if isinstance(value, tuple) else pytest.approx(value, abs=5e-4)
        for option, value in asdict(defaults).items()
    }


def test_every_detector_and_protocol_is_named():
    built_in = [name for name, _ in DETECTORS if DETECTORS.is_built_in(name)]
    for name in [*built_in, *(n for n in protocols_of("detection") if EVALUATORS.is_built_in(n))]:
        assert f"`{name}`" in GUIDES["detection"], name


def test_every_data_key_of_detection_is_named():
    keys = [key for key in known_keys(DetectionConfig) if key.startswith("data.")]
    names = {key.rpartition(".")[2] for key in keys if key.count(".") == 1}
    names -= {"num_workers", "cache", "train", "val", "test", "transforms"}  # common to all tasks
    assert {n for n in names if not re.search(rf"\b{n}\b", GUIDES["detection"])} == set()


def test_every_option_of_the_transforms_is_named():
    section = GUIDES["training"].partition("## Images")[2].partition("## Batches")[0]
    keys = [key for key in known_keys(ClassificationConfig) if key.startswith("data.transforms.")]
    names = {key.rpartition(".")[2] for key in keys}
    missing = {name for name in names if f"`{name}" not in section}
    assert missing <= {"flip_prob", "crop_ratio"}  # shown in the recipe
