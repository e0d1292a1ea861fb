"""The graph of a suite's runs."""

from dataclasses import replace

import pytest
from suites import run_of

from tract_transfer.suite.plan import order_tasks, run_id


def test_task_comes_after_the_one_it_needs_and_otherwise_in_order_of_the_file():
    needs = {"probe": "finetune", "finetune": "pretrain", "voc": None, "pretrain": None}
    assert order_tasks(needs) == ["pretrain", "finetune", "probe", "voc"]
    needs = {"pretrain": None, "b": "pretrain", "a": "pretrain", "c": None}
    assert order_tasks(needs) == list(needs)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"a": "b", "b": "a"}, "tasks.a.needs: circular: a needs b needs a"),
        ({"a": "a"}, "a needs a"),
        ({"x": "a", "a": "b", "b": "c", "c": "b"}, "b needs c needs b"),
        (
            {"finetune": None, "a": "finetnue"},
            "'finetnue' is not one of the tasks.*Did you mean finetune?",
        ),
    ],
)
def test_circles_and_unknown_tasks_are_refused(needs, message, refused):
    with refused(f"suite tasks whose needs are {needs}", ValueError, match=message):
        order_tasks(needs)


def test_id_depends_on_values_and_not_on_their_order():
    assert run_id({"a": 1, "b": 2.0}) == run_id({"b": 2.0, "a": 1})
    assert len({run_id({"a": value}) for value in (1, 2, None, "1", [1])}) == 5
    assert len(run_id({})) == 12
    assert int(run_id({}), 16) >= 0


@pytest.mark.parametrize(
    ("gpus", "cpus", "processes", "threads"),
    [(None, None, 1, 1), (None, 2, 1, 2), (4, 16, 4, 4), (4, 2, 4, 1), (0.5, 3, 1, 3)],
)
def test_run_has_a_process_for_each_gpu_and_they_share_its_cores(gpus, cpus, processes, threads):
    run = run_of(cpus=cpus, gpus=gpus)
    assert (run.processes, run.threads) == (processes, threads)
    assert replace(run, method="tract").title == "seed 0  voc  tract"
