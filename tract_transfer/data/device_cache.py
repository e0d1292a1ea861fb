"""A small data set on its device: decoded once, augmented in whole batches without workers.

The random numbers of an image are a hash of (seed, epoch, index, copy): as reproducible as those of
loader.py, but other numbers.
"""

# B images a batch, P their side, S the side of the result, in pixels

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import Batch, ImageDataset
from tract_transfer.data.sampling import Sample, mix
from tract_transfer.data.transforms import MEAN_COLOR

Boxes = NDArray[np.int64]  # (B, 4): top, left, height, width in pixels
_TRIES, _BOX_DRAWS = 10, 22
_CROP_RATIO = (3 / 4, 4 / 3)
_ERASE_SCALE, _ERASE_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)  # torchvision's is height over width
_GOLDEN = 0x9E3779B97F4A7C15


class DeviceCache:
    """The images of a classification data set as one uint8 tensor (N, 3, P, P) on `device`.

    Args:
        size_px: P; the short side is resized to it once, and the result must be square. None: all
            images have one size and keep it.
        undecodable: `error` raises UndecodableImage; `skip` excludes the image, batches list it.

    Raises:
        ValueError: an image is not square, or of another size; or the memory is too small.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        size_px: int | None,
        device: torch.device,
        *,
        interpolation: str = "bilinear",
        undecodable: str = "error",
    ) -> None:
        self.skipped: dict[int, str] = {}
        images: Tensor | None = None
        mode = InterpolationMode(interpolation)
        resize = v2.Resize(size_px, mode) if size_px else v2.Identity()
        for index in range(len(dataset)):
            try:
                image = resize(dataset.image(index))
            except UndecodableImage as error:
                if undecodable != "skip":
                    raise
                self.skipped[index] = f"{error.item}: {error.reason}"
                continue
            _, height, width = image.shape
            if images is None:
                side = min(height, width)
                images = _empty((len(dataset), 3, side, side), device)
            if image.shape != images.shape[1:]:
                resized = " after its short side is resized" if size_px else ""
                raise ValueError(
                    f"data.cache: device needs square images of one size, {images.shape[-1]} px, "
                    f"and image {index} has {width} x {height} px{resized}. Set data.cache: none "
                    "or ram."
                )
            images[index] = image.to(device)
        if images is None:
            raise ValueError("data.cache: device found no image that can be decoded.")
        self.images = images
        labels = [dataset.target(index) for index in range(len(dataset))]
        self.labels = torch.tensor(labels, dtype=torch.int64, device=device)


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return uint8 zeros of a shape if they fit in the free memory of the device."""
    is_cuda, needed = device.type == "cuda", math.prod(shape)
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"data.cache: device needs {needed / 2**30:.1f} GiB for {shape[0]} images of "
            f"{shape[-1]} px, and {device} has {free / 2**30:.1f} GiB. Set data.cache: none."
        )
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def cached_batches(
    data: DeviceCache, sampler: Iterable[Sequence[Sample]], *, seed: int, augment: "BatchAugment"
) -> Iterator[Batch]:
    """Yield the micro-batches of `sampler`, each image augmented by its own random numbers."""
    for samples in sampler:
        skipped = [data.skipped[s.index] for s in samples if s.index in data.skipped]
        loaded = [s for s in samples if s.index not in data.skipped] if skipped else samples
        if not loaded:
            yield Batch([], [], [], skipped)
            continue
        # (B, 3); np.array of the tuples takes four times as long.
        rows = np.fromiter(itertools.chain.from_iterable(loaded), np.int64).reshape(-1, 3)
        chosen = torch.from_numpy(rows[:, 1].copy()).to(data.images.device)
        draws = hashed_uniform(seed, rows.view(np.uint64), augment.num_draws)
        images = augment(data.images.index_select(0, chosen), draws)
        yield Batch(images, data.labels.index_select(0, chosen), rows[:, 1].tolist(), skipped)


def hashed_uniform(seed: int, rows: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1), (B, count): a function of the seed and each of `rows` (B, parts).

    The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    state = np.full((len(rows), 1), mix(seed), dtype=np.uint64)
    for part in rows.T:
        state = _scramble(state + part[:, None] + np.uint64(1))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    # 53 bits, the precision of float64
    draws: NDArray[np.float64] = (_scramble(state + steps) >> np.uint64(11)) / 2.0**53
    return draws


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state * np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return scrambled


# Crops, flips and erasing of whole batches, as torchvision's v2 does them to single images.


class BatchAugment:
    """The augmentation of a batch; its arguments are those of `transforms.classification_train`.

    Attributes:
        num_draws: how many random numbers in [0, 1) an image needs.
        takes_native_size: whether images are cropped as decoded, not first resized to `size_px`.
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
        self._size_px, self._scale, self._interpolation = size_px, scale, interpolation
        self._pad_px = pad_px if crop == "pad" else 0
        self.takes_native_size = crop == "random_resized"
        self._flip_prob, self._erase_prob = flip_prob, erase_prob
        self.num_draws = 3 + _BOX_DRAWS * self.takes_native_size
        self.num_draws += (_BOX_DRAWS + 1) * bool(erase_prob)

    def __call__(self, images: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """Return uint8 (B, 3, S, S); `draws` (B, num_draws) lie in [0, 1)."""
        if self.takes_native_size:
            box_draws = draws[:, 3 : 3 + _BOX_DRAWS]
            boxes = random_boxes(box_draws, images.shape[-1], self._scale, _CROP_RATIO)
            images = resized_crops(images, boxes, self._size_px, self._interpolation)
        elif self._pad_px:
            shifts = (draws[:, :2] * (2 * self._pad_px + 1)).astype(np.int64)
            images = shifted(images, torch.from_numpy(shifts).to(images.device), self._pad_px)
        # Copying complete images of both versions is six times as fast as torch.where.
        chosen = np.arange(len(images)) + len(images) * (draws[:, 2] < self._flip_prob)
        both = torch.cat([images, images.flip(3)])
        images = both.index_select(0, torch.from_numpy(chosen).to(images.device))
        if self._erase_prob:
            erase_draws = draws[:, -_BOX_DRAWS - 1 :]
            boxes = random_boxes(erase_draws[:, 1:], images.shape[-1], _ERASE_SCALE, _ERASE_RATIO)
            boxes[erase_draws[:, 0] >= self._erase_prob] = 0
            images = erased(images, boxes, MEAN_COLOR)
        return images


def shifted(images: Tensor, shifts: Tensor, pad_px: int) -> Tensor:
    """Crop (B, C, P, P) at `shifts` (B, 2), down and right, from the images padded with zeros."""
    side = images.shape[-1]
    padded = nn.functional.pad(images, [pad_px] * 4)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # (B, C, shifts down, right, P, P)
    image = torch.arange(len(images), device=images.device)
    return windows[image, :, shifts[:, 0], shifts[:, 1]]


def random_boxes(
    draws: NDArray[np.float64], side_px: int, scale: Sequence[float], ratio: Sequence[float]
) -> Boxes:
    """Return a box in each image of `side_px`, distributed as torchvision's RandomResizedCrop.

    The first of ten pairs of area and aspect ratio that fits, or else the whole image, at a random
    position.

    Args:
        draws: (B, 22) in [0, 1): ten areas, ten ratios, top and left.
        scale: smallest and largest fraction of the area.
        ratio: smallest and largest width over height; its logarithm is uniform.
    """
    areas = side_px**2 * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + draws[:, _TRIES : 2 * _TRIES] * (high - low))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (np.minimum(widths, heights) > 0) & (np.maximum(widths, heights) <= side_px)
    first = fits.argmax(1)[:, None]
    sides = np.concatenate([np.take_along_axis(s, first, 1) for s in (heights, widths)], 1)
    sides[~fits.any(1)] = side_px
    corners = np.floor(draws[:, 2 * _TRIES :] * (side_px - sides + 1))
    return np.concatenate([corners, sides], 1).astype(np.int64)


def resized_crops(images: Tensor, boxes: Boxes, size_px: int, interpolation: str) -> Tensor:
    """Crop `boxes` and resize them, antialiased: uint8 (B, 3, P, P) -> uint8 (B, 3, S, S)."""
    # torch resizes bytes on the CPU only.
    images = images if images.device.type == "cpu" else images.float()
    crops = [
        nn.functional.interpolate(
            images[i : i + 1, :, top : top + height, left : left + width],
            size=(size_px, size_px),
            mode=interpolation,
            antialias=True,
        )
        for i, (top, left, height, width) in enumerate(boxes.tolist())
    ]
    return torch.cat(crops).round().clamp(0, 255).to(torch.uint8)


def erased(images: Tensor, boxes: Boxes, color: Sequence[int]) -> Tensor:
    """Fill `boxes` of uint8 (B, 3, P, P) with a color; empty boxes change nothing."""
    line = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = torch.from_numpy(boxes).to(images.device)[:, :, None].unbind(1)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    filled = torch.tensor(color, dtype=torch.uint8, device=images.device)[:, None, None]
    return torch.where(inside, filled, images)
