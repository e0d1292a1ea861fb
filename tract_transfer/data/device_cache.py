"""A small dataset on its device: decoded once, augmented a batch at a time.

The random numbers of an image are a hash of (seed, epoch, index, copy): the law of loader.py, by
other numbers. No worker is needed, and where a run was resumed does not show.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import Batch, ImageDataset
from tract_transfer.data.sampling import Sample, mix
from tract_transfer.data.transforms import MEAN_COLOUR

# --- Crops, flips and erasing of whole batches, as torchvision's v2 does them to single images.

Boxes = NDArray[np.int64]  # (B, 4): top, left, height, width in pixels
_TRIES, _BOX_DRAWS = 10, 22
_TABLE_BYTES = 2**26  # of the weights of all crops: up to 64 px they are made once
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
        if self._resized:
            ratio, side = _CROP_RATIO, images.shape[-1]
            boxes = random_boxes(draws[:, 3 : 3 + _BOX_DRAWS], side, self._scale, ratio)
            images = resized_crops(images, boxes, self._size_px, self._interpolation)
        elif self._pad_px:
            shifts = (draws[:, :2] * (2 * self._pad_px + 1)).astype(np.int64)
            images = shifted(images, torch.from_numpy(shifts).to(images.device), self._pad_px)
        images = flipped(images, draws[:, 2] < self._flip_prob)
        if self._erase_prob:
            own = draws[:, -_BOX_DRAWS - 1 :]
            boxes = random_boxes(own[:, 1:], images.shape[-1], _ERASE_SCALE, _ERASE_RATIO)
            boxes[own[:, 0] >= self._erase_prob] = 0
            images = erased(images, boxes, MEAN_COLOUR)
        return images


def shifted(images: Tensor, shifts: Tensor, pad_px: int) -> Tensor:
    """Crop (B, C, P, P) at `shifts` (B, 2), down and right, of the images with zeros around."""
    count, channels, side, _ = images.shape
    planes, pitch = count * channels, side + pad_px
    # Lines lie one behind the other, and the zeros behind a line are those before the next; so do
    # planes. A line of a crop is `side` values from any place on: one gather copies whole lines.
    lead = pad_px * pitch + pad_px
    canvas = images.new_zeros(lead + planes * pitch**2)
    inside = canvas[lead:].view(planes, pitch, pitch)[:, :side, :side]
    inside.copy_(images.reshape(planes, side, side))
    down = torch.arange(side, device=images.device) * pitch
    plane = torch.arange(planes, device=images.device).view(count, channels, 1) * pitch**2
    first = plane + (shifts[:, 0] * pitch + shifts[:, 1])[:, None, None] + down
    lines = canvas.as_strided((len(canvas) - side + 1, side), (1, 1))
    return lines.index_select(0, first.flatten()).view(images.shape)


def flipped(images: Tensor, chosen: NDArray[np.bool_]) -> Tensor:
    """Swap left and right of the images (B, C, P, P) that are `chosen` (B,)."""
    count = len(images)
    numbers = torch.from_numpy(np.arange(count) + count * chosen).to(images.device)
    # Of all images both ways: whole images are copied, which writing into some is slower than.
    return torch.cat([images, images.flip(3)]).index_select(0, numbers)


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
    rows = _matrices(boxes[:, 0], boxes[:, 2], side, size_px, interpolation, images.device)
    columns = _matrices(boxes[:, 1], boxes[:, 3], side, size_px, interpolation, images.device)
    # (B, P, 3, P): so that each side is one product an image.
    lines = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    across = lines.view(count, side * channels, side) @ columns.transpose(1, 2)
    across.round_()  # as torch, which keeps bytes between the two
    if interpolation == "bicubic":  # which alone leaves 0..255
        across.clamp_(0, 255)
    down = (rows @ across.view(count, side, channels * size_px)).round_()
    if interpolation == "bicubic":
        down.clamp_(0, 255)
    resized = down.view(count, size_px, channels, size_px).permute(0, 2, 1, 3)
    return resized.to(torch.uint8, memory_format=torch.contiguous_format)


def _matrices(
    first: NDArray[np.int64],
    length: NDArray[np.int64],
    side: int,
    size_px: int,
    interpolation: str,
    device: torch.device,
) -> Tensor:
    """Return `_weights` of lines that begin at `first` (B,) and are `length` (B,) long."""
    if 4 * side**3 * size_px <= _TABLE_BYTES:
        numbers = torch.from_numpy(first * side + length - 1).to(device)
        return _table(side, size_px, interpolation, device).index_select(0, numbers)
    begin, lengths = torch.from_numpy(first).to(device), torch.from_numpy(length).to(device)
    return _weights(begin, lengths, side, size_px, interpolation)


@lru_cache(maxsize=4)
def _table(side: int, size_px: int, interpolation: str, device: torch.device) -> Tensor:
    """Return `_weights` of every beginning and length of a line: (P x P, S, P)."""
    line = torch.arange(side, device=device)
    return _weights(
        line.repeat_interleave(side), line.repeat(side) + 1, side, size_px, interpolation
    )


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


_GOLDEN = 0x9E3779B97F4A7C15


class DeviceCache:
    """The images of a classification dataset as one uint8 tensor (N, 3, P, P) on `device`.

    Args:
        size_px: P; the short side is resized to it once, and must then be the long one too. None:
            all images are of one size, and stay so.
        interpolation: of that resizing: nearest, bilinear or bicubic.
        undecodable: `skip` leaves those out that cannot be decoded, and every batch says so.

    Raises:
        UndecodableImage: the first that cannot be decoded, where they are not to be skipped.
        ValueError: an image is not square, or not of the others' size; or there is not enough
            memory.
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
        side = size_px or _first_side(dataset, undecodable)
        shape = (len(dataset), 3, side, side)
        needed, available = math.prod(shape), _available_bytes(device)
        if needed > available:
            raise ValueError(
                f"data.cache: device needs {needed / 2**30:.1f} GiB for {len(dataset)} images of "
                f"{side} px, and {device} has {available / 2**30:.1f} GiB. Set data.cache: none."
            )
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.skipped: dict[int, str] = {}
        resize = v2.Resize(side, InterpolationMode(interpolation))
        for index in range(len(dataset)):
            try:
                image = dataset.image(index)
            except UndecodableImage as error:
                if undecodable != "skip":
                    raise
                self.skipped[index] = f"{error.item}: {error.reason}"
                continue
            image = resize(image) if size_px else image
            if image.shape[1:] != shape[2:]:
                wanted = (
                    "square images" if size_px else f"images of one size, here {side} px square"
                )
                raise ValueError(
                    f"data.cache: device needs {wanted}, and image {index} is {image.shape[2]} x "
                    f"{image.shape[1]} px{f' with its short side at {side}' if size_px else ''}. "
                    "Set data.cache: none or ram."
                )
            self.images[index] = image.to(device)
        labels = [dataset.target(index) for index in range(len(dataset))]
        self.labels = torch.tensor(labels, dtype=torch.int64, device=device)


def cached_batches(
    data: DeviceCache,
    sampler: Iterable[Sequence[Sample]],
    *,
    seed: int,
    augment: BatchAugment,
) -> Iterator[Batch]:
    """Yield the micro-batches of `sampler`, each image augmented by its own numbers."""
    for samples in sampler:
        whole, skipped = samples, []
        if data.skipped:
            skipped = [data.skipped[s.index] for s in samples if s.index in data.skipped]
            whole = [s for s in samples if s.index not in data.skipped]
        # (B, 3); np.array of the tuples takes four times as long.
        rows = np.fromiter(itertools.chain.from_iterable(whole), np.int64).reshape(-1, 3)
        indices = rows[:, 1].tolist()
        if not whole:
            yield Batch([], [], indices, skipped)
            continue
        chosen = torch.from_numpy(rows[:, 1].copy()).to(data.images.device)
        draws = hashed_uniform(seed, rows.view(np.uint64), augment.num_draws)
        images = augment(data.images.index_select(0, chosen), draws)
        yield Batch(images, data.labels.index_select(0, chosen), indices, skipped)


def _first_side(dataset: ImageDataset, undecodable: str) -> int:
    """Return the height of the first image that can be decoded."""
    passed_over = (UndecodableImage,) if undecodable == "skip" else ()
    for index in range(len(dataset)):
        with contextlib.suppress(*passed_over):
            return dataset.image(index).shape[1]
    raise ValueError("data.cache: device found no image that can be decoded.")


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def hashed_uniform(seed: int, rows: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each of `rows` (B, P): a function of seed and row.

    Each part is added to the state and scrambled by the finaliser of SplitMix64 (Steele, Lea,
    Flood, OOPSLA 2014).

    Returns:
        (B, count).
    """
    state = np.full((len(rows), 1), mix(seed), dtype=np.uint64)
    for part in rows.T:
        state = _scramble(state + part[:, None] + np.uint64(1))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    # 53 bits: what a float64 holds.
    draws: NDArray[np.float64] = (_scramble(state + steps) >> np.uint64(11)) / 2.0**53
    return draws


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state * np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return scrambled
