"""Let a trained model answer for images and videos: boxes drawn, or the likeliest classes.

python tools/predict.py --run output/quickstart/detect photo.jpg holidays/ clip.mp4
python tools/predict.py --run output/samples/flowers102 photo.jpg --top-k 3

Writes predictions.json into --output, and, for a detector, every image with its boxes as PNG, every
video as MP4. Videos need PyAV (pip install av).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import at_least, fraction, reports_errors, tell
from tract_transfer.files import FAILED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tract_transfer.run.evaluate import Trained

MIN_WIDTH_PX = 480  # a smaller image is drawn enlarged, so that its labels can be read


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder")
    which.add_argument("--config-file", metavar="FILE", help="YAML, whose output_dir is the run's")
    parser.add_argument("inputs", nargs="+", type=Path, help="images, folders of images, videos")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what --output holds from before"
    )
    parser.add_argument(
        "--min-score", type=fraction, help="a detector's boxes to draw (default 0.5)"
    )
    parser.add_argument(
        "--top-k", type=at_least(1), help="a classifier's classes to write (default 5)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(words)


@reports_errors
def main() -> int:
    """Answer for every input; return the exit code: 1 if one could not be read."""
    arguments = parse()
    from tract_transfer.config.schema import load_config
    from tract_transfer.data.images import UndecodableImage

    run = arguments.run or Path(load_config(arguments.config_file).output_dir)
    path = arguments.output / "predictions.json"
    if path.exists() and not arguments.overwrite:
        raise FileExistsError(f"{path} exists: set another --output, or --overwrite.")
    files = [found for given in arguments.inputs for found in files_of(given)]
    from tract_transfer.run.evaluate import load_trained

    trained = load_trained(run, [f"engine.device={arguments.device}"])
    settle(arguments, detects=trained.detects)
    arguments.output.mkdir(parents=True, exist_ok=True)
    entries, failed = [], 0
    for file, name in files:
        try:
            entries += answer(trained, file, name, arguments)
        except (ValueError, OSError, ImportError) as error:  # noqa: PERF203 - once a file
            if isinstance(error, UndecodableImage):  # no config's policy is asked here
                error = ValueError(f"{error.item} cannot be decoded: {error.reason}.")
            tell(error)
            failed += 1
    about = {"run": str(run), "checkpoint": trained.checkpoint.name}
    path.write_text(json.dumps({**about, "predictions": entries}, indent=1) + "\n")
    print(path)
    return FAILED if failed else 0


def settle(arguments: argparse.Namespace, *, detects: bool) -> None:
    """Give options their defaults; refuse the one that this kind of model would ignore."""
    if detects and arguments.top_k is not None:
        raise ValueError("--top-k is for classifiers, and the run is a detector's. Leave it out.")
    if not detects and arguments.min_score is not None:
        raise ValueError("--min-score is for detectors, and the run is a classifier's: --top-k.")
    arguments.top_k = 5 if arguments.top_k is None else arguments.top_k
    arguments.min_score = 0.5 if arguments.min_score is None else arguments.min_score


def files_of(given: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files of an input, each with its name below --output.

    Raises:
        FileNotFoundError: there is no such file, or no image in the folder.
    """
    from PIL import Image

    if not given.is_dir():
        if not given.is_file():
            raise FileNotFoundError(f"{given} is neither a file nor a folder.")
        yield given, Path(given.name)
        return
    known = Image.registered_extensions()
    files = [f for f in sorted(given.rglob("*")) if f.suffix.lower() in known or is_video(f)]
    if not files:
        raise FileNotFoundError(f"{given} holds no image and no video.")
    for file in files:
        yield file, given.name / file.relative_to(given)


def answer(
    trained: "Trained", file: Path, name: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return what is found in an image, or in every frame of a video; draw it if it is boxes."""
    from tract_transfer.data.images import frame_rate, write_video
    from tract_transfer.visualize import save_pixels

    entries: list[dict[str, Any]] = []
    found = find(trained, file, arguments.top_k)
    if not trained.detects:
        for _, entry in found:
            entries.append(entry)
            best = zip(entry["labels"], entry["scores"], strict=True)
            where = f"{file} {entry['frame']}" if "frame" in entry else str(file)
            print(where, ", ".join(f"{label} {score:.3f}" for label, score in best), sep="  ")
        return entries

    def pictures() -> Iterator["np.ndarray"]:
        for image, entry in found:
            entries.append(entry)
            yield draw(image, entry, arguments.min_score)

    path = arguments.output / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_video(file):
        write_video(path.with_name(f"{name.name}.mp4"), pictures(), frame_rate(file))
    else:
        save_pixels(next(pictures()), path.with_name(f"{name.name}.png"))
    print(summary(file, entries, arguments.min_score))
    return entries


def summary(file: Path, entries: list[dict[str, Any]], min_score: float) -> str:
    """Say how many boxes of an image or a video are drawn, and how good the best one is."""
    scores = [score for entry in entries for score in entry["scores"]]
    drawn = sum(score >= min_score for score in scores)
    frames = f" in {len(entries)} frames" if is_video(file) else ""
    best = f", the best {max(scores):.3f}" if scores else ""
    return f"{file}  {drawn} of {len(scores)} boxes{frames} score {min_score:g} or more{best}"


def find(trained: "Trained", file: Path, top_k: int) -> Iterator[tuple["Tensor", dict[str, Any]]]:
    """Yield an image, or every frame of a video, and what the model finds in it."""
    from tract_transfer.data.images import decode_image, read_video

    limit = trained.config.data.max_pixels
    frames = (
        read_video(file, limit)
        if is_video(file)
        else iter([decode_image(file, str(file), max_pixels=limit)])
    )
    for number, image in enumerate(frames):
        (found,) = trained.predict([image])
        if not trained.detects:
            found = {key: rows[:top_k] for key, rows in found.items()}
        entry: dict[str, Any] = {"file": str(file)}
        entry |= {"frame": number} if is_video(file) else {}
        entry |= {"height": image.shape[1], "width": image.shape[2]}
        entry |= {key: rows.tolist() for key, rows in found.items()}
        entry["labels"] = [trained.class_names[label] for label in entry["labels"]]
        yield image, entry


def is_video(file: Path) -> bool:
    """Whether a file's name says it is a video."""
    from tract_transfer.data.images import VIDEO_SUFFIXES

    return file.suffix.lower() in VIDEO_SUFFIXES


def draw(image: "Tensor", entry: dict[str, Any], min_score: float) -> "np.ndarray":
    """Return an image with its boxes of `min_score` and above, (H, W, 3) uint8."""
    from tract_transfer.visualize import draw_detections, figure_pixels

    kept = [i for i, score in enumerate(entry["scores"]) if score >= min_score]
    columns = ([entry[key][i] for i in kept] for key in ("boxes", "labels", "scores"))
    return figure_pixels(draw_detections(image, *columns), max(entry["width"], MIN_WIDTH_PX))


if __name__ == "__main__":
    sys.exit(main())
