"""Crops, flips and erasing of whole batches, as torchvision's v2 does them to single images.

Images are uint8 (B, 3, P, P). All randomness is in the numbers a call is given: nothing is drawn
here, so that what an image becomes does not depend on its batch.
"""

# B images, P their side, S that of the result, T tries

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.data.transforms import MEAN_COLOUR

Boxes = NDArray[np.int64]  # (B, 4): top, left, height, width in pixels
_TRIES, _BOX_DRAWS = 10, 22
_CROP_RATIO, _ERASE_SCALE = (3 / 4, 4 / 3), (0.02, 0.33)
_ERASE_RATIO = (1 / 3.3, 1 / 0.3)  # RandomErasing's is height over width


class BatchAugment:
    """What is done to a batch; its arguments are those of `transforms.classification_train`.

    Attributes:
        num_draws: how many numbers in [0, 1) an image needs.

    Raises:
        ValueError: the crop is not one that is done in batches.
    """

    def __init__(
        self,
        size_px: int,
        crop: str,
        pad_px: int,
        scale: Sequence[float],
        flip_prob: float,
        interpolation: str,
        erase_prob: float = 0.0,
    ) -> None:
        if crop not in ("pad", "random_resized", "none"):
            raise ValueError(f"crop must be pad, random_resized or none, got {crop!r}.")
        self._size_px, self._scale, self._interpolation = size_px, scale, interpolation
        self._pad_px = pad_px if crop == "pad" else 0
        self._resized = crop == "random_resized"
        self._flip_prob, self._erase_prob = flip_prob, erase_prob
        self.num_draws = 3 + _BOX_DRAWS * self._resized + (_BOX_DRAWS + 1) * bool(erase_prob)

    @property
    def takes_native_size(self) -> bool:
        """Whether images come as they were decoded, and not resized to `size_px` before."""
        return self._resized

    def __call__(self, images: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """Return uint8 (B, 3, size_px, size_px); `draws` (B, num_draws) lie in [0, 1)."""
        flips = torch.from_numpy(draws[:, 2] < self._flip_prob).to(images.device)
        if self._resized:
            ratio, side = _CROP_RATIO, images.shape[-1]
            boxes = random_boxes(draws[:, 3 : 3 + _BOX_DRAWS], side, self._scale, ratio)
            images = resized_crops(images, boxes, self._size_px, self._interpolation)
        elif self._pad_px:
            shifts = (draws[:, :2] * (2 * self._pad_px + 1)).astype(np.int64)
            images = shifted(images, torch.from_numpy(shifts).to(images.device), self._pad_px)
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        if self._erase_prob:
            own = draws[:, -_BOX_DRAWS - 1 :]
            boxes = random_boxes(own[:, 1:], images.shape[-1], _ERASE_SCALE, _ERASE_RATIO)
            boxes[own[:, 0] >= self._erase_prob] = 0
            images = erased(images, boxes, MEAN_COLOUR)
        return images


def shifted(images: Tensor, shifts: Tensor, pad_px: int) -> Tensor:
    """Crop (B, C, P, P) at `shifts` (B, 2), down and right, of the images with zeros around."""
    side = images.shape[-1]
    padded = torch.nn.functional.pad(images, [pad_px] * 4)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # (B, C, shifts, shifts, P, P), a view
    number = torch.arange(len(images), device=images.device)
    return windows[number, :, shifts[:, 0], shifts[:, 1]]


def random_boxes(
    draws: NDArray[np.float64], side_px: int, scale: Sequence[float], ratio: Sequence[float]
) -> Boxes:
    """Return a box in each image of `side_px`, by the law of torchvision's RandomResizedCrop.

    Of ten pairs of area and ratio the first that fits is taken, and the whole image where none
    does; then its place.

    Args:
        draws: (B, 22) in [0, 1): ten areas, ten ratios, top and left.
        scale: least and largest share of the area.
        ratio: least and largest width over height; its logarithm is uniform.
    """
    areas = side_px**2 * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + draws[:, _TRIES : 2 * _TRIES] * (high - low))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (np.minimum(widths, heights) > 0) & (np.maximum(widths, heights) <= side_px)
    first = fits.argmax(1)[:, None]
    sides = np.concatenate([np.take_along_axis(each, first, 1) for each in (heights, widths)], 1)
    sides[~fits.any(1)] = side_px
    corners = np.floor(draws[:, 2 * _TRIES :] * (side_px - sides + 1))
    return np.concatenate([corners, sides], 1).astype(np.int64)


def resized_crops(images: Tensor, boxes: Boxes, size_px: int, interpolation: str) -> Tensor:
    """Cut `boxes` out and resize them: uint8 (B, 3, P, P) -> uint8 (B, 3, S, S).

    The filters are those of torch's antialiased resizing, as a matrix for each side.

    Raises:
        ValueError: the interpolation is none of nearest, bilinear and bicubic.
    """
    count, channels, side, _ = images.shape
    placed = torch.from_numpy(boxes).to(images.device)
    rows = _weights(placed[:, 0], placed[:, 2], side, size_px, interpolation)
    columns = _weights(placed[:, 1], placed[:, 3], side, size_px, interpolation)
    across = images.float().view(count, channels * side, side) @ columns.transpose(1, 2)
    across.round_().clamp_(0, 255)  # as torch, which keeps bytes between the two
    down = rows[:, None] @ across.view(count, channels, side, size_px)
    return down.round_().clamp_(0, 255).to(torch.uint8)


def _weights(first: Tensor, length: Tensor, side: int, size_px: int, interpolation: str) -> Tensor:
    """Return float32 (B, S, P): what each pixel of a line weighs in each pixel of the result."""
    pixel = torch.arange(side, device=first.device)
    begin, end = first[:, None, None], (first + length)[:, None, None]
    step = length[:, None, None] / size_px
    out = torch.arange(size_px, device=first.device)[:, None]
    if interpolation == "nearest":
        return (pixel == begin + (out * step).floor()).float()
    center = begin + (out + 0.5) * step
    distance = ((pixel + 0.5 - center) / step.clamp(min=1)).abs()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    elif interpolation == "bicubic":  # Keys' kernel with a = -0.5, as antialiasing has it
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        raise ValueError(f"interpolation: nearest, bilinear or bicubic, got {interpolation!r}.")
    weights = weights * ((pixel >= begin) & (pixel < end))
    return weights / weights.sum(2, keepdim=True)


def erased(images: Tensor, boxes: Boxes, colour: Sequence[int]) -> Tensor:
    """Fill `boxes` of uint8 (B, 3, P, P) with a colour; those of no size change nothing."""
    line = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = torch.from_numpy(boxes).to(images.device)[:, :, None].unbind(1)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    filled = torch.tensor(colour, dtype=torch.uint8, device=images.device)[:, None, None]
    return torch.where(inside, filled, images)
