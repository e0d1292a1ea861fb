"""Fixtures of all tests: tiny configs, tools, refused inputs, killed runs."""

import contextlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import errors_page
import pytest
import torch
from run_folders import Killed
from tiny_configs import CLASSIFICATION, DETECTION, PROBE

from tract_transfer.config.schema import load_config
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.trainer import Trainer

ROOT = Path(__file__).parents[1]
# Two processes with two threads each slow each other down; commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


TEXTS = {"classification": CLASSIFICATION, "probe": PROBE, "detection": DETECTION}


def pytest_collection_modifyitems(items):
    """Start slow tests first, so that no process waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The folder of the tiny digit scenes, which the first run to use them writes."""
    return tmp_path_factory.mktemp("data") / "scenes"


@pytest.fixture(scope="session")
def write_tiny(scenes):
    """Write a task's tiny config to a folder and return its path; its run goes to `folder/run`."""

    def write(folder, task="classification"):
        text = f"output_dir: {folder}/run\n{TEXTS[task]}"
        text = text.replace("source: digit_scenes,", f"source: digit_scenes, root: {scenes},")
        path = folder / f"{task}.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def load_tiny(write_tiny):
    """Write a task's tiny config to a folder and load it with overrides."""

    def load(folder, *overrides, task="classification"):
        return load_config(write_tiny(folder, task), overrides)

    return load


@pytest.fixture(scope="session")
def tool():
    """Run a tool in a separate process on one thread; return the finished process."""

    def run(name, *words, launcher=(), cwd=ROOT):
        command = [sys.executable, *launcher, str(ROOT / "tools" / name), *map(str, words)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=cwd, check=False
        )

    return run


@pytest.fixture(scope="session")
def call():
    """Run a tool's main() in this process, which saves starting Python and torch every time.

    The finished process that it returns has the log in `stderr`.
    """
    loggers = [logging.getLogger(name) for name in ("tract_transfer", "tract_transfer.suite")]
    levels = [logger.level for logger in loggers]

    def run(name, *words):
        spec = importlib.util.spec_from_file_location(name[:-3], ROOT / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out, err = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(err)
        loggers[0].addHandler(handler)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", [name, *map(str, words)])
            patch.chdir(ROOT)
            try:
                code = module.main()
            except SystemExit as end:  # raised by argparse
                code = end.code
            finally:
                loggers[0].removeHandler(handler)
        return subprocess.CompletedProcess(name, code, out.getvalue(), err.getvalue())

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def refused(tmp_path_factory, pytestconfig):
    """`pytest.raises` for a bad input with a name, of which docs/reference/errors.md has a row."""
    recorder = pytestconfig.pluginmanager.get_plugin(errors_page.RECORDER)
    rows = {} if recorder else errors_page.read_page()

    @contextlib.contextmanager
    def refuse(what, kind=ValueError, match=None):
        with pytest.raises(kind, match=match) as caught:
            yield caught
        message = errors_page.shown(str(caught.value), tmp_path_factory.getbasetemp())
        if recorder:
            recorder.add(what, errors_page.raised_by(caught.tb), message)
        elif not os.environ.get("ERRORS_PAGE_UNCHECKED"):
            assert rows.get(what) == message, (
                "docs/reference/errors.md has another message: make docs"
            )

    return refuse


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """Make `datasets` cache in the test's folder and stay off the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def shards(tmp_path):
    """Parquet shards with 70 rows in a folder."""
    from stream_rows import write_shards

    (tmp_path / "shards").mkdir()
    return write_shards(tmp_path / "shards")


@pytest.fixture
def kill_at(monkeypatch):
    """Kill every training at the start of an iteration; `None` stops that."""

    step = Trainer.step

    def arm(iteration):
        def dying_step(self, batches):
            if self.iteration == iteration:
                raise Killed
            step(self, batches)

        monkeypatch.setattr(Trainer, "step", dying_step)

    return arm


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", keep=3)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte; skips the test if this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
