"""The graph of a suite's runs, without configs or folders."""

from dataclasses import replace
from pathlib import Path

import pytest

from tract_transfer.suite.plan import PlannedRun, Resources, join_same, order_tasks, run_id


def planned(name, method, task="pretrain", needs=None):
    folder = Path("out") / method / task / "seed0"
    return PlannedRun(name, method, task, 0, {}, folder, needs)


def test_a_task_comes_after_the_one_it_needs():
    needs = {"probe": "finetune", "finetune": "pretrain", "voc": None, "pretrain": None}
    assert order_tasks(needs) == ["pretrain", "finetune", "probe", "voc"]


def test_the_order_of_the_file_is_kept_where_it_can_be():
    needs = {"pretrain": None, "b": "pretrain", "a": "pretrain", "c": None}
    assert order_tasks(needs) == list(needs)


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"a": "b", "b": "a"}, "tasks.a.needs: goes in a circle: a needs b needs a"),
        ({"a": "a"}, "a needs a"),
        ({"x": "a", "a": "b", "b": "c", "c": "b"}, "b needs c needs b"),
        ({"finetune": None, "a": "finetnue"}, "'finetnue' is no task.*Did you mean finetune?"),
    ],
)
def test_a_circle_and_an_unknown_task_are_told(needs, says, refused):
    with refused(f"suite tasks whose needs are {needs}", ValueError, match=says):
        order_tasks(needs)


def test_an_id_is_the_same_for_any_order_of_keys_and_another_for_other_values():
    assert run_id({"a": 1, "b": 2.0}) == run_id({"b": 2.0, "a": 1})
    assert len({run_id({"a": value}) for value in (1, 2, None, "1", [1])}) == 5
    assert len(run_id({})) == 12
    assert int(run_id({}), 16) >= 0


def test_methods_share_the_pretraining_that_is_the_same_in_both():
    """And what the second one's tasks need is the first one's run."""
    one, two = planned("p", "vanilla"), planned("p", "low_lr")
    probes = [
        planned("a", "vanilla", "probe", one.folder),
        planned("b", "low_lr", "probe", two.folder),
    ]
    joined = join_same([one, two, *probes])
    assert [run.folder for run in joined] == [one.folder, probes[0].folder, probes[1].folder]
    assert joined[0].also == ("low_lr",)
    assert [run.needs for run in joined] == [None, one.folder, one.folder]


def test_runs_that_differ_are_kept_as_they_are():
    runs = [planned("p", "vanilla"), planned("q", "tract")]
    assert join_same(runs) == runs


def test_methods_with_nothing_to_compare_are_refused(refused):
    runs = [planned("p", "vanilla"), planned("p", "tract")]
    with refused(
        "two methods with the same runs",
        ValueError,
        match=r"methods.tract: the same runs as vanilla's",
    ):
        join_same(runs)


def test_two_tasks_that_are_the_same_run_are_refused(refused):
    runs = [planned("p", "vanilla", "voc"), planned("p", "vanilla", "again")]
    with refused(
        "two tasks that are the same run", ValueError, match="tasks voc and again are the same run"
    ):
        join_same(runs)


def test_a_run_says_what_it_is():
    run = planned("p", "tract", "voc")
    assert run.title == "seed 0  voc  tract"
    assert run.processes == 1
    assert replace(run, resources=replace(run.resources, gpus=4)).processes == 4
    assert replace(run, resources=replace(run.resources, gpus=0.5)).processes == 1


@pytest.mark.parametrize(
    ("gpus", "cpus", "threads"), [(None, None, 1), (None, 2, 2), (4, 16, 4), (4, 2, 1), (0.5, 3, 3)]
)
def test_the_processes_of_a_run_share_its_cores(gpus, cpus, threads):
    resources = Resources(cpus=cpus, gpus=gpus)
    assert replace(planned("p", "tract"), resources=resources).threads == threads
