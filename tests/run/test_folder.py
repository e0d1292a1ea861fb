"""A folder of images becomes a config that says why, runs, and can be repeated."""

import json

import image_folders as make
import numpy as np
import pytest
from huggingface_hub import constants

from tract_transfer.build.data import build_data
from tract_transfer.config.schema import dump_config, load_config
from tract_transfer.data.folder import Description, Split, describe_folder
from tract_transfer.run import recipe as recipes
from tract_transfer.run.recipe import Machine, Options, make_recipe
from tract_transfer.run.run import run

pytestmark = pytest.mark.usefixtures("offline_cache")
CPU = Machine(has_gpu=False, has_bf16=False, cores=2, processes=1)
GPU = Machine(has_gpu=True, has_bf16=True, cores=16, processes=1)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def described(count, side=300, task="classification", names=("cat", "dog"), **splits):
    """Describe a folder that does not exist, of `count` training images."""
    source = {"source": "huggingface", "path": "./x", "split": "train"}
    if task == "detection":
        source = {"source": "coco", "images": "x", "annotations": "x.json"}
    parts = {name: Split(source, n) for name, n in {"train": count, **splits}.items()}
    return Description("x", "a kind", task, parts, list(names), "why", [(side, side + 40)] * 3)


def choose(data, machine=CPU, **options):
    return make_recipe("x", data, Options(**options), machine)


FOLDERS = {
    "classify": (lambda f: make.split_classes(f, train=12, val=6, test=6), {}),
    "flat": (make.classes, {}),
    "tract": (make.classes, {"tract": True}),
    "probe": (make.classes, {"task": "probe", "weights": "none"}),
    "probe with val": (lambda f: make.parquet(f, "train", "val", "test"),
        {"task": "probe", "weights": "none"}),
    "devkit": (lambda f: make.devkit(f, ("train", "val"), "pets"),
        {"backbone": "timm/test_resnet"}),
    "coco": (lambda f: make.coco_export(f, "train", "valid", "test"),
        {"backbone": "timm/test_resnet"}),
}  # fmt: skip
SHORT = "solver={max_epochs: null, max_iters: 2, warmup_epochs: null}"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_trained_to_a_result_and_its_recipe_repeats_it(name, tmp_path):
    write, options = FOLDERS[name]
    folder, words = write(tmp_path / "pets"), ["data.num_workers=0", "engine.device=cpu"]
    data = describe_folder(folder)
    options = Options(output_dir=str(tmp_path / "run"), size_px=32, batch_size=2, **options)
    recipe = make_recipe(folder, data, options, CPU)
    if options.task != "probe":
        words += [SHORT, "engine.log.tensorboard=false"]
    config = recipe.config(words)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.text(words))
    assert dump_config(load_config(file)) == dump_config(config)
    results = run(config)
    assert config.task == "probe" or results["iterations"] == 2
    assert results["method"] == ("tract" if options.tract else "vanilla")
    again = run(load_config(file, [f"output_dir={tmp_path / 'again'}"]))
    assert again["metrics"] == results["metrics"]


def test_every_choice_has_a_reason_and_its_section_has_it_as_comment():
    recipe = choose(described(1000, test=100), GPU, epochs=7)
    text = recipe.text(["seed=3"])
    for choice in recipe.choices:
        assert choice.section in recipe.tree
        assert choice.why in " ".join(text.replace("# ", "").split())
    assert [choice.what for choice in recipe.choices] == [
        "found", "backbone", "size", "mirroring", "batch", "epochs", "optimizer", "TrAct",
        "measured", "machine",
    ]  # fmt: skip
    assert "7: --epochs" in text
    assert text.endswith("seed: 3\n")


@pytest.mark.parametrize("machine", [CPU, GPU, CPU._replace(processes=3)])
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_an_epoch_has_full_batches_that_the_processes_share(machine, task):
    for count in [*range(8, 70), 100, 1000, 10**6]:
        config = choose(described(count, task=task, test=5), machine).config()
        batch_size = config.data.batch_size
        assert batch_size % machine.processes == 0
        assert count // batch_size >= (8 if count >= 8 * 2 * machine.processes else 1)
        assert 3 <= config.solver.max_epochs <= 120


def test_more_images_are_shown_less_often():
    epochs = [choose(described(n)).tree["solver"]["max_epochs"] for n in (10, 100, 10**3, 10**5)]
    assert epochs == sorted(epochs, reverse=True)


@pytest.mark.parametrize(
    ("side", "machine", "options", "size_px"),
    [
        (28, CPU, {}, 32),
        (48, CPU, {}, 48),
        (28, CPU, {"weights": "pretrained"}, 96),
        (500, CPU, {}, 128),
        (500, GPU, {}, 224),
        (500, CPU, {"size_px": 72}, 72),
        (500, CPU, {"backbone": "timm/vit_tiny_patch16_224"}, 224),
        (500, CPU, {"backbone": "torchvision/vit_b_16"}, 224),
        (500, CPU, {"backbone": "cifar/vit"}, 32),
    ],
)
def test_the_size_fits_images_machine_and_backbone(side, machine, options, size_px):
    config = choose(described(100, side), machine, **options).config()
    assert config.data.transforms.size_px == size_px


def test_without_a_test_split_the_val_split_or_a_part_of_train_is_reported():
    config = choose(described(100, val=50)).config()
    assert config.data.val is None
    assert config.data.test.source == "huggingface"
    config = choose(described(100)).config()
    assert (config.data.test.fraction, config.data.test.seed) == (0.2, 0)
    config = choose(described(100, val=50, test=50)).config()
    assert config.evaluation.report == "best"


def test_a_held_out_test_split_does_not_depend_on_the_seed_and_val_is_apart(tmp_path):
    folder = make.classes(tmp_path / "pets", 30)
    parts = []
    for seed in (0, 1):
        words = ["data.val={source: train, fraction: 0.25}", f"seed={seed}"]
        options = Options(weights="none", output_dir=str(tmp_path / "run"))
        recipe = make_recipe(folder, describe_folder(folder), options, CPU)
        data = build_data(recipe.config(words))
        assert [len(split) for split in data.splits.values()] == [18, 6, 6]
        assert [split.class_counts.tolist() for split in data.splits.values()] == [
            [6, 6, 6], [2, 2, 2], [2, 2, 2],
        ]  # fmt: skip
        assert data.report[0] == "test"
        parts.append({name: split.fingerprint() for name, split in data.splits.items()})
    assert parts[0]["test"] == parts[1]["test"]
    assert parts[0]["val"] != parts[1]["val"]


def test_detection_holds_out_images_of_the_rarest_class(tmp_path, load_tiny):
    root = tmp_path / "scenes"
    words = ["data.train.num_train=40", f"data.train.root={root}"]
    words += ["data.test={source: train, fraction: 0.25, seed: 0}"]
    data = build_data(load_tiny(tmp_path, *words, task="detection"))
    assert len(data.train) + len(data.test) == 40
    assert 5 <= len(data.test) <= 15
    shown = [set(np.flatnonzero(split.class_counts)) for split in data.splits.values()]
    assert shown[1] <= shown[0]
    assert len(shown[1]) >= 9


def test_weights_that_cannot_be_had_are_replaced_and_a_server_that_answers_is_used(monkeypatch):
    assert choose(described(100)).tree["model"]["weights"] is None
    assert "HF_HUB_OFFLINE" in choose(described(100)).text()
    small = choose(described(100, 28)).tree["model"]["backbone"]
    assert small == {"name": "cifar/resnet18", "args": {"width": 32}}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(recipes, "_answers", lambda url: (True, f"downloaded from {url}"))
    assert choose(described(100)).tree["model"]["weights"] == "pretrained"
    assert choose(described(9), backbone="torchvision/resnet18").tree["model"]["weights"]
    assert recipes.published_weights("cifar/resnet18") == (False, "it has no published ones")
    monkeypatch.setattr(recipes, "try_to_load_from_cache", lambda *_: "/a/file")
    assert "in the cache of the hub" in choose(described(100)).text()


def test_a_server_that_does_not_answer_is_reported():
    is_there, why = recipes._answers("http://127.0.0.1:9/weights")
    assert not is_there
    assert "127.0.0.1:9 does not answer" in why


def test_weights_of_a_run_bring_their_backbone(tmp_path, load_tiny):
    run(load_tiny(tmp_path, "solver.max_iters=1"))
    folder = make.classes(tmp_path / "pets")
    options = Options(weights=str(tmp_path / "run"), output_dir=str(tmp_path / "finetuned"))
    recipe = make_recipe(folder, describe_folder(folder), options, CPU)
    assert "backbone" not in recipe.tree["model"]
    results = run(recipe.config([SHORT, "engine.log.tensorboard=false"]))
    assert results["weights_match"]
    assert json.loads((tmp_path / "finetuned/model.json").read_text())["name"] == "cifar/resnet18"


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "torchvision/swin_t"])
def test_pretrained_transformers_have_a_lower_learning_rate(name):
    lr = [
        choose(described(100), backbone=backbone, weights="pretrained").tree["solver"]["lr"]
        for backbone in (name, "timm/resnet18")
    ]
    assert lr == [1e-4, 1e-3]


GIVEN = {
    "classify": {"name": "a", "output_dir": "b", "backbone": "cifar/resnet18", "weights": "none",
        "batch_size": 4, "size_px": 40, "epochs": 1, "tract": True},
    "detect": {"backbone": "timm/resnet50", "weights": "pretrained", "size_px": 96, "epochs": 2},
    "probe": {"task": "probe", "weights": "none", "batch_size": 4, "size_px": 40},
}  # fmt: skip


@pytest.mark.parametrize("task", GIVEN)
def test_an_override_of_a_key_that_has_an_option_counts_as_the_option(task):
    data = described(100, task="detection" if task == "detect" else "classification")
    given = Options(**GIVEN[task])
    words = [*recipes.option_words(task, given)]
    words += [f"output_dir={given.output_dir}"] if given.output_dir else []
    keys = recipes.option_keys(task)
    mapping = {key: getattr(given, option) for option, key in keys.items()
        if getattr(given, option) not in (None, False)}  # fmt: skip
    mapping |= {"model.weights": None} if given.weights == "none" else {}
    expected = make_recipe("x", data, given, CPU)
    for overrides in (words, mapping):
        recipe = make_recipe("x", data, Options(task=given.task), CPU, overrides)
        assert recipe == expected
        assert dump_config(recipe.config(overrides)) == dump_config(expected.config())
