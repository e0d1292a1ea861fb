"""The Gram matrix of a stride-1 convolution's unfolded input, without unfolding it.

Two taps i and i' of the kernel multiply the same values, i' - i apart, at almost all positions. So
the sums over all positions depend on the lag i' - i alone: an autocorrelation. What a tap never
meets, a few rows at the top and at the bottom (columns at the sides), is summed by pairs of rows
and taken away.
"""

# B images, Y x X positions, C channels, K kernel size, L = 2 K - 1 lags, S slices, Q blocks a slice

import itertools
import math

import torch
from torch import Tensor

from tract_transfer.tract.canvas import Canvas
from tract_transfer.tract.precision import sum_dtype

CHUNK_BYTES = {"cpu": 4 * 2**20}  # worked on at once: what a cache holds
CHUNK_BYTES_ELSEWHERE = 32 * 2**20
# Blocks, or rows, in one product: sums of few terms round less, and run in parallel.
SLICE_BLOCKS = 2048
SLICE_ROWS = 4096

WIDE = 36  # values of a block, from where the Fourier transform is faster than the products


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
    (ky, kx), (oy, ox) = kernel, outputs
    my, mx = ky - 1, kx - 1
    lags = _lag_sums(canvas, kernel, dtype)
    channels = lags.shape[-1]
    # A sum at lag (-dy, -dx) of (c, c') is that at (dy, dx) of (c', c).
    lags = torch.cat([lags[1:].flip(0, 1).mT, lags])
    sums = lags.new_zeros(2 * ky - 1 + 2 * my * my, 2 * kx - 1 + 2 * mx * mx, channels, channels)
    sums[: 2 * ky - 1, : 2 * kx - 1] = lags

    def ends(count: int, last: int, along: int) -> list[Tensor]:
        """The first and the last rows (columns), rounded as the products' are: (B, Y, X, C)."""
        pieces = [slice(first, first + count) for first in (0, last)]
        cuts = [(piece, slice(None)) if along == 0 else (slice(None), piece) for piece in pieces]
        return [canvas.cut(*cut).to(dtype).to(lags.dtype) for cut in cuts]

    if my:
        rows = ends(my, oy, along=0)
        pairs = _end_sums([end.transpose(1, 2) for end in rows], kx)  # (E, lag, my, C, my, C)
        sums[2 * ky - 1 :, : 2 * kx - 1] = pairs.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    if mx:
        pairs = _end_sums(ends(mx, ox, along=1), ky)  # (E, lag, mx, C, mx, C)
        pairs = pairs.permute(1, 0, 2, 4, 3, 5).flatten(1, 3)
        sums[: 2 * ky - 1, 2 * kx - 1 :] = pairs
    if my and mx:
        corners = [end[:, :, x : x + mx].flatten(1) for end in rows for x in (0, ox)]
        stacked = torch.stack(corners)  # (E E', B, my mx C)
        pairs = torch.bmm(stacked.mT, stacked).view(2, 2, my, mx, channels, my, mx, channels)
        pairs = pairs.permute(0, 2, 5, 1, 3, 6, 4, 7)
        sums[2 * ky - 1 :, 2 * kx - 1 :] = pairs.flatten(3, 5).flatten(0, 2)
    weights_y, weights_x = (_tap_pairs(k, sums.dtype, sums.device) for k in kernel)
    along_y = (weights_y @ sums.flatten(1)).view(ky * ky, -1, channels * channels)
    return (weights_x @ along_y).view(ky, ky, kx, kx, channels, channels)


def _end_sums(strips: list[Tensor], kernel: int) -> Tensor:
    """Return (E, 2 K - 1, m, C, m, C), the lag sums along L of E strips (B, L, m, C).

    One sequence of all strips, K - 1 zeros after every row, in slices.
    """
    num_images, length, *values = strips[0].shape
    num_values, padded = math.prod(values), length + kernel - 1
    slices = -(-num_images * padded // SLICE_ROWS)
    per_slice = -(-num_images * padded // slices)
    total = len(strips) * slices * per_slice
    sequence = strips[0].new_zeros(total + kernel - 1, num_values)
    for strip, own in zip(strips, sequence[:total].chunk(len(strips)), strict=True):
        place = own[: num_images * padded].view(num_images, padded, *values)
        place[:, :length] = strip
    left = sequence[:total].view(-1, per_slice, num_values).mT
    found = []
    for lag in range(kernel):
        right = sequence[lag : lag + total].view(-1, per_slice, num_values)
        found.append(torch.bmm(left, right).view(len(strips), slices, num_values, -1).sum(1))
    forward = torch.stack(found, 1)
    both = torch.cat([forward[:, 1:].flip(1).mT, forward], 1)
    return both.view(*both.shape[:2], *values, *values)


def _lag_sums(canvas: Canvas, kernel: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return (Ky, 2 Kx - 1, C, C): sum z[y, x, c] z[y + dy, x + dx, c'] over B, y, x.

    dy = 0..Ky-1, dx = -(Kx-1)..Kx-1, and z is zero outside the canvas.
    """
    wide = 2 * (kernel[1] - 1) * canvas.channels >= WIDE
    on_cpu = canvas.images.device.type == "cpu"
    if wide and on_cpu and dtype == torch.float32:
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
    for first, top in itertools.product(range(0, num_images, at_once), rows[::height]):
        count = min(at_once, num_images - first)
        if height < len(rows) and (top == rows.start or top + given >= rows.stop):
            lines.zero_()
        canvas.copy_to(place[:count], slice(first, first + count), (top, columns.start))
        transformed = torch.fft.rfft(lines[:count]).movedim(-1, 0)
        # As numbers of 8 bytes: copied twice as fast as complex ones.
        spectra[:, :count, :given].view(torch.float64).copy_(transformed.view(torch.float64))
        values = torch.view_as_real(spectra[:, :count]).flatten(3).flatten(1, 2)
        span = values.shape[1] - (ky - 1)
        left = values[:, :span].mT
        for dy in range(ky):
            products[dy].baddbmm_(left, values[:, dy : dy + span])
    parts = products.view(ky, frequencies, channels, 2, channels, 2)
    real = parts[:, :, :, 0, :, 0] + parts[:, :, :, 1, :, 1]
    imaginary = parts[:, :, :, 0, :, 1] - parts[:, :, :, 1, :, 0]
    sums = torch.fft.irfft(torch.complex(real, imaginary), length, dim=1)
    return torch.cat([sums[:, length - kx + 1 :], sums[:, :kx]], dim=1)


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
    products = images.new_zeros(ky, block * channels, 2, block * channels, dtype=sum_dtype(dtype))
    for first in range(0, num_images, at_once):
        count = min(at_once, num_images - first)
        canvas.copy_to(place[:count], slice(first, first + count), (0, 0))
        place[count:].zero_()
        left = blocks_from(kx - 1).mT
        for dy in range(ky):
            for half in range(2):
                met = blocks_from(dy * width + half * block)
                products[dy, :, half] += batch_product(left, met).sum(0)
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


def _tap_pairs(kernel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (K^2, 2 K - 1 + 2 (K-1)^2): what each pair of taps (i, i') sums up.

    +1 for its lag i' - i over all rows; -1 for every pair of rows of that lag which the taps do
    not meet: the first i rows (i' for the other), and those after the last window.
    """
    # Made on the device: a copy to it would wait for it.
    taps = torch.arange(kernel, device=device)
    lag = (taps - taps[:, None]).view(kernel, kernel, 1, 1)
    own = lag.view(kernel, kernel, 1) == torch.arange(1 - kernel, kernel, device=device)
    rows = taps[:-1]
    apart = lag == rows - rows[:, None]
    before = rows[:, None] < taps.view(kernel, 1, 1, 1)
    ends = [(apart & before).flatten(2), (apart & ~before).flatten(2)]
    return torch.cat([own.to(dtype), *(-end.to(dtype) for end in ends)], dim=2).flatten(0, 1)
