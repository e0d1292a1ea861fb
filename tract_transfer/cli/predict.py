"""Apply a trained model to images and videos: boxes drawn, or the most likely classes.

tract-transfer predict --run output/quickstart/detect photo.jpg holidays/ clip.mp4
tract-transfer predict --run output/samples/flowers102 photo.jpg --top-k 3

Writes predictions.json into --output and, for a detector, every image with its boxes as PNG, every
video as MP4. Videos need PyAV: pip install 'tract_transfer[video]'.
"""

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tract_transfer.cli.main import add_plugins, make_parser, number, print_error, reports_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tract_transfer.run.trained import Classification, Detections, Trained

MIN_WIDTH_PX = 480  # smaller images are enlarged, so that their labels can be read


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder")
    which.add_argument("--config-file", metavar="FILE", help="YAML whose output_dir is the run")
    parser.add_argument("inputs", nargs="+", type=Path, help="images, folders of images, videos")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions")
    parser.add_argument(
        "--min-score", type=number(float, 0, 1), help="of drawn boxes (default 0.5)"
    )
    parser.add_argument("--top-k", type=number(int, 1), help="number of classes (default 5)")
    add_plugins(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args()


class Frame(NamedTuple):
    """An image, or a frame of a video, with its file; `image` is kept if it is drawn."""

    file: Path
    at: int | None  # index of a video's frame; a tuple has its own `index`
    height: int
    width: int
    image: "Tensor | None"

    def entry(self, prediction: "Classification | Detections") -> dict[str, Any]:
        """Return the frame's entry of predictions.json."""
        boxes = getattr(prediction, "boxes_xyxy", None)
        return {
            "file": str(self.file),
            **({} if self.at is None else {"frame": self.at}),
            "height": self.height,
            "width": self.width,
            **({} if boxes is None else {"boxes": boxes.tolist()}),
            "scores": prediction.scores.tolist(),
            "labels": prediction.labels,
        }


Show = Callable[[Path, Iterable[tuple[Frame, Any]], list[dict[str, Any]]], None]


@reports_errors
def main() -> int:
    """Predict every input; return the exit code, 1 if one could not be read."""
    arguments = parse()
    from tract_transfer.config.schema import load_config

    run, plugins = arguments.run, arguments.plugins
    if run is None:  # the user's own config, which names its plug-ins
        config = load_config(arguments.config_file, plugins=plugins)
        run, plugins = Path(config.output_dir), config.plugins
    path = arguments.output / "predictions.json"
    if path.exists() and not arguments.overwrite:
        raise FileExistsError(f"{path} exists: set another --output, or --overwrite.")
    names = dict(pair for given in arguments.inputs for pair in files_of(given))
    from tract_transfer.run.trained import load

    model = load(run, device=arguments.device, plugins=plugins)
    predict, show = by_task(model, arguments, names)
    arguments.output.mkdir(parents=True, exist_ok=True)
    errors: list[Exception] = []
    entries: list[dict[str, Any]] = []
    images = read(names, model.config.data.max_pixels, errors)
    pairs_of_all = predicted(images, predict, keep_images=show is not print_classes)
    for file, pairs in groupby(pairs_of_all, key=lambda pair: pair[0].file):
        try:
            show(file, pairs, entries)
        except (ValueError, OSError, ImportError) as error:  # noqa: PERF203 - once a file
            errors.append(error)
            print_error(error)
    about = {"run": str(run), "checkpoint": model.checkpoint.name}
    path.write_text(json.dumps({**about, "predictions": entries}, indent=1) + "\n")
    print(path)
    return 1 if errors else 0


def by_task(
    model: "Trained[Any]", arguments: argparse.Namespace, names: dict[Path, Path]
) -> tuple[Callable[..., Iterator[Any]], Show]:
    """Return what predicts images, and what shows the predictions of a file."""
    from tract_transfer.run.trained import TrainedClassifier, TrainedDetector

    if isinstance(model, TrainedClassifier):
        if arguments.min_score is not None:
            raise ValueError(
                "--min-score is for detectors, and the run is a classifier's: --top-k."
            )
        return partial(model.stream, top_k=arguments.top_k or 5), print_classes
    assert isinstance(model, TrainedDetector)
    if arguments.top_k is not None:
        fix = "Set --min-score"
        raise ValueError(f"--top-k is for classifiers, and the run is a detector's. {fix}.")
    min_score = 0.5 if arguments.min_score is None else arguments.min_score
    return model.stream, partial(draw, drawings_of(names, arguments.output), min_score)


def files_of(given: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files of an input, each with its path below --output."""
    from PIL import Image

    if given.is_file():
        yield given, Path(given.name)
        return
    if not given.is_dir():
        raise FileNotFoundError(f"{given} is neither a file nor a folder.")
    suffixes = Image.registered_extensions()
    files = [f for f in sorted(given.rglob("*")) if f.suffix.lower() in suffixes or is_video(f)]
    if not files:
        raise FileNotFoundError(f"{given} contains no image and no video.")
    for file in files:
        yield file, given.resolve().name / file.relative_to(given)


def drawings_of(names: dict[Path, Path], folder: Path) -> dict[Path, Path]:
    """Return the drawing of each file; refuse two files with one drawing."""
    files: dict[Path, Path] = {}
    for file, name in names.items():
        drawing = folder / f"{name}{'.mp4' if is_video(file) else '.png'}"
        if (other := files.setdefault(drawing, file)) != file:
            raise ValueError(
                f"{other} and {file} would both be drawn to {drawing}. Predict them one by one, or "
                "give a folder that contains both."
            )
    return {file: drawing for drawing, file in files.items()}


def read(
    files: Iterable[Path], max_pixels: int, errors: list[Exception]
) -> Iterator[tuple[Path, int | None, "Tensor"]]:
    """Yield file, index and image of every image (no index) and every frame of every video.

    Errors of a file are printed and collected.
    """
    from tract_transfer.data.images import UndecodableImage, decode_image, read_video

    for file in files:
        try:
            if is_video(file):
                for index, image in enumerate(read_video(file, max_pixels)):
                    yield file, index, image
            else:
                yield file, None, decode_image(file, str(file), max_pixels=max_pixels)
        except (ValueError, OSError, ImportError) as error:  # noqa: PERF203 - once a file
            if isinstance(error, UndecodableImage):  # the config's policy is for training data
                error = ValueError(f"{error.item} cannot be decoded: {error.reason}.")
            errors.append(error)
            print_error(error)


def predicted(
    images: Iterator[tuple[Path, int | None, "Tensor"]],
    predict: Callable[..., Iterator[Any]],
    *,
    keep_images: bool,
) -> Iterator[tuple[Frame, Any]]:
    """Yield every frame with its prediction; predictions are made a batch at a time."""
    waiting: deque[Frame] = deque()

    def given(first: tuple[Path, int | None, "Tensor"]) -> Iterator["Tensor"]:
        for file, index, image in chain([first], images):
            size = image.shape[1], image.shape[2]
            waiting.append(Frame(file, index, *size, image if keep_images else None))
            yield image

    if (first := next(images, None)) is not None:
        for prediction in predict(given(first)):
            yield waiting.popleft(), prediction


def print_classes(
    file: Path, pairs: Iterable[tuple[Frame, Any]], entries: list[dict[str, Any]]
) -> None:
    """Print the classes of an image, or of every frame of a video; append them to `entries`."""
    for frame, prediction in pairs:
        entries.append(frame.entry(prediction))
        classes = zip(prediction.labels, prediction.scores.tolist(), strict=True)
        where = str(file) if frame.at is None else f"{file} {frame.at}"
        print(where, ", ".join(f"{label} {score:.3f}" for label, score in classes), sep="  ")


def draw(
    drawings: dict[Path, Path],
    min_score: float,
    file: Path,
    pairs: Iterable[tuple[Frame, Any]],
    entries: list[dict[str, Any]],
) -> None:
    """Draw the boxes of an image, or of every frame of a video; append them to `entries`."""
    from tract_transfer.data.images import frame_rate, write_video
    from tract_transfer.visualize.boxes import draw_detections
    from tract_transfer.visualize.plots import figure_pixels, save_pixels

    scores: list[float] = []

    def pictures() -> Iterator["np.ndarray"]:
        for frame, prediction in pairs:
            entry = frame.entry(prediction)
            entries.append(entry)
            scores.extend(entry["scores"])
            kept = [i for i, score in enumerate(entry["scores"]) if score >= min_score]
            columns = ([entry[key][i] for i in kept] for key in ("boxes", "labels", "scores"))
            assert frame.image is not None
            width_px = max(frame.width, MIN_WIDTH_PX)
            yield figure_pixels(draw_detections(frame.image, *columns), width_px)

    drawings[file].parent.mkdir(parents=True, exist_ok=True)
    if is_video(file):
        write_video(drawings[file], pictures(), frame_rate(file))
    else:
        save_pixels(next(pictures()), drawings[file])
    drawn = f"{sum(score >= min_score for score in scores)} of {len(scores)} boxes"
    print(f"{file}  {drawn} score {min_score:g} or more, the best {max(scores, default=0.0):.3f}")


def is_video(file: Path) -> bool:
    """Whether a file's suffix is that of a video."""
    from tract_transfer.data.images import VIDEO_SUFFIXES

    return file.suffix.lower() in VIDEO_SUFFIXES
