"""Training and evaluation transforms on uint8 RGB (3, H, W), by torchvision's v2.

All random numbers are from torch's global CPU generator, which the loader seeds for every sample.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

ImageTransform = Callable[[Tensor], Tensor]
DetectionTransform = Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]

MEAN_COLOR = (124, 116, 104)  # of ImageNet, in 0..255


def classification_train(
    size_px: int,
    crop: str,
    pad_px: int,
    scale: tuple[float, float],
    flip_prob: float,
    interpolation: str,
    *,
    rotation_deg: float = 0.0,
    augment: ImageTransform | None = None,
    color_jitter: float = 0.0,
    erase_prob: float = 0.0,
) -> ImageTransform:
    """Return the training transform, uint8 (3, H, W) -> uint8 (3, size_px, size_px).

    The steps are, in this order: crop, flip, rotation, `augment`, color jitter, erasing.

    Args:
        crop: `pad`: resize the short side to `size_px`, pad `pad_px` zeros on every side, crop at
            random (the CIFAR recipe). `resize_random`: the same, padded by reflection (DeiT III's
            simple random crop). `random_resized`: crop a fraction of the area within `scale` and
            resize it (the ImageNet recipe). `none`: resize to the square.
        interpolation: nearest, bilinear or bicubic; the latter two antialiased.
        rotation_deg: the largest angle in either direction; corners are black, pixels the nearest.
        augment: a policy of `AUGMENTATIONS`.
        color_jitter: brightness, contrast and saturation are each scaled by 1 - this to 1 + this.
        erase_prob: probability of filling a rectangle of 2 to 33 % of the area with ImageNet's mean
            color (Zhong et al. 2020).
    """
    mode = InterpolationMode(interpolation)
    crops: dict[str, list[Any]] = {
        "pad": [v2.Resize(size_px, mode), v2.RandomCrop(size_px, padding=pad_px)],
        "resize_random": [
            v2.Resize(size_px, mode),
            v2.RandomCrop(size_px, padding=pad_px, padding_mode="reflect"),
        ],
        "random_resized": [v2.RandomResizedCrop(size_px, scale=scale, interpolation=mode)],
        "none": [v2.Resize((size_px, size_px), mode)],
    }
    steps = [*crops[crop], v2.RandomHorizontalFlip(flip_prob)]
    if rotation_deg:
        steps.append(v2.RandomRotation(rotation_deg))
    if augment is not None:
        steps.append(augment)
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if erase_prob:
        steps.append(v2.RandomErasing(erase_prob, value=MEAN_COLOR))
    return cast(ImageTransform, v2.Compose(steps))


def classification_eval(
    size_px: int, crop_ratio: float, interpolation: str, resize: str = "short"
) -> ImageTransform:
    """Return the test transform, uint8 (3, H, W) -> uint8 (3, size_px, size_px).

    Args:
        crop_ratio: side of the center crop divided by the short side of the resized image, in
            (0, 1]; for `resize: short`.
        resize: `short`: resize the short side to round(size_px / crop_ratio), then crop the center.
            `whole`: resize the whole image to the square, which changes its aspect ratio.
    """
    mode = InterpolationMode(interpolation)
    if resize == "whole":
        return cast(ImageTransform, v2.Resize((size_px, size_px), mode))
    short = v2.Resize(round(size_px / crop_ratio), mode)
    return cast(ImageTransform, v2.Compose([short, v2.CenterCrop(size_px)]))


def detection_train(
    short_sides_px: Sequence[int],
    max_side_px: int,
    flip_prob: float,
    photometric_prob: float = 0.0,
) -> DetectionTransform:
    """Return the training transform (image, target) -> (image, target).

    The short side is resized to one of `short_sides_px`, drawn at random, or less if the long side
    would exceed `max_side_px`; with probability `flip_prob` the image is flipped horizontally.
    Boxes follow, and other entries of the target stay. `scale` is the factor of the height.
    Brightness, contrast, saturation, hue and the order of the channels each change with probability
    `photometric_prob` (0.5 in SSD's distortion).
    """
    if max_side_px < max(short_sides_px):
        raise ValueError(
            f"short_sides_px must be at most max_side_px, got {list(short_sides_px)} and "
            f"{max_side_px}."
        )
    # Colors first, as detectors mostly enlarge images: fewer pixels to change.
    distort = [v2.RandomPhotometricDistort(p=photometric_prob)] if photometric_prob else []
    resize = v2.RandomShortestSize(list(short_sides_px), max_size=max_side_px)
    steps = v2.Compose([*distort, resize, v2.RandomHorizontalFlip(flip_prob)])
    return partial(_transform_boxes, steps)


def _transform_boxes(
    steps: Callable[..., Any], image: Tensor, target: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    image, boxes = steps(tv_tensors.Image(image), boxes)
    changed = {"boxes": boxes.as_subclass(Tensor), "scale": image.shape[-2] / size[0]}
    return image.as_subclass(Tensor), {**target, **changed}


def detection_eval(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return both as they are: at test time the model resizes, and returns original pixels."""
    return image, target
