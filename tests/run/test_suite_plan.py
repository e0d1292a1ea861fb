"""A suite's file becomes runs with whole configs, or an error that names file, key and fix."""

from pathlib import Path

import pytest
import yaml

from tract_transfer.config.file import ConfigError
from tract_transfer.config.suite import load_suite
from tract_transfer.run.suite_plan import plan_suite

SUITE = {
    "output_dir": "out",
    "baseline": "vanilla",
    "seeds": [0, 1],
    "methods": {"vanilla": {}, "tract": {"pretrain": {"tract.enabled": True}}},
    "pretrain": "classification.yaml",
    "tasks": {"finetune": "finetune.yaml", "probe": "probe.yaml"},
}
KNOWN, UNKNOWN = "name: cifar/resnet18, args: {width: 8}", "name: null"


@pytest.fixture
def plan(tmp_path, write_tiny):
    """Plan a suite with some keys changed; data and models are not looked at."""
    for name, task in (("classification", "classification"), ("probe", "probe")):
        text = write_tiny(tmp_path, task).read_text()
        if name == "probe":
            (tmp_path / "probe.yaml").write_text(text.replace(KNOWN, UNKNOWN))
        else:
            (tmp_path / "finetune.yaml").write_text(text.replace(KNOWN, UNKNOWN))

    def build(inspect=lambda config, needed: {"train": "t"}, glance=None, **changes):
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**SUITE, **changes}, sort_keys=False))
        return plan_suite(load_suite(path), inspect, glance)

    return build


def test_every_method_task_and_seed_is_a_run_with_its_whole_config(plan):
    runs = plan()
    assert [str(run.folder) for run in runs[:6]] == [
        f"out/{method}/{task}/seed0"
        for task in ("pretrain", "finetune", "probe")
        for method in ("vanilla", "tract")
    ]
    assert len({run.id for run in runs}) == len(runs) == 12
    for run in runs:
        assert run.config["seed"] == run.seed
        assert run.config["output_dir"] == str(run.folder)
        if run.task == "pretrain":
            assert run.config["tract"]["enabled"] is (run.method == "tract")
        else:
            assert run.needs == Path(f"out/{run.method}/pretrain/seed{run.seed}")
            assert run.config["model"]["weights"] == str(run.needs)


def test_ids_know_data_and_backbone_and_not_the_place(plan):
    ids = {(run.method, run.task, run.seed): run.id for run in plan()}
    moved = plan(output_dir="elsewhere", title="Other?", workers=2)
    assert [run.id for run in moved] == list(ids.values())
    other = {run.id for run in plan(lambda config, needed: {"train": "u"})}
    assert not other & set(ids.values())
    longer = {"tract": {"pretrain": {"tract.enabled": True, "solver.max_iters": 7}}, "vanilla": {}}
    changed = {(run.method, run.task, run.seed): run.id for run in plan(methods=longer)}
    assert changed["tract", "probe", 0] != ids["tract", "probe", 0]  # by its backbone
    assert changed["vanilla", "probe", 0] == ids["vanilla", "probe", 0]


BAD = {
    "a circle": (
        {"tasks": {"a": {"config": "finetune.yaml", "needs": "b"},
                   "b": {"config": "probe.yaml", "needs": "a"}}},
        r"tasks\.a\.needs: goes in a circle: a needs b needs a\. Break it\..*suite\.yaml line \d+",
    ),
    "an unknown task": (
        {"tasks": {"finetune": "finetune.yaml",
                   "probe": {"config": "probe.yaml", "needs": "finetnue"}}},
        r"tasks\.probe\.needs: 'finetnue' is no task of .* Did you mean finetune\?.*suite\.yaml",
    ),
    "a missing baseline": (
        {"baseline": "tarct"},
        r"'tarct' is none of methods \['vanilla', 'tract'\]",
    ),
    "seeds that do not pair": (
        {"tasks": {"probe": {"config": "probe.yaml", "seeds": [1, 2]}}},
        r"tasks\.probe\.seeds: \[1, 2\] must be different seeds of pretrain, \[0, 1\]: a run pairs",
    ),
    "seeds that the task it needs lacks": (
        {"tasks": {"finetune": {"config": "finetune.yaml", "seeds": [0]},
                   "probe": {"config": "probe.yaml", "needs": "finetune", "seeds": [0, 1]}}},
        r"tasks\.probe\.seeds: \[0, 1\] must be different seeds of finetune, \[0\]",
    ),
    "a seed twice": ({"seeds": [0, 0]}, r"seeds \[0, 0\] repeat one"),
    "two runs of one name": (
        {"tasks": {"probe": "probe.yaml", "Probe": "finetune.yaml"}},
        "tasks: probe and Probe are one folder on some disks",
    ),
    "two runs that are the same": (
        {"tasks": {"probe": "probe.yaml", "again": "probe.yaml"}},
        "tasks probe and again are the same run .* Leave one out",
    ),
    "a name that makes no folder": (
        {"tasks": {"../probe": "probe.yaml"}}, r"tasks\.\.\./probe: a name is of letters",
    ),
    "methods that are the same": (
        {"methods": {"vanilla": {}, "tract": {}}}, r"methods\.tract: the same runs as vanilla's",
    ),
    "a method's task that is none": (
        {"methods": {"vanilla": {}, "tract": {"tasks": {"prob": {"seed": 1}}}}},
        r"methods\.tract\.tasks\.prob: is no task of \['finetune', 'probe'\]",
    ),
    "a key that the suite sets": (
        {"methods": {"vanilla": {}, "tract": {"downstream": {"model.weights": "x"}}}},
        r"methods\.tract: model\.weights is set by the suite itself in finetune.*suite\.yaml line",
    ),
    "an unknown key of a method": (
        {"methods": {"vanilla": {}, "tract": {"downstream": {"data.batchsize": 3}}}},
        r"finetune, tract: data\.batchsize: unknown\. Did you mean data\.batch_size\?.*line \d+",
    ),
    "nothing to run": ({"pretrain": None, "tasks": {}}, "there is nothing to run"),
    "a pre-training's override without one": (
        {"pretrain": None, "methods": {"vanilla": {}, "tract": {"pretrain": {"seed": 1}}}},
        r"methods\.tract\.pretrain: the suite has no pretrain",
    ),
    "a file that is not there": (
        {"tasks": {"probe": "nowhere.yaml"}}, r"probe: No config can be read at .*nowhere\.yaml",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_a_plan_that_cannot_be_run_is_told(plan, changes):
    keys, message = changes
    with pytest.raises(ConfigError, match=message):
        plan(**keys)


def test_the_problems_of_all_runs_are_told_at_once_and_each_once(plan):
    """Data that do not load, in one task of every method and seed; a full disk in another."""

    def inspect(config, needed):
        if config.task == "probe":
            raise FileNotFoundError("No data at x. Set data.train.path.")
        if needed is not None:
            raise OSError(28, "No space left on device")
        return {}

    with pytest.raises(ConfigError) as error:
        plan(inspect)
    assert str(error.value).splitlines() == [
        "finetune: [Errno 28] No space left on device",
        "probe: No data at x. Set data.train.path.",
    ]


def test_what_needs_a_run_with_a_problem_adds_none_of_its_own(plan):
    def inspect(config, needed):
        if config.name == "pretrain":
            raise ValueError("no good")
        raise AssertionError("its backbone has a problem")

    with pytest.raises(ConfigError, match=r"^pretrain: no good$"):
        plan(inspect)


def test_a_task_without_a_pretraining_keeps_its_own_weights(plan):
    runs = plan(
        pretrain=None,
        tasks={"train": "classification.yaml"},
        methods={"vanilla": {}, "tract": {"downstream": {"tract.enabled": True}}},
    )
    assert [run.needs for run in runs] == [None] * 4
    assert {run.config["model"]["weights"] for run in runs} == {None}


def test_what_configs_tell_is_told_before_data_are_looked_at(plan):
    def look(config, needed):
        pytest.fail("data were looked at")

    with pytest.raises(ConfigError, match=r"probe, tract: solver: not a key of a probe config"):
        methods = {"vanilla": {}, "tract": {"tasks": {"probe": {"solver": 1}}}}
        plan(look, methods=methods)


def test_the_runs_are_shown_before_data_are_looked_at(plan):
    order = []

    def glance(drafts):
        order.append([draft.run.folder for draft in drafts])

    def look(config, needed):
        order.append("data")
        return {"train": "t"}

    runs = plan(look, glance)
    assert order[0] == [run.folder for run in runs]
    assert set(order[1:]) == {"data"}
