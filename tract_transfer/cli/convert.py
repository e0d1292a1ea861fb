"""Convert a ResNet's weights to detectron2's names, or back.

python tools/convert_weights.py --to detectron2 output/pretrain/r50 r50.pkl
python tools/convert_weights.py --from detectron2 model_final.pth output/from_detectron2

The first also writes r50.yaml: the colours and the ResNet in detectron2's own keys. The second
reads such a YAML, or the config.yaml that detectron2 writes into every OUTPUT_DIR.
"""

import argparse
import sys
from pathlib import Path

from tract_transfer.cli.main import reports_errors


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=["detectron2"], help="IN is a run folder, OUT a file")
    direction.add_argument(
        "--from", choices=["detectron2"], dest="source", help="IN is a file, OUT a run folder"
    )
    parser.add_argument("input", metavar="IN", type=Path, help="run folder, or .pkl or .pth file")
    parser.add_argument("output", metavar="OUT", type=Path, help=".pkl or .pth file, or new folder")
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        type=Path,
        help="with --from: detectron2's config of the weights; without, the YAML beside them",
    )
    parser.add_argument(
        "--method",
        help="with --from: what trained the weights, as reports call it; without, what the file "
        "says, else vanilla",
    )
    arguments = parser.parse_args()
    if arguments.to and (arguments.config_file or arguments.method):
        parser.error("--config-file and --method go with --from: a run folder says what it is.")
    return arguments


@reports_errors
def main() -> int:
    """Convert what the command line names; return the exit code."""
    arguments = parse()
    convert = to_detectron2 if arguments.to else from_detectron2
    print("\n".join(convert(arguments)))
    return 0


def to_detectron2(arguments: argparse.Namespace) -> list[str]:
    """Write a run folder's backbone as detectron2 reads it; return the files."""
    from tract_transfer.models.weights import build_from_metadata, load_weights, read_metadata
    from tract_transfer.models.weights_detectron2 import save_detectron2

    card = read_metadata(arguments.input)
    backbone = build_from_metadata(card)
    load_weights(backbone, arguments.input)
    beside = save_detectron2(arguments.output, backbone, card)
    return [str(arguments.output), str(beside)]


def from_detectron2(arguments: argparse.Namespace) -> list[str]:
    """Write detectron2's ResNet as a run folder that model.weights takes; return what was done."""
    from tract_transfer.models.weights import has_metadata, save_backbone
    from tract_transfer.models.weights_detectron2 import load_detectron2

    if has_metadata(arguments.output):
        raise ValueError(f"{arguments.output} holds a backbone already. Name another folder.")
    backbone, card, aside = load_detectron2(arguments.input, arguments.config_file)
    card = {**card, "converted_from": str(arguments.input)}
    if arguments.method:
        card["method"] = arguments.method
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_backbone(arguments.output, backbone, card)
    left = f"left aside: {', '.join(aside[:4])}{' ...' if len(aside) > 4 else ''}"
    return [f"{arguments.output}: {backbone.origin['name']}", *([left] if aside else [])]


if __name__ == "__main__":
    sys.exit(main())
