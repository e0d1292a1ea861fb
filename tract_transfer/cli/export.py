"""Write a run's model for other tools: `main` for timm or torchvision, `convert` for detectron2."""

from pathlib import Path

from tract_transfer.cli.main import add_plugins, make_parser, reports_errors

EXPORT = """\
Export a finished classification run as a folder that timm, torchvision or others load.

tract-transfer export --run output/samples/flowers102 --output exported/flowers102
tract-transfer export --run output/samples/flowers102 --output exported/flowers102 --onnx

Writes model.safetensors, config.json or model.json, and README.md, a model card. Nothing is
uploaded without --push-to-hub.
"""
CONVERT = """\
Convert a ResNet's weights to detectron2's names, or back.

tract-transfer convert --to detectron2 output/pretrain/r50 r50.pkl
tract-transfer convert --from detectron2 model_final.pth output/from_detectron2

The first also writes r50.yaml: normalization mean and std, and the ResNet in detectron2's own keys.
The second reads such a YAML, or the config.yaml that detectron2 writes into every OUTPUT_DIR.
"""


@reports_errors
def main() -> int:
    """Export a run, and upload it if asked; return the exit code."""
    parser = make_parser(EXPORT)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--onnx", action="store_true", help="also write a checked model.onnx")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload it as owner/name")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: not public")
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0")
    add_plugins(parser)
    arguments = parser.parse_args()
    hub_id = arguments.push_to_hub
    if arguments.private and not hub_id:
        parser.error("--private goes with --push-to-hub.")

    from tract_transfer.run.export import check_hub, export_run, push

    if hub_id:
        check_hub(hub_id)
    options = {
        "plugins": arguments.plugins,
        "onnx": arguments.onnx,
        "hub_id": hub_id,
        "license_id": arguments.license,
    }
    exported = export_run(arguments.run, arguments.output, **options)
    print(f"{arguments.output}: {exported.library} {exported.name}")
    if exported.reason:
        print(f"It loads with tract_transfer alone: {exported.reason}")
    if hub_id:
        print(push(arguments.output, hub_id, private=arguments.private))
    return 0


@reports_errors
def convert() -> int:
    """Convert weights to or from detectron2's names; return the exit code."""
    parser = make_parser(CONVERT)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=["detectron2"], help="IN is a run folder, OUT a file")
    text = "IN is a file, OUT a run folder"
    direction.add_argument("--from", choices=["detectron2"], dest="source", help=text)
    parser.add_argument("input", metavar="IN", type=Path, help="run folder, or .pkl or .pth file")
    parser.add_argument("output", metavar="OUT", type=Path, help=".pkl or .pth file, or new folder")
    text = "with --from: detectron2's config of the weights (default: the YAML beside them)"
    parser.add_argument("--config-file", metavar="YAML", type=Path, help=text)
    text = "with --from: the method that reports name (default: that of the file, or vanilla)"
    parser.add_argument("--method", help=text)
    add_plugins(parser)
    arguments = parser.parse_args()
    if arguments.to and (arguments.config_file or arguments.method):
        parser.error("--config-file and --method go with --from: a run folder has its own.")
    from tract_transfer.models import weights
    from tract_transfer.models.weights_detectron2 import load_detectron2, save_detectron2

    source, output = arguments.input, arguments.output
    if arguments.to:
        metadata = weights.read_metadata(source)
        backbone = weights.build_from_metadata(metadata, arguments.plugins)
        weights.load_weights(backbone, source)
        print(output, save_detectron2(output, backbone, metadata), sep="\n")
        return 0
    if weights.has_metadata(output):
        raise ValueError(f"{output} already contains a backbone. Name another folder.")
    backbone, metadata, unused = load_detectron2(source, arguments.config_file)
    metadata = {**metadata, "converted_from": str(source)}
    if arguments.method:
        metadata["method"] = arguments.method
    output.mkdir(parents=True, exist_ok=True)
    weights.save_backbone(output, backbone, metadata)
    print(f"{output}: {backbone.origin['name']}")
    if unused:
        print(f"not converted: {', '.join(unused[:4])}{' ...' if len(unused) > 4 else ''}")
    return 0
