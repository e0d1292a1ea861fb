"""Every config loads, builds its model and runs; every suite expands to configs that load."""

from pathlib import Path

import datasets
import pytest
import torch
from box_data import write_voc

from tract_transfer.build.data import build_data
from tract_transfer.build.model import build_model
from tract_transfer.config.schema import (
    TASKS,
    DetectionConfig,
    ProbeConfig,
    dump_config,
    load_config,
)
from tract_transfer.config.suite import load_suite
from tract_transfer.run.run import run as run_config
from tract_transfer.run.suite import draft_runs, inspect_runs, list_plan, open_suite

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
BENCHMARKS = ROOT / "benchmarks/configs"
ALL = sorted([*ROOT.glob("configs/**/*.yaml"), *BENCHMARKS.glob("**/*.yaml")])
SUITES = [path for path in ALL if path.parent.name == "suites"]
RUNS = [path for path in ALL if path.parent.name not in ("base", "suites")]
SAMPLES = [path for path in RUNS if path.parent.name == "samples"]


def name_of(path):
    return str(path.relative_to(ROOT))


SMALL_VIT = (
    "model.backbone={name: timm/deit3_small_patch16_224, args: {img_size: 32, patch_size: 8, "
    "depth: 2, embed_dim: 48, num_heads: 3}}"
)


def small_net(config):
    """Overrides of a ViT and of a deep ResNet; none for others."""
    name = config.model.backbone.name or ""
    # Too wide for a test, or too deep for images of 16 px.
    if name in ("cifar/resnet18", "torchvision/resnet34", "torchvision/resnet50"):
        return ["model.backbone={name: cifar/resnet18, args: {width: 8}}"]
    is_vit = name.startswith(("cifar/vit", "timm/vit", "timm/deit3"))
    return [SMALL_VIT, "data.transforms.size_px=32"] if is_vit else []


def without_weights(config):
    """Overrides that need no weights, with a tiny backbone instead of a run folder's."""
    if config.model.backbone.name is not None:
        return ["model.weights=null"]
    return ["model.weights=null", "model.backbone={name: cifar/resnet18, args: {width: 8}}"]


# A tiny backbone for each kind of detector, and arguments that make it small.
SMALL_DETECTORS = {
    "torchvision_fpn": ("cifar/resnet18, args: {width: 8}", ["head_dim=32", "fpn_channels=16"]),
    "torchvision_c4": ("cifar/resnet18, args: {width: 8}", []),
    "torchvision_c5": ("timm/vgg11, args: {mlp_ratio: 0.01}", []),
    "torchvision_vitdet": ("timm/test_vit", ["head_dim=32", "fpn_channels=16"]),
    "detectron2": ("cifar/resnet18, args: {width: 8}", []),
}


def needs_detectron2(path):
    config = load_config(path)
    if isinstance(config, DetectionConfig) and config.model.detector.name == "detectron2":
        pytest.importorskip("detectron2")


def small_detector(config):
    name = config.model.detector.name
    backbone, words = SMALL_DETECTORS[name]
    words = [*words, "short_side_px=64", "max_side_px=64"]
    if name != "detectron2":
        words += ["box.rois_per_image=16", "rpn.post_nms_train=50", "rpn.post_nms_test=20"]
    words = [f"model.detector.args.{word}" for word in words]
    return [f"model.backbone={{name: {backbone}}}", *words]


def shortened(config, scenes):
    """Overrides that keep the kind of a config and make it two steps on embedded data."""
    detects, probes = isinstance(config, DetectionConfig), isinstance(config, ProbeConfig)
    has_boxes = detects or (probes and config.data.has_many_labels)
    source = "digits, classes: [0, 1]"
    if has_boxes:
        source = f"digit_scenes, root: {scenes}, num_train: 12, num_test: 6, size_px: 64"
    words = [
        "data.batch_size=2", "data.num_workers=0", "engine.device=cpu", *without_weights(config),
        *(f"data.{split}={{source: {source}, split: {split}}}" for split in ("train", "test")
          if getattr(config.data, split)),
    ]  # fmt: skip
    if config.data.val is not None:
        words.append(f"data.val={'null' if probes else '{source: train, fraction: 0.3}'}")
    if detects:
        sizes = "{short_sides_px: [64], max_side_px: 64}"
        words += [f"data.transforms={sizes}", *small_detector(config)]
    else:
        words.append("data.transforms.size_px=16")
    if probes:
        words.append("data.feature_cache=null")
        if config.evaluation.few_shot:
            ks = [1] if has_boxes else [8]
            words += [f"evaluation.few_shot.ks={ks}", "evaluation.few_shot.samplings=2"]
        if has_boxes:
            words.append("model.backbone={name: cifar/resnet18, args: {width: 8}}")
        return words
    unset = ("max_epochs", "warmup_epochs", "warmup_iters")
    words += [*(f"solver.{key}=null" for key in unset), "solver.max_iters=2"]
    words += ["evaluation={every_epochs: null, every_iters: null}", "solver.warmup_start=0"]
    words += [] if detects else ["data.repeats=1", *small_net(config)]
    if config.solver.schedule == "multistep":
        words += ["solver.steps_epochs=null", "solver.steps_iters=[1]"]
    return words


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_dumped_config_reads_back(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert type(again) is type(config) is TASKS[config.task]
    assert again.model_dump() == config.model_dump()
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_config_is_short_and_starts_with_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 25


def test_every_run_has_a_folder_of_its_own():
    folders = [load_config(path).output_dir for path in RUNS]
    assert len(set(folders)) == len(folders)
    assert all(folder.startswith("output/") for folder in folders)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_config_builds_its_model(path):
    needs_detectron2(path)
    with torch.device("meta"):  # shapes alone: some have a hundred million weights
        model = build_model(load_config(path, without_weights(load_config(path))), num_classes=7)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_config_runs(path, tmp_path, scenes):
    needs_detectron2(path)
    words = shortened(load_config(path), scenes)
    results = run_config(load_config(path, [*words, f"output_dir={tmp_path / 'run'}"]))
    assert results["primary_metric"] in results["metrics"]
    assert (tmp_path / "run/results.json").is_file()


def go_to_samples(folder, monkeypatch):
    """Change to a folder with data/samples, as the configs of the results need it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data")
    (folder / "data").mkdir()
    (folder / "data/samples").symlink_to(SHARED)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_the_samples_have_the_images_that_the_configs_name(path, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    go_to_samples(tmp_path, monkeypatch)
    data = build_data(load_config(path, ["data.cache=none"]))
    name, reported = data.report
    assert name == "test"
    assert min(len(data.train), len(reported)) >= 400
    assert data.train.image(0).shape[0] == 3
    assert len(data.class_names) in (10, 20, 100, 102, 196)


@pytest.mark.parametrize("path", SUITES, ids=name_of)
def test_runs_of_a_suite_are_configs(path):
    suite = load_suite(path)
    runs = inspect_runs(draft_runs(suite), lambda config, needed: None)
    stages = ([suite.pretrain] if suite.pretrain else []) + list(suite.tasks.values())
    seeds = [getattr(stage, "seeds", None) or suite.seeds for stage in stages]
    labels = [(run.task, method, run.seed) for run in runs for method in (run.method, *run.also)]
    assert len(set(labels)) == len(labels) == len(suite.methods) * sum(map(len, seeds))
    for run in runs:
        labels = {"name": run.task, "method": run.method, "seed": run.seed}
        assert labels.items() | {("output_dir", str(run.folder))} <= {
            (key, value) for key, value in run.config.items() if isinstance(value, str | int)
        }


@pytest.mark.slow
@pytest.mark.parametrize("path", SUITES, ids=name_of)
def test_dry_run_of_a_suite_lists_every_run(path, monkeypatch, tmp_path):
    """Without the hub's data, and with a VOC 2007 of three photographs."""
    if path.is_relative_to(BENCHMARKS):
        if path.stem == "voc_engines":
            pytest.importorskip("detectron2")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        go_to_samples(tmp_path, monkeypatch)
    else:
        monkeypatch.chdir(tmp_path)
        write_voc(tmp_path / "data", [("dog", (1, 2, 30, 20))])
        for name, numbers in (("trainval", "0\n2\n"), ("test", "1\n")):
            (tmp_path / f"data/VOC2007/ImageSets/Main/{name}.txt").write_text(numbers)
    suite = open_suite(load_suite(path, [f"output_dir={tmp_path}/suite"]))
    lines = list_plan(suite)
    assert len(lines) == len(suite.runs) >= len(suite.config.methods) * len(suite.config.seeds)
    assert all(line.endswith("  run") for line in lines)
    assert not (tmp_path / "suite").exists()
