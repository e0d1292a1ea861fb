"""Training and evaluation transforms on uint8 RGB (3, H, W), from torchvision's v2.

All randomness comes from torch's global CPU generator, which the loader seeds for every sample.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

ImageTransform = Callable[[Tensor], Tensor]
DetectionTransform = Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def classification_train(
    size_px: int,
    crop: str,
    pad_px: int,
    scale: tuple[float, float],
    flip_prob: float,
    interpolation: str,
) -> ImageTransform:
    """Return the training transform, uint8 (3, H, W) -> uint8 (3, size_px, size_px).

    Args:
        size_px: side of the result.
        crop: `pad`: resize the short side to `size_px` (no change where it is), pad `pad_px` zeros
            on every side, crop at random; the CIFAR recipe. `random_resized`: crop a share of the
            area within `scale` and resize it; the ImageNet recipe. `none`: resize to the square.
        pad_px: used by `pad` alone.
        scale: used by `random_resized` alone.
        flip_prob: probability of a horizontal flip.
        interpolation: nearest, bilinear or bicubic; the latter two antialiased.
    """
    mode = _interpolation(interpolation)
    steps: list[v2.Transform]
    if crop == "pad":
        steps = [v2.Resize(size_px, mode), v2.RandomCrop(size_px, padding=pad_px)]
    elif crop == "random_resized":
        steps = [v2.RandomResizedCrop(size_px, scale=scale, interpolation=mode)]
    elif crop == "none":
        steps = [v2.Resize((size_px, size_px), mode)]
    else:
        raise ValueError(f"crop must be pad, random_resized or none, got {crop!r}.")
    pipeline: ImageTransform = v2.Compose([*steps, v2.RandomHorizontalFlip(flip_prob)])
    return pipeline


def classification_eval(size_px: int, crop_ratio: float, interpolation: str) -> ImageTransform:
    """Return the test transform, uint8 (3, H, W) -> uint8 (3, size_px, size_px).

    The short side is resized to round(size_px / crop_ratio), then the centre is cropped.
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio must lie in (0, 1], got {crop_ratio}.")
    resize = v2.Resize(round(size_px / crop_ratio), _interpolation(interpolation))
    pipeline: ImageTransform = v2.Compose([resize, v2.CenterCrop(size_px)])
    return pipeline


def _interpolation(name: str) -> InterpolationMode:
    if name not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {_INTERPOLATIONS}, got {name!r}.")
    return InterpolationMode(name)


class _DetectionTrain:
    """Random colours, short side and flip of an image and its boxes."""

    def __init__(
        self,
        short_sides_px: Sequence[int],
        max_side_px: int,
        flip_prob: float,
        photometric_prob: float,
    ) -> None:
        # First, as detectors mostly enlarge: fewer pixels to change.
        distort = [v2.RandomPhotometricDistort(p=photometric_prob)] if photometric_prob else []
        self._pipeline = v2.Compose(
            [
                *distort,
                v2.RandomShortestSize(list(short_sides_px), max_size=max_side_px),
                v2.RandomHorizontalFlip(flip_prob),
            ]
        )

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        size = (image.shape[-2], image.shape[-1])
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        image, boxes = self._pipeline(tv_tensors.Image(image), boxes)
        changed = {"boxes": boxes.as_subclass(Tensor), "scale": image.shape[-2] / size[0]}
        return image.as_subclass(Tensor), {**target, **changed}


def detection_train(
    short_sides_px: Sequence[int],
    max_side_px: int,
    flip_prob: float,
    photometric_prob: float = 0.0,
) -> DetectionTransform:
    """Return the training transform (image, target) -> (image, target).

    The short side becomes one of `short_sides_px`, drawn at random, or what keeps the long side
    within `max_side_px`; with probability `flip_prob` left and right are swapped. Boxes follow,
    whatever else the target holds stays, and `scale` is what the height was multiplied by.
    Brightness, contrast, saturation, hue and the order of the channels change with probability
    `photometric_prob` each (SSD's distortion has 0.5).
    """
    if not short_sides_px or min(short_sides_px) < 1 or max_side_px < max(short_sides_px):
        raise ValueError(
            f"short_sides_px must be positive and at most max_side_px, got {list(short_sides_px)} "
            f"and {max_side_px}."
        )
    return _DetectionTrain(short_sides_px, max_side_px, flip_prob, photometric_prob)


def detection_eval() -> DetectionTransform:
    """Return the identity: at test time the model resizes, and answers in original pixels."""
    return _identity


def _identity(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    return image, target
