import logging
from pathlib import Path

import pytest

from tract_transfer.suite.execute import execute
from tract_transfer.suite.plan import PRETRAIN, expand

METHODS = {
    "vanilla": {"pretrain": {}, "downstream": {}},
    "tract": {"pretrain": {"tract.enabled": True, "seed": 9}, "downstream": {"solver.lr": 0.1}},
}


@pytest.fixture
def plan():
    tasks = {"finetune": Path("f.yaml"), "probe": Path("p.yaml")}
    return expand(Path("out"), METHODS, [3, 5], Path("pre.yaml"), tasks)


def test_whole_seeds_come_one_after_another(plan):
    assert [(run.seed, run.task, run.method) for run in plan] == [
        (seed, task, method)
        for seed in (3, 5)
        for task in (PRETRAIN, "finetune", "probe")
        for method in ("vanilla", "tract")
    ]


def test_a_backbone_comes_before_what_needs_it(plan):
    before = set()
    for run in plan:
        assert (run.needs is None) == (run.task == PRETRAIN)
        assert run.needs is None or run.needs in before
        before.add(run.folder)


def test_folders_name_method_task_and_seed(plan):
    assert [str(run.folder) for run in plan[:3]] == [
        "out/vanilla/pretrain/seed3", "out/tract/pretrain/seed3", "out/vanilla/finetune/seed3",
    ]  # fmt: skip
    assert len({run.folder for run in plan}) == len(plan)


def test_overrides_are_the_methods_the_labels_and_the_backbone(plan):
    by_folder = {str(run.folder): run for run in plan}
    assert by_folder["out/tract/pretrain/seed5"].overrides == {
        "tract.enabled": True, "name": "pretrain", "method": "tract", "seed": 5,
        "output_dir": "out/tract/pretrain/seed5",
    }  # fmt: skip
    downstream = by_folder["out/tract/probe/seed5"]
    assert downstream.overrides == {
        "solver.lr": 0.1, "name": "probe", "method": "tract", "seed": 5,
        "output_dir": "out/tract/probe/seed5", "model.weights": "out/tract/pretrain/seed5",
    }  # fmt: skip
    assert downstream.config_file == Path("p.yaml")
    assert downstream.needs == Path("out/tract/pretrain/seed5")


def carry_out_all(plan, *, finished=(), failing=()):
    """Execute a plan; return its failures and the folders that were carried out."""
    done = []

    def carry_out(run):
        done.append(str(run.folder))
        if str(run.folder) in failing:
            raise failing[str(run.folder)]
        return "top1 50%"

    return execute(plan, lambda run: str(run.folder) in finished, carry_out), done


def test_everything_is_carried_out_in_order(plan):
    failures, done = carry_out_all(plan)
    assert failures == {}
    assert done == [str(run.folder) for run in plan]


def test_what_is_finished_is_left_alone(plan, caplog):
    finished = {str(run.folder) for run in plan[:-1]}
    with caplog.at_level(logging.INFO):
        _, done = carry_out_all(plan, finished=finished)
    assert done == [str(plan[-1].folder)]
    assert caplog.text.count("finished before") == len(plan) - 1
    assert "[12/12] seed 5  probe" in caplog.text


@pytest.mark.parametrize(
    "error", [ValueError("odd"), OSError("odd"), RuntimeError("odd"), FloatingPointError("odd")]
)
def test_a_failure_stops_only_what_needs_it(plan, error):
    broken = "out/tract/pretrain/seed3"
    failures, done = carry_out_all(plan, failing={broken: error})
    assert failures == {
        Path(broken): f"{type(error).__name__}: odd",
        Path("out/tract/finetune/seed3"): f"its backbone {broken} failed",
        Path("out/tract/probe/seed3"): f"its backbone {broken} failed",
    }
    assert done == [str(run.folder) for run in plan if run.folder not in list(failures)[1:]]


def test_a_failed_task_stops_nothing(plan):
    broken = "out/vanilla/finetune/seed3"
    failures, done = carry_out_all(plan, failing={broken: ValueError("odd")})
    assert list(failures) == [Path(broken)]
    assert len(done) == len(plan)


def test_a_run_that_cannot_be_resumed_is_a_failure(plan):
    def is_finished(run):
        if run.task == "probe":
            raise ValueError("run with another config")
        return True

    failures = execute(plan, is_finished, lambda run: "")
    assert {run.folder for run in plan if run.task == "probe"} == set(failures)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_what_is_no_runs_fault_ends_the_suite(plan, error):
    """A stop by the user, or a mistake in the program."""
    with pytest.raises(error):
        carry_out_all(plan, failing={str(plan[0].folder): error()})
