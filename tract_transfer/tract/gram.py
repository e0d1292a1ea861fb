"""The exact Gram matrix of what a layer multiplies."""

# B images, C channels, R rows the layer multiplies, N inputs a row

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_transfer.tract.lags import (
    Canvas,
    batch_product,
    float32_factors,
    lag_gram,
    per_chunk,
    product_dtype,
    sum_dtype,
    tiles_of,
)

logger = logging.getLogger(__name__)

BLOCK_COLUMNS = 128  # a wider product is made of blocks, those below the diagonal by symmetry
CHUNK_OF_SUM = 8  # rows worked on at once are at least so many times their sum's size


def gram_matrix(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, int]:
    """Sum x x^T over the rows x that `layer` multiplies with its weight.

    A convolution's rows are its unfolded windows, in the order of `weight.flatten(1)`, padding
    included: a zero the layer multiplies is a zero in the sum. Nothing is unfolded but the windows
    of a dilated convolution, a few images at a time.

    Everything is summed in float32, from float64 inputs in float64. The products run in the type
    of the inputs, under autocast in autocast's, where the device can sum them in float32: CUDA, and
    for rows and patches a CPU with instructions for bfloat16.

    Args:
        layer: a Linear or an ungrouped Conv2d of any stride, padding, padding mode and dilation.
        inputs: what the layer's forward is given, (..., N) or ([B,] C, H, W).

    Returns:
        The (N, N) sum, and R, how many rows it holds.
    """
    inputs, dtype = inputs.detach(), product_dtype(inputs)
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, layer.in_features)
        return _gram_of_rows(rows, dtype), len(rows)
    images = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)
    padding = _padding(layer, images.shape[-2], images.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    kernel, stride, dilation = map(_two, (layer.kernel_size, layer.stride, layer.dilation))
    gram = _gram_of_windows(images, kernel, stride, dilation, padding, mode, dtype)
    outputs = _num_outputs(images, kernel, stride, dilation, padding)
    return gram, len(images) * outputs[0] * outputs[1]


# Operators of torch, so that torch.compile takes them whole.
@torch.library.custom_op("tract_transfer::gram_of_rows", mutates_args=())
def _gram_of_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (N, N) sum of x x^T over (R, N) rows."""
    device = rows.device.type
    with torch.autocast(device, enabled=False), float32_factors(device):
        return _sum_over_chunks(rows, rows.shape[1], dtype)


@torch.library.custom_op("tract_transfer::gram_of_windows", mutates_args=())
def _gram_of_windows(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the (N, N) sum of x x^T over the windows of (B, C, H, W) images.

    `padding` is left, right, top, bottom.
    """
    num_inputs = images.shape[1] * kernel[0] * kernel[1]
    outputs = _num_outputs(images, kernel, stride, dilation, padding)
    if len(images) * outputs[0] * outputs[1] == 0:
        return images.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
    device = images.device.type
    if device == "cpu" and (list(kernel) != list(stride) or max(dilation) > 1):
        dtype = sum_dtype(dtype)  # small products, which rounding would not make faster
    with torch.autocast(device, enabled=False), float32_factors(device):
        if max(dilation) == 1:
            return _gram_by_lags(images, kernel, stride, outputs, padding, padding_mode, dtype)
        logger.debug("TrAct unfolds a dilated convolution's input, a few images at a time.")
        gram = images.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
        image_bytes = outputs[0] * outputs[1] * num_inputs * dtype.itemsize
        for chunk in images.split(per_chunk(len(images), image_bytes, device)):
            padded = F.pad(chunk, padding, padding_mode)
            rows = F.unfold(padded, tuple(kernel), tuple(dilation), 0, tuple(stride)).mT
            gram += _product(rows.reshape(-1, num_inputs), dtype)
            del rows, padded  # before the next
        return gram


@_gram_of_rows.register_fake
def _(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(rows.shape[1], rows.shape[1], dtype=sum_dtype(dtype))


@_gram_of_windows.register_fake
def _(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    dtype: torch.dtype,
) -> Tensor:
    num_inputs = images.shape[1] * kernel[0] * kernel[1]
    return images.new_empty(num_inputs, num_inputs, dtype=sum_dtype(dtype))


def _gram_by_lags(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    outputs: tuple[int, int],
    padding: Sequence[int],
    padding_mode: str,
    dtype: torch.dtype,
) -> Tensor:
    """The sum over undilated windows.

    Tiles of stride x stride pixels taken for channels make the stride 1 and the kernel
    ceil(kernel / stride); taps beyond the kernel's own are left out at the end.
    """
    channels, (sy, sx) = images.shape[1], stride
    if padding_mode != "constant":
        images, padding = F.pad(images, padding, padding_mode), (0, 0, 0, 0)
    ky, kx = (-(-k // s) for k, s in zip(kernel, stride, strict=True))
    # Where the tiles have taps to spare, the image begins with one: fewer copies.
    spare = [
        -zeros % s if -zeros % s <= -k % s else 0
        for zeros, k, s in zip((padding[2], padding[0]), kernel, stride, strict=True)
    ]
    before = (padding[2] + spare[0], padding[0] + spare[1])
    if (ky, kx) == (1, 1):
        tiles = _tiles(images, (sy, sx), before, outputs)
        found = _sum_over_chunks(tiles, channels * sy * sx, dtype)
    else:
        size = (outputs[0] + ky - 1, outputs[1] + kx - 1)
        found = lag_gram(Canvas(images, (sy, sx), before, size), (ky, kx), outputs, dtype)
    taps = found.view(ky, ky, kx, kx, channels, sy, sx, channels, sy, sx)
    taps = taps.permute(4, 0, 5, 2, 6, 7, 1, 8, 3, 9)
    taps = taps.reshape(channels, ky * sy, kx * sx, channels, ky * sy, kx * sx)
    rows, columns = (slice(o, o + k) for o, k in zip(spare, kernel, strict=True))
    return taps[:, rows, columns, :, rows, columns].reshape(channels * kernel[0] * kernel[1], -1)


def _tiles(
    images: Tensor, stride: tuple[int, int], before: tuple[int, int], outputs: tuple[int, int]
) -> Tensor:
    """Return (B, Y, X, C, Sy, Sx), a tile for every window: a copy where zeros are added."""
    (sy, sx), (top, left) = stride, before
    height, width = outputs[0] * sy, outputs[1] * sx
    bottom, right = (
        max(0, end - first - n)
        for end, first, n in zip((height, width), before, images.shape[2:], strict=True)
    )
    if any((left, right, top, bottom)):
        images = F.pad(images, (left, right, top, bottom))
    images = images[:, :, :height, :width]
    return tiles_of(images, stride)


def _sum_over_chunks(parts: Tensor, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the (N, N) sum of x x^T over the (R, N) rows in parts (P, ...), some at a time."""
    gram = parts.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
    factor_dtype = sum_dtype(dtype) if parts.device.type == "cpu" else dtype
    part_bytes = parts[:1].numel() * factor_dtype.itemsize
    at_once = per_chunk(
        len(parts), part_bytes, parts.device.type, CHUNK_OF_SUM * gram.numel() * gram.itemsize
    )
    for chunk in parts.split(at_once):
        # Dense in this order, so that reshape does not copy once more.
        chunk = chunk.to(factor_dtype, memory_format=torch.contiguous_format)
        gram += _product(chunk.reshape(-1, num_inputs), dtype)
    return gram


def _product(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows^T rows, (N, N), of (R, N) rows rounded to `dtype`."""
    if rows.device.type == "cpu" and dtype == torch.bfloat16:
        with float32_factors("cpu", "bf16"):
            return rows.T @ rows
    rows = rows.to(dtype)
    num_inputs = rows.shape[1]
    product = rows.new_empty(num_inputs, num_inputs, dtype=sum_dtype(dtype))
    for first in range(0, num_inputs, BLOCK_COLUMNS):
        own = slice(first, first + BLOCK_COLUMNS)
        part = batch_product(rows[None, :, own].mT, rows[None, :, first:])[0]
        product[own, first:] = part
        product[first:, own] = part.T
    return product


def _num_outputs(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> tuple[int, int]:
    """How many windows there are along the height and the width."""
    height = images.shape[2] + padding[2] + padding[3] - dilation[0] * (kernel[0] - 1) - 1
    width = images.shape[3] + padding[0] + padding[1] - dilation[1] * (kernel[1] - 1) - 1
    return max(height // stride[0] + 1, 0), max(width // stride[1] + 1, 0)


def _padding(layer: nn.Conv2d, height: int, width: int) -> list[int]:
    """Return left, right, top, bottom."""
    if is_dynamic_same(layer):
        return _dynamic_same_padding(layer, height, width)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return list(layer._reversed_padding_repeated_twice)
    rows, columns = _two(layer.padding)
    return [columns, columns, rows, rows]


def _two(size: Any) -> list[int]:
    """What nn.Conv2d keeps as a pair, and takes as a number where it was set later."""
    return [size, size] if isinstance(size, int) else list(size)


def is_dynamic_same(layer: nn.Module) -> bool:
    """Whether `layer` is timm's Conv2dSame, which pads in its forward by the size it is given."""
    forward = type(layer).forward
    return forward.__module__.startswith("timm.") and forward.__qualname__ == "Conv2dSame.forward"


def _dynamic_same_padding(layer: nn.Conv2d, height: int, width: int) -> list[int]:
    """TensorFlow's 'SAME': ceil(size / stride) outputs, the odd pixel at the end."""
    padding: list[int] = []
    sizes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for size, kernel, stride, dilation in sizes:
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return padding
