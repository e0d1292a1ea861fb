"""The Gram matrix of a stride-1 convolution's unfolded input, without unfolding it.

Two taps i and i' of the kernel multiply the same values, i' - i apart, at almost all positions. So
the sums over all positions depend on the lag i' - i alone: an autocorrelation. What a tap never
meets, a few rows at the top and at the bottom (columns at the sides), is summed by pairs of rows
and taken away.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# --- Images as tiles of pixels, which make a convolution of any stride one of stride 1.


def tiles_of(images: Tensor, stride: tuple[int, int]) -> Tensor:
    """View (B, C, H, W) as (B, Y, X, C, Sy, Sx)."""
    tiles: Tensor = images.unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return tiles.permute(0, 2, 4, 1, 3, 5)


class Canvas(NamedTuple):
    """Tiles of Sy x Sx pixels taken for channels, (B, Y, X, C Sy Sx), of images with zeros around.

    Args:
        images: (B, C, H, W) in pixels.
        stride: (Sy, Sx).
        before: zeros above and to the left of the images, in pixels.
        size: (Y, X), in tiles; what of the images lies beyond is left out.
    """

    images: Tensor
    stride: tuple[int, int]
    before: tuple[int, int]
    size: tuple[int, int]

    @property
    def channels(self) -> int:
        """How many values a tile has."""
        return self.images.shape[1] * math.prod(self.stride)

    def filled(self, axis: int) -> range:
        """Rows (axis 0) or columns (1) of tiles that hold a pixel."""
        before, step, count = self.before[axis], self.stride[axis], self.images.shape[2 + axis]
        return range(before // step, min((before + count - 1) // step + 1, self.size[axis]))

    def overlaps(self, target: Tensor, first: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Views that pair pixels of a target with those of the images that are its tiles.

        Args:
            target: (b, y, x, C Sy Sx).
            first: which tile (Y, X) it begins with.

        Returns:
            Views of the target and of all B images, of one size but for b and B. No view holds the
            target's tiles, or parts of tiles, that lie outside the images or the canvas.
        """
        target = target.unflatten(3, (-1, *self.stride))
        sizes = zip(self.stride, self.before, self.images.shape[2:], strict=True)
        parts: Iterable[tuple[int, ...]]
        if all(before % step == size % step == 0 for step, before, size in sizes):
            source, steps, parts = tiles_of(self.images, self.stride), (1, 1), [()]
        else:  # Pixel by pixel of a tile.
            source, steps = self.images.movedim(1, 3), self.stride
            parts = itertools.product(*map(range, self.stride))
        found = []
        for pixel in parts:
            ours: list[Any] = [slice(None)]
            theirs = [slice(None)]
            for axis, step in enumerate(steps):
                # Tile t begins with pixel, or tile, step t + offset of the source.
                within = pixel[axis] if pixel else 0
                offset = within - self.before[axis] * step // self.stride[axis]
                filled = -((offset - source.shape[1 + axis]) // step)
                start = max(first[axis], -(offset // step))
                stop = min(first[axis] + target.shape[1 + axis], self.size[axis], filled)
                stop = max(start, stop)
                ours.append(slice(start - first[axis], stop - first[axis]))
                theirs.append(slice(start * step + offset, stop * step + offset, step))
            index = (*ours, slice(None), *pixel)
            found.append((target[index], source[tuple(theirs)]))
        return found

    def cut(self, rows: Sequence[range], columns: Sequence[range]) -> Tensor:
        """Return (B, y, x, C Sy Sx), the tiles of each range after those of the one before."""
        counts = [list(map(len, ranges)) for ranges in (rows, columns)]
        # The values of a tile first in memory: copied in rows, not in tiles.
        piece = self.images.new_zeros(self.channels, len(self.images), *map(sum, counts))
        piece = piece.movedim(0, 3)
        for band, own_rows in zip(piece.split(counts[0], 1), rows, strict=True):
            for part, own_columns in zip(band.split(counts[1], 2), columns, strict=True):
                for target, source in self.overlaps(part, (own_rows.start, own_columns.start)):
                    target.copy_(source)
        return piece


# --- The types that matrix products run in.

SETTINGS = threading.RLock()  # which are of the process: threads take turns


def product_dtype(inputs: Tensor) -> torch.dtype:
    """The type of the layer's own product; float32 where it cannot be summed in float32.

    A sum rounded to 16 bits is useless: its inverse would be far off (docs/tract.md).
    """
    device = inputs.device.type
    if inputs.dtype == torch.float64:
        return torch.float64
    if device not in ("cpu", "cuda"):
        return torch.float32
    on = torch.is_autocast_enabled(device)
    wanted = torch.get_autocast_dtype(device) if on else inputs.dtype
    if device == "cpu" and not (wanted == torch.bfloat16 and _cpu_sums_bfloat16()):
        return torch.float32
    return wanted


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that products of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def float32_factors(device: str, precision: str = "ieee") -> Iterator[None]:
    """Let matrix products of float32 round their factors to `precision` ("ieee": not at all).

    Whatever the user allows his own: `torch.set_float32_matmul_precision("medium")` would round the
    sums of products, of which G is made.
    """
    settings = _settings(device)
    if settings is None:  # torch 2.8
        read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        precision = "highest"
    else:
        read = functools.partial(getattr, settings, "fp32_precision")
        write = functools.partial(setattr, settings, "fp32_precision")
    with SETTINGS:
        before = read()
        if (before, precision) == ("none", "ieee"):  # no setting, which rounds nothing either
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
    """What holds `fp32_precision` of a device's matrix products: torch 2.9 and newer."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    settings = getattr(backend, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None


CHUNK_BYTES = {"cpu": 4 * 2**20}  # worked on at once: what a cache holds
CHUNK_BYTES_ELSEWHERE = 32 * 2**20
# Blocks, or rows, in one product: sums of few terms round less, and run in parallel.
SLICE_BLOCKS = 2048
SLICE_ROWS = 4096

WIDE = 36  # values of a block, from where the Fourier transform is faster than the products
FEW = 0.5  # of the images' values, up to which it does not take too much memory


def lag_gram(
    canvas: Canvas, kernel: tuple[int, int], outputs: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Sum x x^T over all windows x of the canvas, products in `dtype`.

    Args:
        canvas: its size is outputs + kernel - 1.
        kernel: (Ky, Kx), in tiles.
        outputs: how many windows there are along Y and X.
        dtype: what the products run in; sums are float32, or float64 if that is float64.

    Returns:
        (Ky, Ky, Kx, Kx, C, C): taps i, i' along Y, j, j' along X, and channels c, c'.
    """
    (ky, kx), channels = kernel, canvas.channels
    if not (canvas.filled(0) and canvas.filled(1)):
        return canvas.images.new_zeros(ky, ky, kx, kx, channels, channels, dtype=sum_dtype(dtype))
    forward = _lag_sums(canvas, kernel, dtype)
    ends = [_ends(canvas, axis, kernel[axis] - 1, outputs[axis]) for axis in range(2)]
    num_ends = [sum(map(len, each)) for each in ends]
    lags = [2 * k - 1 for k in kernel]
    shape = [n + count * count for n, count in zip(lags, num_ends, strict=True)]
    # All positions at every lag, and the pairs of end rows; for each, the same along X.
    sums = forward.new_zeros(*shape, channels, channels)
    sums[ky - 1 : lags[0], : lags[1]] = forward
    # A sum at lag (-dy, -dx) of (c, c') is that at (dy, dx) of (c', c).
    sums[: ky - 1, : lags[1]] = forward[1:].flip(0, 1).mT

    def cut(rows: Sequence[range], columns: Sequence[range]) -> Tensor:
        """(B, y, x, C), rounded as the products' factors are."""
        return canvas.cut(rows, columns).to(dtype).to(sums.dtype)

    if num_ends[0]:
        rows = cut(ends[0], [canvas.filled(1)])
        pairs = _end_sums(rows.transpose(1, 2), kx)  # (lag, E, C, E, C)
        sums[lags[0] :, : lags[1]] = pairs.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if num_ends[1]:
        pairs = _end_sums(cut([canvas.filled(0)], ends[1]), ky)  # (lag, E, C, E, C)
        sums[: lags[0], lags[1] :] = pairs.permute(0, 1, 3, 2, 4).flatten(1, 2)
    if num_ends[0] and num_ends[1]:
        corners = cut(*ends).flatten(1)  # (B, E E' C)
        pairs = (corners.T @ corners).view(2 * (*num_ends, channels))
        sums[lags[0] :, lags[1] :] = pairs.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(0, 1)
    tap_pairs = _tap_pairs if sums.device.type != "cpu" else _tap_pairs_of_cpu
    weights_y, weights_x = (
        tap_pairs(k, first, range(last.start - o, last.stop - o), sums.dtype, sums.device)
        for k, o, (first, last) in zip(kernel, outputs, ends, strict=True)
    )
    along_y = (weights_y @ sums.flatten(1)).view(ky * ky, -1, channels * channels)
    return (weights_x @ along_y).view(ky, ky, kx, kx, channels, channels)


def _ends(canvas: Canvas, axis: int, count: int, outputs: int) -> tuple[range, range]:
    """The first and the last `count` rows (columns) of a canvas, of those that hold a pixel."""
    filled = canvas.filled(axis)
    first = range(filled.start, max(filled.start, min(count, filled.stop)))
    start = max(outputs, filled.start)
    return first, range(start, max(start, filled.stop))


def _end_sums(strip: Tensor, kernel: int) -> Tensor:
    """Return (2 K - 1, E, C, E, C), the lag sums along L of a strip (B, L, E, C).

    One sequence of all images, K - 1 zeros after each, in slices.
    """
    num_images, length, *values = strip.shape
    num_values, padded = math.prod(values), length + kernel - 1
    slices = -(-num_images * padded // SLICE_ROWS)
    per_slice = -(-num_images * padded // slices)
    total = slices * per_slice
    sequence = strip.new_zeros(total + kernel - 1, num_values)
    place = sequence[: num_images * padded].view(num_images, padded, *values)
    place[:, :length] = strip
    left = sequence[:total].view(slices, per_slice, num_values).mT
    shifted = [sequence[lag : lag + total].view_as(left.mT) for lag in range(kernel)]
    forward = torch.stack([torch.bmm(left, right).sum(0) for right in shifted])
    both = torch.cat([forward[1:].flip(0).mT, forward])
    return both.view(-1, *values, *values)


def _lag_sums(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return (Ky, 2 Kx - 1, C, C): sum z[y, x, c] z[y + dy, x + dx, c'] over B, y, x.

    dy = 0..Ky-1, dx = -(Kx-1)..Kx-1, and z is zero outside the canvas.
    """
    wide = 2 * (kernel[1] - 1) * canvas.channels >= WIDE
    on_cpu = canvas.images.device.type == "cpu"
    # The products of all frequencies, of 2 C values each: few beside the images.
    num_products = (canvas.size[1] + kernel[1]) // 2 * kernel[0] * (2 * canvas.channels) ** 2
    few = num_products <= FEW * canvas.images.numel()
    if wide and few and on_cpu and dtype == torch.float32:
        return _lag_sums_by_fourier(canvas, kernel)
    return _lag_sums_by_products(canvas, kernel, dtype)


def _lag_sums_by_fourier(canvas: Canvas, kernel: tuple[int, int]) -> Tensor:
    """Along x by the Fourier transform of every row, along y by products of the transforms.

    A lag along x is a factor exp(2 pi i f dx / N) of frequency f, and a lag along y one of rows: at
    each frequency, the products of all channels over all rows, dy apart.
    """
    (ky, kx), channels, num_images = kernel, canvas.channels, len(canvas.images)
    rows, columns = canvas.filled(0), canvas.filled(1)
    length = _fast_length(len(columns) + kx - 1)
    frequencies = length // 2 + 1
    # The rows, their transforms and those in order are in use at once: of some images, or of some
    # rows of one.
    row_bytes = 3 * length * channels * 4
    at_once = per_chunk(num_images, len(rows) * row_bytes, "cpu")
    height = per_chunk(len(rows), row_bytes, "cpu")
    met = height + ky - 1  # with the rows that they meet, or as many of zeros
    given = min(met, len(rows))
    # The rows of a channel, which the transform wants dense, then the channels of a frequency,
    # which the products want dense.
    lines = canvas.images.new_zeros(at_once, given, channels, length, dtype=torch.float32)
    place = lines[..., : len(columns)].movedim(2, 3)
    spectra = lines.new_empty(frequencies, at_once, met, channels, dtype=torch.complex64)
    spectra[:, :, given:] = 0
    products = lines.new_zeros(ky, frequencies, 2 * channels, 2 * channels)
    tops = [(top, canvas.overlaps(place, (top, columns.start))) for top in rows[::height]]
    sums = products.unbind()  # of a dy each

    @functools.cache
    def operands(count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Where the transforms of some images go, and the products' factors for every dy."""
        own = spectra[:, :count]
        values = torch.view_as_real(own).flatten(3).flatten(1, 2)
        span = values.shape[1] - (ky - 1)
        shifted = [values[:, dy : dy + span] for dy in range(ky)]
        # As numbers of 8 bytes: copied twice as fast as complex ones.
        return own[:, :, :given].view(torch.float64), shifted[0].mT, shifted

    for first in range(0, num_images, at_once):
        count = min(at_once, num_images - first)
        ordered, left, shifted = operands(count)
        for top, overlaps in tops:
            if height < len(rows) and (top == rows.start or top + given >= rows.stop):
                lines.zero_()
            for target, source in overlaps:
                target[:count].copy_(source[first : first + count])
            transformed = torch.fft.rfft(lines[:count]).movedim(-1, 0)
            ordered.copy_(transformed.view(torch.float64))
            for own, right in zip(sums, shifted, strict=True):
                own.baddbmm_(left, right)
    return _sums_of_spectra(products, channels, kx, length)


def _sums_of_spectra(products: Tensor, channels: int, kernel: int, length: int) -> Tensor:
    """Return (Ky, 2 Kx - 1, C, C), lags along x, of products (Ky, F, 2 C, 2 C) of spectra.

    2 C are the real and the imaginary part of every channel; the lines had `length` values.
    """
    parts = products.unflatten(3, (channels, 2)).unflatten(2, (channels, 2))
    real = parts[:, :, :, 0, :, 0] + parts[:, :, :, 1, :, 1]
    imaginary = parts[:, :, :, 0, :, 1] - parts[:, :, :, 1, :, 0]
    sums = torch.fft.irfft(torch.complex(real, imaginary), length, dim=1)
    return torch.cat([sums[:, length - kernel + 1 :], sums[:, :kernel]], dim=1)


def _fast_length(least: int) -> int:
    """The least number from `least` on without prime factors above 7."""
    while 210 ** least.bit_length() % least:
        least += 1
    return least


def _lag_sums_by_products(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Matrix products of the batch with itself, shifted.

    With Kx - 1 zeros after every row and Ky - 1 rows of zeros after every image, the batch is one
    sequence and (dy, dx) one lag. A block of 2 (Kx - 1) positions meets its 2 Kx - 1 lags inside
    the two blocks that begin Kx - 1 before it: two products for all of them.
    """
    (ky, kx), images, size = kernel, canvas.images, canvas.size
    channels, num_images = canvas.channels, len(images)
    height, width = size[0] + ky - 1, size[1] + kx - 1
    block = max(2 * (kx - 1), 1)
    image_bytes = height * width * channels * dtype.itemsize
    at_once = per_chunk(num_images, image_bytes, images.device.type)
    blocks = -(-at_once * height * width // block)
    slices = -(-blocks // SLICE_BLOCKS)
    per_slice = -(-blocks // slices)
    # Kx - 1 zeros stand before; after come those the last block meets at the largest lag.
    length = kx - 1 + slices * per_slice * block + (ky - 1) * width + 2 * block
    sequence = images.new_zeros(length, channels, dtype=dtype)

    def blocks_from(position: int) -> Tensor:
        """(slices, blocks, 2 (Kx-1) C)"""
        shape = (slices, per_slice, block * channels)
        strides = (per_slice * block * channels, block * channels, 1)
        return sequence.as_strided(shape, strides, position * channels)

    own = sequence[kx - 1 : kx - 1 + at_once * height * width]
    place = own.view(at_once, height, width, channels)[:, : size[0], : size[1]]
    overlaps = canvas.overlaps(place, (0, 0))
    products = images.new_zeros(ky, block * channels, 2, block * channels, dtype=sum_dtype(dtype))
    left = blocks_from(kx - 1).mT
    halves = list(itertools.product(range(ky), range(2)))
    met = [blocks_from(dy * width + half * block) for dy, half in halves]
    for first in range(0, num_images, at_once):
        count = min(at_once, num_images - first)
        for target, source in overlaps:
            target[:count].copy_(source[first : first + count])
        place[count:].zero_()
        for (dy, half), right in zip(halves, met, strict=True):
            products[dy, :, half] += batch_product(left, right).sum(0)
    # Position r of the block and position r + lag of the two: a diagonal for each lag.
    row = 2 * block * channels
    diagonals = products.as_strided(
        (ky, block, channels, 2 * kx - 1, channels),
        (block * channels * row, channels * row + channels, row, channels, 1),
    )
    return diagonals.sum(1).transpose(1, 2)


def per_chunk(count: int, item_bytes: int, device: str, least_bytes: int = 0) -> int:
    """How many of `count` images or rows are worked on at once: chunks of about one size."""
    limit = max(CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE), least_bytes)
    chunks = -(-count // max(1, limit // max(item_bytes, 1)))
    return max(1, -(-count // max(chunks, 1)))


def batch_product(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm, whose result is not rounded to a 16-bit type of the factors."""
    if left.dtype.itemsize > 2:
        return torch.bmm(left, right)
    return torch.bmm(left, right, torch.float32)  # CUDA's alone


def _tap_pairs(
    kernel: int, first: range, last: range, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (K^2, 2 K - 1 + E^2): what each pair of taps (i, i') sums up.

    +1 for its lag i' - i over all rows; -1 for every pair of rows of that lag which the taps do not
    meet: the first i rows (i' for the other), and those after the last window.

    Args:
        first: those of the first K - 1 rows that are among the E, counted from the first row.
        last: those of the last K - 1, counted from the first that tap 0 does not meet.
    """
    # Made on the device: a copy to it would wait for it.
    taps = torch.arange(kernel, device=device)
    lag = (taps - taps[:, None])[..., None]
    own = lag == torch.arange(1 - kernel, kernel, device=device)
    ends = [torch.arange(each.start, each.stop, device=device) for each in (first, last)]
    rows = torch.cat(ends)
    is_last = torch.arange(len(rows), device=device) >= len(first)
    apart = lag[..., None] == rows - rows[:, None]
    taps = taps.view(kernel, 1, 1)
    unmet = torch.where(is_last, rows >= taps, rows < taps)[..., None]
    pairs = apart & unmet & (is_last == is_last[:, None])
    return torch.cat([own.to(dtype), -pairs.flatten(2).to(dtype)], dim=2).flatten(0, 1)


_tap_pairs_of_cpu = functools.lru_cache(_tap_pairs)
