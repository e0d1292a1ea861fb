"""The documentation builds as a site without a warning, and its notebooks run."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb"))


def test_the_site_builds_without_a_warning(tmp_path):
    options = ["--fail-on-warning", "--keep-going", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in (tmp_path / "site").rglob("*.html")}
    missing = {path.stem for path in DOCS.rglob("*.md")} - pages
    assert missing == {"README"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(DOCS / "notebooks" / name, as_version=4)
    shown = [cell for cell in notebook.cells if cell.get("outputs")]
    assert shown, "stored with its outputs"
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
