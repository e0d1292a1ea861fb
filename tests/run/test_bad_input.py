"""Every bad input is an error that names key, file and fix, before training starts."""

import pytest
import torch
from safetensors.torch import save_file

from tract_transfer.build.model import build_model
from tract_transfer.build.trainer import build_tract
from tract_transfer.config.schema import ConfigError
from tract_transfer.run.run import run


def other_weights(folder):
    save_file({"model.conv1.weight": torch.zeros(4, 3, 3, 3)}, folder / "other.safetensors")
    return [f"model.weights={folder / 'other.safetensors'}"]


def no_weights(folder):
    return [f"model.weights={folder / 'nowhere'}"]


def no_card(folder):
    return ["model.backbone={name: null}", f"model.weights={folder}"]


def junk_weights(folder):
    (folder / "junk.pth").write_bytes(b"PK junk")
    return [f"model.weights={folder / 'junk.pth'}"]


def empty_weights(folder):
    (folder / "empty.pth").touch()
    return ["model.backbone={name: null}", f"model.weights={folder / 'empty.pth'}"]


def no_weights_and_no_data(folder):
    nowhere = f"{{source: voc, root: {folder / 'nowhere'}, sets: [2007/train]}}"
    return [*no_card(folder), f"data.train={nowhere}"]


def told(*words):
    return lambda _folder: list(words)


C, P, D = "classification", "probe", "detection"
TABLE = {
    # a config that cannot be read
    "unknown key": (C, told("solver.lrr=1"), ConfigError,
        ["solver.lrr: unknown. Did you mean solver.lr?", "command line"]),
    "unknown section": (C, told("sovler.lr=1"), ConfigError, ["sovler: unknown", "solver"]),
    "key of another task": (C, told("evaluation.protocol=area"), ConfigError,
        ["evaluation.protocol: not a key of a classification config (of detection)"]),
    "key of another source": (C, told("data.train.path=x"), ConfigError,
        ["data.train.path: not a key of source: digits"]),
    "wrong type": (C, told("solver.lr=fast"), ConfigError,
        ["solver.lr: Input should be a valid number, got 'fast'", "command line"]),
    "number in quotes": (C, told("data.batch_size='32'"), ConfigError,
        ["data.batch_size: Input should be a valid integer, got '32'"]),
    "out of range": (C, told("solver.lr=-1"), ConfigError,
        ["solver.lr: Input should be greater than 0, got -1"]),
    "unknown task": (C, told("task=segment"), ConfigError,
        ["task: 'segment' is none of", "classification", "probe", "detection"]),
    "missing key": (C, told("solver={optimizer: sgd, lr: null}"), ConfigError, ["solver.lr"]),
    "key without a value": (C, told("solver.lr"), ConfigError,
        ["solver.lr: given without a value"]),
    # keys that do not go together
    "two lengths": (C, told("solver.max_epochs=3"), ConfigError,
        ["give one of solver.max_epochs and solver.max_iters, and null unsets what a base gives:",
         "solver.max_epochs: null", "(solver.max_epochs: command line; solver.max_iters: ",
         "classification.yaml line 11)"]),
    "steps without multistep": (C, told("solver.steps_iters=[2]"), ConfigError,
        ["solver.schedule: multistep and solver.steps_epochs (or steps_iters) go together"]),
    "best without val": (C, told("evaluation.report=best"), ConfigError,
        ["evaluation.report: best", "needs data.val", "{source: train, fraction: 0.1}"]),
    "nothing to measure": (C, told("data.test=null"), ConfigError, ["data.test or data.val"]),
    "no backbone": (C, told("model.backbone={name: null}"), ConfigError,
        ["model.backbone.name is needed"]),
    "scale without its crop": (C, told("data.transforms.scale=[0.5, 1]"), ConfigError,
        ["scale is for crop: random_resized, and crop is pad"]),
    "tract tuned and not enabled": (C, told("tract.lam=0.5"), ConfigError,
        ["tract.lam, lam_mode, layers and update_every are for tract.enabled: true"]),
    "step factor without steps": (C, told("solver.step_factor=0.5"), ConfigError,
        ["solver.step_factor has no use here"]),
    "test on training data": (C, told("data.test.split=train"), ValueError,
        ["data.train and data.test are the same 431 images", "data.val: {source: train"]),
    "average of the initial weights": (C, told("solver.ema_decay=0.999"), ConfigError,
        ["solver.ema_decay: 0.999 over 6 iterations leaves 99%", "Set 0.46"]),
    "image of another size": (C, told("model.backbone={name: cifar/vit, args: {depth: 1}}"),
        ConfigError, ["data.transforms.size_px: the backbone takes images of 32 px, not of 16"]),
    "metric of a probe left out": (P, told("evaluation.logistic_regression=null"), ConfigError,
        ["evaluation.metric is logistic_top1, and its probe is left out"]),
    "top 5 of 3 classes": (C, told("evaluation.metric=top5"), ConfigError,
        ["evaluation.metric: top5 needs more than 5 classes, and there are 3. Use top1."]),
    "warm-up too long": (C, told("solver.warmup_iters=6"), ConfigError,
        ["solver: warmup_iters must be less than max_iters", "6 is not less than 6",
         "solver.warmup_iters: null"]),
    "warm-up of too many epochs": (C,
        told("solver={max_iters: null, max_epochs: 1, warmup_epochs: 5}"), ConfigError,
        ["solver: warmup_epochs must be less than max_epochs", "5 is not less than 1"]),
    "warm-up too long in another unit": (C, told("solver.warmup_epochs=2"), ConfigError,
        ["solver: the warm-up of 26 iterations is longer than the run of 6"]),
    "step after the end": (C,
        told("solver.schedule=multistep", "solver.steps_iters=[9]"), ConfigError,
        ["solver: steps_iters must lie before max_iters", "9 is not before 6",
         "solver.schedule: constant"]),
    "step after the end in another unit": (C,
        told("solver.schedule=multistep", "solver.steps_epochs=[1]"), ConfigError,
        ["solver: the steps [13] must ascend between", "the run's end 6"]),
    "batch larger than the data": (C, told("data.batch_size=500"), ConfigError,
        ["data.batch_size: must lie in 1..431", "got 500", "command line"]),
    "batch not divisible": (C, told("engine.accumulate=3"), ConfigError,
        ["data.batch_size: must be divisible by processes x engine.accumulate", "Set", "30"]),
    "no gpu": (C, told("engine.device=cuda"), ConfigError,
        ["engine.device: torch finds no CUDA GPU. Set auto or cpu.", "command line"]),
    "device cache with another crop": (C, told("data.cache=device", "data.transforms.pad_px=null",
        "data.transforms.crop=resize_random"), ConfigError, ["cache: device", "crop"]),
    "device cache with an augmentation": (C, told("data.cache=device",
        "data.transforms.augment=trivial_augment"), ConfigError, ["cache: device", "augment"]),
    "device cache with colour jitter": (C, told("data.cache=device",
        "data.transforms.color_jitter=0.2"), ConfigError, ["cache: device", "color_jitter"]),
    "device cache with rotation": (C, told("data.cache=device",
        "data.transforms.rotation_deg=5"), ConfigError, ["cache: device", "rotation_deg"]),
    "patience without a test split": (C, told("data.val={source: train, fraction: 0.2}",
        "data.test=null", "evaluation={patience: 2, every_iters: 1}"), ConfigError,
        ["patience", "data.test"]),
    "patience without val": (C, told("evaluation={patience: 2, every_iters: 1}"), ConfigError,
        ["patience", "data.val"]),
    "patience without evaluations": (C, told("data.val={source: train, fraction: 0.2}",
        "evaluation.patience=2"), ConfigError, ["every_epochs or every_iters"]),
    "warm-up of no average": (C, told("solver.ema_warmup=true"), ConfigError,
        ["solver.ema_warmup", "ema_decay"]),
    # names
    "unknown backbone": (C, told("model.backbone={name: cifar/resnet19}"), ConfigError,
        ["model.backbone: ", "'cifar/resnet19'", "Did you mean 'cifar/resnet18'?"]),
    "unknown timm model": (C, told("model.backbone={name: timm/resnet19}"), ConfigError,
        ["timm has no model 'resnet19'", "Did you mean"]),
    "unknown torchvision model": (C, told("model.backbone={name: torchvision/resnt18}"),
        ConfigError, ["torchvision has no", "Did you mean 'resnet18'?"]),
    "unknown head": (C, told("model.head={name: liner}"), ConfigError,
        ["model.head.name: HEADS has no 'liner'. Did you mean 'linear'?", "command line"]),
    "unknown detector": (D, told("model.detector={name: torchvision_fnp}"), ConfigError,
        ["model.detector.name: ", "Did you mean 'torchvision_fpn'?"]),
    "unknown optimizer": (C, told("solver.optimizer=sgdd"), ConfigError,
        ["solver.optimizer: no 'sgdd'. Did you mean 'sgd", "command line"]),
    "unknown protocol": (D, told("evaluation.protocol=voc2007"), ConfigError,
        ["evaluation.protocol: ", "Did you mean 'voc2007_devkit'?", "command line"]),
    "unknown layer": (C,
        told("tract={enabled: true, layers: [backbone.model.conv2]}"), ConfigError,
        ["tract.layers: ", "no layer 'backbone.model.conv2'", "backbone.model.conv1"]),
    "layer of another kind": (C, told("tract={enabled: true, layers: [backbone.model.bn1]}"),
        ConfigError, ["tract.layers: TrAct treats Linear and Conv2d layers"]),
    # arguments
    "unknown backbone argument": (C, told("model.backbone.args={widht: 8}"), ConfigError,
        ["model.backbone.args.widht: unknown. Did you mean 'width'? cifar/resnet18 takes"]),
    "backbone argument of a wrong type": (C, told("model.backbone.args={width: wide}"),
        ConfigError, ["model.backbone.args.width: ", "valid integer, got 'wide'", "line"]),
    "unknown argument of timm's backbone": (C,
        told("model.backbone={name: timm/test_vit, args: {dept: 2}}"), ConfigError,
        ["model.backbone.args.dept: unknown. Did you mean 'depth'?", "command line"]),
    "argument of a wrong type of timm's backbone": (C,
        told("model.backbone={name: timm/test_vit, args: {num_heads: many}}"), ConfigError,
        ["model.backbone.args.num_heads: timm/test_vit takes int, got 'many'."]),
    "argument of a wrong type of torchvision's backbone": (C,
        told("model.backbone={name: torchvision/resnet18, args: {width_per_group: wide}}"),
        ConfigError,
        ["model.backbone.args.width_per_group: torchvision/resnet18 takes int, got 'wide'."]),
    "argument of a wrong type of a network of table 1": (C,
        told("model.backbone={name: cifar/vgg11, args: {dropout: much}}"), ConfigError,
        ["model.backbone.args.dropout: cifar/vgg11 takes float, got 'much'."]),
    "backbone argument that does not fit": (C,
        told("model.backbone={name: cifar/vit, args: {width: 50, num_heads: 3}}"), ConfigError,
        ["model.backbone: cifar/vit", "num_heads"]),
    "unknown head argument": (C, told("model.head={name: linear, args: {dropout: 0.1}}"),
        ConfigError,
        ["model.head.args.dropout: ", "linear takes ['zero_init']", "command line"]),
    "head argument of a wrong type": (C, told("model.head={name: mlp, args: {hidden_dim: big}}"),
        ConfigError, ["model.head.args.hidden_dim: ", "valid integer, got 'big'"]),
    "unknown detector argument": (D, told("model.detector.args.levels=2"), ConfigError,
        ["model.detector.args.levels: unknown. Did you mean 'num_levels'?"]),
    "detector argument of a wrong type": (D, told("model.detector.args.num_levels=two"),
        ConfigError, ["model.detector.args.num_levels: ", "valid integer, got 'two'"]),
    "detector argument that does not fit": (D, told("model.detector.args.num_levels=9"),
        ConfigError, ["model.detector: torchvision_fpn needs maps of num_levels = 9"]),
    "backbone of one size in a detector": (D, told("model.backbone={name: cifar/vit}"),
        ConfigError, ["model.detector: torchvision_fpn needs a backbone for images of any size"]),
    "unknown optimizer argument": (C, told("solver.optimizer_args={beta: 1}"), ConfigError,
        ["solver.optimizer: ", "beta"]),
    "momentum where there is none": (C, told("solver.optimizer=adamw"), ConfigError,
        ["solver.momentum: adamw has none. Set solver.optimizer_args.betas instead"]),
    # weights
    "weights of another architecture": (C, other_weights, ConfigError,
        ["model.weights: ", "other.safetensors does not fit TimmBackbone", "another architecture",
         "of another shape conv1.weight (4, 3, 3, 3) for (64, 3, 3, 3)", "Set model.backbone"]),
    "no weights": (C, no_weights, ConfigError,
        ["model.weights: No weights at", "nowhere: there is no such file or folder"]),
    "no run folder": (C, no_card, ConfigError,
        ["model.weights: No model.json at", "Set model.backbone.name"]),
    "empty weights of a backbone that nothing names": (C, empty_weights, ConfigError,
        ["model.weights: ", "empty.pth is empty. Copy or download it again."]),
    "weights and data that are not there": (D, no_weights_and_no_data, ConfigError,
        ["model.weights: No model.json at", "Set model.backbone.name"]),
    "junk weights": (C, junk_weights, ConfigError, ["model.weights: ", "junk.pth"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_input_is_told_before_training(name, tmp_path, load_tiny, refused, monkeypatch):
    task, prepare, kind, wanted = TABLE[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a GPU too
    with refused(name, kind) as caught:
        run(load_tiny(tmp_path, *prepare(tmp_path), task=task))
    message = str(caught.value)
    assert [part for part in wanted if part not in message] == [], message
    assert not (tmp_path / "run").exists()


def test_tract_needs_a_layer_that_trains(tmp_path, load_tiny, refused):
    config = load_tiny(tmp_path, "tract.enabled=true")
    model = build_model(config, 3)
    model.backbone.requires_grad_(False)
    with refused(
        "TrAct on a frozen first layer",
        ConfigError,
        match=r"tract: .*conv1.weight is frozen.*Unfreeze",
    ):
        build_tract(config, model)


def test_tract_says_where_it_found_no_first_layer(tmp_path, load_tiny, refused):
    config = load_tiny(tmp_path, "tract.enabled=true")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1))
    with refused(
        "a model with two layers that could be the first",
        ConfigError,
        match=r"tract: .* 2 could: \['0', '1'\].*tract.layers",
    ):
        build_tract(config, model)
