"""Inspect the data of a config: `check` lists what is broken, `visualize` draws training images."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tract_transfer.cli.folder import checked_config, take_folder
from tract_transfer.cli.main import add_config, make_parser, number, read_config, reports_errors

if TYPE_CHECKING:
    from torch import Tensor

    from tract_transfer.build.data import Dataset
    from tract_transfer.config.schema import Config
    from tract_transfer.data.loader import Batch
    from tract_transfer.run.check_data import DataReport

CHECK = """\
Check the data of a config: open every image, read every annotation, list everything broken.

tract-transfer check-data ./my_images
tract-transfer check-data --config-file detection/r18_fpn_voc07
tract-transfer check-data --config-file X.yaml data.train.path=./my_images --json report.json

The exit code is 0 if nothing is broken, 1 if something is, and 2 if command line, config or --json
must be changed first.
"""
VISUALIZE = """\
Draw what a model sees in training: images after the transforms, with classes or boxes.

tract-transfer visualize --config-file quickstart/detect
tract-transfer visualize --config-file X.yaml --start-iter 500 --num-images 36 seed=1

The images are those of the training's own batches from iteration --start-iter on, in their order.
Difficult objects are dashed. The images of a probe are those of its training split.
"""
MAX_SHOWN = 50
PX_PER_INCH = 150


@reports_errors
def check() -> int:
    """Check the data and print the problems; return the exit code."""
    parser = make_parser(CHECK)
    add_config(parser, is_required=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report")
    arguments = parser.parse_intermixed_args()
    folder = take_folder(parser, arguments)
    if folder is None:
        config = read_config(arguments)
    else:
        config, recipe = checked_config(folder, arguments.overrides, arguments.plugins)
        print(recipe.choices[0].why)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {arguments.json}: the folder does not exist. Create it.")
    from tract_transfer.run.check_data import check_data

    report = check_data(config, show_progress)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"is_clean": report.is_clean, **asdict(report)}, indent=1) + "\n"
        )
    print("\n".join(lines_of(report)))
    return 0 if report.is_clean else 1


def show_progress(indices: Iterable[int], name: str) -> Iterable[int]:
    """Draw a progress bar if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    disable = not console.is_terminal
    return track(indices, description=name, console=console, disable=disable, transient=True)


def lines_of(report: "DataReport") -> list[str]:
    """Return the report as lines of text."""
    lines = []
    for name, split in report.splits.items():
        lines.append(f"{name}  ({split.name})")
        statistics = dict(split.statistics or {})
        classes = statistics.pop("classes", {})
        rows = {**statistics, **({"classes": len(classes)} if classes else {}), **classes}
        for what, value in rows.items():
            if isinstance(value, dict):  # counts, or a spread
                value = ", ".join(f"{key} {number:g}" for key, number in value.items())
            lines.append(f"  {what:>22}  {'none' if value is None else value}")
        lines += titled(f"broken in {name}", split.problems)
    lines += titled("broken between the splits", report.problems)
    lines += titled("worth a look", report.warnings)
    count = sum(len(split.problems) for split in report.splits.values()) + len(report.problems)
    return [*lines, f"{count} problems, {len(report.warnings)} warnings"]


def titled(title: str, lines: Sequence[str]) -> list[str]:
    """Return the first MAX_SHOWN lines below a title."""
    if not lines:
        return []
    more = len(lines) - MAX_SHOWN
    rest = [f"  ... and {more} more: see --json FILE"] if more > 0 else []
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:MAX_SHOWN]), *rest]


@reports_errors
def visualize() -> int:
    """Draw the images; return the exit code."""
    parser = make_parser(VISUALIZE)
    add_config(parser)
    count, start = number(int, 1), number(int, 0)
    parser.add_argument("--num-images", type=count, default=16, metavar="N", help="default 16")
    parser.add_argument("--start-iter", type=start, default=0, metavar="I", help="default 0")
    parser.add_argument("--output", type=Path, default=Path("data.png"), metavar="FILE")
    arguments = parser.parse_intermixed_args()
    words = ["data.num_workers=0"]
    if read_config(arguments).data.cache == "ram":
        words.append("data.cache=none")
    config = read_config(arguments, *words)
    from tract_transfer.build.data import build_data
    from tract_transfer.visualize.boxes import draw_samples
    from tract_transfer.visualize.plots import figure_pixels, save_pixels

    train = build_data(config).train
    drawn = islice(samples(config, train, arguments.start_iter), arguments.num_images)
    figure = draw_samples(*zip(*drawn, strict=True))
    width_px = round(PX_PER_INCH * figure.get_figwidth())
    save_pixels(figure_pixels(figure, width_px), arguments.output)
    print(arguments.output)
    return 0


def samples(
    config: "Config", train: "Dataset", start_iter: int
) -> Iterator[tuple["Tensor", str, list[tuple[list[float], str, bool]]]]:
    """Yield images as the training gets them, each with its caption and its boxes.

    A box is its corners, the name of its class and whether it is difficult.
    """
    from tract_transfer.build.batches import build_eval_loader, build_train_batches

    batches: Iterable[Batch]
    if config.task == "probe":
        batches = build_eval_loader(config, train)
    else:
        batches = build_train_batches(config, train)(start_iter)
    for batch in batches:
        for image, target, index in zip(batch.images, batch.targets, batch.indices, strict=True):
            size = f"{image.shape[2]} x {image.shape[1]}"
            if isinstance(target, dict):
                names = [train.class_names[label] for label in target["labels"].tolist()]
                boxes, difficult = target["boxes"].tolist(), target["difficult"].tolist()
                yield image, f"image {index}: {size}", [*zip(boxes, names, difficult, strict=True)]
            else:
                labels = (target == 1).nonzero().flatten() if target.ndim else [target]
                classes = ", ".join(train.class_names[int(label)] for label in labels)
                yield image, f"image {index}: {classes or 'none'}, {size}", []
