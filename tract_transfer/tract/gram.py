"""The exact Gram matrix of what a layer multiplies."""

# B images, C channels, R rows the layer multiplies, N inputs a row

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 32 * 2**20  # unfolded rows held at once


def gram_matrix(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, int]:
    """Sum x x^T over the rows x that `layer` multiplies with its weight.

    A convolution's rows are its unfolded windows, in the order of `weight.flatten(1)`, padding
    included: a zero the layer multiplies is a zero in the sum.

    Args:
        layer: a Linear or an ungrouped Conv2d of any stride, padding, padding mode and dilation.
        inputs: what the layer's forward is given, (..., N) or ([B,] C, H, W).

    Returns:
        The (N, N) sum in float32 (float64 for float64 inputs), and R, how many rows it holds.
    """
    inputs = inputs.detach()
    if inputs.dtype != torch.float64:
        inputs = inputs.float()
    with torch.autocast(inputs.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            rows = inputs.reshape(-1, layer.in_features)
            return rows.T @ rows, len(rows)
        images = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)
        return _convolution_gram(layer, images)


def _convolution_gram(layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, int]:
    num_inputs = layer.weight[0].numel()
    gram = images.new_zeros(num_inputs, num_inputs)
    num_rows = 0
    num_values = images.shape[1:].numel() // layer.in_channels * num_inputs  # of stride 1
    for chunk in images.split(max(1, CHUNK_BYTES // (num_values * images.element_size()))):
        padded = pad_as_the_layer_does(layer, chunk)
        windows = F.unfold(padded, _pair(layer.kernel_size), layer.dilation, 0, layer.stride)
        rows = windows.transpose(1, 2).reshape(-1, num_inputs)
        gram.addmm_(rows.T, rows)
        num_rows += len(rows)
    return gram, num_rows


def pad_as_the_layer_does(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Pad (B, C, H, W) images by the layer's own padding and padding mode."""
    if is_dynamic_same(layer):
        padding = _dynamic_same_padding(layer, images.shape[-2], images.shape[-1])
    else:
        # [left, right, top, bottom]; nn.Conv2d resolves numbers, 'same' and 'valid' into it.
        padding = list(layer._reversed_padding_repeated_twice)
    if not any(padding):
        return images
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(images, padding, mode=mode)


def is_dynamic_same(layer: nn.Module) -> bool:
    """Whether `layer` is timm's Conv2dSame, which pads in its forward by the size it is given."""
    return any(cls.__name__ == "Conv2dSame" for cls in type(layer).__mro__)


def _dynamic_same_padding(layer: nn.Conv2d, height: int, width: int) -> list[int]:
    """TensorFlow's 'SAME': ceil(size / stride) outputs, the odd pixel at the end."""
    padding: list[int] = []
    sizes = zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for size, kernel, stride, dilation in sizes:
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return padding


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]
