"""A suite over folders that hold runs, parts of runs, or other things; nothing is trained."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tract_transfer.config.file import ConfigError, dump_yaml
from tract_transfer.config.suite import load_suite
from tract_transfer.run import suite as run_suite
from tract_transfer.run import suite_plan as inspect_suite
from tract_transfer.run.suite import Suite, carry_out, list_plan, refuse_others
from tract_transfer.suite.screen import Lines

SUITE = {
    "baseline": "vanilla",
    "seeds": [0],
    "methods": {"vanilla": {}, "tract": {"pretrain": {"tract.enabled": True}}},
    "pretrain": "classification.yaml",
    "tasks": {"probe": "probe.yaml"},
    "retries": 0,
}
PRINTS = {"train": "t1", "test": "t2"}


@pytest.fixture
def make(tmp_path, write_tiny, monkeypatch):
    """Plan the suite in tmp_path/suite; what its data are is not looked at."""
    monkeypatch.setattr(inspect_suite.Inspector, "inspect", lambda *_: PRINTS)
    write_tiny(tmp_path)
    probe = write_tiny(tmp_path, "probe").read_text()
    known = "name: cifar/resnet18, args: {width: 8}"
    (tmp_path / "probe.yaml").write_text(probe.replace(known, "name: null"))

    def build(**changes):
        tree = {**SUITE, "output_dir": str(tmp_path / "suite"), **changes}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return Suite(load_suite(tmp_path / "suite.yaml"), remember=False)

    return build


def finish(run, sha256="w1"):
    """Leave in a run's folder what it leaves when it is finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_yaml(run.config))
    (run.folder / "environment.json").write_text(json.dumps({"data": PRINTS}))
    results = {
        "format": 1, "metrics": {"top1": 0.5}, "primary_metric": "top1", "seed": run.seed,
        "method": run.method, "name": run.task,
        "role": "downstream" if run.needs else "pretrain",
    }  # fmt: skip
    if run.needs:
        results["weights_sha256"] = sha256
    else:
        (run.folder / "model.json").write_text(json.dumps({"sha256": sha256}))
    (run.folder / "results.json").write_text(json.dumps(results))


def stock(suite):
    """What is told of every run, by its folder in the suite."""
    others = suite.take_stock()
    folders = [job.run.folder.relative_to(suite.folder) for job in suite.jobs]
    lines = [line.split("  ", 2)[2] for line in list_plan(suite, others)]
    return {str(folder.parent): line for folder, line in zip(folders, lines, strict=True)}


def test_a_new_suite_runs_everything(make):
    assert stock(make()) == dict.fromkeys(
        ("vanilla/pretrain", "tract/pretrain", "vanilla/probe", "tract/probe"), "run"
    )


def test_what_is_finished_is_skipped_and_what_was_cut_off_goes_on(make):
    suite = make()
    finish(suite.runs[0])
    finish(suite.runs[1])
    (suite.runs[1].folder / "results.json").unlink()
    (suite.runs[1].folder / "checkpoints/iter_0000004").mkdir(parents=True)
    finish(suite.runs[3])  # before its backbone was there: told once that is
    assert stock(make()) == {
        "vanilla/pretrain": "skip: finished",
        "tract/pretrain": "goes on from iter_0000004",
        "vanilla/probe": "run",
        "tract/probe": "finished, if its backbone comes out the same",
    }


def test_a_backbone_that_came_out_otherwise_makes_its_tasks_others(make):
    suite = make()
    finish(suite.runs[0], sha256="w2")
    finish(suite.runs[2], sha256="w1")
    assert stock(make())["vanilla/probe"] == (
        "holds another run: its backbone has been trained anew since"
    )


BROKEN = {
    "another config": ("config.yaml", None, "seed: 5 then, 0 now"),
    "no config": ("config.yaml", "a: [", "config.yaml is not YAML"),
    "other data": ("environment.json", '{"data": {}}', "other images or labels in data.test"),
    "no data": ("environment.json", "{", "environment.json does not tell its data"),
    "another version": ("results.json", '{"format": 9}', "results.json has format 9, and this"),
}


@pytest.mark.parametrize(("name", "text", "why"), BROKEN.values(), ids=BROKEN)
def test_another_runs_folder_is_refused_by_name(make, name, text, why):
    suite = make()
    finish(suite.runs[0])
    other = dump_yaml({**suite.runs[0].config, "seed": 5})
    (suite.runs[0].folder / name).write_text(text or other)
    others = make().take_stock()
    with pytest.raises(ConfigError) as error:
        refuse_others(others)
    told = str(error.value)
    assert f"{suite.runs[0].folder} holds another run: " in told
    assert why in told
    assert "Nothing was started. --set-aside moves them" in told


def test_many_conflicts_are_counted(make):
    suite = make(seeds=list(range(8)))
    for run in suite.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "results.json").write_text('{"format": 9}')
    with pytest.raises(ConfigError, match=r"\.\.\. and 27 more\.\n"):
        refuse_others(make(seeds=list(range(8))).take_stock())


def test_results_that_are_broken_go_on_or_begin_anew(make):
    suite = make()
    finish(suite.runs[0])
    (suite.runs[0].folder / "results.json").write_text("{oops")
    told = stock(make())["vanilla/pretrain"]
    assert told.startswith("goes on from the beginning: results.json cannot be read (")


def test_what_is_set_aside_is_kept_under_a_number(make):
    suite = make()
    for number in (1, 2):
        finish(suite.runs[0])
        place = suite.set_aside(suite.runs[0].folder)
        assert place == suite.folder / f"set_aside/vanilla/pretrain/seed0_{number}"
        assert (place / "results.json").exists()
        assert not suite.runs[0].folder.exists()


def test_an_attempt_has_the_whole_config_in_a_file(make):
    suite = make()
    run = suite.runs[0]
    attempt = suite.prepare(run)
    file = suite.folder / f"plan/{run.id}.yaml"
    assert list(attempt.command[1:]) == [
        "-m",
        "tract_transfer.cli.train",
        "--config-file",
        str(file),
        "--resume",
    ]
    assert yaml.safe_load(file.read_text()) == json.loads(json.dumps(run.config))
    assert attempt.log == run.folder / "console.txt"


class Launcher:
    """Finishes every run at once; sends this process a signal with the first, if it is to."""

    name = "local"

    def __init__(self, number=None):
        self.number, self.started, self.stops, self.left = number, [], [], None
        self._running = []

    def has_room(self, run):
        return not self._running

    def start(self, run, attempt):
        self.started.append(run.task)
        self._running.append(run)
        if self.number is not None:
            os.kill(os.getpid(), self.number)
        return {"pid": 1}

    def ended(self):
        if self.number is not None and not self.stops:
            return []
        ended, self._running = self._running, []
        if self.number is None:
            for run in ended:
                finish(run)
        return [(run, 0 if self.number is None else 143) for run in ended]

    def stop(self, number):
        self.stops.append(number)

    def ask_leftovers(self, handles):
        self.left = handles

    def end_leftovers(self, handles):
        assert handles == self.left


@pytest.fixture
def carried_out(capsys):
    def run(suite, launcher, *, set_aside=False):
        screen = Lines(sys.stderr, len(suite.runs))
        return carry_out(suite, launcher, screen, set_aside=set_aside)

    return run


def states(suite):
    return [run["state"] for run in json.loads((suite.folder / "suite.json").read_text())["runs"]]


def test_a_suite_is_carried_out_and_then_skipped(make, carried_out):
    suite, launcher = make(), Launcher()
    assert carried_out(suite, launcher) is None
    assert launcher.started == ["pretrain", "pretrain", "probe", "probe"]
    assert states(suite) == ["finished"] * 4
    again = Launcher()
    assert carried_out(make(), again) is None
    assert again.started == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_the_handlers_come_back(make, carried_out, number):
    before = signal.getsignal(number)
    suite, launcher = make(), Launcher(number)
    assert carried_out(suite, launcher) == number
    assert launcher.stops == [number]
    assert signal.getsignal(number) is before
    assert states(suite) == ["waiting"] * 4
    assert not (suite.folder / ".owner.json").exists()


def test_leftovers_of_a_killed_suite_are_ended_first(make, carried_out):
    suite = make()
    suite.folder.mkdir()
    owner = {"pid": 1, "host": "h", "since": "s", "jobs": {"a": {"pid": 7, "started": 1.0}}}
    (suite.folder / ".owner.json").write_text(json.dumps(owner))
    launcher = Launcher()
    carried_out(suite, launcher)
    assert launcher.left == [{"pid": 7, "started": 1.0}]


def test_runs_whose_suite_fails_are_not_forgotten(make, carried_out):
    """Of a suite that ends by an error, or while it ends what another left."""
    suite, launcher = make(), Launcher()
    launcher.ended = lambda: 1 / (not launcher.started) and []
    with pytest.raises(ZeroDivisionError):
        carried_out(suite, launcher)

    def interrupted(handles):
        assert handles == [{"pid": 1}]
        raise KeyboardInterrupt

    for _ in range(2):
        launcher = Launcher()
        launcher.end_leftovers = interrupted
        with pytest.raises(KeyboardInterrupt):
            carried_out(make(), launcher)
    launcher = Launcher()
    assert carried_out(make(), launcher) is None
    assert launcher.left == [{"pid": 1}]
    assert not (suite.folder / ".owner.json").exists()


def test_others_stop_the_suite_unless_they_are_set_aside(make, carried_out):
    suite = make()
    finish(suite.runs[0])
    (suite.runs[0].folder / "config.yaml").write_text("seed: 5\n")
    launcher = Launcher()
    with pytest.raises(ConfigError, match="holds another run"):
        carried_out(make(), launcher)
    assert launcher.started == []
    suite = make()
    assert carried_out(suite, launcher, set_aside=True) is None
    assert states(suite) == ["finished"] * 4
    aside = suite.folder / "set_aside/vanilla/pretrain/seed0_1"
    assert (aside / "config.yaml").read_text() == "seed: 5\n"


def test_a_full_disk_ends_with_the_runs_it_let_finish(make, carried_out, monkeypatch, caplog):
    """The plan cannot be written: those runs fail, by name, and nothing is thrown."""
    suite = make()

    def full(self, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(run_suite.SuiteLock, "tell", lambda self, jobs: None)
    with caplog.at_level(logging.ERROR):
        assert carried_out(suite, Launcher()) is None
    assert [job.state for job in suite.jobs] == ["failed", "failed", "blocked", "blocked"]
    assert f"DiskFullError: No space left in {suite.folder}/plan: " in str(suite.jobs[0].error)
    assert "The suite's state cannot be written" in caplog.text
