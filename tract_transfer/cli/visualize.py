"""Draw what a model sees in training: images after the transforms, with classes or boxes.

python tools/visualize_data.py --config-file configs/quickstart/detect.yaml
python tools/visualize_data.py --config-file X.yaml --start-iter 500 --num-images 36 seed=1

The images are those of the training's own batches, from iteration --start-iter on, in their order.
Difficult objects are dashed. A probe's images are those of its training split.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import at_least, reports_errors

if TYPE_CHECKING:
    from torch import Tensor

    from tract_transfer.build.data import Dataset
    from tract_transfer.config.schema import Config
    from tract_transfer.data.loader import Batch

PX_PER_INCH = 150


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--num-images", type=at_least(1), default=16, metavar="N", help="default 16"
    )
    parser.add_argument("--start-iter", type=at_least(0), default=0, metavar="I", help="default 0")
    parser.add_argument("--output", type=Path, default=Path("data.png"), metavar="FILE")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or key value: over the file's keys"
    )
    arguments = parser.parse_intermixed_args(words)
    if arguments.num_images < 1 or arguments.start_iter < 0:
        parser.error("--num-images must be 1 or more, --start-iter 0 or more")
    return arguments


@reports_errors
def main() -> int:
    """Draw the images; return the exit code."""
    arguments = parse()
    from tract_transfer.config.schema import load_config

    quick = ["data.num_workers=0"]
    config = load_config(arguments.config_file, [*arguments.overrides, *quick])
    if config.data.cache == "ram":
        quick.append("data.cache=none")
        config = load_config(arguments.config_file, [*arguments.overrides, *quick])

    from tract_transfer.build.data import build_data
    from tract_transfer.visualize import draw_samples, figure_pixels, save_pixels

    train = build_data(config).train
    if config.task != "probe" and config.data.batch_size > len(train):
        # A training would have no batch, but its images can be seen.
        fits = [f"data.batch_size={len(train)}", "engine.accumulate=1"]
        config = load_config(arguments.config_file, [*arguments.overrides, *quick, *fits])
    seen = samples(config, train, arguments.start_iter)
    images, captions, targets = zip(*islice(seen, arguments.num_images), strict=True)
    figure = draw_samples(images, captions, targets)
    width_px = round(PX_PER_INCH * figure.get_figwidth())
    save_pixels(figure_pixels(figure, width_px), arguments.output)
    print(arguments.output)
    return 0


def samples(
    config: "Config", train: "Dataset", start_iter: int
) -> Iterator[tuple["Tensor", str, list[tuple[list[float], str, bool]]]]:
    """Yield images as the training gets them, each with its caption and its boxes."""
    from tract_transfer.build.batches import build_eval_loader, build_train_batches

    batches: Iterable[Batch]
    if config.task == "probe":
        batches = build_eval_loader(config, train, rank=0, world_size=1, pin_memory=False)
    else:
        make = build_train_batches(config, train, rank=0, world_size=1, pin_memory=False)
        batches = make(start_iter)
    for batch in batches:
        for image, target, index in zip(batch.images, batch.targets, batch.indices, strict=True):
            size = f"{image.shape[2]} x {image.shape[1]}"
            if isinstance(target, dict):
                yield image, f"image {index}: {size}", boxes_of(target, train.class_names)
            else:
                shown = (target == 1).nonzero().flatten() if target.ndim else [target]
                names = ", ".join(train.class_names[int(label)] for label in shown)
                yield image, f"image {index}: {names or 'none'}, {size}", []


def boxes_of(
    target: dict[str, Any], class_names: Sequence[str]
) -> list[tuple[list[float], str, bool]]:
    """Return an image's boxes, the names of their classes, and whether they are difficult."""
    names = [class_names[label] for label in target["labels"].tolist()]
    difficult = target["difficult"].tolist()
    return list(zip(target["boxes"].tolist(), names, difficult, strict=True))


if __name__ == "__main__":
    sys.exit(main())
