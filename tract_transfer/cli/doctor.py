"""Check the installation, or whether TrAct has an effect on a model and its data.

tract-transfer doctor
tract-transfer doctor --config-file quickstart/pretrain
tract-transfer doctor --backbone timm/resnet18 --data ./my_images

Without arguments it prints versions, extras, hardware and caches. Otherwise it builds model and
data as a training would, runs batches forward and backward without an update, and prints what TrAct
does to the first layer, a verdict and the lam to use. Nothing is written.

The exit code is 0, or 1 if a package cannot be imported, or if TrAct has no effect or is unsafe; 2
if the command line, the config or the data must be changed first.
"""

import argparse
import importlib
import json
import logging
import platform
import sys
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tract_transfer
from tract_transfer.cli.main import (
    CONFIG_HELP,
    add_overrides,
    add_plugins,
    make_parser,
    number,
    read_config,
    reports_errors,
)
from tract_transfer.files import num_cores

if TYPE_CHECKING:
    from torch import nn

    from tract_transfer.config.schema import Config, TrainedTask
    from tract_transfer.tract import TrAct
    from tract_transfer.tract.diagnose import Report

PACKAGE = "tract_transfer"
SHOWN = ("torch", "torchvision", "timm", "detectron2")  # their versions, even if not installed
SIZE_PX, CIFAR_SIZE_PX = 224, 32  # of images from the hub


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config-file", metavar="FILE", help=CONFIG_HELP)
    which.add_argument("--backbone", metavar="NAME", help="such as timm/resnet18, with --data")
    text = "its images: what `train` takes as FOLDER, a parquet file, or a hub id"
    parser.add_argument("--data", metavar="DATA", help=text)
    count = number(int, 1)
    text = "micro-batches to run (default 8)"
    parser.add_argument("--num-batches", type=count, default=8, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugins(parser)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if (arguments.backbone is None) != (arguments.data is None):
        parser.error("--backbone and --data go together; a config has its own data.")
    if arguments.overrides and not (arguments.config_file or arguments.backbone):
        parser.error(
            f"{arguments.overrides} override a config: give --config-file, or --backbone and "
            "--data."
        )
    return arguments


@reports_errors
def main() -> int:
    """Check what the command line names; return the exit code."""
    arguments = parse()
    if not (arguments.config_file or arguments.backbone):
        rows, is_complete = environment()
        width = max(map(len, rows))
        lines = [f"{name:>{width}}  {text}" for name, text in rows.items()]
        print(json.dumps(rows, indent=1) if arguments.json else "\n".join(lines))
        return 0 if is_complete else 1
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = read_config(arguments) if arguments.config_file else config_of(arguments)
    if config.task == "probe":
        raise config.error("task", "a probe trains no first layer. Give the config of a training.")
    heading, report = diagnose(config, arguments.num_batches)
    keys = recommended(report)
    if arguments.json:
        layers = [layer.as_dict() for layer in report.values()]
        about = {"has_effect": report.has_effect, "is_safe": report.is_safe}
        print(json.dumps({"checked": heading, **about, "recommended": keys, "layers": layers}))
    else:
        print(f"{heading}\n\n{report}\n\nrecommended: {' '.join(keys)}")
    return 0 if report.has_effect and report.is_safe else 1


# The environment.


def environment() -> tuple[dict[str, str], bool]:
    """Return rows on the installation, and whether every installed package of them imports."""
    rows = {
        "python": f"{platform.python_version()} ({sys.executable})",
        PACKAGE: f"{tract_transfer.__version__} ({Path(tract_transfer.__file__).parent})",
    }
    states = {name: package_state(name) for name in SHOWN}
    rows |= {name: text for name, (text, _) in states.items()}
    for extra, missing in missing_of_extras().items():
        if extra in ("docs", "dev"):  # for work on this project
            continue
        install = f"missing {', '.join(missing)}: pip install '{PACKAGE}[{extra}]'"
        rows[f"[{extra}]"] = install if missing else "installed"
    rows["cpu"] = f"{platform.machine()}, {num_cores()} cores"
    if states["torch"][1] and states["torch"][0] != "not installed":
        import torch

        count = torch.cuda.device_count()
        gpus = [torch.cuda.get_device_name(index) for index in range(count)]
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        rows["gpu"] = ", ".join(gpus) or f"none (torch is built {build})"
        rows["threads"] = str(torch.get_num_threads())
    rows["hub cache"] = hub_cache()
    return rows, all(works for _, works in states.values())


def package_state(name: str) -> tuple[str, bool]:
    """Return the version of a package, and whether it imports; one that is missing is no error."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed", True
    try:
        importlib.import_module(name)
    except Exception as error:  # of any kind, such as when versions do not fit
        return f"{version}, but it cannot be imported: {type(error).__name__}: {error}", False
    return version, True


def missing_of_extras() -> dict[str, list[str]]:
    """Return the packages that each extra lacks, by the distribution's own metadata."""
    needs = tract_transfer.packages_of_extras()

    def expand(extra: str, seen: tuple[str, ...] = ()) -> list[str]:
        """Return the packages of an extra and of the extras that it names."""
        packages = []
        for name in needs.get(extra, []):
            other = name.strip("[]")
            if other == name:
                packages.append(name)
            elif other not in seen:
                packages += expand(other, (*seen, extra))
        return packages

    def is_missing(package: str) -> bool:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return True
        return False

    return {extra: [p for p in dict.fromkeys(expand(extra)) if is_missing(p)] for extra in needs}


def hub_cache() -> str:
    """Return where downloads from the Hugging Face hub are kept, and whether it is offline."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return "huggingface_hub is not installed"
    folder = Path(constants.HF_HUB_CACHE)
    notes = ["" if folder.is_dir() else " (empty)"]
    notes += [" offline (HF_HUB_OFFLINE)"] if constants.HF_HUB_OFFLINE else []
    return f"{folder}{''.join(notes)}"


# A model and its data.


def config_of(arguments: argparse.Namespace) -> "Config":
    """Return the config of a training of --backbone on --data, with random weights and TrAct.

    For local images it is that of `tract-transfer train FOLDER`.
    """
    from tract_transfer.config.file import add_plugins, override, parse_words
    from tract_transfer.config.schema import check_config
    from tract_transfer.registry import load_plugins
    from tract_transfer.run.recipe import Options, config_for

    backbone, path = arguments.backbone, arguments.data
    load_plugins(arguments.plugins)
    if path.startswith((".", "/", "~")) or Path(path).exists():
        options = Options(backbone=backbone, weights="none", tract=True)
        config, _ = config_for(path, options, arguments.overrides, arguments.plugins)
        return config
    size_px = CIFAR_SIZE_PX if backbone.startswith("cifar/") else SIZE_PX
    tree = {
        "task": "classification",
        "output_dir": "output/doctor",  # nothing is written there
        "model": {"backbone": {"name": backbone}},
        "data": {
            "train": {"source": "huggingface", "path": path, "split": "train"},
            "val": {"source": "train", "fraction": 0.1},
            "transforms": {"size_px": size_px, "crop": "random_resized", "flip_prob": 0.5},
            "batch_size": 32,
            "num_workers": 0,
        },
        "tract": {"enabled": True},
        "solver": {"optimizer": "sgd", "lr": 0.1, "max_iters": 1},
    }
    origins = {"model.backbone.name": "--backbone", "data.train": "--data"}
    tree, origins = override(tree, origins, parse_words(arguments.overrides))
    return check_config(*add_plugins(tree, origins, arguments.plugins))


def diagnose(config: "TrainedTask", num_batches: int) -> tuple[str, "Report"]:
    """Run micro-batches of a training forward and backward; return what was run, and the report."""
    import torch

    from tract_transfer.build.data import build_data
    from tract_transfer.build.model import preflight
    from tract_transfer.build.trainer import build_accelerator, build_trainer
    from tract_transfer.engine.determinism import deterministic, seed_all

    preflight(config)
    with deterministic(config.engine.deterministic):
        data = build_data(config)
        # Without TrAct, which refuses a frozen layer. Here that is a finding.
        trainer = build_trainer(with_tract(config, enabled=False), data, build_accelerator(config))
        tract = watch_layers(with_tract(config, enabled=True), trainer.unwrapped)
        trainer.model.train()
        seed_all(config.seed, 0, 0)
        num_images = 0
        for batch in islice(trainer.batches(0), num_batches):
            batch = batch.to(trainer.accelerator.device)
            if not len(batch.images):
                continue
            num_images += len(batch.images)
            with trainer.autocast():
                loss = torch.stack(list(trainer.losses(batch).values())).sum() / num_batches
            if loss.requires_grad:
                trainer.scaler.scale(loss).backward()
        report = tract.report()
    name = config.model.backbone.name or config.model.weights
    heading = f"{name} on {num_images} training images of {data.train.name}"
    if not config.tract.enabled:
        heading += "\ntract.enabled is false in this config: this is what TrAct would do."
    return heading, report


def with_tract(config: "TrainedTask", *, enabled: bool) -> "TrainedTask":
    """Return a config with TrAct on or off."""
    tract = config.tract.model_copy(update={"enabled": enabled})
    return config.model_copy(update={"tract": tract})


def watch_layers(config: "TrainedTask", model: "nn.Module") -> "TrAct":
    """Return the TrAct of a training, on frozen layers too."""
    from tract_transfer.build.trainer import build_tract

    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        return build_tract(config, model)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def recommended(report: "Report") -> list[str]:
    """Return the overrides of a config that the report recommends."""
    if not any(layer.has_effect or "large_lam" in layer.findings for layer in report.values()):
        return ["tract.enabled=false"]
    # One lam serves all layers: that of the first whose scale is wrong.
    settings = [layer.recommended for layer in report.values()]
    present = [{"lam": layer.lam, "lam_mode": layer.lam_mode} for layer in report.values()]
    changed = [new for new, old in zip(settings, present, strict=True) if new != old]
    chosen: dict[str, Any] = (changed or settings)[0]
    return ["tract.enabled=true", *(f"tract.{key}={value}" for key, value in chosen.items())]


if __name__ == "__main__":
    sys.exit(main())
