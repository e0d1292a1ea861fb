"""Plug-ins are imported once and when they are trusted, and what they lack is an early error."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_files import forgotten, write
from run_folders import Killed
from tiny_configs import SUITE

import tract_transfer
from tract_transfer.build.data import build_data, load_split
from tract_transfer.config.file import ConfigError, read_config_file
from tract_transfer.config.schema import load_config
from tract_transfer.config.suite import load_suite
from tract_transfer.data.findings import Findings
from tract_transfer.models import BACKBONES, build_backbone
from tract_transfer.models.export import load_exported
from tract_transfer.models.weights import save_backbone
from tract_transfer.registry import PluginError, load_plugins, trusted_plugins
from tract_transfer.run.recipe import Options, config_for
from tract_transfer.run.run import run
from tract_transfer.run.suite import draft_runs
from tract_transfer.run.summary import next_commands
from tract_transfer.run.trained import run_config

TINY = """
@BACKBONES.register("mine/tiny")
def tiny(width: int = 8):
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(model, feature_dim=width, first_layers=["0"], mean=[0.5] * 3, std=[0.5] * 3)
"""
BACKBONE = "model.backbone={name: mine/tiny, args: {}}"


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with forgotten(tmp_path):
        yield


# Importing.


def test_a_plugin_is_imported_once_by_whatever_name(tmp_path, monkeypatch):
    write(tmp_path / "mine.py", f"{TINY}\nprint('imported')")
    (tmp_path / "link.py").symlink_to(tmp_path / "mine.py")
    (tmp_path / "sub").mkdir()
    load_plugins(["mine.py", str(tmp_path / "mine.py"), "link.py"])
    entry = BACKBONES.get("mine/tiny")
    load_plugins(["../mine.py"], tmp_path / "sub")
    load_plugins(["mine"])
    assert BACKBONES.get("mine/tiny") is entry
    assert sum(str(tmp_path) in str(getattr(m, "__file__", "")) for m in sys.modules.values()) == 1


def test_plugins_of_one_file_name_and_of_a_taken_module_name_are_different(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "json.py", TINY.replace("mine/", f"{name}/"))
    load_plugins(["a/json.py", "b/json.py"])
    assert {"a/tiny", "b/tiny"} <= {name for name, _ in BACKBONES}
    assert json.loads("1") == 1


def test_networks_that_were_built_in_are_found_with_a_warning(monkeypatch):
    for attribute in ("_obj_map", "modules"):  # other tests have imported the plug-in
        entries = getattr(BACKBONES, attribute).items()
        built_in = {name: entry for name, entry in entries if BACKBONES.is_built_in(name)}
        monkeypatch.setattr(BACKBONES, attribute, built_in)
    monkeypatch.delitem(sys.modules, "cifar_zoo", raising=False)
    with pytest.warns(FutureWarning, match="--plugin paper/cifar_zoo.py"):
        assert build_backbone("cifar/nasnet", args={"depth": 1, "width": 8}).feature_dim == 192
    with pytest.raises(KeyError, match="Did you mean 'cifar/vgg16'"):
        build_backbone("cifar/vgg_16")
    monkeypatch.delitem(sys.modules, "cifar_zoo")


def test_a_plugin_imports_files_beside_it(tmp_path):
    (tmp_path / "widths_of_mine.py").write_text("WIDTH = 24")
    write(
        tmp_path / "mine.py", f"from widths_of_mine import WIDTH\n{TINY}".replace("= 8", "= WIDTH")
    )
    load_plugins([str(tmp_path / "mine.py")])
    assert build_backbone("mine/tiny").feature_dim == 24


def test_a_plugin_may_register_through_a_file_beside_it(tmp_path):
    write(tmp_path / "helper_nets.py", TINY)
    (tmp_path / "mine.py").write_text("import helper_nets\n")
    for plugins in (["mine.py"], ["mine.py"], ["helper_nets.py"], ["mine"]):
        load_plugins(plugins)
    assert BACKBONES.modules["mine/tiny"] == "helper_nets"


def test_a_plugin_that_registered_nothing_can_be_fixed(tmp_path, monkeypatch):
    write(tmp_path / "helper_nets.py", "")
    (tmp_path / "mine.py").write_text("import colorsys, helper_nets, tract_transfer.lately\n")
    sys.modules.pop("colorsys", None)
    spec = importlib.util.spec_from_file_location("tract_transfer", tmp_path / "mine.py")
    monkeypatch.setattr(tract_transfer, "__spec__", spec)  # as in a clone
    monkeypatch.setattr(tract_transfer, "__path__", [*tract_transfer.__path__, str(tmp_path)])
    (tmp_path / "lately.py").write_text("")
    for _ in range(2):
        with pytest.raises(PluginError, match="registers nothing"):
            load_plugins(["mine.py"])
    assert not {"mine", "helper_nets"} & sys.modules.keys()
    assert {"colorsys", "tract_transfer.lately"} <= sys.modules.keys()
    write(tmp_path / "helper_nets.py", TINY)
    load_plugins(["mine.py"])
    assert build_backbone("mine/tiny").feature_dim == 8


def test_nothing_of_a_plugin_that_fails_stays_and_it_can_be_fixed(tmp_path):
    path = write(tmp_path / "mine.py", f"{TINY}\n1 / 0")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        load_plugins([str(path)])
    assert "mine/tiny" not in BACKBONES
    write(path, TINY)
    load_plugins([str(path)])
    assert build_backbone("mine/tiny").feature_dim == 8


def test_bad_plugins_are_refused(tmp_path, refused):
    def load(*plugins):
        load_plugins(plugins)

    with refused(
        "plug-in file that does not exist", PluginError, match="nowhere.py does not exist"
    ):
        load("nowhere.py")
    with refused("plug-in module that does not exist", PluginError, match="no module 'nowhere'"):
        load("nowhere.nets")
    with refused("plug-in that is neither file nor module", PluginError, match="is no plug-in"):
        load("./mine")
    (tmp_path / "text.py").write_text("def f(:\n")
    with refused(
        "plug-in that is not Python", PluginError, match=r"SyntaxError.*text\.py line 1\)"
    ):
        load("text.py")
    (tmp_path / "broken.py").write_text("def f():\n    return undefined\n\n\nf()\n")
    with refused(
        "plug-in that raises an error", PluginError, match=r"NameError.*broken\.py line 2\)"
    ):
        load("broken.py")
    (tmp_path / "needs.py").write_text("import nowhere\n")
    with refused("plug-in that needs a missing module", PluginError, match=r"needs\.py line 1\)"):
        load("needs.py")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    with refused("plug-in that is a script", PluginError, match="SystemExit"):
        load("ends.py")
    (tmp_path / "idle.py").write_text("import tract_transfer\n")
    with refused("plug-in that registers nothing", PluginError, match="registers nothing"):
        load("idle.py")
    taken = TINY.replace("mine/tiny", "cifar/vit")
    write(tmp_path / "takes.py", taken)
    reason = r"BACKBONES has 'cifar/vit' already: tract_transfer\.models\.cifar .*takes\.py line"
    with refused("plug-in with a built-in name", PluginError, match=reason):
        load("takes.py")
    write(tmp_path / "first.py", TINY)
    write(tmp_path / "second.py", TINY)
    with refused("plug-in with a name of another", PluginError, match=r"already: \S*first\.py"):
        load("first.py", "second.py")


# Configs.


def test_plugins_of_bases_files_and_the_command_line_add_up(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("plugins: [base.py, lab.nets]")
    (tmp_path / "sub/x.yaml").write_text("_BASE_: ../base.yaml\nplugins: [own.py, ../base.py]")
    tree, origins = read_config_file(tmp_path / "sub/x.yaml", (), ["cli.py", "paper/cifar_zoo.py"])
    *files, packaged = tree["plugins"]
    own = [str(tmp_path / name) for name in ("base.py", "sub/own.py", "cli.py")]
    assert files == [own[0], "lab.nets", *own[1:]]
    assert packaged.endswith("/configs/paper/cifar_zoo.py")
    assert origins["plugins"] == "command line"
    assert read_config_file(tmp_path / "sub/x.yaml", ["plugins=[cli.py]"])[0]["plugins"] == own[2:]


def test_an_error_of_a_plugin_names_the_line_of_the_config(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "plugins=[nowhere.py]")
    with pytest.raises(ConfigError, match=r"^plugins: The plug-in .*nowhere\.py.*\(command line\)"):
        run(config)


def test_runs_of_a_suite_have_its_plugins_and_those_of_their_backbone(tmp_path, write_tiny):
    for name in ("suite", "net"):
        write(tmp_path / f"{name}.py", TINY.replace("mine/tiny", f"{name}/tiny"))
    pretrain, _ = write_tiny(tmp_path), write_tiny(tmp_path, "probe")
    pretrain.write_text(f"plugins: [net.py]\n{pretrain.read_text()}")
    probe = tmp_path / "probe.yaml"
    probe.write_text(
        probe.read_text().replace("name: cifar/resnet18, args: {width: 8}", "name: null")
    )
    text = SUITE.format(output_dir=tmp_path / "suite")
    (tmp_path / "suite.yaml").write_text(f"plugins: [suite.py]\n{text}")
    suite = load_suite(tmp_path / "suite.yaml")
    both = [str(tmp_path / "suite.py"), str(tmp_path / "net.py")]
    assert [draft.run.config["plugins"] for draft in draft_runs(suite)] == [both] * 4
    (tmp_path / "suite.yaml").write_text(text.replace("tract.enabled: true", "plugins: [x.py]"))
    with pytest.raises(ConfigError, match="plugins are not overridden"):
        draft_runs(load_suite(tmp_path / "suite.yaml"))


# Trust.


@pytest.fixture
def untrusted(tmp_path):
    """A folder of weights and a run, whose plug-in leaves a file when it is executed."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    plugin = write(folder / "evil.py", f"{TINY}\nopen({str(tmp_path / 'executed')!r}, 'w')")
    with forgotten(tmp_path):
        load_plugins([str(plugin)])
        save_backbone(folder, build_backbone("mine/tiny"), {"plugins": [str(plugin)]})
    (tmp_path / "executed").unlink()
    return folder


def test_weights_and_runs_do_not_execute_the_files_that_they_name(
    untrusted, tmp_path, load_tiny, monkeypatch, write_tiny
):
    weights = ["model.backbone={name: null, args: {}}", f"model.weights={untrusted}"]
    with pytest.raises(ConfigError, match=r"^model\.weights: .*evil\.py, which is not imported"):
        run(load_tiny(tmp_path, *weights))
    text = write_tiny(tmp_path).read_text()
    for plugin in (str(untrusted / "evil.py"), "evil.py", "evil"):
        (untrusted / "config.yaml").write_text(f"{text}\nplugins: [{plugin}]\n")
        monkeypatch.chdir(untrusted)
        monkeypatch.syspath_prepend("")  # as python -m does
        with pytest.raises(PluginError, match=r"evil.*If you trust it, name it"):
            run_config(untrusted)
    metadata = json.loads((untrusted / "model.json").read_text())
    content = {**metadata, "head": {"name": "linear", "args": {}}, "label_names": ["a", "b"]}
    (untrusted / "model.json").write_text(json.dumps(content))
    with pytest.raises(PluginError, match="If you trust it"):
        load_exported(untrusted)
    assert not (tmp_path / "executed").exists()
    assert "mine/tiny" not in BACKBONES
    config = run_config(untrusted, plugins=["evil.py"])
    assert config.plugins == [str(untrusted / "evil.py")]
    run(load_tiny(tmp_path, *weights, "plugins=[evil.py]", "solver.max_iters=1"))
    assert (tmp_path / "executed").exists()


def test_a_trusted_file_does_not_make_its_folder_trusted(untrusted, tmp_path):
    """Its folder is in sys.path then, so the others in it can be imported by name."""
    write(untrusted / "mine.py", TINY.replace("mine/", "trusted/"))
    (tmp_path / "elsewhere").mkdir()
    (untrusted / "evil.py").rename(tmp_path / "elsewhere/evil.py")
    (untrusted / "evil.py").symlink_to(tmp_path / "elsewhere/evil.py")
    (untrusted / "evil_package").mkdir()
    load_plugins([str(untrusted / "mine.py")])
    assert importlib.util.find_spec("evil") is not None
    for plugin in ("evil", "evil_package", "evil_package.nets"):
        with pytest.raises(PluginError, match="If you trust it, name it"):
            trusted_plugins([plugin], [str(untrusted / "mine.py")], "A run")
    assert not (tmp_path / "executed").exists()


def test_plugins_of_an_override_are_checked_as_those_of_a_config(untrusted, write_tiny, tmp_path):
    (untrusted / "config.yaml").write_text(write_tiny(tmp_path).read_text())
    with pytest.raises(ConfigError, match=r"^plugins: .*list"):
        run_config(untrusted, ["plugins=evil.py"])
    config = run_config(untrusted, [f"plugins=[{untrusted}/evil.py]"], ["timm.models"])
    assert config.plugins == ["timm.models", str(untrusted / "evil.py")]


def test_a_moved_plugin_an_installed_module_and_a_packaged_file_are_trusted(tmp_path):
    moved = write(tmp_path / "mine.py", TINY)
    elsewhere = "/another/machine/site-packages/tract_transfer/configs/paper/cifar_zoo.py"
    recorded = ["/another/machine/mine.py", elsewhere, "timm.models"]
    own, zoo, module = trusted_plugins(recorded, ["mine.py"], "A run")
    assert (own, module) == (str(moved), "timm.models")
    assert zoo.endswith("/configs/paper/cifar_zoo.py")
    assert zoo != elsewhere
    for plugin in ("antigravity", "nowhere", "..mine", "/x/configs/../mine.py", 3):
        recorded = [plugin]
        if isinstance(plugin, str):
            with pytest.raises(PluginError):
                trusted_plugins(recorded, [], "A run")
        else:
            assert trusted_plugins(recorded, [], "A run") == []


def test_python_calls_take_plugins(tmp_path, write_tiny):
    plugin = str(write(tmp_path / "mine.py", TINY))
    words = ["model.backbone={name: mine/tiny}", "solver.max_iters=1"]
    with forgotten(tmp_path):
        trained = tract_transfer.train(write_tiny(tmp_path), overrides=words, plugins=["mine.py"])
        assert trained.load().backbone.feature_dim == 8
    with pytest.raises(PluginError, match=r"plugins=\[\.\.\.\]"):
        tract_transfer.load(trained)
    with pytest.raises(PluginError, match="which is not imported"):
        tract_transfer.create_backbone(weights=trained)
    with pytest.raises(PluginError, match="which is not imported"):
        tract_transfer.evaluate(trained)
    with forgotten(tmp_path):
        assert tract_transfer.load(trained, plugins=[plugin]).backbone.feature_dim == 8
    with forgotten(tmp_path):
        backbone = tract_transfer.create_backbone(weights=trained, plugins=[plugin])
        assert backbone.origin["name"] == "mine/tiny"
    with forgotten(tmp_path):  # an installed module, which the weights record
        metadata = json.loads((trained.folder / "model.json").read_text())
        (trained.folder / "model.json").write_text(json.dumps({**metadata, "plugins": ["lab"]}))
        (tmp_path / "installed").mkdir()
        write(tmp_path / "installed/lab.py", TINY)
        sys.path.append(str(tmp_path / "installed"))
        tract_transfer.create_backbone("mine/tiny", weights=trained)
        (trained.folder / "model.json").write_text(json.dumps(metadata))
    assert tract_transfer.evaluate(trained, plugins=[plugin]) == trained.metrics


def test_a_folder_of_images_is_trained_with_a_plugin(tmp_path, call):
    plugin = write(tmp_path / "mine.py", TINY)
    for number in range(24):
        path = tmp_path / "images" / ("train", "test")[number % 3 == 0] / "ab"[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    words = [tmp_path / "images", "--backbone", "mine/tiny", "--weights", "none", "--epochs", 1]
    words += ["--output", tmp_path / "run", "data.num_workers=0"]
    other = write(tmp_path / "other.py", TINY.replace("mine/", "other/"))
    done = call("train_net.py", *words, "--plugin", plugin, f"plugins=[{other}]")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/model.json").read_text())["name"] == "mine/tiny"
    for name in ("recipe.yaml", "config.yaml"):
        assert load_config(tmp_path / "run" / name).plugins == [str(other), str(plugin)]
    options = Options(backbone="mine/tiny", weights="none", output_dir=str(tmp_path / "run"))
    config, _ = config_for(words[0], options, (), ["more.py"], continues=True)
    assert config.plugins == [str(other), str(plugin), str(tmp_path / "more.py")]


# What an entry lacks is reported before training.

LACKING = {
    "backbone of a plug-in that is none": (
        "BACKBONES.register('bad/x')(lambda: nn.Identity())",
        "classification", "model.backbone={name: bad/x, args: {}}", "returns Identity. Return a",
    ),
    "backbone of a plug-in with another feature_dim": (
        "@BACKBONES.register('bad/x')\ndef bad():\n    backbone = tiny()\n"
        "    backbone.feature_dim = 5\n    return backbone",
        "classification", "model.backbone={name: bad/x, args: {}}", r"of shape \(2, 8\)",
    ),
    "backbone of a plug-in that fails": (
        "@BACKBONES.register('bad/x')\ndef bad():\n    backbone = tiny()\n"
        "    backbone.model.append(nn.Linear(3, 3))\n    return backbone",
        "classification", "model.backbone={name: bad/x, args: {}}", "fails on a blank image",
    ),
    "backbone of a plug-in without its first layer": (
        "@BACKBONES.register('bad/x')\ndef bad():\n    backbone = tiny()\n"
        "    backbone.first_layers = ['model.stem']\n    return backbone",
        "classification", "model.backbone={name: bad/x, args: {}}", r"no module \['stem'\]",
    ),
    "backbone of a plug-in with maps but no map_names": (
        "class Half(Backbone):\n    def maps(self, images, names):\n        return {}\n"
        "@BACKBONES.register('bad/x')\ndef bad():\n    backbone = tiny()\n"
        "    backbone.__class__ = Half\n    return backbone",
        "classification", "model.backbone={name: bad/x, args: {}}", "both maps and map_names",
    ),
    "backbone of a plug-in with a shared weight": (
        "@BACKBONES.register('bad/x')\ndef bad():\n    backbone = tiny()\n"
        "    backbone.model.again = backbone.model[0]\n"
        "    backbone.model.forward = nn.Sequential(*backbone.model[:3]).forward\n"
        "    return backbone",
        "classification", "model.backbone={name: bad/x, args: {}}", "are one tensor",
    ),
    "detector on a backbone without feature maps": (
        "", "detection", BACKBONE, "needs feature maps, and mine/tiny has none",
    ),
    "frozen stages of a backbone without feature maps": (
        "", "detection", f"{BACKBONE} & model.freeze_at=1", "freeze_at: counts feature maps",
    ),
    "head of a plug-in with another width": (
        "@HEADS.register('bad/x')\ndef bad(feature_dim, num_classes, *, width: int = 9):\n"
        "    return nn.Linear(feature_dim, width)",
        "classification", "model.head={name: bad/x}", r"to \(2, 9\). Return logits of shape \(2, 3",
    ),
    "detector of a plug-in without its backbone": (
        "@DETECTORS.register('bad/x')\ndef bad(backbone, num_classes):\n    return nn.Identity()",
        "detection", "model.detector={name: bad/x, args: {}}", "attribute backbone",
    ),
    "evaluator of a plug-in that is incomplete": (
        "EVALUATORS.register('bad/x')(type('Bad', (), {'task': 'classification'}))",
        "classification", "evaluation={protocol: bad/x}", "bad/x lacks metrics, update, compute",
    ),
    "evaluator of another task": (
        "", "classification", "evaluation={protocol: coco}", "coco is for detection, and the task",
    ),
    "metric that an evaluator lacks": (
        "", "classification", "evaluation={metric: top}", r"no metric of accuracy. Did you mean",
    ),
    "source that is not registered": (
        "", "classification", "data.train={source: digit}", r"SOURCES has no 'digit'. Did you mean",
    ),
    "source of a plug-in with an unknown argument": (
        "SOURCES.register('bad/x')(lambda: 1)",
        "classification", "data.train={source: bad/x, args: {a: 1}}", r"data\.train\.args\.a: unk",
    ),
    "source of a plug-in that returns no data": (
        "SOURCES.register('bad/x')(lambda: [])",
        "detection", "data.train={source: bad/x}", "returns list, and a detection needs a Detecti",
    ),
    "source of a plug-in with a wrong label": (
        "@SOURCES.register('bad/x')\ndef bad():\n"
        "    return image_dataset([np.zeros((4, 4), np.uint8)] * 2, ['a', 'c'], ['a', 'b'])",
        "classification", "data.train={source: bad/x}", "images image 1: the label 'c' is neither",
    ),
    "source of a plug-in with float images": (
        "@SOURCES.register('bad/x')\ndef bad():\n"
        "    return image_dataset([np.zeros((4, 4, 3))], [0], ['a', 'b'])",
        "classification", "data.train={source: bad/x}", "must be uint8, RGB .* got float64",
    ),
    "source of a plug-in without a label for each image": (
        "@SOURCES.register('bad/x')\ndef bad():\n    return image_dataset(['a.png'], [], ['a'])",
        "classification", "data.train={source: bad/x}", "1 images and 0 labels",
    ),
    "source of a plug-in with a box outside of its image": (
        "@SOURCES.register('bad/x')\ndef bad():\n"
        "    image = np.zeros((4, 4, 3), np.uint8)\n"
        "    return box_dataset([image], [[[0, 0, 9, 4]]], [['a']], ['a', 'b'])",
        "detection", "data.train={source: bad/x}", "images image 0 object 0: the box must lie in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_what_an_entry_lacks_is_reported_before_training(case, tmp_path, load_tiny, refused):
    text, task, words, message = LACKING[case]
    plugin = write(tmp_path / "mine.py", f"{TINY}\n{text}")
    config = load_tiny(tmp_path, *words.split(" & "), f"plugins=[{plugin}]", task=task)
    with refused(case, ConfigError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()


# Entries at work.

HEAD_AND_DETECTOR = """
@HEADS.register("mine/head")
def head(feature_dim, num_classes, *, bias: bool = True):
    return nn.Linear(feature_dim, num_classes, bias=bias)


class Corner(nn.Module):
    '''Finds one box in the corner of every image.'''

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.scores = nn.Linear(backbone.feature_dim, num_classes)

    def forward(self, images, targets=None):
        scores = self.scores(torch.cat([self.backbone.pooled(image[None]) for image in images]))
        if self.training:
            return {"loss_scores": scores.square().mean()}
        best, labels = scores.sigmoid().max(1)
        box = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
        return [{"boxes": box, "scores": b[None], "labels": k[None]} for b, k in zip(best, labels)]


DETECTORS.register("mine/corner")(Corner)
EVALUATORS.register("mine/count")(type("Count", (), {
    "task": "detection", "metrics": ("count",),
    "__init__": lambda self, names: setattr(self, "names", names),
    "update": lambda self, predictions, targets: None,
    "compute": lambda self: {"count": 0.5},
    "details": lambda self: {"class_names": self.names},
}))
"""


def test_a_detector_an_evaluator_and_a_backbone_without_maps_train(tmp_path, load_tiny):
    plugin = write(tmp_path / "mine.py", TINY + HEAD_AND_DETECTOR)
    words = [BACKBONE, "model.detector={name: mine/corner, args: {}}", f"plugins=[{plugin}]"]
    words.append("evaluation={protocol: mine/count, metric: count}")
    results = run(load_tiny(tmp_path, *words, "solver.max_iters=2", task="detection"))
    assert (results["primary_metric"], results["metrics"]) == ("count", {"count": 0.5})
    metadata = json.loads((tmp_path / "run/model.json").read_text())
    assert (metadata["maps"], metadata["plugins"]) == ({}, [str(plugin)])
    config = load_config(tmp_path / "run/config.yaml")
    assert all(f" --plugin {plugin} " in command for command in next_commands(config))
    hashes = json.loads((tmp_path / "run/environment.json").read_text())["plugin_files"]
    assert hashes.keys() == {"mine.py"}


def test_a_changed_plugin_is_a_warning_on_resume(tmp_path, load_tiny, kill_at, caplog):
    plugin = write(tmp_path / "mine.py", TINY + HEAD_AND_DETECTOR)
    words = [f"plugins=[{plugin}]", "model.head={name: mine/head, args: {bias: false}}"]
    config = load_tiny(tmp_path, *words, "engine.checkpoint.every_iters=2")
    kill_at(4)
    with forgotten(tmp_path), pytest.raises(Killed):
        run(config)
    kill_at(None)
    plugin.write_text(f"{plugin.read_text()}\n# changed\n")
    results = run(config, resume=True)
    assert results["iterations"] == 6
    assert "another environment" in caplog.text


def test_a_source_of_arrays_is_that_of_their_files(tmp_path, load_tiny):
    text = """
    from PIL import Image
    IMAGES = [np.random.default_rng(i).integers(0, 256, (9, 8, 3), np.uint8) for i in range(4)]

    @SOURCES.register("mine/files")
    def files(*, root: str, seed: int = 0):
        paths = [f"{root}/{i}.png" for i in range(4)]
        for path, image in zip(paths, IMAGES):
            Image.fromarray(image).save(path)
        return image_dataset(paths, [0, 1, 1, seed], ["a", "b"])

    @SOURCES.register("mine/arrays")
    def arrays(*, seed: int = 0):
        return image_dataset(IMAGES, ["a", "b", "b", "ab"[seed]], ["a", "b"])

    @SOURCES.register("mine/decoded")
    def decoded(*, root: str):
        return image_dataset([f"{root}/{i}.png" for i in range(4)], [0] * 4, ["a", "b"],
                             decode=lambda path: IMAGES[int(path.stem)][:, :, 0])

    @SOURCES.register("mine/boxes")
    def boxes():
        return box_dataset(IMAGES, [[[1, 2, 3, 4]], [], [[0, 0, 99, 9]], []],
                           [["b"], [], [0], []], ["a", "b"], difficult=[[1], [], [0], []])
    """
    plugin = write(tmp_path / "mine.py", text)
    words = [f"data.train={{source: mine/files, args: {{root: {tmp_path}}}}}"]
    words += ["data.test={source: mine/arrays, args: {seed: 1}}", f"plugins=[{plugin}]"]
    config = load_tiny(tmp_path, *words)
    data = build_data(config)
    for index in range(4):
        assert torch.equal(data.train.image(index), data.test.image(index))
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.test.labels.tolist() == [0, 1, 1, 1]
    words[1] = f"data.test={{source: mine/decoded, args: {{root: {tmp_path}}}}}"
    gray = build_data(load_tiny(tmp_path, *words)).test.image(3)
    assert torch.equal(gray, data.train.image(3)[:1].expand(3, -1, -1))
    words = ["data.train={source: mine/boxes}", f"plugins=[{plugin}]", "data.invalid_boxes=clip"]
    config = load_tiny(tmp_path, *words, task="detection")
    findings = Findings("clip")
    dataset = load_split(config, "train", findings)
    assert dataset.target(0)["boxes"].tolist() == [[1, 2, 3, 4]]
    assert (dataset.target(0)["labels"].item(), dataset.target(0)["difficult"].item()) == (1, True)
    assert dataset.target(2)["boxes"].tolist() == [[0, 0, 8, 9]]
    assert dataset.image(2).shape == (3, 9, 8)
    assert len(findings.clipped_boxes) == 1
