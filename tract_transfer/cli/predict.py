"""Apply a trained model to images and videos: boxes drawn, or the most likely classes.

tract-transfer predict --run output/quickstart/detect photo.jpg holidays/ clip.mp4
tract-transfer predict --run output/samples/flowers102 photo.jpg --top-k 3

Writes predictions.json into --output and, for a detector, every image with its boxes as PNG, every
video as MP4. Videos need PyAV (pip install av).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import add_plugins, make_parser, number, print_error, reports_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tract_transfer.run.evaluate import Trained

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


@reports_errors
def main() -> int:
    """Predict every input; return the exit code, 1 if one could not be read."""
    arguments = parse()
    from tract_transfer.config.schema import load_config
    from tract_transfer.data.images import UndecodableImage

    run, plugins = arguments.run, arguments.plugins
    if run is None:  # the user's own config, which names its plug-ins
        config = load_config(arguments.config_file, plugins=plugins)
        run, plugins = Path(config.output_dir), config.plugins
    path = arguments.output / "predictions.json"
    if path.exists() and not arguments.overwrite:
        raise FileExistsError(f"{path} exists: set another --output, or --overwrite.")
    files = [pair for given in arguments.inputs for pair in files_of(given)]
    from tract_transfer.run.evaluate import load_trained

    trained = load_trained(run, [f"engine.device={arguments.device}"], plugins)
    if trained.detects and arguments.top_k is not None:
        raise ValueError("--top-k is for classifiers, and the run is a detector's. Leave it out.")
    if not trained.detects and arguments.min_score is not None:
        raise ValueError("--min-score is for detectors, and the run is a classifier's: --top-k.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    top_k = arguments.top_k or 5
    min_score = 0.5 if arguments.min_score is None else arguments.min_score
    entries, code = [], 0
    for file, name in files:
        try:
            entries += predict_file(trained, file, arguments.output / name, top_k, min_score)
        except (ValueError, OSError, ImportError) as error:  # noqa: PERF203 - once a file
            if isinstance(error, UndecodableImage):  # the config's policy is for training data
                error = ValueError(f"{error.item} cannot be decoded: {error.reason}.")
            print_error(error)
            code = 1
    about = {"run": str(run), "checkpoint": trained.checkpoint.name}
    path.write_text(json.dumps({**about, "predictions": entries}, indent=1) + "\n")
    print(path)
    return code


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
        yield file, given.name / file.relative_to(given)


def predict_file(
    trained: "Trained", file: Path, output: Path, top_k: int, min_score: float
) -> list[dict[str, Any]]:
    """Return the predictions of an image, or of every frame of a video; draw boxes to `output`."""
    from tract_transfer.data.images import frame_rate, write_video
    from tract_transfer.visualize.boxes import draw_detections
    from tract_transfer.visualize.plots import figure_pixels, save_pixels

    entries: list[dict[str, Any]] = []
    predictions = predict(trained, file, top_k)
    if not trained.detects:
        for _, entry in predictions:
            entries.append(entry)
            classes = zip(entry["labels"], entry["scores"], strict=True)
            where = f"{file} {entry['frame']}" if "frame" in entry else str(file)
            print(where, ", ".join(f"{label} {score:.3f}" for label, score in classes), sep="  ")
        return entries

    def pictures() -> Iterator["np.ndarray"]:
        for image, entry in predictions:
            entries.append(entry)
            kept = [i for i, score in enumerate(entry["scores"]) if score >= min_score]
            columns = ([entry[key][i] for i in kept] for key in ("boxes", "labels", "scores"))
            width_px = max(entry["width"], MIN_WIDTH_PX)
            yield figure_pixels(draw_detections(image, *columns), width_px)

    output.parent.mkdir(parents=True, exist_ok=True)
    if is_video(file):
        write_video(output.with_name(f"{output.name}.mp4"), pictures(), frame_rate(file))
    else:
        save_pixels(next(pictures()), output.with_name(f"{output.name}.png"))
    scores = [score for entry in entries for score in entry["scores"]]
    drawn = f"{sum(score >= min_score for score in scores)} of {len(scores)} boxes"
    print(f"{file}  {drawn} score {min_score:g} or more, the best {max(scores, default=0.0):.3f}")
    return entries


def predict(
    trained: "Trained", file: Path, top_k: int
) -> Iterator[tuple["Tensor", dict[str, Any]]]:
    """Yield an image, or every frame of a video, and the model's prediction."""
    from tract_transfer.data.images import decode_image, read_video

    limit = trained.config.data.max_pixels
    if is_video(file):
        frames = read_video(file, limit)
    else:
        frames = iter([decode_image(file, str(file), max_pixels=limit)])
    for index, image in enumerate(frames):
        (prediction,) = trained.predict([image])
        count = None if trained.detects else top_k
        entry: dict[str, Any] = {"file": str(file)}
        entry |= {"frame": index} if is_video(file) else {}
        entry |= {"height": image.shape[1], "width": image.shape[2]}
        entry |= {key: rows[:count].tolist() for key, rows in prediction.items()}
        entry["labels"] = [trained.class_names[label] for label in entry["labels"]]
        yield image, entry


def is_video(file: Path) -> bool:
    """Whether a file's suffix is that of a video."""
    from tract_transfer.data.images import VIDEO_SUFFIXES

    return file.suffix.lower() in VIDEO_SUFFIXES
