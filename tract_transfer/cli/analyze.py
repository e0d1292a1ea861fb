"""Tell what a model costs: parameters and FLOPs by block, the first layer, strides, memory.

python tools/analyze_model.py --config-file configs/detection/r18_fpn_voc07.yaml
python tools/analyze_model.py --backbone timm/resnet50 --size-px 224 --depth 2
python tools/analyze_model.py --weights r50.pth --backbone timm/resnet50

The first two need no data and no weights: what is pre-trained costs the same at random. The third
tells what of a weights file fits, by name; it ends with 1 where a training would refuse them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import at_least, reports_errors

if TYPE_CHECKING:
    from torch import nn

    from tract_transfer.models import Backbone

MAX_MAPS = 8
NUM_IMAGES = 2  # of a training step: batch normalisation refuses one


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config-file", metavar="FILE", help="YAML, see configs/")
    which.add_argument("--backbone", metavar="NAME", help="such as timm/resnet50")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="compare these weights instead, a run folder alone or any file with one of the above",
    )
    stems = ["default", "cifar", "patch_norm", "dual_patch_norm", "whitened"]
    parser.add_argument("--stem", choices=stems, default="default")
    parser.add_argument("--args", default="{}", metavar="JSON", help="arguments of --backbone")
    parser.add_argument(
        "--size-px",
        type=at_least(1),
        metavar="N",
        help="side of the images (default: the config's, 224)",
    )
    parser.add_argument(
        "--num-classes", type=at_least(1), default=20, metavar="K", help="default 20"
    )
    parser.add_argument(
        "--depth", type=at_least(1), default=1, help="levels of parts to list (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or key value: over the file's keys"
    )
    arguments = parser.parse_intermixed_args(words)
    if not (arguments.config_file or arguments.backbone or arguments.weights):
        parser.error("one of --config-file, --backbone and --weights is needed.")
    if not arguments.backbone and (arguments.stem != "default" or arguments.args != "{}"):
        parser.error("--stem and --args go with --backbone: a config and a run folder have theirs.")
    if arguments.overrides and not arguments.config_file:
        parser.error(f"{arguments.overrides} are of a config: give --config-file.")
    return arguments


@reports_errors
def main() -> int:
    """Build the model the command line names, measure and print; return the exit code."""
    arguments = parse()
    if arguments.weights is not None:
        return compare(arguments)
    model, size_px = build(arguments)
    found = analyze(model, arguments.size_px or size_px, arguments.depth)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(lines_of(found)))
    return 0


def build(arguments: argparse.Namespace) -> tuple["nn.Module", int]:
    """Return the model, its weights at random, and the side of its images."""
    if arguments.backbone is not None:
        backbone = build_named(arguments)
        return backbone, backbone.image_size_px or 224

    from tract_transfer.build.model import build_model
    from tract_transfer.config.schema import load_config

    config = load_config(arguments.config_file, arguments.overrides)
    if config.model.backbone.name is not None:
        without = config.model.model_copy(update={"weights": None})
        config = config.model_copy(update={"model": without})
    transforms: Any = config.data.transforms
    size_px = transforms.size_px if config.task != "detection" else max(transforms.short_sides_px)
    return build_model(config, arguments.num_classes), size_px


def build_named(arguments: argparse.Namespace) -> "Backbone":
    """Return the backbone of --backbone, --stem and --args, its weights at random."""
    from tract_transfer.models import build_backbone

    try:
        own = json.loads(arguments.args)
    except ValueError as error:
        raise ValueError(f'--args must be JSON, such as {{"width": 8}}: {error}') from error
    try:
        return build_backbone(arguments.backbone, stem=arguments.stem, args=own)
    except KeyError as error:
        raise ValueError(f"--backbone: {error.args[0]}") from error


def compare(arguments: argparse.Namespace) -> int:
    """Print what of --weights fits the model; return 0 where all of the model is there, else 1."""
    from tract_transfer.models.weights import WeightsError

    refusal, report = None, None
    try:
        report = load(arguments).loaded
    except (FileNotFoundError, ValueError) as error:
        refusal = error
        known = error if isinstance(error, WeightsError) else error.__cause__
        if not isinstance(known, WeightsError):
            raise  # there was nothing to compare
        report = known.report
    if report is not None:
        as_json = arguments.json
        print(json.dumps(report.summary(), indent=1) if as_json else "\n".join(report.lines()))
    if refusal is not None:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    return 0


def load(arguments: argparse.Namespace) -> "Backbone":
    """Return the backbone with --weights loaded, by the config's rules where one is given."""
    from tract_transfer.build.weights import build_with_weights, check_weights_exist
    from tract_transfer.config.schema import load_config
    from tract_transfer.models.weights import build_from_metadata, load_weights, read_metadata

    path = Path(arguments.weights)
    if arguments.config_file is not None:
        words = [*arguments.overrides, f"model.weights={json.dumps(arguments.weights)}"]
        return build_with_weights(load_config(arguments.config_file, words))
    check_weights_exist(path)
    named = arguments.backbone is not None
    backbone = build_named(arguments) if named else build_from_metadata(read_metadata(path))
    load_weights(backbone, path)
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
        targets = torch.zeros(NUM_IMAGES, dtype=torch.long)
        run, train = (lambda: model(images[:1])), (lambda: model(images, targets))
    else:
        boxes = [box_in_the_middle(size_px) for _ in images]
        run, train = (lambda: model([images[0]])), (lambda: model([*images], boxes))
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


def box_in_the_middle(size_px: int) -> dict[str, Any]:
    """Return the target of an image that shows one object."""
    import torch

    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size_px
    flag = torch.zeros(1, dtype=torch.bool)
    area = torch.tensor([size_px**2 / 4])
    label = torch.zeros(1, dtype=torch.long)
    return {"boxes": box, "labels": label, "difficult": flag, "crowd": flag, "area": area}


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return the measurements as lines of text."""
    side = f"{found['size_px']} x {found['size_px']}"
    width = max(len(block["name"]) for block in found["blocks"])
    lines = [f"{'block':<{width}}  {'kind':<24} {'parameters':>12} {'GFLOPs':>9}"]
    lines += [
        f"{block['name']:<{width}}  {block['kind']:<24} {block['parameters']:>12,} "
        f"{block['flops'] / 1e9:>9.3f}"
        for block in found["blocks"]
        if block["parameters"] or block["flops"]
    ]
    total = f"{'all':<{width}}  {'':<24} {found['parameters']:>12,} {found['flops'] / 1e9:>9.3f}"
    lines += [total, ""]
    maps = [f"{n} {m['channels']} / {m['stride']}" for n, m in found["maps"].items()]
    if len(maps) > MAX_MAPS:  # a plain ViT's are all of one stride
        maps = [*maps[:2], f"{len(maps) - 3} more", maps[-1]]
    for layer in found["first_layers"]:
        lines.append(
            f"first layer   {layer['name']} ({layer['kind']}): {layer['outputs']} outputs, "
            f"{layer['rows']:,} rows an image of n = {layer['inputs']} inputs"
        )
        lines.append("TrAct         inverts an n x n matrix at every step")
    return [
        *lines,
        f"maps          {', '.join(maps)} (channels / stride)",
        f"trained       {found['trained_parameters']:,} parameters",
        f"activations   {found['activation_bytes'] / 2**20:.1f} MiB an image of {side} in training",
        f"FLOPs         of a square image of {found['flops_short_side_px']} px in evaluation, a "
        "multiply-add counted as two",
    ]


if __name__ == "__main__":
    sys.exit(main())
