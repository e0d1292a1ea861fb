"""Print what a model costs: parameters and FLOPs by block, the first layer, strides, memory.

tract-transfer analyze --config-file detection/r18_fpn_voc07
tract-transfer analyze --backbone timm/resnet50 --size-px 224 --depth 2
tract-transfer analyze --weights r50.pth --backbone timm/resnet50

The first two need no data and no weights: random weights cost the same. The third lists which
weights of a file match by name; its exit code is 1 if a training would refuse them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import (
    CONFIG_HELP,
    add_overrides,
    add_plugins,
    make_parser,
    number,
    read_config,
    reports_errors,
)

if TYPE_CHECKING:
    from torch import nn

    from tract_transfer.models import Backbone

NUM_IMAGES = 2  # of a training step: batch normalization refuses one


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config-file", metavar="FILE", help=CONFIG_HELP)
    which.add_argument("--backbone", metavar="NAME", help="such as timm/resnet50")
    weights = "compare these weights instead: a run folder, or any file with one of the above"
    parser.add_argument("--weights", metavar="FILE", help=weights)
    stems = ["default", "cifar", "patch_norm", "dual_patch_norm", "whitened"]
    parser.add_argument("--stem", choices=stems, default="default")
    parser.add_argument("--args", type=json.loads, default={}, metavar="JSON", help="of --backbone")
    count = number(int, 1)
    parser.add_argument("--size-px", type=count, metavar="N", help="default: the config's, or 224")
    parser.add_argument("--num-classes", type=count, default=20, metavar="K", help="default 20")
    parser.add_argument("--depth", type=count, default=1, help="levels of modules (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_plugins(parser)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if not (arguments.config_file or arguments.backbone or arguments.weights):
        parser.error("one of --config-file, --backbone and --weights is required.")
    if not arguments.backbone and (arguments.stem != "default" or arguments.args):
        parser.error("--stem and --args go with --backbone: a config and a run folder have theirs.")
    if arguments.overrides and not arguments.config_file:
        parser.error(f"{arguments.overrides} override a config: give --config-file.")
    return arguments


@reports_errors
def main() -> int:
    """Analyze the model that the command line names, or its weights; return the exit code."""
    arguments = parse()
    if arguments.weights is not None:
        return compare_weights(arguments)
    from tract_transfer.build.model import build_model

    model: nn.Module
    if arguments.backbone is not None:
        model = backbone = build_named(arguments)
        size_px = backbone.image_size_px or 224
    else:
        config = read_config(arguments)
        if config.model.backbone.name is not None:
            without_weights = config.model.model_copy(update={"weights": None})
            config = config.model_copy(update={"model": without_weights})
        section: Any = config.data.transforms
        size_px = max(section.short_sides_px) if config.task == "detection" else section.size_px
        model = build_model(config, arguments.num_classes)
    costs = analyze(model, arguments.size_px or size_px, arguments.depth)
    print(json.dumps(costs, indent=1) if arguments.json else "\n".join(lines_of(costs)))
    return 0


def build_named(arguments: argparse.Namespace) -> "Backbone":
    """Return the backbone of --backbone, --stem and --args with random weights."""
    from tract_transfer.models import build_backbone
    from tract_transfer.registry import load_plugins

    load_plugins(arguments.plugins)
    try:
        return build_backbone(arguments.backbone, stem=arguments.stem, args=arguments.args)
    except KeyError as error:
        raise ValueError(f"--backbone: {error.args[0]}") from error


def compare_weights(arguments: argparse.Namespace) -> int:
    """Print which of --weights match the model; return 0 if the whole model has weights, else 1."""
    from tract_transfer.models.weights import WeightsError

    refusal = None
    try:
        report = load_weights(arguments).loaded
    except ValueError as error:
        reason = error if isinstance(error, WeightsError) else error.__cause__
        if not isinstance(reason, WeightsError):
            raise  # there was nothing to compare
        report, refusal = reason.report, error
        print(f"refused: {refusal}", file=sys.stderr)
    if report is not None and arguments.json:
        print(json.dumps(report.summary(), indent=1))
    elif report is not None:
        print("\n".join(report.lines()))
    return 0 if refusal is None else 1


def load_weights(arguments: argparse.Namespace) -> "Backbone":
    """Return the backbone with --weights loaded, as the config says if there is one."""
    from tract_transfer.build.weights import build_with_weights, check_weights_exist
    from tract_transfer.models import weights

    path = Path(arguments.weights)
    check_weights_exist(path)
    if arguments.config_file is not None:
        word = f"model.weights={json.dumps(arguments.weights)}"
        return build_with_weights(read_config(arguments, word))
    if arguments.backbone is not None:
        backbone = build_named(arguments)
    else:
        backbone = weights.build_from_metadata(weights.read_metadata(path), arguments.plugins)
    weights.load_weights(backbone, path)
    return backbone


def analyze(model: "nn.Module", size_px: int, depth: int) -> dict[str, Any]:
    """Measure a backbone, a classifier or a detector on noise; return plain values."""
    import torch

    from tract_transfer.engine.cost import measure_blocks, measure_first_layers, saved_bytes
    from tract_transfer.models import Backbone, Classifier

    torch.manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, size_px, size_px), dtype=torch.uint8)
    backbone = model if isinstance(model, Backbone) else model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    if isinstance(model, Backbone):
        run, train = (lambda: model.pooled(images[:1])), (lambda: model.pooled(images))
    elif isinstance(model, Classifier):
        classes = torch.zeros(NUM_IMAGES, dtype=torch.long)
        run, train = (lambda: model(images[:1])), (lambda: model(images, classes))
    else:
        target = {
            "boxes": torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size_px,
            "labels": torch.zeros(1, dtype=torch.long),
            **dict.fromkeys(("difficult", "crowd"), torch.zeros(1, dtype=torch.bool)),
            "area": torch.tensor([size_px**2 / 4]),
        }
        run, train = (lambda: model([images[0]])), (lambda: model([*images], [target, target]))
    blocks = measure_blocks(model, run, depth)
    # At the size of training: a detector resizes its test images.
    layers = measure_first_layers(
        backbone, backbone.first_layers, lambda: backbone.pooled(images), NUM_IMAGES
    )
    parameters = [*model.parameters()]
    return {
        "size_px": size_px,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "flops": sum(block.flops for block in blocks),
        "flops_short_side_px": getattr(model, "short_side_px", size_px),
        "activation_bytes": saved_bytes(model, train) // NUM_IMAGES,
        "blocks": [block._asdict() for block in blocks],
        "first_layers": [layer._asdict() for layer in layers],
        "maps": {name: info._asdict() for name, info in backbone.map_info.items()},
    }


def lines_of(costs: dict[str, Any]) -> list[str]:
    """Return the measurements as lines of text."""
    rows = [block for block in costs["blocks"] if block["parameters"] or block["flops"]]
    width = max(len(block["name"]) for block in costs["blocks"])
    lines = [f"{'block':<{width}}  {'kind':<24} {'parameters':>12} {'GFLOPs':>9}"]
    for row in [*rows, {"name": "all", "kind": "", **costs}]:
        name, gflops = f"{row['name']:<{width}}  {row['kind']:<24}", row["flops"] / 1e9
        lines.append(f"{name} {row['parameters']:>12,} {gflops:>9.3f}")
    lines.append("")
    for layer in costs["first_layers"]:
        lines += [
            f"first layer   {layer['name']} ({layer['kind']}): {layer['outputs']} outputs, "
            f"{layer['rows']:,} rows an image of n = {layer['inputs']} inputs",
            "TrAct         inverts an n x n matrix at every step",
        ]
    maps = [f"{n} {m['channels']} / {m['stride']}" for n, m in costs["maps"].items()]
    side = f"{costs['size_px']} x {costs['size_px']}"
    return [
        *lines,
        f"feature maps  {', '.join(maps)} (channels / stride)",
        f"trained       {costs['trained_parameters']:,} parameters",
        f"activations   {costs['activation_bytes'] / 2**20:.1f} MiB an image of {side} in training",
        f"FLOPs         of a square image of {costs['flops_short_side_px']} px in evaluation, a "
        "multiply-add counted as two",
    ]
