"""Measure how TrAct's settings change the accuracy of short trainings, paired with plain training.

A half-width ResNet-18 trains on 4,000 CIFAR-10 images for three epochs, once per seed. Runs of a
seed share initial weights, order and augmentation. `--output` stores finished runs, and a later
call skips them.

    python benchmarks/tract_variants.py --data data/samples/cifar10 [--variants inputs layers]

The folder contains parquet files with columns img and label, such as those of uoft-cs/cifar10.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tract_transfer.build.batches import build_eval_loader
from tract_transfer.build.data import Data, build_data
from tract_transfer.build.model import build_evaluator
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ClassificationConfig, load_config
from tract_transfer.engine.hooks import evaluate
from tract_transfer.models import Backbone
from tract_transfer.report.statistics import paired_difference, summarize

CONFIG = Path(__file__).parent / "configs" / "samples" / "pretrain.yaml"
SCALES = {  # std for images in [0, 1]; the mean is 0
    "in [0, 1]": 1.0,
    "in [0, 255]": 1 / 255,
}
ON = ("tract.enabled=true",)
RELATIVE = (*ON, "tract.lam_mode=relative")
BLOCK = "backbone.model.conv1, backbone.model.layer1.0.conv1, backbone.model.layer1.0.conv2"
ADAM = ("solver.optimizer=adam", "solver.momentum=null", "solver.lr=0.001")
FIRST_BY_SGD = (*ADAM, "solver.first_layer={optimizer: sgd, lr: 0.08, momentum: 0.9}")


@dataclass(frozen=True)
class Variant:
    """A training: overrides of CONFIG, and the variant to compare it with."""

    name: str
    changes: tuple[str, ...] = ()
    against: str = "plain"
    inputs: str = "standardised"


def _of_inputs(inputs: str) -> list[Variant]:
    plain = f"plain, {inputs}"
    return [
        Variant(plain, (), plain, inputs),
        Variant(f"lam 0.1 absolute, {inputs}", ON, plain, inputs),
        Variant(f"lam 0.1 relative, {inputs}", RELATIVE, plain, inputs),
    ]


GROUPS = {
    "inputs": [
        Variant("plain"),
        Variant("lam 0.1 absolute", ON),
        Variant("lam 0.1 relative", RELATIVE),
        *(variant for inputs in SCALES for variant in _of_inputs(inputs)),
    ],
    "update_every": [
        Variant("plain"),
        Variant("lam 0.1 absolute", ON),
        Variant("update_every 4", (*ON, "tract.update_every=4")),
        Variant("update_every 16", (*ON, "tract.update_every=16")),
    ],
    "layers": [
        Variant("plain"),
        Variant("lam 0.1 absolute", ON),
        Variant("stem and first block", (*ON, f"tract.layers=[{BLOCK}]")),
    ],
    "optimizer": [
        Variant("Adam", ADAM, "Adam"),
        Variant("Adam + TrAct", (*ADAM, *ON), "Adam"),
        Variant("first layer SGD, rest Adam", FIRST_BY_SGD, "Adam"),
        Variant("first layer SGD + TrAct, rest Adam", (*FIRST_BY_SGD, *ON), "Adam"),
    ],
}


def make_config(variant: Variant, seed: int, arguments: argparse.Namespace) -> ClassificationConfig:
    """Load the config of one run."""
    config = load_config(
        CONFIG,
        [
            f"data.train.path={arguments.data}",
            f"data.train.split=train[:{arguments.images}]",
            f"data.test.path={arguments.data}",
            "data.num_workers=0",
            f"solver.max_epochs={arguments.epochs}",
            f"engine.precision={arguments.precision}",
            f"seed={seed}",
            *variant.changes,
        ],
    )
    assert isinstance(config, ClassificationConfig)
    return config


def accuracy(config: ClassificationConfig, data: Data, inputs: str) -> float:
    """Train, and return the accuracy on data.test in [0, 1]."""
    trainer = build_trainer(config, data, build_accelerator(config))
    backbone = trainer.evaluated_model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    if inputs in SCALES:
        backbone.set_normalization(mean=[0.0] * 3, std=[SCALES[inputs]] * 3)
    trainer.train()
    trainer.state_parts()  # raises errors that TrAct has deferred
    evaluator = build_evaluator(config, data.class_names)
    test = data.report[1]
    batches = build_eval_loader(config, test, rank=0, world_size=1, pin_memory=False)
    model, device = trainer.evaluated_model, trainer.accelerator.device
    evaluate(model, batches, evaluator, device=device, precision=trainer.precision)
    return float(evaluator.compute()["top1"])


class Results:
    """Accuracies of runs, stored in a JSON file if a path is given.

    The key of a run is its settings in this script; use a new file after changing other code.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.accuracies: dict[str, float] = {}

    def of(self, variant: Variant, seed: int, data: Data, arguments: argparse.Namespace) -> float:
        """Return the accuracy of a run, and train it if it is not stored."""
        settings = arguments.images, arguments.epochs, arguments.precision
        key = json.dumps([*settings, variant.inputs, variant.changes, seed])
        self.read()
        if key not in self.accuracies:
            top1 = accuracy(make_config(variant, seed, arguments), data, variant.inputs)
            print(f"seed {seed}  {top1:.4f}  {variant.name}", file=sys.stderr, flush=True)
            self.read()
            self.accuracies[key] = top1
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.accuracies, indent=1))
        return self.accuracies[key]

    def read(self) -> None:
        """Merge the file, which another process may have extended."""
        if self.path is not None and self.path.is_file():
            self.accuracies |= json.loads(self.path.read_text())


def row(variant: Variant, accuracies: dict[str, dict[int, float]]) -> str:
    """Format a table row: mean accuracy and paired difference, in %."""
    accuracy_by_seed = accuracies[variant.name]
    cells = [variant.name, f"{100 * summarize(list(accuracy_by_seed.values())).mean:.1f}"]
    if variant.name == variant.against:
        cells += ["", ""]
    else:
        difference = paired_difference(accuracy_by_seed, accuracies[variant.against])
        cells.append(f"{100 * difference.mean:+.1f}")
        has_interval = difference.low is not None and difference.high is not None
        cells.append(
            f"{100 * difference.low:+.1f} .. {100 * difference.high:+.1f}" if has_interval else ""
        )
    return "| " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/samples/cifar10", help="a folder of parquet")
    parser.add_argument("--variants", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--output", type=Path, help="JSON file that stores finished runs")
    parser.add_argument("--quick", action="store_true", help="two iterations and one seed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.epochs, arguments.seeds = 256, 1, 1
    if not Path(arguments.data).is_dir():
        parser.error(f"{arguments.data} is not a folder. Set --data to CIFAR-10 as parquet files.")
    return arguments


def main() -> None:
    """Train the selected groups and print a table for each."""
    arguments = parse_arguments()
    results = Results(arguments.output)
    data = build_data(make_config(Variant("plain"), 0, arguments))
    for group in arguments.variants:
        variants = GROUPS[group]
        accuracies: dict[str, dict[int, float]] = {variant.name: {} for variant in variants}
        for seed in range(arguments.seeds):
            for variant in variants:
                accuracies[variant.name][seed] = results.of(variant, seed, data, arguments)
        print(f"| {group} | accuracy, % | difference, % | 95 % interval |")
        print("| --- " * 4 + "|")
        for variant in variants:
            print(row(variant, accuracies))
        print(flush=True)


if __name__ == "__main__":
    main()
