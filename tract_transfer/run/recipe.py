"""A config for a folder of images: what to train, and why.

Every choice is a `Choice` with its reason. `Recipe.text` is a short config of the chosen keys, with
the reasons as comments, from which the run can be repeated and changed.
"""

import json
import os
import statistics
import textwrap
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from huggingface_hub import constants, try_to_load_from_cache

from tract_transfer.config.file import (
    Override,
    Overrides,
    add_plugins,
    dump_yaml,
    override,
    read_overrides,
)
from tract_transfer.config.schema import Config, check_config, load_config
from tract_transfer.data.folder import Description, describe_folder
from tract_transfer.engine.run_folder import Chosen, flatten
from tract_transfer.files import CONFIG_NAME, num_cores, redact
from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import build_backbone, check_backbone_name
from tract_transfer.models.weights import build_from_metadata, has_metadata, read_metadata

# --task -> the task of a config, and the task of the data it needs.
TASKS = {
    "classify": ("classification", "classification"),
    "detect": ("detection", "detection"),
    "probe": ("probe", "classification"),
}
HELD_OUT, HELD_OUT_SEED = 0.2, 0
_SMALL_PX = 64  # images up to here are small
_BATCHES = (64, 32, 16, 8, 4, 2)
_MIN_BATCHES = 8  # in an epoch, which drops an incomplete one
_TIMEOUT_SECONDS = 5
# (task, whether weights are pre-trained) -> learning rate of AdamW. Pre-trained ViTs need less.
_VIT_RATE = 1e-4
_RATES = {
    ("classify", True): 1e-3,
    ("classify", False): 1e-3,
    ("detect", True): 2e-4,
    ("detect", False): 5e-4,
}


@dataclass(frozen=True)
class Options:
    """The options of a command line, None if not given.

    `weights` is pretrained, none, a file or the folder of a run.
    """

    task: str | None = None
    backbone: str | None = None
    weights: str | None = None
    tract: bool = False
    epochs: int | None = None
    size_px: int | None = None
    batch_size: int | None = None
    output_dir: str | None = None
    name: str | None = None


class Machine(NamedTuple):
    """What a recipe needs to know of the machine."""

    has_gpu: bool
    has_bf16: bool
    cores: int
    processes: int

    @classmethod
    def this(cls) -> "Machine":
        """Return this machine, and the number of processes that a launcher started."""
        has_gpu = torch.cuda.is_available()
        has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(has_gpu, has_bf16, num_cores(), processes)


class Choice(NamedTuple):
    """A line of the report: the section of the config, what was chosen, and why."""

    section: str
    what: str
    why: str


@dataclass(frozen=True)
class Recipe:
    """The chosen keys of a config as a tree, and the reasons."""

    tree: dict[str, Any]
    choices: list[Choice]
    source: str

    def config(self, overrides: Overrides = (), plugins: Sequence[str] = ()) -> Config:
        """Return the checked config with overrides `key=value`, and more plug-ins."""
        place = f"chosen for {self.source}"
        chosen = [Override(key, value, place) for key, value in self.tree.items()]
        tree, origins = override(*override({}, {}, chosen), read_overrides(overrides))
        origins[""] = place
        return check_config(*add_plugins(tree, origins, plugins))

    def text(self, overrides: Overrides = (), plugins: Sequence[str] = ()) -> str:
        """Return the keys of `config` that were chosen or given as YAML, with the reasons."""
        tree, _ = add_plugins(*override(self.tree, {}, read_overrides(overrides)), plugins)
        parts = []
        for section, value in redact(tree, by_name=False).items():
            lines = [f"{one.what}: {one.why}" for one in self.choices if one.section == section]
            wrapped = [textwrap.wrap(line, 96) for line in lines]
            comments = [f"# {line}" for lines in wrapped for line in lines]
            parts.append("\n".join([*comments, _dump(section, value)]))
        return "\n".join(parts) + "\n"

    def lines(self, overrides: Overrides = ()) -> list[str]:
        """Return the choices, and the overrides of them, as lines to log."""
        changes = read_overrides(overrides)
        words = [f"{key}={_word(value)}" for key, value, _ in changes]
        given = [Choice("", "given", redact(" ".join(words)))] if words else []
        indent, lines = " " * 12, list[str]()
        for one in [*self.choices, *given]:
            lines += textwrap.wrap(f"{one.what:>10}  {one.why}", 100, subsequent_indent=indent)
        return lines

    def to_json(self) -> str:
        """Return the recipe for another process."""
        return json.dumps([self.tree, self.choices, self.source])

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe that another process chose."""
        tree, choices, source = json.loads(text)
        return cls(tree, [Choice(*choice) for choice in choices], source)

    def chosen(self, overrides: Overrides = (), plugins: Sequence[str] = ()) -> Chosen:
        """Return what a run logs of the choices and saves."""
        return Chosen(self.text(overrides, plugins), self.lines(overrides))


def make_recipe(
    folder: str | Path,
    data: Description,
    options: Options,
    machine: Machine,
    overrides: Overrides = (),
) -> Recipe:
    """Choose a config for what `describe_folder` found in `folder`.

    Args:
        overrides: of the config; those of a key that has an option count as the option.

    Raises:
        ValueError: an option does not go with the task or the data.
        FileNotFoundError: `--weights` names no file or folder.
    """
    options = options_with(options, task_of(data, options), overrides)
    chooser = _Chooser(folder, data, options, machine)
    return Recipe(chooser.tree(), chooser.choices, str(folder))


def config_for(
    folder: str | Path,
    options: Options,
    overrides: Overrides = (),
    plugins: Sequence[str] = (),
    *,
    continues: bool = False,
    machine: Machine | None = None,
) -> tuple[Config, Recipe | None]:
    """Return the config for a folder, and the recipe that chose it.

    Args:
        plugins: added to `plugins` of the config.
        continues: a run that exists is continued or measured: then the config is the run's, and
            there is no recipe.
        machine: that trains; None is this one.
    """
    data = describe_folder(folder)
    task = task_of(data, options)
    output_dir = output_dir_of(folder, task, options_with(options, task, overrides))
    file = Path(output_dir) / CONFIG_NAME
    if continues and file.is_file():
        saved = load_config(file, option_words(task, options))
        return load_config(saved, overrides, plugins), None
    recipe = make_recipe(folder, data, options, machine or Machine.this(), overrides)
    return recipe.config(overrides, plugins), recipe


def task_of(data: Description, options: Options) -> str:
    """Return the task, `classify`, `detect` or `probe`; refuse options that do not go with it."""
    task = options.task or ("detect" if data.task == "detection" else "classify")
    if TASKS[task][1] != data.task:
        holds = "classes" if data.task == "classification" else "boxes"
        fits = [name for name, (_, needed) in TASKS.items() if needed == data.task]
        raise ValueError(
            f"--task {task} does not go with {data.path}: it holds {holds} ({data.kind}: "
            f"{data.why}). Give --task {' or '.join(fits)}."
        )
    if task == "probe":
        for name, given in (("--epochs", options.epochs), ("--tract", options.tract)):
            if given:
                raise ValueError(
                    f"{name} does not go with --task probe, which trains no backbone. Leave it out."
                )
    return task


def output_dir_of(folder: str | Path, task: str, options: Options) -> str:
    """Return --output, or output/<name of the folder>-<task>."""
    path = Path(folder).expanduser().resolve()
    name = path.name if path.is_dir() else path.stem
    return options.output_dir or f"output/{name}-{task}"


# Options and keys of the config.


def option_keys(task: str) -> dict[str, str]:
    """Return the fields of Options that are keys of a config of the task, and these keys."""
    keys = {
        "name": "name",
        "output_dir": "output_dir",
        "backbone": "model.backbone.name",
        "weights": "model.weights",
        "batch_size": "data.batch_size",
        "size_px": "data.transforms.size_px",
    }
    if task == "detect":
        keys["size_px"] = "model.detector.args.short_side_px"
    if task != "probe":
        keys |= {"epochs": "solver.max_epochs", "tract": "tract.enabled"}
    return keys


def option_words(task: str, options: Options) -> list[str]:
    """Return the options as overrides of a saved recipe: a resumed run must agree with them."""
    words = []
    for option, key in option_keys(task).items():
        value = getattr(options, option)
        if option == "output_dir" or value is None or value is False:
            continue
        if option == "weights":
            value = _weights_key(value)
        words.append(f"{key}={json.dumps(value)}")
    return words


def options_with(options: Options, task: str, overrides: Overrides) -> Options:
    """Return the options with the overrides of their keys.

    A value of another type stays an override, which the check of the config refuses.
    """
    tree, _ = override({}, {}, read_overrides(overrides))
    values, given = flatten(tree), dict[str, Any]()
    for option, key in option_keys(task).items():
        value: Any = values.get(key)
        if option == "weights" and key in values and value is None:
            value = "none"
        kind = {"tract": bool, "epochs": int, "batch_size": int, "size_px": int}.get(option, str)
        is_kind = type(value) is kind  # bool is no int here
        if is_kind and (kind is not int or value > 0):
            given[option] = value
    return replace(options, **given)


def _weights_key(weights: str) -> str | None:
    """Return `model.weights` for --weights; the path of a file or run is absolute."""
    if weights in ("none", "pretrained"):
        return None if weights == "none" else weights
    return str(Path(weights).absolute())


# Published weights.


def published_weights(name: str) -> tuple[bool, str]:
    """Return whether a backbone's pre-trained weights are available, and where, or why not."""
    library, _, model = name.partition("/")
    if library == "timm" and timm.is_model_pretrained(model):
        config = timm.get_pretrained_cfg(model)
        if repository := config.hf_hub_id:
            for file in ("model.safetensors", "pytorch_model.bin"):
                if isinstance(try_to_load_from_cache(repository, file), str):
                    return True, "in the cache of the hub"
            if constants.HF_HUB_OFFLINE:
                return False, "not in the cache of the hub, and HF_HUB_OFFLINE is set"
            return _answers(constants.ENDPOINT)
        return _answers(config.url)
    if library == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        url = torchvision.models.get_model_weights(model).DEFAULT.url
        if (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            return True, "in the cache of torch.hub"
        return _answers(url)
    return False, "it has no published ones"


def _answers(url: str) -> tuple[bool, str]:
    """Return whether a server can be reached; the training then downloads from it."""
    host = url.split("/")[2]
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return False, f"not in the cache, and {host} does not answer: {reason}"
    return True, f"downloaded from {host}"


# The choices.


class _Chooser:
    """Chooses the sections of a config one by one, and keeps the reasons in `choices`."""

    def __init__(
        self, folder: str | Path, data: Description, options: Options, machine: Machine
    ) -> None:
        self.folder, self.data, self.options, self.machine = folder, data, options, machine
        self.choices: list[Choice] = []
        self.task = task_of(data, options)
        short_sides = [min(size) for size in data.sizes] or [224]
        self.median_px = statistics.median(short_sides)
        self.is_small = self.median_px <= _SMALL_PX
        backbone = _weightless_backbone(options)
        self.fixed_px = None if backbone is None else backbone.image_size_px
        self.is_transformer = backbone is not None and _is_transformer(backbone)
        self.device = "a GPU" if machine.has_gpu else "a CPU"
        # The split that is reported: test, or else val. Without either, a part of train is.
        self.reported = next((name for name in ("test", "val") if name in data.splits), None)
        count = data.splits["train"].num_images
        self.num_train = count if self.reported else count - max(1, round(HELD_OUT * count))

    def tree(self) -> dict[str, Any]:
        """Return the config."""
        options = self.options
        self.note("task", "found", self.found())
        sources = self.sources()
        model, is_trained = self.model()
        tree: dict[str, Any] = {
            "task": TASKS[self.task][0],
            "output_dir": output_dir_of(self.folder, self.task, options),
            **({"name": options.name} if options.name else {}),
            "model": model,
            "data": {**sources, "transforms": self.transforms(model, is_trained)},
        }
        batch_size = self.batch_size()
        workers = min(8, max(1, self.machine.cores // self.machine.processes - 1))
        tree["data"] |= {"batch_size": batch_size, "num_workers": workers}
        if self.task == "detect":
            tree["data"]["invalid_boxes"] = "clip"
            self.note("data", "boxes", "clipped to their image; results.json lists which")
        if self.task == "probe":
            tree["evaluation"] = self.probes()
        else:
            epochs = self.epochs(batch_size, is_trained)
            tree["solver"] = self.solver(epochs, is_trained)
            tree["tract"] = {"enabled": options.tract}
            on = "on the first layer, with the default lam 0.1"
            self.note("tract", "TrAct", on if options.tract else "off; --tract enables it")
            tree["evaluation"] = self.evaluation(sources, epochs)
        tree["engine"] = self.engine(tree)
        return tree

    def note(self, section: str, what: str, why: str) -> None:
        self.choices.append(Choice(section, what, why))

    def found(self) -> str:
        data, names = self.data, self.data.class_names
        counts = ", ".join(f"{name} {split.num_images:,}" for name, split in data.splits.items())
        parts = [f"{data.kind} ({data.why})", f"images: {counts}"]
        if names is not None:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            parts.append(f"{len(names)} classes: {shown}" if len(names) > 1 else f"class {shown}")
        return "; ".join([*parts, *data.notes])

    def sources(self) -> dict[str, Any]:
        """Return the sources of data; without a test split, one is held out."""
        splits = self.data.splits
        sources: dict[str, Any] = {"train": splits["train"].source}
        if self.reported is None:
            sources["test"] = {"source": "train", "fraction": HELD_OUT, "seed": HELD_OUT_SEED}
            why = f"{HELD_OUT:.0%} of train, held out by class with seed {HELD_OUT_SEED}"
            why += f": the folder has no test split; {self.num_train:,} images remain"
            self.note("data", "test", why)
        elif self.reported == "val":
            sources["test"] = splits["val"].source
            self.note("data", "test", "the val split, as there is no other; it selects nothing")
        else:
            sources |= {name: splits[name].source for name in ("val", "test") if name in splits}
        return sources

    def model(self) -> tuple[dict[str, Any], bool]:
        """Return the section of the model, and whether its weights are pre-trained."""
        name, weights = self.options.backbone or "timm/resnet18", self.options.weights
        check_name(name)
        model: dict[str, Any] = {"backbone": {"name": name}, "weights": None}
        has_weights = True
        if weights not in (None, "none", "pretrained"):
            assert weights is not None
            if not Path(weights).exists():
                raise FileNotFoundError(
                    f"--weights {weights}: there is no such file or folder. Give the folder of a "
                    "run, a weights file, pretrained or none."
                )
            if self.options.backbone is None and Path(weights).is_dir():  # of a run
                model, why = {}, f"that of {weights}"
            else:
                why = f"{name} with the weights in {weights}"
            model["weights"] = _weights_key(weights)
        else:
            has_weights, reason = weights == "pretrained", f"--weights {weights}"
            if weights is None:
                has_weights, reason = published_weights(name)
            why = f"{name}, pre-trained ({reason})"
            if has_weights:
                model["weights"] = "pretrained"
            else:
                model["backbone"], why = self.random_weights(name, reason)
        self.note("model", "backbone", why)
        return self.with_detector(model, has_weights), has_weights

    def random_weights(self, name: str, reason: str) -> tuple[dict[str, Any], str]:
        """Return a backbone with random weights, and why it is this one."""
        options = self.options
        if self.task == "probe" and options.weights is None:
            raise ValueError(
                f"--task probe measures a pre-trained backbone, and the weights of {name} are "
                f"not available: {reason}. Give --weights PATH, or --weights none for random ones."
            )
        if options.weights is None:
            reason = f"pre-trained weights are not available: {reason}"
        if options.backbone is None and self.is_small and self.task != "detect":
            width = 64 if self.machine.has_gpu else 32
            backbone = {"name": "cifar/resnet18", "args": {"width": width}}
            return backbone, f"cifar/resnet18, made for small images, from scratch ({reason})"
        return {"name": name}, f"{name} from scratch ({reason})"

    def with_detector(self, model: dict[str, Any], is_trained: bool) -> dict[str, Any]:
        """Add the detector to a model, of a size that the machine can train."""
        if self.task != "detect":
            return model
        short_px, long_px = self.detector_sides()
        args: dict[str, Any] = {"short_side_px": short_px, "max_side_px": long_px}
        rpn: dict[str, Any] = {"anchor_scales": [4]} if short_px < 400 else {}
        width = "of its usual width"
        if not self.machine.has_gpu:
            width = "half as wide, for a CPU"
            rpn |= {"pre_nms_train": 1000, "post_nms_train": 300}
            rpn |= {"pre_nms_test": 500, "post_nms_test": 300}
            args |= {"fpn_channels": 128, "head_dim": 512, "box": {"rois_per_image": 128}}
        args |= {"rpn": rpn} if rpn else {}
        self.note("model", "detector", f"Faster R-CNN with a feature pyramid, {width}")
        norm = "frozen" if is_trained else "trained"
        return {**model, "norm": norm, "detector": {"name": "torchvision_fpn", "args": args}}

    def detector_sides(self) -> tuple[int, int]:
        """Return the short side of a detector's images, and the longest long side."""
        most = 640 if self.machine.has_gpu else 256
        short_px = self.options.size_px or _multiple(min(self.median_px, most), 32)
        ratios = [max(size) / min(size) for size in self.data.sizes] or [1.5]
        return short_px, _multiple(short_px * min(max(ratios), 2.0) + 31, 32)

    def transforms(self, model: Mapping[str, Any], is_trained: bool) -> dict[str, Any]:
        if self.task == "detect":
            return self.detection_transforms()
        size_px = self.size_px(model, is_trained)
        transforms: dict[str, Any] = {"size_px": size_px}
        transforms |= {} if self.is_small else {"crop_ratio": 0.875}
        if self.task == "probe":
            return transforms
        if self.is_small:
            transforms |= {"crop": "pad", "pad_px": max(1, size_px // 8)}
        else:
            transforms |= {"crop": "random_resized", "scale": [0.35, 1.0]}
        names = self.data.class_names or []
        if names and all(len(name) == 1 for name in names):
            self.note("data", "mirroring", "off: the classes are characters")
            return transforms
        self.note("data", "mirroring", "on; data.transforms.flip_prob=0 if left and right differ")
        return {**transforms, "flip_prob": 0.5}

    def detection_transforms(self) -> dict[str, Any]:
        short_px, long_px = self.detector_sides()
        most = f"the images have {self.median_px:g} px, and {self.device} trains at "
        why = "--size" if self.options.size_px else (
            most + ("640 at most" if self.machine.has_gpu else "256 at most")
        )  # fmt: skip
        self.note("data", "size", f"short side {short_px} px, long side up to {long_px}: {why}")
        sides = [_multiple(short_px * scale, 8) for scale in (0.8, 0.9, 1.0, 1.1)]
        return {"short_sides_px": sides, "max_side_px": round(long_px * 1.1)}

    def size_px(self, model: Mapping[str, Any], is_trained: bool) -> int:
        """Return the size of a classifier's images."""
        most, given = 224 if self.machine.has_gpu else 128, self.options.size_px
        is_published = is_trained and model["weights"] == "pretrained"
        least = 96 if is_published else 32
        why = f"the images have {self.median_px:g} px (median of the short sides)"
        size_px = _multiple(min(max(self.median_px, least), most), 16)
        if given is not None:
            size_px, why = given, "--size"
        elif self.fixed_px is not None:
            size_px, why = self.fixed_px, "the only one that the backbone takes"
        elif self.median_px > most:
            why += f", and {self.device} trains at {most} at most"
        elif self.median_px < least:
            why += ", and pre-trained weights need more" if is_published else f"; at least {least}"
        self.note("data", "size", f"{size_px} px: {why}")
        return size_px

    def batch_size(self) -> int:
        if self.options.batch_size:
            self.note("data", "batch", f"{self.options.batch_size}: --batch-size")
            return self.options.batch_size
        if self.task == "probe":
            self.note("data", "batch", "64 images at a time to extract features")
            return 64
        count, processes = self.num_train, self.machine.processes
        most = {"detect": (4, 16), "classify": (32, 64)}[self.task][self.machine.has_gpu]
        fits = [size for size in _BATCHES if size <= most and size * _MIN_BATCHES <= count]
        size = max(max(fits, default=2) // processes, 1) * processes
        why = f"{size}: an epoch of {count:,} images has {count // size:,} full batches"
        left = count % size
        self.note(
            "data", "batch", f"{why}, and drops {left} images, others each time" if left else why
        )
        return size

    def epochs(self, batch_size: int, is_trained: bool) -> int:
        if self.options.epochs:
            self.note("solver", "epochs", f"{self.options.epochs}: --epochs")
            return self.options.epochs
        shown = {"detect": 4_000, "classify": 20_000}[self.task]
        shown *= (5 if self.machine.has_gpu else 1) * (1 if is_trained else 2)
        least, most = (3, 60) if is_trained else (6, 120)
        epochs = min(max(round(shown / self.num_train), least), most)
        steps = epochs * (self.num_train // batch_size)
        work = "fine-tuning" if is_trained else "training from scratch"
        why = f"about {shown:,} images for {work} on {self.device}, in {least} to {most} epochs"
        self.note("solver", "epochs", f"{epochs}, {steps:,} steps: {why}")
        return epochs

    def solver(self, epochs: int, is_trained: bool) -> dict[str, Any]:
        lr = _RATES[self.task, is_trained]
        if is_trained and self.is_transformer:
            lr = _VIT_RATE
        self.note("solver", "optimizer", f"AdamW with lr {lr:g}, a warm-up and a cosine")
        return {
            "optimizer": "adamw",
            "lr": lr,
            "weight_decay": 0.05,
            "decay_all": False,
            "schedule": "cosine",
            "max_epochs": epochs,
            "warmup_epochs": min(1.0, epochs / 10),
        }

    def evaluation(self, sources: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        every = max(1, epochs // 10)
        section: dict[str, Any] = {"every_epochs": every}
        times = "every epoch" if every == 1 else f"every {every} epochs"
        why = f"on test {times}; the last epoch is reported"
        if "val" in sources:
            section["report"] = "best"
            why = f"on val {times}; the best epoch there is reported on test"
        if self.task == "detect":
            train = sources["train"]
            is_pascal = train["source"] == "voc" and "classes" not in train
            section["protocol"] = "voc2007_devkit" if is_pascal else "coco"
            why += f", AP 50 by the protocol {section['protocol']}"
        self.note("evaluation", "measured", why)
        return section

    def probes(self) -> dict[str, Any]:
        ks = [k for k in (1, 5, 20) if k <= self.num_train]
        cs = [10.0**power for power in range(-4, 4)]
        self.note("evaluation", "probes", f"logistic regression ({len(cs)} C), k-NN (k of {ks})")
        return {"knn": {"ks": ks}, "logistic_regression": {"cs": cs}}

    def engine(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        precision = "bf16" if self.machine.has_bf16 else "fp32"
        where = "a GPU" if self.machine.has_gpu else f"a CPU, {self.machine.cores} cores"
        workers = tree["data"]["num_workers"]
        self.note("engine", "machine", f"{where}: {precision}, {workers} data workers")
        if self.task == "probe":
            return {"precision": precision}
        per_epoch = max(1, self.num_train // tree["data"]["batch_size"])
        return {
            "precision": precision,
            **({"grad_clip": 10.0} if self.task == "detect" else {}),
            "checkpoint": {"every_epochs": tree["evaluation"]["every_epochs"]},
            "log": {"every_iters": min(20, per_epoch)},
        }


def check_name(name: str) -> None:
    """Refuse a backbone that does not exist."""
    try:
        check_backbone_name(name)
    except KeyError as error:
        raise ValueError(f"--backbone: {error.args[0]}") from None


def _dump(section: str, value: Any) -> str:
    return dump_yaml({section: value}, is_short=isinstance(value, dict | list)).rstrip()


def _weightless_backbone(options: Options) -> Backbone | None:
    """Return the backbone that options name, on the meta device; None if it cannot be built so.

    Raises:
        ValueError: there is no such backbone.
    """
    name, weights = options.backbone, Path(options.weights or "none")
    if name is not None:
        check_name(name)
    elif not weights.is_dir() or not has_metadata(weights):
        return None
    try:
        with torch.device("meta"):
            if name is None:
                return build_from_metadata(read_metadata(weights))
            return build_backbone(name)
    except Exception:  # of any plug-in; the run reports what it cannot build
        return None


def _is_transformer(backbone: Backbone) -> bool:
    kinds = [type(module).__name__ for module in backbone.modules()]
    return sum(kind.endswith("Attention") for kind in kinds) > 1


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _multiple(value: float, of: int) -> int:
    """Return the largest multiple of `of` that is not above a value, at least one."""
    return max(1, int(value) // of) * of
