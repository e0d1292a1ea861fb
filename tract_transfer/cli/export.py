"""Export a finished classification run as a folder that timm, torchvision or others load.

python tools/export_model.py --run output/samples/flowers102 --output exported/flowers102
python tools/export_model.py --run output/samples/flowers102 --output exported/flowers102 --onnx

Writes model.safetensors, config.json or model.json, and README.md, a model card. Nothing is
uploaded without --push-to-hub.
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
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--onnx", action="store_true", help="model.onnx too, checked against torch's outputs"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="upload it as owner/name")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: not public")
    parser.add_argument(
        "--license", metavar="ID", help="what the card states, such as apache-2.0; else none"
    )
    arguments = parser.parse_args()
    if arguments.private and not arguments.push_to_hub:
        parser.error("--private goes with --push-to-hub.")
    return arguments


@reports_errors
def main() -> int:
    """Export, and upload where told; return the exit code."""
    arguments = parse()
    from tract_transfer.run.export import check_hub, export_run, push

    hub_id = arguments.push_to_hub
    if hub_id:
        check_hub(hub_id)
    made = export_run(
        arguments.run,
        arguments.output,
        onnx=arguments.onnx,
        hub_id=hub_id,
        license_id=arguments.license,
    )
    print(f"{arguments.output}: {made.library} {made.name}")
    if made.reason:
        print(f"It loads with tract_transfer alone: {made.reason}")
    if hub_id:
        print(push(arguments.output, hub_id, private=arguments.private))
    return 0


if __name__ == "__main__":
    sys.exit(main())
