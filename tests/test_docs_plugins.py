"""The example of docs/guides/plugins.md runs as it is printed."""

import io
import json
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plugin_files import forgotten
from run_folders import Killed

from tract_transfer.cli.main import main

PAGE = Path(__file__).parents[1] / "docs/guides/plugins.md"
EXAMPLE = PAGE.read_text(encoding="utf-8").partition("## An example")[2].partition("\n## ")[0]
SUITE = """\
output_dir: output/suite
baseline: vanilla
seeds: [0, 1]
methods: {vanilla: {}, tract: {pretrain: {tract.enabled: true}}}
pretrain: stripes.yaml
tasks: {tuned: tuned.yaml}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's files, and images of rows and columns."""
    folder = tmp_path_factory.mktemp("example")
    for kind, name in (("python", "mine.py"), ("yaml", "stripes.yaml")):
        (text,) = re.findall(rf"```{kind}\n(.*?)```", EXAMPLE, re.DOTALL)
        (folder / name).write_text(text)
    random = np.random.default_rng(0)
    for number in range(48):
        split, kind = "train" if number % 3 else "test", ("rows", "columns")[number % 2]
        path = folder / "stripes" / split / kind / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 90, (16, 16, 3), dtype=np.uint8)
        image[(slice(0, 16, 2),) if kind == "rows" else (slice(None), slice(0, 16, 2))] += 150
        Image.fromarray(image).save(path)
    return folder


def run(folder, line, *more):
    """Run a command as a new process would, with the plug-in not imported yet."""
    words = [*shlex.split(line), *more]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, forgotten(folder):
        patch.setattr(sys, "argv", words)
        patch.chdir(folder)
        with redirect_stdout(out), redirect_stderr(err):
            code = main()
    return code, out.getvalue(), err.getvalue()


def test_the_example_is_short():
    code, config = re.findall(r"```\w+\n(.*?)```", EXAMPLE, re.DOTALL)
    assert len((code + config).splitlines()) <= 60


def test_its_commands_train_fine_tune_predict_and_evaluate(folder, kill_at):
    commands = re.findall(r"^    (tract-transfer .*)$", EXAMPLE.replace("\\\n", " "), re.MULTILINE)
    train, tune, predict, evaluate = commands
    workers = "data.num_workers=0"
    kill_at(12)
    with pytest.raises(Killed):
        run(folder, train, workers)
    kill_at(None)
    code, out, err = run(folder, train, "--resume", workers)
    assert (code, out) == (0, "output/stripes/results.json\n"), err
    results = json.loads((folder / out.strip()).read_text())
    assert results["metrics"] == {"worst_class": 1.0}
    assert results["protocol"]["metric"] == "accuracy of the worst class"
    code, out, err = run(folder, tune, workers)
    assert code == 0, err
    tuned = json.loads((folder / "output/tuned/results.json").read_text())
    assert tuned["weights_match"]["fits"]
    code, out, err = run(folder, predict)
    assert code == 0, err
    assert re.search(r"rows (0\.[5-9]|1)", out)
    code, out, err = run(folder, evaluate)
    assert code == 0, err
    assert "worst_class  100.00%" in out
    code, _, err = run(folder, predict.replace("--plugin mine.py", "--overwrite"))
    assert code == 2
    assert f"output/stripes needs the plug-in {folder}/mine.py" in err


def test_a_suite_of_it_is_planned(folder):
    (folder / "tuned.yaml").write_text("_BASE_: stripes.yaml\nmodel: {backbone: {name: null}}\n")
    (folder / "suite.yaml").write_text(SUITE)
    code, out, err = run(folder, "tract-transfer suite --config-file suite.yaml --dry-run")
    assert code == 0, err
    assert len(out.splitlines()) == 8
