"""What the documents name is there, and their commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from tract_transfer.config.schema import load_config
from tract_transfer.config.suite import load_suite

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"^ {4}\S*python tools/(\w+)\.py (.+)$", re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [(tool, shlex.split(words)) for tool, words in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_configs_that_load(page):
    for tool, words in commands(page):
        assert (ROOT / "tools" / f"{tool}.py").is_file()
        if "--config-file" not in words:
            continue
        file = ROOT / words[words.index("--config-file") + 1]
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        (load_suite if tool == "run_suite" else load_config)(file, overrides)


def test_the_readme_has_commands():
    assert {tool for tool, _ in commands(ROOT / "README.md")} >= {"train_net", "run_suite"}


def test_the_reading_order_is_short_and_the_same_everywhere():
    def order(page: str) -> list[Path]:
        path = ROOT / page
        text = path.read_text(encoding="utf-8").partition("## Reading order")[2]
        return [(path.parent / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)][:7]

    files = order("README.md")
    assert files == order("docs/architecture.md")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 1500


def test_the_readme_quotes_the_report_of_cpu_demo():
    def rows(page: str) -> set[tuple[str, ...]]:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\", "")
        lines = [line.strip() for line in text.splitlines()]
        return {tuple(c.strip() for c in line.split("|")) for line in lines if line[:1] == "|"}

    quoted = rows("README.md") & rows("docs/cpu_demo.md")
    tasks = {row[1] for row in quoted}
    assert tasks >= {"pretrain", "cifar100", "flowers102", "stanford_cars", "voc"}
