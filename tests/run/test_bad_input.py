"""Every bad input is an error that names key, file and fix, before training starts."""

import os
import pickle
from pathlib import Path

import image_folders
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import tract_transfer
from tract_transfer.build.model import build_model
from tract_transfer.build.trainer import build_tract
from tract_transfer.config.schema import ConfigError, dump_config
from tract_transfer.data.folder import describe_folder
from tract_transfer.models import build_backbone
from tract_transfer.run.recipe import Machine, Options, make_recipe
from tract_transfer.run.run import run
from tract_transfer.run.trained import read_images

ROOT = Path(__file__).parents[2]
CPU = Machine(has_gpu=False, has_bf16=False, cores=2, processes=1)
C, P, D = "classification", "probe", "detection"
NET = "model.backbone={name: timm/test_resnet}"
NO_NAME = "model.backbone={name: null}"


class Payload:
    """What unpickling an untrusted file would do: write a file."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def weights_of(name="timm/test_resnet"):
    return dict(build_backbone(name).model.state_dict())


def nan_weights():
    state = weights_of()
    state["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    return state


def evil(file):
    return {**weights_of(), "model": Payload(file.parent / "touched")}


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# File name of model.weights -> how it is written.
WEIGHTS = {
    "other.safetensors": lambda file: save_file({"conv1.weight": torch.ones(4, 3, 3, 3)}, file),
    "junk.pth": lambda file: file.write_bytes(b"PK junk"),
    "empty.pth": lambda file: file.touch(),
    "cut.safetensors": lambda file: (save_file(weights_of(), file), truncate(file)),
    "cut.pth": lambda file: (torch.save(weights_of(), file), truncate(file)),
    "another.pth": lambda file: torch.save(weights_of("timm/test_efficientnet"), file),
    "nan.safetensors": lambda file: save_file(nan_weights(), file),
    "evil.pth": lambda file: torch.save(evil(file), file),
    "evil.pkl": lambda file: file.write_bytes(pickle.dumps(evil(file))),
}  # fmt: skip


def weights(name, *words):
    """Overrides with `model.weights`, a file that is written if WEIGHTS says how."""

    def write(folder):
        if name in WEIGHTS:
            WEIGHTS[name](folder / name)
        overrides = [word.replace("FOLDER", str(folder)) for word in words]
        return [*overrides, f"model.weights={folder / name}"]

    return write


# Name -> task, overrides, and parts of the message.
TABLE = {
    "test on training data": (C, "data.test.split=train",
        ["data.train and data.test are the same 431 images", "data.val: {source: train"]),
    "average of the initial weights": (C, "solver.ema_decay=0.999",
        ["solver.ema_decay: 0.999 over 6 iterations leaves 99%", "Set 0.46"]),
    "image of another size": (C, "model.backbone={name: cifar/vit, args: {depth: 1}}",
        ["data.transforms.size_px: the backbone takes images of 32 px, not of 16"]),
    "top 5 of 3 classes": (C, "evaluation.metric=top5",
        ["evaluation.metric: top5 needs more than 5 classes, and there are 3. Use top1."]),
    "more neighbours than images": (P,
        ["evaluation.knn={ks: [432]}", "evaluation.metric=logistic_top1"],
        ["evaluation.knn.ks must be in 1..431"]),
    "more shots than images": (P, "evaluation.few_shot={ks: [1, 145]}",
        ["few_shot.ks: class 'two' has 142 training images, fewer than k = 145"]),
    "warm-up too long in another unit": (C, "solver.warmup_epochs=2",
        ["solver: the warm-up of 26 iterations is longer than the run of 6"]),
    "step after the end in another unit": (C,
        ["solver.schedule=multistep", "solver.steps_epochs=[1]"],
        ["solver: the steps [13] must ascend between", "the run's end 6"]),
    "batch larger than the data": (C, "data.batch_size=500", ["data.batch_size: must lie in 1..431",
        "got 500", "command line"]),
    "batch not divisible": (C, "engine.accumulate=3",
        ["data.batch_size: must be divisible by processes x engine.accumulate", "Set", "30"]),
    "no gpu": (C, "engine.device=cuda", ["engine.device: torch finds no CUDA GPU. Set auto or cpu.",
        "command line"]),
    # names
    "unknown backbone": (C, "model.backbone={name: cifar/resnet19}", ["model.backbone: ",
        "'cifar/resnet19'", "Did you mean 'cifar/resnet18'?"]),
    "unknown timm model": (C, "model.backbone={name: timm/resnet19}",
        ["timm has no model 'resnet19'", "Did you mean"]),
    "unknown torchvision model": (C, "model.backbone={name: torchvision/resnt18}",
        ["torchvision has no", "Did you mean 'resnet18'?"]),
    "unknown head": (C, "model.head={name: liner}",
        ["model.head.name: HEADS has no 'liner'. Did you mean 'linear'?", "command line"]),
    "unknown detector": (D, "model.detector={name: torchvision_fnp}", ["model.detector.name: ",
        "Did you mean 'torchvision_fpn'?"]),
    "unknown optimizer": (C, "solver.optimizer=sgdd",
        ["solver.optimizer: no 'sgdd'. Did you mean 'sgd", "command line"]),
    "unknown protocol": (D, "evaluation.protocol=voc2007", ["evaluation.protocol: ",
        "Did you mean 'voc2007_devkit'?", "command line"]),
    "unknown layer": (C, "tract={enabled: true, layers: [backbone.model.conv2]}", ["tract.layers: ",
        "no layer 'backbone.model.conv2'", "backbone.model.conv1"]),
    "layer of another kind": (C, "tract={enabled: true, layers: [backbone.model.bn1]}",
        ["tract.layers: TrAct treats Linear and Conv2d layers"]),
    # arguments
    "unknown backbone argument": (C, "model.backbone.args={widht: 8}",
        ["model.backbone.args.widht: unknown. Did you mean 'width'? cifar/resnet18 takes"]),
    "backbone argument of a wrong type": (C, "model.backbone.args={width: wide}",
        ["model.backbone.args.width: ", "valid integer, got 'wide'", "line"]),
    "unknown argument of timm's backbone": (C,
        "model.backbone={name: timm/test_vit, args: {dept: 2}}",
        ["model.backbone.args.dept: unknown. Did you mean 'depth'?", "command line"]),
    "argument of a wrong type of timm's backbone": (C,
        "model.backbone={name: timm/test_vit, args: {num_heads: many}}",
        ["model.backbone.args.num_heads: ", "valid integer, got 'many'."]),
    "argument of a wrong type of torchvision's backbone": (C,
        "model.backbone={name: torchvision/resnet18, args: {width_per_group: wide}}",
        ["model.backbone.args.width_per_group: ", "valid integer, got 'wide'."]),
    "argument of a wrong type of a network of table 1": (C,
        ["model.backbone={name: cifar/vgg11, args: {dropout: much}}",
         "plugins=[paper/cifar_zoo.py]"],
        ["model.backbone.args.dropout: ", "valid number, got 'much'."]),
    "backbone argument that does not fit": (C,
        "model.backbone={name: cifar/vit, args: {width: 50, num_heads: 3}}",
        ["model.backbone: cifar/vit", "num_heads"]),
    "unknown head argument": (C, "model.head={name: linear, args: {dropout: 0.1}}",
        ["model.head.args.dropout: ", "linear takes ['zero_init']", "command line"]),
    "head argument of a wrong type": (C, "model.head={name: mlp, args: {hidden_dim: big}}",
        ["model.head.args.hidden_dim: ", "valid integer, got 'big'"]),
    "unknown detector argument": (D, "model.detector.args.levels=2",
        ["model.detector.args.levels: unknown. Did you mean 'num_levels'?"]),
    "detector argument of a wrong type": (D, "model.detector.args.num_levels=two",
        ["model.detector.args.num_levels: ", "valid integer, got 'two'"]),
    "detector argument that does not fit": (D, "model.detector.args.num_levels=9",
        ["model.detector.args.num_levels: 9; a feature pyramid needs at least 2 strides"]),
    "backbone of one size in a detector": (D, "model.backbone={name: cifar/vit}",
        ["model.detector: torchvision_fpn needs a backbone for images of any size"]),
    "unknown argument of a part of a detector": (D, "model.detector.args.rpn.nms_io=0.5",
        ["model.detector.args.rpn.nms_io: unknown. Did you mean 'nms_iou'?", "command line"]),
    "argument out of range of a part of a detector": (D, "model.detector.args.box.max_detections=0",
        ["args.box.max_detections: Input should be greater than or equal to 1, got 0"]),
    "a part of a detector that is no mapping": (D, "model.detector.args.box=7", ["args.box: "]),
    "choice of a detector": (D, "model.detector.args.difficult_in_training=leave",
        ["args.difficult_in_training: Input should be 'keep', 'drop' or 'ignore'"]),
    "freeze_at out of range": (D, "model.freeze_at=6", ["model.freeze_at: ", "equal to 5"]),
    "unknown norm": (D, "model.norm=fixed", ["model.norm: ", "'trained', 'frozen' or 'synced'"]),
    "norm of a backbone without BatchNorm": (D,
        ["model.backbone={name: timm/vgg11, args: {mlp_ratio: 0.01}}", "model.norm=frozen"],
        ["model.norm: frozen needs BatchNorms", "(command line)"]),
    "unknown optimizer argument": (C, "solver.optimizer_args={beta: 1}", ["solver.optimizer: ",
        "beta"]),
    "momentum where there is none": (C, "solver.optimizer=adamw",
        ["solver.momentum: adamw has none. Set solver.optimizer_args.betas instead"]),
    # weights
    "weights of another architecture": (C, weights("other.safetensors"), ["model.weights: ",
        "other.safetensors does not fit TimmBackbone", "another architecture",
        "of another shape conv1.weight (4, 3, 3, 3) for (64, 3, 3, 3)", "Set model.backbone"]),
    "weights of another model": (P, weights("another.pth", NET),
        ["model.weights: ", "another architecture's", "Set model.backbone"]),
    "missing weights": (C, weights("nowhere"),
        ["model.weights: No weights at", "nowhere: there is no such file or folder"]),
    "no run folder": (C, weights("", NO_NAME),
        ["model.weights: No model.json at", "Set model.backbone.name"]),
    "no run folder and no data": (D, weights("", NO_NAME,
        "data.train={source: voc, root: FOLDER/nowhere, sets: [2007/train]}"),
        ["model.weights: No model.json at", "Set model.backbone.name"]),
    "an empty weights file without model.backbone": (C, weights("empty.pth", NO_NAME),
        ["model.weights: ", "empty.pth is empty. Copy or download it again."]),
    "junk weights": (C, weights("junk.pth"), ["model.weights: ", "junk.pth"]),
    "truncated weights": (C, weights("cut.safetensors", NET),
        ["model.weights: ", "cut.safetensors cannot be read as weights"]),
    "truncated pickled weights": (P, weights("cut.pth", NET),
        ["model.weights: ", "cut.pth cannot be read as weights"]),
    "weights with NaN": (C, weights("nan.safetensors", NET),
        ["model.weights: ", "NaN or infinite values in conv1.0.weight", "earlier"]),
    "weights that run code": (C, weights("evil.pth", NET), ["evil.pth", "was not opened"]),
    "pickled weights that run code": (P, weights("evil.pkl", NET), ["evil.pkl", "not opened"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_before_training(name, tmp_path, load_tiny, refused, monkeypatch):
    task, words, expected = TABLE[name]
    if callable(words):
        words = words(tmp_path)
    words = [words] if isinstance(words, str) else words
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a GPU too
    with refused(name, ValueError) as caught:
        run(load_tiny(tmp_path, *words, task=task))
    message = str(caught.value)
    assert [part for part in expected if part not in message] == [], message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "touched").exists()


OPTIONS = {
    "a task that does not go with classes": ({"task": "detect"}, ValueError,
        r"--task detect does not go with .*it holds classes \(class folders.*Give --task classify"),
    "epochs of a probe": ({"task": "probe", "epochs": 3}, ValueError,
        "--epochs does not go with --task probe, which trains no backbone"),
    "TrAct in a probe": ({"task": "probe", "tract": True}, ValueError, "--tract does not go with"),
    "a probe without weights": ({"task": "probe"}, ValueError,
        "the weights of timm/resnet18 are not available: not in the cache.*--weights PATH"),
    "weights that do not exist": ({"weights": "nowhere.pth"}, FileNotFoundError,
        "--weights nowhere.pth: there is no such file or folder"),
    "a backbone that does not exist": ({"backbone": "timm/resnet19"}, ValueError,
        "--backbone: timm has no model 'resnet19'. Did you mean"),
    "weights that a backbone does not have": ({"backbone": "timm/resnet50.bogus"}, ValueError,
        "--backbone: timm has no weights 'resnet50.bogus'"),
    "a batch larger than a folder": ({"batch_size": 500, "weights": "none"}, ValueError,
        r"data.batch_size: must lie in 1..9,.* got 500"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_does_not_fit_a_folder(name, tmp_path, refused, offline_cache, monkeypatch):
    options, kind, match = OPTIONS[name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = image_folders.classes(tmp_path / "pets")
    options = Options(output_dir=str(tmp_path / "run"), **options)
    with refused(name, kind, match=match):
        run(make_recipe(folder, describe_folder(folder), options, CPU).config())


def test_tract_needs_a_first_layer_that_trains(tmp_path, load_tiny, refused):
    config = load_tiny(tmp_path, "tract.enabled=true")
    model = build_model(config, 3)
    model.backbone.requires_grad_(False)
    frozen = r"tract: .*conv1.weight is frozen.*Unfreeze"
    with refused("TrAct on a frozen first layer", ConfigError, match=frozen):
        build_tract(config, model)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1))
    two = r"tract: .* 2 could: \['0', '1'\].*tract.layers"
    with refused("a model with two layers that could be the first", ConfigError, match=two):
        build_tract(config, model)


# The Python API: name -> call, kind of error, and parts of the message.

ARRAY, IMAGE = np.zeros((8, 9, 3), np.uint8), torch.zeros(3, 8, 9)
CREATE = tract_transfer.create_backbone
OF_CONFIGS = {
    "train(3)": (lambda: tract_transfer.train(3), TypeError,
        ["config: must be the name of a packaged config, a path", "got int"]),
    "train(None)": (lambda: tract_transfer.train(None), TypeError, ["config: ", "got NoneType"]),
    "train of an unknown name": (lambda: tract_transfer.train("quickstart/pretrian"), ConfigError,
        ["No config quickstart/pretrian", "Nearest: quickstart/pretrain"]),
    "train of a folder without images": (lambda: tract_transfer.train(ROOT / "configs"),
        ValueError, ["configs"]),
    "train of a dict with a wrong key": (
        lambda: tract_transfer.train({"task": "probe", "modle": 1}), ConfigError,
        ["modle: ", "(the given mapping)"]),
    "train of a dict with a key that is no string": (lambda: tract_transfer.train({3: 1}),
        TypeError, ["config: keys must be strings, got 3"]),
    "train of a dict with another object": (lambda: tract_transfer.train({"seed": {"a": object}}),
        TypeError, ["config['seed']['a']: must be a number, a string", "got type"]),
    "overrides that are one string": (
        lambda: tract_transfer.train("quickstart/pretrain", overrides="solver.lr=1"), TypeError,
        ["overrides: must be a dict such as", "got 'solver.lr=1'"]),
    "overrides that are numbers": (
        lambda: tract_transfer.train("quickstart/pretrain", overrides=[3]), TypeError,
        ["overrides: must be a list of strings key=value, got 3"]),
    "an override with an unknown key": (
        lambda: tract_transfer.train("quickstart/pretrain", overrides={"solver.lrr": 1}),
        ConfigError, ["solver.lrr: unknown. Did you mean solver.lr? (overrides)"]),
    "resume that is a path": (lambda: tract_transfer.train("quickstart/pretrain", resume="run"),
        TypeError, ["resume: must be True or False, got 'run'"]),
    "load(None)": (lambda: tract_transfer.load(None), TypeError,
        ["run: must be the path of a run folder, got NoneType"]),
    "load of no run": (lambda: tract_transfer.load(ROOT / "docs"), FileNotFoundError,
        ["docs is not a run folder: it contains no config.yaml"]),
    "load on an unknown device": (lambda: tract_transfer.load("run", device="gpu"), ValueError,
        ["device: torch has no 'gpu'. Set auto, cpu or cuda"]),
    "load on a missing device": (lambda: tract_transfer.load("run", device="cuda:99"), ValueError,
        ["device: cuda:99, but torch finds", "Set auto or cpu"]),
    "evaluate of a folder without a run": (lambda: tract_transfer.evaluate(ROOT / "docs"),
        FileNotFoundError, ["docs is not a run folder"]),
    "create_backbone()": (CREATE, ValueError, ["name: give the name of a backbone, or weights"]),
    "create_backbone(3)": (lambda: CREATE(3), TypeError, ["name: must be a string such as"]),
    "create_backbone of an unknown name": (lambda: CREATE("cifar/resnet19"), ValueError,
        ["name: BACKBONES has no 'cifar/resnet19'. Did you mean"]),
    "create_backbone with a wrong argument": (
        lambda: CREATE("timm/test_vit", args={"dept": 2}), ValueError,
        ["args['dept']: unknown. Did you mean 'depth'?"]),
    "create_backbone with two kinds of weights": (
        lambda: CREATE("timm/test_vit", pretrained=True, weights="x"), ValueError,
        ["pretrained and weights: give one of them"]),
    "create_backbone with missing weights": (lambda: CREATE(weights="nowhere"), FileNotFoundError,
        ["No weights at nowhere"]),
    "create_backbone with a stem that needs images": (
        lambda: CREATE("timm/test_resnet", stem="whitened"), ValueError,
        ["stem: the filters of whitened are computed from training images"]),
    "a normalization of two channels": (lambda: CREATE("timm/test_vit", mean=[0.5, 0.5]),
        ValueError, ["mean: must be three numbers in [0, 1], got [0.5, 0.5]"]),
    "list_backbones(3)": (lambda: tract_transfer.list_backbones(3), TypeError,
        ["pattern: must be a string such as"]),
}  # fmt: skip
OF_IMAGES = {
    "no image": ([], ValueError, ["inputs: contains no image. Give at least one."]),
    "an image that is a number": (3, TypeError, ["inputs: must be a path", "got int"]),
    "an image that is None": ([ARRAY, None], TypeError, ["inputs[1]: must be a path", "NoneType"]),
    "a dict of images": ({"a": ARRAY}, TypeError, ["inputs: must be a path", "got dict"]),
    "a missing image": (["nowhere.jpg"], FileNotFoundError,
        ["inputs[0]: there is no file nowhere.jpg"]),
    "a folder as an image": (ROOT, IsADirectoryError, ["inputs: ", "is a folder. List the images"]),
    "a file that is no image": (ROOT / "setup.cfg", ValueError,
        ["inputs: ", "setup.cfg cannot be decoded: its ", "bytes are no image of"]),
    "a gray array": (ARRAY[..., 0], ValueError,
        ["inputs: an array must be (H, W, 3), got (8, 9). PIL converts others"]),
    "an array with channels first": (ARRAY.transpose(2, 0, 1), ValueError,
        ["must be (H, W, 3), got (3, 8, 9)", "array.transpose(1, 2, 0)"]),
    "a batch as an array": (ARRAY[None], ValueError, ["got (1, 8, 9, 3)", "list(images)"]),
    "a float array": (ARRAY.astype(float), ValueError, ["must be uint8 in 0..255, got float64"]),
    "a tensor with channels last": (IMAGE.permute(1, 2, 0), ValueError,
        ["a tensor must be (3, H, W), got (8, 9, 3)", "tensor.permute(2, 0, 1)"]),
    "a gray tensor": (IMAGE[0], ValueError, ["got (8, 9)", "tensor.expand(3, -1, -1)"]),
    "a batch as a tensor": (IMAGE[None], ValueError, ["got (1, 3, 8, 9)", "list(images)"]),
    "an empty tensor": (IMAGE[:, :0], ValueError, ["got (3, 0, 9)"]),
    "a tensor of integers": (IMAGE.long(), ValueError,
        ["must be uint8 or floating, got torch.int64", "tensor.to(torch.uint8)"]),
    "a float image in 0..255": ([IMAGE, IMAGE + 255], ValueError,
        ["inputs[1]: floating images must be in [0, 1], got 255 to 255. Divide it by 255."]),
    "a normalized image": (IMAGE - 2, ValueError, ["got -2 to -2. Undo a normalization"]),
    "an image with NaN": (IMAGE / 0, ValueError, ["got nan to nan. It holds NaN."]),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_CONFIGS)
def test_bad_arguments_of_the_api_are_refused(name, tmp_path, refused, monkeypatch):
    call, kind, expected = OF_CONFIGS[name]
    monkeypatch.chdir(tmp_path)
    with refused(name, kind) as caught:
        call()
    message = str(caught.value)
    assert [part for part in expected if part not in message] == [], message
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize("name", OF_IMAGES)
def test_bad_images_are_refused(name, refused):
    images, kind, expected = OF_IMAGES[name]
    with refused(name, kind) as caught:
        list(read_images(images, 10_000))
    message = str(caught.value)
    assert [part for part in expected if part not in message] == [], message


def test_bad_options_of_predictions_and_a_probe_are_refused(tmp_path, load_tiny, refused):
    config = load_tiny(tmp_path, task="probe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_config(config))
    probe = "task: a probe trains no model. Give another run."
    with refused("load of a probe's run", ConfigError, match=probe):
        tract_transfer.load(tmp_path / "run")
    where = ("model", "backbone", ["a"], tmp_path, torch.device("cpu"))
    classifier = tract_transfer.TrainedClassifier(load_tiny(tmp_path), *where)
    detector = tract_transfer.TrainedDetector(load_tiny(tmp_path, task="detection"), *where)
    for value, kind, text in ((0, ValueError, "1 or more, got 0"), (2.5, TypeError, "an integer")):
        with refused(f"predict with top_k={value}", kind, match=f"top_k: must be {text}"):
            classifier.predict(IMAGE, top_k=value)
        with refused(f"predict with batch_size={value}", kind, match=f"batch_size: must be {text}"):
            detector.predict(IMAGE, batch_size=value)
    with refused("predict with min_score=2", ValueError, match=r"min_score: must be in \[0, 1\]"):
        detector.predict(IMAGE, min_score=2)
    with refused("predict with min_score='a'", TypeError, match="min_score: must be a number"):
        detector.predict(IMAGE, min_score="a")
