"""A run from config to results: what it reports, and the folder that tells all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_folders import CARVED, Killed, assert_same_run, lines_of, results_of

from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ConfigError, load_config
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.files import as_yaml
from tract_transfer.models.weights import build_from_metadata, load_weights, read_metadata
from tract_transfer.run.evaluate import evaluate_run, preview
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def selected(tmp_path_factory, load_tiny):
    """A finished run that reports its best checkpoint, and what `run` returned."""
    folder = tmp_path_factory.mktemp("selected")
    config = load_tiny(
        folder, *CARVED, "solver={lr: 0.3, max_iters: 8, schedule: constant}", "seed=4",
        "evaluation.every_iters=2", "tract.enabled=true", "solver.ema_decay=0.5",
    )  # fmt: skip
    return config, Path(config.output_dir), run(config)


def test_val_is_carved_from_train(selected):
    config, _, _ = selected
    data = build_data(config)
    whole = build_data(config.model_copy(update={"data": config.data.model_copy(
        update={"val": None})}))  # fmt: skip

    def rows(dataset):
        return sorted(dataset.item(i) for i in range(len(dataset)))

    assert not set(rows(data.train)) & set(rows(data.val))
    assert sorted(rows(data.train) + rows(data.val)) == rows(whole.train)
    counts = np.bincount(data.val.labels) / np.bincount(whole.train.labels)
    assert counts == pytest.approx(0.2, abs=0.01)


def test_the_best_checkpoint_is_reported(selected):
    _, folder, results = selected
    val = {line["iteration"]: line["top1"] for line in lines_of(folder) if line["split"] == "val"}
    assert list(val) == [2, 4, 6, 8]
    best = next(iteration for iteration, top1 in val.items() if top1 == max(val.values()))
    assert results["reported_iteration"] == best
    assert results["iterations"] == 8
    assert results["protocol"]["selection"] == "best top1 on val"
    checkpointer = Checkpointer(folder / "checkpoints")
    assert checkpointer.best().name == f"iter_{best:07d}"
    weights = checkpointer.load(checkpointer.best())[0]["ema"]
    backbone = build_from_metadata(read_metadata(folder))
    load_weights(backbone, folder)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, weights[f"backbone.{name}"]), name


def test_results_say_what_they_are(selected):
    _, folder, results = selected
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["task"] == "classification"
    assert (results["name"], results["method"], results["role"]) == (
        "classification", "tract", "pretrain",
    )  # fmt: skip
    assert results["seed"] == 4
    assert results["weights"] is None
    assert results["tract"]["lam"] == 0.1
    assert results["primary_metric"] in results["metrics"]
    assert results["epochs"] == pytest.approx(8 / (346 // 32), rel=0.01)
    assert results["skipped"] == []
    assert results["protocol"]["average"] == "exponential moving average, decay 0.5"
    line = lines_of(folder)[-1]
    assert line == {"iteration": 8, "epoch": line["epoch"], "split": "test", **results["metrics"]}
    environment = json.loads((folder / "environment.json").read_text())
    assert set(environment["data"]) == {"train", "val", "test"}
    assert torch.__version__.startswith(environment["versions"]["torch"])


def test_the_card_describes_the_backbone(selected):
    _, folder, results = selected
    card = read_metadata(folder)
    assert card["method"] == "tract"
    assert (card["lam"], card["lam_mode"], card["seed"]) == (0.1, "absolute", 4)
    assert card["iterations"] == results["reported_iteration"]
    assert (card["name"], card["args"]) == ("cifar/resnet18", {"width": 8})
    assert card["data"]["classes"] == ["zero", "one", "two"]
    assert card["feature_dim"] == 64


def test_evaluating_again_gives_the_same_numbers(selected):
    config, folder, results = selected
    assert evaluate_run(config) == results["metrics"]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["metrics"] == results["metrics"]
    assert evaluation["checkpoint"] == f"iter_{results['reported_iteration']:07d}"
    assert evaluation["details"] == json.loads(json.dumps(results["details"]))


def test_resuming_a_finished_run_changes_nothing(selected):
    config, folder, _ = selected
    lines, results = lines_of(folder), results_of(folder)
    run(config, resume=True)
    assert lines_of(folder) == lines
    assert results_of(folder) == results


def test_the_folders_config_runs_the_same_again(selected, tmp_path):
    _, folder, _ = selected
    again = tmp_path / "again"
    run(load_config(folder / "config.yaml", [f"output_dir={again}"]))
    assert_same_run(folder, again)


def test_a_downstream_run_takes_what_the_folder_says(selected, tmp_path, load_tiny):
    _, folder, _ = selected
    for number, task in enumerate(("classification", "probe", "detection")):
        path = tmp_path / str(number)
        path.mkdir()
        config = load_tiny(
            path, "model.backbone={name: null}", f"model.weights={folder}", task=task
        )
        results = run(config)
        assert (results["method"], results["role"]) == ("tract", "downstream")
        assert results["weights"] == str(folder)
    card = read_metadata(tmp_path / "0/run")
    assert (card["name"], card["args"], card["method"]) == (
        "cifar/resnet18", {"width": 8}, "tract",
    )  # fmt: skip
    assert card["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])


def test_colours_travel_with_the_weights(tmp_path, load_tiny):
    words = ("model.backbone.mean=[0.1, 0.2, 0.3]", "model.backbone.std=[0.4, 0.5, 0.6]")
    first = load_tiny(tmp_path, *words, "solver.max_iters=1")
    run(first)
    (tmp_path / "next").mkdir()
    second = load_tiny(
        tmp_path / "next", "model.backbone={name: null}", f"model.weights={first.output_dir}",
        "solver.max_iters=1",
    )  # fmt: skip
    results = run(second)
    card = read_metadata(Path(second.output_dir))
    assert card["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert card["std"] == pytest.approx([0.4, 0.5, 0.6])
    assert results["method"] == "vanilla"


def test_a_detector_reports(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "evaluation.protocol=area", task="detection")
    results = run(config)
    assert results["metrics"].keys() == {"ap50", "ap75", "ap"}
    assert "VOC" in results["protocol"]["metric"]
    found = json.loads((tmp_path / "run/detections.json").read_text())
    assert [entry["image"] for entry in found] == ["detections/0000.png", "detections/0001.png"]
    assert all((tmp_path / "run" / entry["image"]).is_file() for entry in found)
    assert len(found[0]["truth_boxes"]) == len(found[0]["truth_labels"]) > 0
    assert evaluate_run(config) == results["metrics"]


def test_val_alone_is_reported_where_there_is_no_test(tmp_path, load_tiny):
    results = run(load_tiny(tmp_path, *CARVED[:1], "data.test=null", "evaluation.every_iters=3"))
    found = [(line["iteration"], line["split"]) for line in lines_of(tmp_path / "run")]
    assert found == [(i, s) for i, s in [(2, "train"), (3, "val"), (4, "train"), (6, "train")]] + [
        (6, "val")
    ]
    assert "val" in results["protocol"]


def test_a_probe_is_a_function_of_its_config(tmp_path, load_tiny):
    one = run(load_tiny(tmp_path, f"output_dir={tmp_path / 'one'}", task="probe"))
    words = (f"output_dir={tmp_path / 'two'}", "data.batch_size=50", "data.num_workers=2")
    two = run(load_tiny(tmp_path, *words, task="probe"))
    assert one["metrics"] == pytest.approx(two["metrics"], abs=0.02)
    assert one["metrics"].keys() == {
        f"{probe}_{metric}"
        for probe, metrics in (
            ("knn1", ("top1", "mean_per_class")),
            ("knn5", ("top1", "mean_per_class")),
            ("logistic", ("top1", "mean_per_class")),
        )
        for metric in metrics
    }


@pytest.mark.parametrize("task", ["classification", "probe", "detection"])
def test_a_preview_writes_nothing(tmp_path, load_tiny, task):
    said = preview(load_tiny(tmp_path, task=task))
    assert "parameters" in said
    assert float(said["FLOPs of a forward"].partition(" G an image")[0]) > 0
    assert not (tmp_path / "run").exists()
    if task != "probe":
        assert said["the whole run"].startswith("about 0:00")


def test_a_failure_is_in_the_log(tmp_path, load_tiny, kill_at, capsys):
    kill_at(2)
    with pytest.raises(Killed):
        run(load_tiny(tmp_path))
    text = (tmp_path / "run/log.txt").read_text()
    assert "The run failed." in text
    assert "Killed" in text
    assert "Traceback" not in capsys.readouterr().err


def test_what_trains_on_decides_the_numbers_alone(tmp_path, load_tiny):
    """Workers, cache and log interval change no bit."""
    run(load_tiny(tmp_path, f"output_dir={tmp_path / 'one'}"))
    words = ("data.num_workers=2", "data.cache=ram", "engine.log.every_iters=5")
    run(load_tiny(tmp_path, *words, f"output_dir={tmp_path / 'two'}"))
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_average_warms_up_as_timm_s(tmp_path, load_tiny):
    words = ("solver.ema_decay=0.9999", "solver.max_iters=5")
    with pytest.raises(ConfigError, match=r"leaves 100% of the initial weights"):
        run(load_tiny(tmp_path, *words))
    config = load_tiny(tmp_path, *words, "solver.ema_warmup=true")
    trainer = build_trainer(config, build_data(config), build_accelerator(config))
    name = "backbone.model.conv1.weight"
    expected, seen = trainer.model.state_dict()[name].clone(), []
    trainer.optimizer.register_step_post_hook(
        lambda *_: seen.append(trainer.model.state_dict()[name].clone())
    )
    trainer.train()
    for step, weight in enumerate(seen, start=1):
        expected.lerp_(weight, (1 + step) ** (-2 / 3))
    torch.testing.assert_close(trainer.evaluated_model.state_dict()[name], expected)


def test_settings_on_a_line_are_yaml_without_braces():
    assert as_yaml({"lr": 0.1, "clip": None, "steps": (2, 4)}) == (
        "lr: 0.1, clip: null, steps: [2, 4]"
    )
    settings = {"head": {"name": "mlp"}, "note": "a: b, {c} 'd' \u00e9 " + "long " * 50}
    text = as_yaml(settings)
    assert "\n" not in text
    assert yaml.safe_load(f"{{{text}}}") == settings
