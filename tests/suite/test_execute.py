"""Executing a plan, with a launcher that is told how its attempts end."""

import copy
import signal
from pathlib import Path

import pytest

from tract_transfer.suite.execute import Execution
from tract_transfer.suite.journal import Found, Job
from tract_transfer.suite.launchers import Attempt
from tract_transfer.suite.plan import PlannedRun

PRE, OTHER = Path("vanilla/pretrain"), Path("tract/pretrain")


def run_of(folder, needs=None):
    return PlannedRun(str(folder), folder.parts[0], folder.parts[1], 0, {}, folder, needs)


def make_jobs():
    runs = [run_of(PRE), run_of(OTHER)]
    runs += [run_of(p.parent / task, needs=p) for p in (PRE, OTHER) for task in ("probe", "voc")]
    return [Job(run) for run in runs]


class Folders:
    """Stands for the disk: which runs have results, or are another run's."""

    def __init__(self):
        self.finished, self.others = set(), set()

    def look(self, run):
        if run.folder in self.others:
            return Found("other", "seed: 0 then, 1 now")
        is_there = run.folder in self.finished
        return Found("finished", "", "c0ffee") if is_there else Found("new")


class Launcher:
    """Ends every attempt at the next question, with the codes it was given for its folder."""

    def __init__(self, folders, codes=None, workers=1):
        self.folders, self.codes, self.workers = folders, codes or {}, workers
        self.running, self.started, self.stops, self.most = [], [], [], 0

    def has_room(self, run):
        return len(self.running) < self.workers

    def start(self, run, attempt):
        self.running.append(run)
        self.started.append(run.folder)
        self.most = max(self.most, len(self.running))
        return {"pid": 1}

    def ended(self):
        done = []
        for run in self.running:
            codes = self.codes.get(run.folder, [])
            code = codes.pop(0) if codes else 0
            if code == 0:
                self.folders.finished.add(run.folder)
            done.append((run, 0 if code == "nothing" else code))
        self.running = []
        return done

    def stop(self, number):
        self.stops.append(number)


class Screen:
    def __init__(self):
        self.lines = []

    def started(self, job):
        self.lines.append(f"{job.run.folder} started")

    def ended(self, job, result):
        self.lines.append(f"{job.run.folder} {result}")

    def show(self, jobs):
        pass


@pytest.fixture
def make(tmp_path):
    """Make an execution; `told` of it are the states after each change."""

    def build(codes=None, *, workers=1, retries=0, jobs=None, set_aside=None):
        folders = Folders()
        execution = Execution(
            jobs or make_jobs(),
            Launcher(folders, codes, workers),
            Screen(),
            look=folders.look,
            prepare=lambda run: Attempt([], tmp_path / "log.txt", {}, tmp_path / "stop"),
            set_aside=set_aside,
            in_words=lambda found: "top1 50.00%",
            changed=lambda jobs, handles: execution.told.append(
                ([job.state for job in jobs], sorted(handles))
            ),
            retries=retries,
        )
        execution.told, execution.folders = [], folders
        return execution

    return build


def states(execution):
    return {str(job.run.folder): job.state for job in execution.jobs}


def test_everything_is_carried_out_in_order(make):
    execution = make()
    execution.run(0)
    assert execution.launcher.started == [job.run.folder for job in execution.jobs]
    assert set(states(execution).values()) == {"finished"}
    assert [job.attempts for job in execution.jobs] == [1] * 6
    assert {job.config_sha256 for job in execution.jobs} == {"c0ffee"}


def test_as_many_run_at_a_time_as_there_is_room_for(make):
    execution = make(workers=2)
    execution.run(0)
    assert execution.launcher.most == 2
    assert len(execution.launcher.started) == 6


def test_nothing_starts_before_what_it_needs_is_finished(make):
    execution = make(workers=9)
    execution.run(0)
    assert execution.launcher.started[:2] == [PRE, OTHER]
    assert execution.launcher.most == 4


def test_what_is_finished_is_left_alone(make):
    jobs = make_jobs()
    for job in jobs[:-1]:
        job.state = "finished"
    execution = make(jobs=jobs)
    execution.run(0)
    assert execution.launcher.started == [jobs[-1].run.folder]


def test_a_failure_stops_only_what_needs_it(make):
    execution = make({OTHER: [1]})
    execution.run(0)
    assert states(execution) == {
        "vanilla/pretrain": "finished", "tract/pretrain": "failed",
        "vanilla/probe": "finished", "vanilla/voc": "finished",
        "tract/probe": "blocked", "tract/voc": "blocked",
    }  # fmt: skip
    blocked = execution.jobs[-1]
    assert blocked.error == "it needs tract/pretrain, which failed"
    assert "tract/voc blocked: it needs tract/pretrain, which failed" in execution.screen.lines


@pytest.mark.parametrize(("code", "says"), [(1, "exit code 1"), (-9, "SIGKILL, as when memory")])
def test_a_failure_is_tried_again_as_often_as_asked(make, code, says):
    execution = make({PRE: [code]}, retries=1)
    execution.run(0)
    assert execution.launcher.started.count(PRE) == 2
    assert set(states(execution).values()) == {"finished"}
    execution = make({PRE: [code, code]}, retries=1)
    execution.run(0)
    assert states(execution)["vanilla/pretrain"] == "failed"
    assert says in execution.jobs[0].error
    assert execution.jobs[0].attempts == 2


def test_starts_are_counted_since_the_run_began(make):
    """What another session did counts where its checkpoint goes on, and not where it is gone."""
    execution = make()
    for job in execution.jobs[:2]:
        job.attempts, job.spent = 3, 900.0
    goes_on = execution.jobs[1].run.folder
    look = execution.look
    began = Found("begun", "results.json cannot be read")
    execution.look = lambda run: (
        began if run.folder == goes_on and look(run).state == "new" else look(run)
    )
    execution.run(0)
    assert [job.attempts for job in execution.jobs[:2]] == [1, 4]
    assert execution.jobs[0].seconds < 900 <= execution.jobs[1].seconds
    assert execution.jobs[1].last < 900
    assert execution.jobs[1].note == ("goes on from the beginning: results.json cannot be read")


def test_a_config_that_cannot_be_used_is_not_tried_again(make):
    execution = make({PRE: [2]}, retries=3)
    execution.run(0)
    assert execution.launcher.started.count(PRE) == 1


def test_a_run_that_ends_well_without_results_has_failed(make):
    execution = make({PRE: ["nothing"]})
    execution.run(0)
    assert execution.jobs[0].state == "failed"
    assert "there are no results of it" in execution.jobs[0].error


def test_another_runs_folder_is_a_failure_or_set_aside(make):
    execution = make()
    execution.folders.others.add(PRE)
    execution.run(0)
    assert states(execution)["vanilla/pretrain"] == "failed"
    assert "seed: 0 then, 1 now" in execution.jobs[0].error

    def set_aside(folder):
        execution.folders.others.remove(folder)
        return Path("aside")

    execution = make(set_aside=set_aside)
    execution.folders.others.add(PRE)
    execution.run(0)
    assert set(states(execution).values()) == {"finished"}


def test_every_change_is_told_with_who_is_at_work(make):
    execution = make(jobs=make_jobs()[:1])
    execution.run(0)
    assert execution.told == [
        (["waiting"], []), (["running"], ["vanilla/pretrain"]), (["finished"], []),
    ]  # fmt: skip


def test_a_stop_is_passed_on_and_leaves_the_rest_waiting(make):
    """The run that is under way ends by the signal: it goes on another time."""
    execution = make({PRE: [143]})
    start = execution.launcher.start

    def start_and_stop(run, attempt):
        execution.stop_requested = signal.SIGTERM
        return start(run, attempt)

    ended = execution.launcher.ended
    execution.launcher.ended = lambda: ended() if execution.launcher.stops else []
    execution.launcher.start = start_and_stop
    execution.run(0)
    assert execution.launcher.stops == [signal.SIGTERM]
    assert set(states(execution).values()) == {"waiting"}
    assert execution.jobs[0].error is None


def test_who_comes_later_learns_which_runs_were_told_to_end(make):
    """A second signal would end them without a checkpoint."""
    execution, told = make(), []
    execution.changed = lambda jobs, handles: told.append(copy.deepcopy(handles))
    start, ended = execution.launcher.start, execution.launcher.ended

    def start_and_stop(run, attempt):
        execution.stop_requested = signal.SIGTERM
        return start(run, attempt)

    execution.launcher.start = start_and_stop
    execution.launcher.ended = lambda: ended() if len(told) > 2 else []
    execution.run(0)
    assert told[1] == {str(PRE): {"pid": 1}}
    assert told[2] == {str(PRE): {"pid": 1, "asked": signal.SIGTERM}}


def test_a_full_disk_does_not_end_the_runs(make, caplog):
    execution = make()

    def changed(jobs, handles):
        raise OSError(28, "No space left on device")

    execution.changed = changed
    execution.run(0)
    assert set(states(execution).values()) == {"finished"}
    assert "The suite's state cannot be written" in caplog.text


def test_a_run_that_cannot_be_started_has_failed(make):
    execution = make()

    def start(run, attempt):
        raise OSError(12, "Cannot allocate memory")

    execution.launcher.start = start
    execution.run(0)
    assert [job.state for job in execution.jobs] == ["failed"] * 2 + ["blocked"] * 4
