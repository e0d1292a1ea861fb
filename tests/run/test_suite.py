"""Planning a suite: from its file to runs with complete configs, or errors with key and fix."""

from pathlib import Path

import pytest
import yaml
from run_folders import entries
from suites import finish

from tract_transfer.config.file import ConfigError
from tract_transfer.config.suite import load_suite
from tract_transfer.run import suite as suite_module
from tract_transfer.run.suite import (
    Inspector,
    draft_runs,
    inspect_runs,
    list_plan,
    open_suite,
)

SUITE = {
    "output_dir": "out",
    "baseline": "vanilla",
    "seeds": [0, 1],
    "methods": {"vanilla": {}, "tract": {"pretrain": {"tract.enabled": True}}},
    "pretrain": "classification.yaml",
    "tasks": {"finetune": "finetune.yaml", "probe": "probe.yaml"},
}
KNOWN, UNKNOWN = "name: cifar/resnet18, args: {width: 8}", "name: null"
FITS = "model={weights: out/pretrain, backbone: {name: null}}"


@pytest.fixture
def write(tmp_path, write_tiny):
    """Write a suite with some keys changed, and its configs; return its path."""
    for name, task in (("finetune", "classification"), ("probe", "probe")):
        text = write_tiny(tmp_path, task).read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace(KNOWN, UNKNOWN))
    write_tiny(tmp_path)

    def write(**changes):
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**SUITE, **changes}, sort_keys=False))
        return load_suite(path)

    return write


@pytest.fixture
def plan(write):
    """Plan a suite with some keys changed; data and models are not inspected."""

    def plan(inspect=lambda config, needed: {"train": "t"}, **changes):
        suite = write(**changes)
        return inspect_runs(draft_runs(suite), inspect)

    return plan


def ids_of(runs):
    return {(run.method, run.task, run.seed): run.id for run in runs}


def test_every_method_task_and_seed_is_a_run_with_a_complete_config(plan):
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
        assert run.fingerprints == {"train": "t"}
        if run.task == "pretrain":
            assert run.config["tract"]["enabled"] is (run.method == "tract")
        else:
            assert run.needs == Path(f"out/{run.method}/pretrain/seed{run.seed}")
            assert run.config["model"]["weights"] == str(run.needs)


def test_id_depends_on_config_data_and_backbone_and_not_on_paths(plan):
    ids = ids_of(plan())
    assert ids_of(plan(output_dir="elsewhere", title="Other?", workers=2)) == ids
    other = ids_of(plan(lambda config, needed: {"train": "u"}))
    assert not set(other.values()) & set(ids.values())
    longer = {"tract": {"pretrain": {"tract.enabled": True, "solver.max_iters": 7}}, "vanilla": {}}
    changed = ids_of(plan(methods=longer))
    assert changed["tract", "probe", 0] != ids["tract", "probe", 0]  # by its backbone
    assert changed["vanilla", "probe", 0] == ids["vanilla", "probe", 0]


def test_task_comes_after_the_one_it_needs(plan):
    tasks = {"probe": {"config": "probe.yaml", "needs": "finetune"}, "finetune": "finetune.yaml"}
    runs = plan(tasks=tasks, seeds=[0])
    assert [run.task for run in runs[::2]] == ["pretrain", "finetune", "probe"]


def test_methods_share_the_runs_that_are_the_same(plan):
    """Their tasks take the backbone of the shared run."""
    methods = {"vanilla": {}, "lower": {"tasks": {"finetune": {"solver.lr": 0.01}}}}
    runs = {(run.method, run.task): run for run in plan(methods=methods, seeds=[0])}
    assert set(runs) == {
        ("vanilla", "pretrain"), ("vanilla", "finetune"), ("lower", "finetune"),
        ("vanilla", "probe"),
    }  # fmt: skip
    shared = runs["vanilla", "pretrain"]
    assert shared.also == runs["vanilla", "probe"].also == ("lower",)
    for method in methods:
        assert runs[method, "finetune"].also == ()
        assert runs[method, "finetune"].needs == shared.folder
        assert runs[method, "finetune"].config["model"]["weights"] == str(shared.folder)


def test_task_without_pretraining_keeps_its_own_weights(plan):
    methods = {"vanilla": {}, "tract": {"downstream": {"tract.enabled": True}}}
    runs = plan(pretrain=None, tasks={"train": "classification.yaml"}, methods=methods)
    assert [run.needs for run in runs] == [None] * 4
    assert {run.config["model"]["weights"] for run in runs} == {None}


BAD = {
    "a circle": (
        {"tasks": {"a": {"config": "finetune.yaml", "needs": "b"},
                   "b": {"config": "probe.yaml", "needs": "a"}}},
        r"tasks\.a\.needs: circular: a needs b needs a\. Break the circle\..*suite\.yaml line \d+",
    ),
    "an unknown task": (
        {"tasks": {"finetune": "finetune.yaml",
                   "probe": {"config": "probe.yaml", "needs": "finetnue"}}},
        r"tasks\.probe\.needs: 'finetnue' is not one of the tasks .* Did you mean 'finetune'\?",
    ),
    "a missing baseline": (
        {"baseline": "tarct"}, r"'tarct' is not one of the methods \['vanilla', 'tract'\]",
    ),
    "seeds that the needed task lacks": (
        {"tasks": {"finetune": {"config": "finetune.yaml", "seeds": [0]},
                   "probe": {"config": "probe.yaml", "needs": "finetune", "seeds": [0, 1]}}},
        r"tasks\.probe\.seeds: \[0, 1\] must be different seeds of finetune, \[0\]",
    ),
    "a seed twice": ({"seeds": [0, 0]}, r"seeds \[0, 0\] contain a seed twice"),
    "two tasks that are the same run": (
        {"tasks": {"probe": "probe.yaml", "again": "probe.yaml"}},
        "tasks probe and again are the same run: .* Remove one",
    ),
    "a name that cannot be a folder": (
        {"tasks": {"../probe": "probe.yaml"}}, r"'\.\./probe' names a folder, so",
    ),
    "the name of the pre-training": (
        {"tasks": {"pretrain": "probe.yaml"}}, r"tasks\.pretrain: the name is reserved",
    ),
    "two methods with the same runs": (
        {"methods": {"vanilla": {}, "tract": {}}},
        r"methods\.tract: has the same runs as vanilla in every task",
    ),
    "an unknown task of a method": (
        {"methods": {"vanilla": {}, "tract": {"tasks": {"prob": {"seed": 1}}}}},
        r"methods\.tract\.tasks\.prob: not one of the tasks \['finetune', 'probe'\]",
    ),
    "an unknown key of a section": ({"tasks": {"probe": {"conf": "x"}}}, r"probe\.conf: unknown"),
    "a key that the suite sets": (
        {"methods": {"vanilla": {}, "tract": {"downstream": {"model.weights": "x"}}}},
        r"methods\.tract: model\.weights is set by the suite itself in finetune.*suite\.yaml line",
    ),
    "an unknown key of a method": (
        {"methods": {"vanilla": {}, "tract": {"downstream": {"data.batchsize": 3}}}},
        r"finetune: data\.batchsize: unknown\. Did you mean data\.batch_size\?.*line \d+",
    ),
    "a key of another task": (
        {"methods": {"vanilla": {}, "tract": {"tasks": {"probe": {"solver": 1}}}}},
        r"probe: solver: not a key of a probe config",
    ),
    "two and a half GPUs": ({"resources": {"gpus": 2.5}}, r"gpus: 2\.5 must be a whole number"),
    "nothing to run": ({"pretrain": None, "tasks": {}}, "there is nothing to run"),
    "a pre-training's override without one": (
        {"pretrain": None, "methods": {"vanilla": {}, "tract": {"pretrain": {"seed": 1}}}},
        r"methods\.tract\.pretrain: the suite has no pretrain",
    ),
    "a task's override without one": (
        {"tasks": {}, "methods": {"vanilla": {}, "tract": {"downstream": {"seed": 1}}}},
        r"methods\.tract\.downstream: the suite has no tasks",
    ),
    "a missing file": (
        {"tasks": {"probe": "nowhere.yaml"}}, r"probe: No config .*nowhere\.yaml",
    ),
    "missing weights": (
        {"pretrain": None, "tasks": {"train": "classification.yaml"},
         "methods": {"vanilla": {}, "tract": {"downstream": {"model.weights": "nowhere"}}}},
        r"train: model\.weights: .*nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_bad_suites_are_refused_before_data_are_inspected(plan, changes):
    keys, message = changes
    with pytest.raises(ConfigError, match=message):
        plan(lambda config, needed: pytest.fail("data were inspected"), **keys)


def test_problems_of_all_runs_are_reported_once_and_not_their_consequences(plan):
    def inspect(config, needed):
        if config.task == "probe":
            raise FileNotFoundError("No data at x. Set data.train.path.")
        if needed is not None:
            raise OSError(28, "No space left on device")

    problems = r"finetune: \[Errno 28\] No space left on device\nprobe: No data at x\. Set .*"
    with pytest.raises(ConfigError, match=f"^{problems}$"):
        plan(inspect)

    def inspect_pretrain(config, needed):
        raise ValueError(f"no {config.name}")

    with pytest.raises(ConfigError, match=r"^pretrain: no pretrain$"):
        plan(inspect_pretrain)


def test_plan_lists_what_would_be_done(write, monkeypatch):
    monkeypatch.setattr(Inspector, "inspect", lambda *_: {"train": "t1", "test": "t2"})
    monkeypatch.chdir(Path(write().path("probe")).parent)
    methods = {**SUITE["methods"], "again": {"tasks": {"finetune": {"solver.lr": 0.01}}}}
    config = write(seeds=[0], methods=methods)
    suite = open_suite(config)
    finish(suite.runs[0])
    finish(suite.runs[1])
    (suite.runs[1].folder / "config.yaml").write_text("seed: 5\n")
    suite = open_suite(config)
    lines = list_plan(suite)
    assert lines[0] == (
        f"{suite.runs[0].id}  out/vanilla/pretrain/seed0 (also again)  skip: finished"
    )
    assert "  contains another run: data.batch_size: None then, 32 now; " in lines[1]
    assert [line.rpartition("  ")[2] for line in lines[2:]] == ["run"] * 5
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match=r"contains another run: [\s\S]*--set-aside"),
    ):
        patch.setattr(Inspector, "inspect", lambda *_: pytest.fail("data were inspected"))
        open_suite(config, refuse=True)
    assert entries(Path("out")) == ["tract", "vanilla"]


@pytest.fixture
def pretrain(load_tiny, tmp_path):
    return load_tiny(tmp_path, "output_dir=out/pretrain")


@pytest.fixture
def inspect(tmp_path):
    (tmp_path / "temporary").mkdir()
    inspector = Inspector(tmp_path / "temporary")
    return lambda config, needed=None: inspector.inspect(config, needed)


def test_fingerprints_identify_the_data(inspect, pretrain, load_tiny, tmp_path):
    fingerprints = inspect(pretrain)
    assert set(fingerprints) == {"train", "test"}
    fewer = load_tiny(tmp_path, "data.test.classes=[0, 1]", "data.train.classes=[0, 1]")
    assert not set(inspect(fewer).values()) & set(fingerprints.values())


def test_task_is_built_on_a_backbone_that_is_not_trained_yet(
    inspect, pretrain, load_tiny, tmp_path
):
    for task in ("classification", "detection", "probe"):
        assert inspect(load_tiny(tmp_path, FITS, f"output_dir={task}", task=task), pretrain)
    assert not (tmp_path / "out").exists()


def test_data_on_the_hub_are_not_inspected(inspect, pretrain, load_tiny, tmp_path):
    hub = ("data.train={source: huggingface, path: a/b, split: train}", "data.cache=none")
    hub += ("data.test={source: huggingface, path: a/b, split: test}",)
    for task in ("classification", "probe"):
        config = load_tiny(tmp_path, FITS, f"output_dir={task}", *hub, task=task)
        assert inspect(config, pretrain) is None


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        (
            "classification", "model={weights: out/pretrain, backbone: {name: cifar/vit}}",
            "model.weights: the weights are those of .*Remove model.backbone",
        ),
        ("classification", "data.train.classes=[0, 1]", "classes"),
        ("detection", "model.detector={name: torchvision_c5, args: {num_levels: 7}}", "detector"),
        (
            "classification", "data.train={source: huggingface, path: ./nowhere, split: train}",
            "nowhere",
        ),
    ],
)  # fmt: skip
def test_config_that_does_not_fit_is_refused(
    inspect, pretrain, load_tiny, tmp_path, task, override, message
):
    """The error names the run whose backbone is missing, not the stand-in."""
    config = load_tiny(tmp_path, FITS, override, task=task)
    with pytest.raises((ValueError, OSError), match=message) as error:
        inspect(config, pretrain)
    assert "temporary" not in str(error.value)


def test_what_decides_the_data_is_inspected_once(pretrain, load_tiny, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(suite_module, "_build", lambda config: built.append(config) or {})
    inspector = Inspector(tmp_path)
    held_out = "data.val={source: train, fraction: 0.2}"  # depends on the seed
    for words in ((), ("seed=5",), ("solver.max_iters=9",), (held_out,), (held_out, "seed=5")):
        inspector.inspect(load_tiny(tmp_path, "output_dir=out/pretrain", *words), None)
    assert [(config.solver.max_iters, config.seed) for config in built] == [
        (6, 0), (9, 0), (6, 0), (6, 5),
    ]  # fmt: skip
