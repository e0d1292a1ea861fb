"""The exact Gram matrix of what a layer multiplies, and its damped inverse."""

# B images, C channels, R rows the layer multiplies, N inputs a row, O outputs

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

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

BLOCK_COLUMNS = 128  # wider products are computed in blocks, half of them by symmetry
CHUNK_OF_SUM = 8  # a chunk of rows has at least so many times the size of the sum
EXACT_SIZE = 256  # factors of matrices up to this N are float64, at no cost that matters


def gram_matrix(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, int]:
    """Sum x x^T over the rows x that `layer` multiplies with its weight.

    The layer is a Linear or an ungrouped Conv2d of any stride, padding, padding mode and dilation,
    with inputs (..., N) or ([B,] C, H, W). The rows of a convolution are its unfolded windows,
    padding included, in the order of `weight.flatten(1)`. Only dilated convolutions are unfolded,
    a few images at a time.

    Sums are float32, or float64 for float64 inputs. Products run in the type of the inputs, or of
    autocast, where the device can sum them in float32: on CUDA, and for rows and patches on a CPU
    with bfloat16 instructions.

    Returns:
        The (N, N) sum, and the number R of rows in it.
    """
    inputs, dtype = inputs.detach(), product_dtype(inputs)
    if isinstance(layer, nn.Linear):  # a 1 x 1 convolution of images with one pixel
        images = inputs.reshape(-1, layer.in_features, 1, 1)
        kernel, stride, dilation, padding = (1, 1), (1, 1), (1, 1), [0, 0, 0, 0]
    else:
        images = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)
        # Pairs, unless someone has set a number later.
        kernel, stride, dilation = map(_pair, (layer.kernel_size, layer.stride, layer.dilation))
        padding = _padding(layer, images.shape[-2], images.shape[-1])
        if layer.padding_mode != "zeros":
            images, padding = F.pad(images, padding, layer.padding_mode), [0, 0, 0, 0]
    if images.device.type == "cpu" and (kernel != stride or max(dilation) > 1):
        dtype = sum_dtype(dtype)  # the products are small, and rounding does not speed them up
    zeros = (padding[2] + padding[3], padding[0] + padding[1])
    sizes = zip(images.shape[2:], zeros, kernel, stride, dilation, strict=True)
    outputs = [max((size + z - d * (k - 1) - 1) // s + 1, 0) for size, z, k, s, d in sizes]
    gram = _gram_of_windows(images, kernel, stride, dilation, padding, outputs, dtype)
    return gram, len(images) * outputs[0] * outputs[1]


# A custom operator, which torch.compile does not trace into.
@torch.library.custom_op("tract_transfer::gram_of_windows", mutates_args=())
def _gram_of_windows(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the (N, N) sum of x x^T over the windows of (B, C, H, W) images.

    `padding` is left, right, top, bottom, of zeros; `outputs` counts windows along H and W.
    """
    num_inputs = images.shape[1] * kernel[0] * kernel[1]
    if len(images) * outputs[0] * outputs[1] == 0:
        return images.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
    device = images.device.type
    with torch.autocast(device, enabled=False), float32_factors(device):
        if max(dilation) == 1:
            return _gram_by_lags(images, kernel, stride, outputs, padding, dtype)
        gram = images.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
        image_bytes = outputs[0] * outputs[1] * num_inputs * dtype.itemsize
        for chunk in images.split(per_chunk(len(images), image_bytes, device)):
            padded = F.pad(chunk, padding)
            rows = F.unfold(padded, tuple(kernel), tuple(dilation), 0, tuple(stride)).mT
            gram += _product(rows.reshape(-1, num_inputs), dtype)
            del rows, padded  # before the next chunk is unfolded
        return gram


@_gram_of_windows.register_fake
def _(images: Tensor, kernel: Sequence[int], *arguments: Any) -> Tensor:
    num_inputs = images.shape[1] * kernel[0] * kernel[1]
    return images.new_empty(num_inputs, num_inputs, dtype=sum_dtype(arguments[-1]))


def _gram_by_lags(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    outputs: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the sum over undilated windows.

    Tiles of stride x stride pixels become channels. This makes the stride 1 and the kernel
    ceil(kernel / stride); taps beyond the real kernel are dropped at the end.
    """
    channels, (sy, sx) = images.shape[1], stride
    ky, kx = (-(-k // s) for k, s in zip(kernel, stride, strict=True))
    # If the tiles have taps to spare, tiles start at the first pixel, which saves copies.
    spare = [
        -zeros % s if -zeros % s <= -k % s else 0
        for zeros, k, s in zip((padding[2], padding[0]), kernel, stride, strict=True)
    ]
    before = (padding[2] + spare[0], padding[0] + spare[1])
    if (ky, kx) == (1, 1):
        height, width = outputs[0] * sy, outputs[1] * sx
        bottom, right = (
            max(0, end - first - size)
            for end, first, size in zip((height, width), before, images.shape[2:], strict=True)
        )
        if any((*before, bottom, right)):
            images = F.pad(images, (before[1], right, before[0], bottom))
        tiles = tiles_of(images[:, :, :height, :width], (sy, sx))  # one for every window
        gram = _sum_over_chunks(tiles, channels * sy * sx, dtype)
    else:
        size = (outputs[0] + ky - 1, outputs[1] + kx - 1)
        gram = lag_gram(Canvas(images, (sy, sx), before, size), (ky, kx), dtype)
    taps = gram.view(ky, ky, kx, kx, channels, sy, sx, channels, sy, sx)
    taps = taps.permute(4, 0, 5, 2, 6, 7, 1, 8, 3, 9)
    taps = taps.reshape(channels, ky * sy, kx * sx, channels, ky * sy, kx * sx)
    rows, columns = (slice(o, o + k) for o, k in zip(spare, kernel, strict=True))
    return taps[:, rows, columns, :, rows, columns].reshape(channels * kernel[0] * kernel[1], -1)


def _sum_over_chunks(parts: Tensor, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the (N, N) sum of x x^T over the rows of parts (P, ...), some parts at a time."""
    gram = parts.new_zeros(num_inputs, num_inputs, dtype=sum_dtype(dtype))
    device = parts.device.type
    factor_dtype = sum_dtype(dtype) if device == "cpu" else dtype
    part_bytes = parts[:1].numel() * factor_dtype.itemsize
    for chunk in parts.split(per_chunk(len(parts), part_bytes, device, CHUNK_OF_SUM * gram.nbytes)):
        # Contiguous in this order, so that reshape does not copy again.
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
        block = slice(first, first + BLOCK_COLUMNS)
        part = batch_product(rows[None, :, block].mT, rows[None, :, first:])[0]
        product[block, first:] = part
        product[first:, block] = part.T
    return product


def _padding(layer: nn.Conv2d, height: int, width: int) -> list[int]:
    """Return left, right, top, bottom."""
    if is_dynamic_same(layer):
        # TensorFlow's 'SAME': ceil(size / stride) outputs, an odd pixel goes to the end.
        padding: list[int] = []
        sizes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
        for size, kernel, stride, dilation in sizes:
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return padding
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return list(layer._reversed_padding_repeated_twice)
    rows, columns = _pair(layer.padding)
    return [columns, columns, rows, rows]


def is_dynamic_same(layer: nn.Module) -> bool:
    """Whether `layer` is timm's Conv2dSame, whose padding depends on the input's size."""
    forward = type(layer).forward
    return forward.__module__.startswith("timm.") and forward.__qualname__ == "Conv2dSame.forward"


class DampedFactor(NamedTuple):
    """The Cholesky `factor` (N, N) of x x^T / b + lam I.

    `health` holds three booleans: the matrix is finite, it is positive definite, and lam was large
    enough. Without the first two the update is zero. `damping` is what was added to the diagonal.
    """

    factor: Tensor
    health: Tensor
    damping: Tensor

    def gram(self) -> Tensor:
        """Return x x^T / b, (N, N), in float64 on the CPU."""
        factor = self.factor.double().cpu()
        gram = factor @ factor.T
        gram.diagonal().sub_(self.damping.double().cpu())
        return gram

    def times(self, gradient: Tensor) -> Tensor:
        """Return gradient (O, ...) (x x^T / b + lam I)^-1, in the shape of `gradient`."""
        columns = gradient.reshape(len(gradient), -1).T.to(self.factor.dtype)
        with float32_factors(gradient.device.type):
            solved = torch.cholesky_solve(columns, self.factor).T.reshape(gradient.shape)
        return torch.where(self.health[:2].all(), solved, 0)

    def undo(self, treated: Tensor) -> Tensor:
        """Return the gradient of which `times` returned `treated`, in float64 on the CPU."""
        factor = self.factor.double().cpu()
        columns = treated.reshape(len(treated), -1).T.double().cpu()
        return (factor @ (factor.T @ columns)).T.reshape(treated.shape)


def damped_factor(gram: Tensor, lam: float, lam_mode: str) -> DampedFactor:
    """Factorise gram + lam I of a mean of x x^T, (N, N), without waiting for the device.

    The damping is lam, or with "relative" lam times the mean of the diagonal, but at least the
    error that rounding makes in an eigenvalue, 4 eps of the trace. So a matrix without full rank
    stays positive. For inputs of standard deviation 1 that is less than 1 % of any usual lam.
    """
    rounding = 4 * torch.finfo(gram.dtype).eps
    exact = len(gram) <= EXACT_SIZE and gram.device.type in ("cpu", "cuda")
    matrix = gram.to(torch.float64 if exact else gram.dtype, copy=True)
    is_finite = matrix.sum().isfinite()
    diagonal = matrix.diagonal()
    trace = diagonal.sum()
    is_relative = lam_mode == "relative"
    requested = lam * trace / len(gram) if is_relative else torch.full_like(trace, lam)
    damping = torch.maximum(requested, rounding * trace)
    # For blank images under a relative lam any positive matrix serves: the gradient is 0 too.
    added = torch.where(damping > 0, damping, 1)
    diagonal += added
    with float32_factors(gram.device.type):
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return DampedFactor(factor, torch.stack([is_finite, failed == 0, damping <= requested]), added)
