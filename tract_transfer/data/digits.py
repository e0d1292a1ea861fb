"""The built-in data: scikit-learn's handwritten digits, alone and on photographs."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.findings import Findings
from tract_transfer.data.images import MAX_PIXELS, ImageSource
from tract_transfer.data.voc import load_voc

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_IMAGE_PX = 32
_SCENES_VERSION = 1


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ((N, 8, 8) uint8 ink in 0..16, (N,) labels): every fifth of each digit is test."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    bunch = load_sklearn_digits()
    rank = np.zeros(len(bunch.target), dtype=np.int64)
    for digit in range(10):
        members = np.flatnonzero(bunch.target == digit)
        rank[members] = np.arange(len(members))
    rows = np.flatnonzero((rank % 5 == 4) == (split == "test"))
    return bunch.images[rows].astype(np.uint8), bunch.target[rows].astype(np.int64)


def _enlarge(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w) ink in 0..16 smoothly to (height, width) uint8."""
    gray = Image.fromarray((ink.astype(np.float64) * 255 / 16).round().astype(np.uint8))
    return np.array(gray.resize((width, height), Image.Resampling.BICUBIC))


class _DigitImages(ImageSource):
    """Digits in memory: the stored bytes are the ink (8, 8), the image is enlarged."""

    def __init__(self, ink: np.ndarray, split: str) -> None:
        super().__init__()
        self._ink = ink
        self._images = np.stack([_enlarge(digit, _IMAGE_PX, _IMAGE_PX) for digit in ink])
        self._split = split

    def encoded(self, row: int) -> bytes:
        return bytes(self._ink[row])

    def image(self, row: int, exif: bool = True) -> Tensor:
        return torch.from_numpy(self._images[row]).repeat(3, 1, 1)

    def item(self, row: int) -> str:
        return f"digits split {self._split} row {row}"


def load_digits(
    split: str, classes: Sequence[int] | None = None, *, key: str = "data.train"
) -> ClassificationDataset:
    """Load 1,797 real digits of 8x8 pixels, smoothly enlarged to 32x32, as RGB.

    Args:
        split: `train` (1,442) or `test` (355: every fifth of each digit).
        classes: only these digits, with labels 0..K-1 in the given order; all ten by default.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}. Set {key}.split to train or test.")
    digits = list(range(10)) if classes is None else list(classes)
    if not digits or len(set(digits)) < len(digits) or not set(digits) <= set(range(10)):
        raise ValueError(f"{key}.classes must be different digits in 0..9, got {digits}.")
    ink, truth = _digits(split)
    rows = np.flatnonzero(np.isin(truth, digits))
    labels = np.array([digits.index(digit) for digit in truth[rows]], dtype=np.int64)
    names = [DIGIT_NAMES[digit] for digit in digits]
    return ClassificationDataset("digits", names, labels, _DigitImages(ink, split), rows)


def load_digit_scenes(
    split: str,
    root: str | Path | None = None,
    *,
    num_train: int = 200,
    num_test: int = 100,
    size_px: int = 128,
    key: str = "data.train",
    findings: Findings | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DetectionDataset:
    """Load digits on photographs: `write_digit_scenes` to `root`, by default in output/data."""
    default = f"output/data/digit_scenes_{num_train}_{num_test}_{size_px}"
    folder = write_digit_scenes(Path(root or default), 0, num_train, num_test, size_px)
    return load_voc(
        folder, [f"2007/{split}"], DIGIT_NAMES, key=key, findings=findings, max_pixels=max_pixels
    )


def write_digit_scenes(
    root: Path, seed: int = 0, num_train: int = 200, num_test: int = 100, size_px: int = 128
) -> Path:
    """Write a VOC devkit of digits on photographs, and return `root`.

    `root/VOC2007` contains square scenes with one to four digits of any color, 18 to 48 pixels high
    in a scene of 128 and in proportion in others, on crops of two photographs. Train and test
    scenes show digits of their own split. A digit that is largely covered or hardly visible is
    `difficult`. The files depend only on the arguments. A root written with the same arguments is
    reused, and one with other files refused; an interrupted call leaves no root.
    """
    counts = {"train": num_train, "test": num_test}
    parameters = {"digit_scenes": _SCENES_VERSION, "seed": seed}
    parameters |= {"num_train": num_train, "num_test": num_test, "size_px": size_px}
    if _already_written(root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as temporary:
        written = Path(temporary) / root.name
        _write_devkit(written / "VOC2007", seed, counts, size_px)
        (written / "digit_scenes.json").write_text(json.dumps(parameters) + "\n")
        try:
            written.rename(root)
        except OSError:  # another process was faster
            if not _already_written(root, parameters):
                raise
    return root


def _already_written(root: Path, parameters: dict[str, int]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    stamp = root / "digit_scenes.json"
    content = json.loads(stamp.read_text()) if stamp.is_file() else "other files"
    if content != parameters:
        raise ValueError(
            f"{root} must be empty or contain digit scenes of {parameters}, but contains "
            f"{content}. Remove it, or choose another folder."
        )
    return True


def _write_devkit(devkit: Path, seed: int, counts: dict[str, int], size_px: int) -> None:
    from sklearn.datasets import load_sample_image

    photographs = [Image.fromarray(load_sample_image(n)) for n in ("china.jpg", "flower.jpg")]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (devkit / folder).mkdir(parents=True)
    first = 1
    for number, (split, count) in enumerate(counts.items()):
        generator = np.random.default_rng([seed, number])
        ids = [f"{index:06d}" for index in range(first, first + count)]
        first += count
        for image_id in ids:
            scene, objects = _draw_scene(generator, photographs, split, size_px)
            scene.save(devkit / "JPEGImages" / f"{image_id}.jpg", quality=95)
            xml = _annotation(image_id, size_px, objects)
            (devkit / "Annotations" / f"{image_id}.xml").write_text(xml)
        listed = "".join(f"{image_id}\n" for image_id in ids)
        (devkit / "ImageSets/Main" / f"{split}.txt").write_text(listed)


def _draw_scene(
    generator: np.random.Generator, photographs: list[Image.Image], split: str, size_px: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Return a scene and its objects: name, box (x1, y1, x2, y2 exclusive), difficult."""
    photograph = photographs[generator.integers(len(photographs))]
    side = int(generator.integers(160, 400))
    left = int(generator.integers(photograph.width - side + 1))
    top = int(generator.integers(photograph.height - side + 1))
    crop = photograph.crop((left, top, left + side, top + side))
    canvas = np.array(crop.resize((size_px, size_px), Image.Resampling.BICUBIC), dtype=np.float64)

    ink, labels = _digits(split)
    masks: list[np.ndarray] = []
    objects: list[dict[str, Any]] = []
    num_objects = int(generator.integers(1, 5))
    max_covered = 0.55 if generator.random() < 0.06 else 0.08
    for _ in range(40):
        if len(objects) == num_objects:
            break
        row = int(generator.integers(len(labels)))
        mask = _random_mask(generator, ink[row], size_px)
        covered = [float((old * mask).sum() / old.sum()) for old in masks]
        if max(covered, default=0.0) > max_covered:
            continue
        for old, share in zip(objects, covered, strict=True):
            old["difficult"] |= share > 0.2
        faint = generator.random() < 0.04
        _paint(generator, canvas, mask, faint)
        masks.append(mask)
        name, (rows, columns) = DIGIT_NAMES[labels[row]], _extent(mask, 0.3)
        box = (columns.start, rows.start, columns.stop, rows.stop)
        objects.append({"name": name, "box": box, "difficult": faint})
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)), objects


def _random_mask(generator: np.random.Generator, ink: np.ndarray, size_px: int) -> np.ndarray:
    """Return the opacity (size_px, size_px) in [0, 1] of a digit at a random position and size."""
    tight = ink[_extent(ink, 0)]
    scale = size_px / 128
    height = round(float(generator.uniform(18, 48)) * scale)
    stretch = generator.uniform(0.85, 1.15) * tight.shape[1] / tight.shape[0]
    width = min(max(round(height * float(stretch)), 4), size_px)
    # A margin, so that the enlarged strokes fade out inside.
    soft = _enlarge(np.pad(tight, 1), height + height // 4, width + height // 4) / 255
    sharp = np.clip((soft - 0.33) / 0.3, 0, 1)
    sharp = sharp * sharp * (3 - 2 * sharp)
    sharp = sharp[_extent(sharp, 0.3)]
    height, width = sharp.shape
    top = int(generator.integers(size_px - height + 1))
    left = int(generator.integers(size_px - width + 1))
    mask = np.zeros((size_px, size_px))
    mask[top : top + height, left : left + width] = sharp
    return mask


def _paint(
    generator: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, faint: bool
) -> None:
    """Blend in a color that differs in luminance from what it covers."""
    to_gray = np.array([0.299, 0.587, 0.114])
    background = float((canvas @ to_gray * mask).sum() / mask.sum())
    contrast = generator.uniform(14, 22) if faint else generator.uniform(70, 150)
    brighter = background < 90 or (background < 165 and generator.random() < 0.5)
    luminance = background + contrast if brighter else background - contrast
    color = generator.uniform(0, 255, size=3)
    for _ in range(2):  # the second time for what was clipped
        color = (color + luminance - color @ to_gray).clip(0, 255)
    canvas += mask[..., None] * (color - canvas)


def _extent(mask: np.ndarray, threshold: float) -> tuple[slice, slice]:
    """Return the rows and columns of the values above a threshold."""
    rows, columns = (np.flatnonzero((mask > threshold).any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _annotation(image_id: str, size_px: int, objects: list[dict[str, Any]]) -> str:
    """Return VOC's XML, with 1-based, inclusive boxes."""
    lines = [f"<annotation><folder>VOC2007</folder><filename>{image_id}.jpg</filename>"]
    lines.append(f"<size><width>{size_px}</width><height>{size_px}</height><depth>3</depth></size>")
    for drawn in objects:
        x1, y1, x2, y2 = drawn["box"]
        lines.append(
            f"<object><name>{drawn['name']}</name>"
            f"<difficult>{int(drawn['difficult'])}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    return "\n".join(lines) + "\n</annotation>\n"
