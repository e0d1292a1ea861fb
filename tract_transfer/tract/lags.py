"""The Gram matrix of a stride-1 convolution's unfolded input, without unfolding it.

Two taps i and i' of the kernel multiply the same values, i' - i apart, at almost all positions. So
the sums over all positions depend only on the lag i' - i: an autocorrelation. A tap misses a few
rows at the top and the bottom (columns at the sides). Their products are summed by pairs of rows
and subtracted from each pair of taps that misses them.
"""

# B images of C values a position; E end rows, which some tap misses

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 4 * 2**20}  # worked on at once: what a cache holds
CHUNK_BYTES_ELSEWHERE = 32 * 2**20
# Blocks, or rows, in one product: short sums round less, and run in parallel.
SLICE_BLOCKS = 2048
SLICE_ROWS = 4096

WIDE = 36  # from this many values in a block the Fourier transform is faster than the products
FEW = 0.5  # of the images' values: its products may take up to this much memory

SETTINGS_LOCK = threading.RLock()  # precision settings belong to the process, not to a thread


def tiles_of(images: Tensor, stride: tuple[int, int]) -> Tensor:
    """View (B, C, H, W) as (B, Y, X, C, Sy, Sx)."""
    tiles: Tensor = images.unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return tiles.permute(0, 2, 4, 1, 3, 5)


class Canvas(NamedTuple):
    """Zero-padded images as tiles of Sy x Sx pixels whose pixels are channels: (B, Y, X, C Sy Sx).

    Tiles make a convolution of any stride one of stride 1.
    """

    images: Tensor  # (B, C, H, W), in pixels
    stride: tuple[int, int]  # (Sy, Sx)
    before: tuple[int, int]  # zeros above and to the left of the images, in pixels
    size: tuple[int, int]  # (Y, X), in tiles; pixels beyond it are ignored

    @property
    def channels(self) -> int:
        """Values in a tile."""
        return self.images.shape[1] * math.prod(self.stride)

    def filled(self, axis: int) -> range:
        """Rows (axis 0) or columns (1) of tiles that hold a pixel."""
        before, step, count = self.before[axis], self.stride[axis], self.images.shape[2 + axis]
        return range(before // step, min((before + count - 1) // step + 1, self.size[axis]))

    def copy_to(self, target: Tensor, first: tuple[int, int] = (0, 0)) -> None:
        """Copy the tiles from `first` (Y, X) on to a target (B, y, x, C Sy Sx).

        Parts of the target outside the images or the canvas keep their values.
        """
        target = target.unflatten(3, (-1, *self.stride))
        sizes = zip(self.stride, self.before, self.images.shape[2:], strict=True)
        pixels: Iterable[tuple[int, ...]]
        if all(before % step == size % step == 0 for step, before, size in sizes):
            source, steps, pixels = tiles_of(self.images, self.stride), (1, 1), [()]
        else:  # each pixel of a tile separately
            source, steps = self.images.movedim(1, 3), self.stride
            pixels = itertools.product(*map(range, self.stride))
        for pixel in pixels:
            target_slices: list[Any] = [slice(None)]
            source_slices = [slice(None)]
            for axis, step in enumerate(steps):
                # Tile t starts at position step t + offset of the source.
                within = pixel[axis] if pixel else 0
                offset = within - self.before[axis] * step // self.stride[axis]
                filled = -((offset - source.shape[1 + axis]) // step)
                start = max(first[axis], -(offset // step))
                stop = min(first[axis] + target.shape[1 + axis], self.size[axis], filled)
                stop = max(start, stop)
                target_slices.append(slice(start - first[axis], stop - first[axis]))
                source_slices.append(slice(start * step + offset, stop * step + offset, step))
            index = (*target_slices, slice(None), *pixel)
            target[index].copy_(source[tuple(source_slices)])

    def cut(self, rows: Sequence[range], columns: Sequence[range]) -> Tensor:
        """Return (B, y, x, C Sy Sx), the tiles in all of the ranges, concatenated."""
        counts = [list(map(len, ranges)) for ranges in (rows, columns)]
        # The values of a tile come first in memory: copied in rows, not in tiles.
        piece = self.images.new_zeros(self.channels, len(self.images), *map(sum, counts))
        piece = piece.movedim(0, 3)
        for band, band_rows in zip(piece.split(counts[0], 1), rows, strict=True):
            for part, part_columns in zip(band.split(counts[1], 2), columns, strict=True):
                self.copy_to(part, (band_rows.start, part_columns.start))
        return piece


def lag_gram(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sum x x^T over all windows of Ky x Kx tiles of a canvas, with products in `dtype`.

    Returns:
        (Ky, Ky, Kx, Kx, C, C): taps i, i' along Y, j, j' along X, and channels c, c'.
    """
    (ky, kx), channels = kernel, canvas.channels
    if not (canvas.filled(0) and canvas.filled(1)):
        return canvas.images.new_zeros(ky, ky, kx, kx, channels, channels, dtype=sum_dtype(dtype))
    forward = _lag_sums(canvas, kernel, dtype)
    ends = [_ends(canvas, axis, kernel[axis]) for axis in range(2)]
    num_ends = [sum(map(len, ranges)) for ranges in ends]
    lags = [2 * k - 1 for k in kernel]
    shape = [n + count * count for n, count in zip(lags, num_ends, strict=True)]
    # Along Y: every lag over all rows, then every pair of end rows. Along X the same.
    sums = forward.new_zeros(*shape, channels, channels)
    sums[ky - 1 : lags[0], : lags[1]] = forward
    # The sum at lag (-dy, -dx) of (c, c') is the one at (dy, dx) of (c', c).
    sums[: ky - 1, : lags[1]] = forward[1:].flip(0, 1).mT

    def cut(rows: Sequence[range], columns: Sequence[range]) -> Tensor:
        """(B, y, x, C), rounded like the factors of the products."""
        return canvas.cut(rows, columns).to(dtype).to(sums.dtype)

    rows = cut(ends[0], [canvas.filled(1)])
    pairs = _end_sums(rows.transpose(1, 2), kx)  # (lag, E, C, E, C)
    sums[lags[0] :, : lags[1]] = pairs.permute(1, 3, 0, 2, 4).flatten(0, 1)
    pairs = _end_sums(cut([canvas.filled(0)], ends[1]), ky)  # (lag, E, C, E, C)
    sums[: lags[0], lags[1] :] = pairs.permute(0, 1, 3, 2, 4).flatten(1, 2)
    corners = cut(*ends).flatten(1)  # (B, E E' C)
    pairs = (corners.T @ corners).view(2 * (*num_ends, channels))
    sums[lags[0] :, lags[1] :] = pairs.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(0, 1)
    tap_pairs = _tap_pairs if sums.device.type != "cpu" else _cached_tap_pairs
    weights_y, weights_x = (
        tap_pairs(k, first, range(last.start - n, last.stop - n), sums.dtype, sums.device)
        for k, n, (first, last) in zip(kernel, canvas.size, ends, strict=True)
    )
    along_y = (weights_y @ sums.flatten(1)).view(ky * ky, -1, channels * channels)
    return (weights_x @ along_y).view(ky, ky, kx, kx, channels, channels)


def _ends(canvas: Canvas, axis: int, kernel: int) -> tuple[range, range]:
    """The first and the last K - 1 rows (columns) of a canvas, as far as they hold a pixel."""
    filled = canvas.filled(axis)
    first = range(filled.start, max(filled.start, min(kernel - 1, filled.stop)))
    start = max(canvas.size[axis] - kernel + 1, filled.start)
    return first, range(start, max(start, filled.stop))


def _end_sums(strip: Tensor, kernel: int) -> Tensor:
    """Return (2 K - 1, E, C, E, C), the lag sums along L of a strip (B, L, E, C).

    All images form one sequence, with K - 1 zeros after each, which is summed in slices.
    """
    num_images, length, *values = strip.shape
    num_values, padded = math.prod(values), length + kernel - 1
    slices = -(-num_images * padded // SLICE_ROWS)
    per_slice = -(-num_images * padded // slices)
    total = slices * per_slice
    sequence = strip.new_zeros(total + kernel - 1, num_values)
    sequence[: num_images * padded].view(num_images, padded, *values)[:, :length] = strip
    left = sequence[:total].view(slices, per_slice, num_values).mT
    shifted = [sequence[lag : lag + total].view_as(left.mT) for lag in range(kernel)]
    forward = torch.stack([torch.bmm(left, right).sum(0) for right in shifted])
    both = torch.cat([forward[1:].flip(0).mT, forward])
    return both.view(len(both), *values, *values)


def _tap_pairs(
    kernel: int, first: range, last: range, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (K^2, 2 K - 1 + E^2), the weights that make the sum of a pair of taps (i, i').

    +1 for its lag i' - i over all rows; -1 for every pair of end rows of that lag that the taps
    miss: the first i rows (i' for the other tap), and those after the last window. End rows are
    numbered, those in `last` from behind (-1 is the last row).
    """
    # Made on the device, because a copy to it would wait.
    taps = torch.arange(kernel, device=device)
    lag = (taps - taps[:, None])[..., None]
    is_lag = lag == torch.arange(1 - kernel, kernel, device=device)
    ends = [torch.arange(rows.start, rows.stop, device=device) for rows in (first, last)]
    rows = torch.cat(ends)
    is_last = torch.arange(len(rows), device=device) >= len(first)
    apart = lag[..., None] == rows - rows[:, None]
    taps = taps.view(kernel, 1, 1)
    missed = torch.where(is_last, rows + kernel - 1 >= taps, rows < taps)[..., None]
    pairs = apart & missed & (is_last == is_last[:, None])
    return torch.cat([is_lag.to(dtype), -pairs.flatten(2).to(dtype)], dim=2).flatten(0, 1)


_cached_tap_pairs = functools.lru_cache(_tap_pairs)


def _lag_sums(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return (Ky, 2 Kx - 1, C, C): sum z[y, x, c] z[y + dy, x + dx, c'] over B, y, x.

    dy = 0..Ky-1, dx = -(Kx-1)..Kx-1, and z is zero outside the canvas.
    """
    is_wide = 2 * (kernel[1] - 1) * canvas.channels >= WIDE
    # One product of 2 C x 2 C values for every frequency and dy.
    num_products = (canvas.size[1] + kernel[1]) // 2 * kernel[0] * (2 * canvas.channels) ** 2
    is_small = num_products <= FEW * canvas.images.numel()
    on_cpu = canvas.images.device.type == "cpu"
    if is_wide and is_small and on_cpu and dtype == torch.float32:
        return _lag_sums_by_fourier(canvas, kernel)
    return _lag_sums_by_products(canvas, kernel, dtype)


def _lag_sums_by_fourier(canvas: Canvas, kernel: tuple[int, int]) -> Tensor:
    """Fourier transforms along x, and products of transformed rows dy apart along y.

    A lag dx multiplies frequency f by exp(2 pi i f dx / N). So the products of all channels over
    all rows are needed once for each frequency and dy.
    """
    (ky, kx), channels = kernel, canvas.channels
    rows, columns = canvas.filled(0), canvas.filled(1)
    length = _fast_length(len(columns) + kx - 1)
    frequencies = length // 2 + 1
    # A chunk is some images, or some rows of one. It holds the rows, their transforms, and the
    # transforms in another order.
    row_bytes = 3 * length * channels * 4
    at_once = per_chunk(len(canvas.images), len(rows) * row_bytes, "cpu")
    height = per_chunk(len(rows), row_bytes, "cpu")
    met = height + ky - 1  # rows of a chunk and the rows, or zeros, below that they meet
    copied = min(met, len(rows))
    # The transform wants the rows of a channel contiguous, the products the channels of a
    # frequency.
    lines = canvas.images.new_zeros(at_once, copied, channels, length, dtype=torch.float32)
    chunk = lines[..., : len(columns)].movedim(2, 3)
    spectra = lines.new_empty(frequencies, at_once, met, channels, dtype=torch.complex64)
    spectra[:, :, copied:] = 0
    products = lines.new_zeros(ky, frequencies, 2 * channels, 2 * channels)

    for images in canvas.images.split(at_once):
        part, used = canvas._replace(images=images), spectra[:, : len(images)]
        values = torch.view_as_real(used).flatten(3).flatten(1, 2)
        span = values.shape[1] - (ky - 1)
        shifted = [values[:, dy : dy + span] for dy in range(ky)]
        for top in rows[::height]:
            if height < len(rows) and (top == rows.start or top + copied >= rows.stop):
                lines.zero_()
            part.copy_to(chunk[: len(images)], (top, columns.start))
            transformed = torch.fft.rfft(lines[: len(images)]).movedim(-1, 0)
            # Numbers of 8 bytes are copied twice as fast as complex ones.
            used[:, :, :copied].view(torch.float64).copy_(transformed.view(torch.float64))
            for product, right in zip(products.unbind(), shifted, strict=True):
                product.baddbmm_(shifted[0].mT, right)
    # Real and imaginary parts of every channel back to lags along x.
    parts = products.view(ky, frequencies, channels, 2, channels, 2)
    real = parts[:, :, :, 0, :, 0] + parts[:, :, :, 1, :, 1]
    imaginary = parts[:, :, :, 0, :, 1] - parts[:, :, :, 1, :, 0]
    sums = torch.fft.irfft(torch.complex(real, imaginary), length, dim=1)
    return torch.cat([sums[:, length - kx + 1 :], sums[:, :kx]], dim=1)


def _fast_length(least: int) -> int:
    """The smallest number from `least` on without prime factors above 7."""
    while 210 ** least.bit_length() % least:
        least += 1
    return least


def _lag_sums_by_products(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Matrix products of the batch with its shifted self.

    With Kx - 1 zeros after every row and Ky - 1 rows of zeros after every image, the batch is one
    sequence and (dy, dx) one lag. A block of 2 (Kx - 1) positions meets its 2 Kx - 1 lags inside
    the two blocks that start Kx - 1 before it: two products give all of them.
    """
    (ky, kx), images, size, channels = kernel, canvas.images, canvas.size, canvas.channels
    height, width = size[0] + ky - 1, size[1] + kx - 1
    block = max(2 * (kx - 1), 1)
    image_bytes = height * width * channels * dtype.itemsize
    at_once = per_chunk(len(images), image_bytes, images.device.type)
    blocks = -(-at_once * height * width // block)
    slices = -(-blocks // SLICE_BLOCKS)
    per_slice = -(-blocks // slices)
    # Kx - 1 zeros before; after the chunk, what the last block meets at the largest lag.
    length = kx - 1 + slices * per_slice * block + (ky - 1) * width + 2 * block
    sequence = images.new_zeros(length, channels, dtype=dtype)

    def blocks_from(position: int) -> Tensor:
        """(slices, blocks, 2 (Kx-1) C)"""
        shape = (slices, per_slice, block * channels)
        strides = (per_slice * block * channels, block * channels, 1)
        return sequence.as_strided(shape, strides, position * channels)

    chunk = sequence[kx - 1 : kx - 1 + at_once * height * width]
    chunk = chunk.view(at_once, height, width, channels)[:, : size[0], : size[1]]
    products = images.new_zeros(ky, block * channels, 2, block * channels, dtype=sum_dtype(dtype))
    left = blocks_from(kx - 1).mT
    halves = list(itertools.product(range(ky), range(2)))
    met = [blocks_from(dy * width + half * block) for dy, half in halves]
    for part in images.split(at_once):
        canvas._replace(images=part).copy_to(chunk[: len(part)])
        chunk[len(part) :].zero_()
        for (dy, half), right in zip(halves, met, strict=True):
            products[dy, :, half] += batch_product(left, right).sum(0)
    # Position r of the block and position r + lag of the two blocks: a diagonal for each lag.
    row = 2 * block * channels
    diagonals = products.as_strided(
        (ky, block, channels, 2 * kx - 1, channels),
        (block * channels * row, channels * row + channels, row, channels, 1),
    )
    return diagonals.sum(1).transpose(1, 2)


def per_chunk(count: int, item_bytes: int, device: str, least_bytes: int = 0) -> int:
    """How many of `count` items to work on at once: chunks of about equal size."""
    limit = max(CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE), least_bytes)
    chunks = -(-count // max(1, limit // max(item_bytes, 1)))
    return max(1, -(-count // max(chunks, 1)))


def batch_product(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm, with a float32 result for 16-bit factors."""
    if left.dtype.itemsize > 2:
        return torch.bmm(left, right)
    return torch.bmm(left, right, torch.float32)  # on CUDA only


def product_dtype(inputs: Tensor) -> torch.dtype:
    """The type of the layer's own product, or float32 if that could not be summed in float32.

    A sum rounded to 16 bits is useless: its inverse would be far off (docs/reference/tract.md).
    """
    device = inputs.device.type
    if inputs.dtype == torch.float64:
        return torch.float64
    if device not in ("cpu", "cuda"):
        return torch.float32
    is_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_autocast else inputs.dtype
    if device == "cpu" and not (dtype == torch.bfloat16 and _cpu_sums_bfloat16()):
        return torch.float32
    return dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that products of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def float32_factors(device: str, precision: str = "ieee") -> Iterator[None]:
    """Make float32 matrix products round their factors to `precision` ("ieee": not at all).

    This overrides what the user allows the model: under
    `torch.set_float32_matmul_precision("medium")` the sums of products in G would be rounded.
    """
    settings = _settings(device)
    if settings is None:  # torch 2.8
        read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        precision = "highest"
    else:
        read = functools.partial(getattr, settings, "fp32_precision")
        write = functools.partial(setattr, settings, "fp32_precision")
    with SETTINGS_LOCK:
        before = read()
        if (before, precision) == ("none", "ieee"):  # unset, which does not round either
            yield
            return
        write(precision)
        try:
            yield
        finally:
            write(before)


@functools.cache
def _cpu_sums_bfloat16() -> bool:
    """Whether oneDNN can round float32 factors to bfloat16 and sum their products in float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return _settings("cpu") is not None and bool(supported())


@functools.cache
def _settings(device: str) -> Any:
    """The object with `fp32_precision` of a device's matrix products, from torch 2.9 on."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    settings = getattr(backend, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None
