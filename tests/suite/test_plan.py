"""A run of a suite, and its id."""

from dataclasses import replace

import pytest
from suites import run_of

from tract_transfer.suite.plan import run_id


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
