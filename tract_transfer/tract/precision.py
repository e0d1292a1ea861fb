"""The types that matrix products run in."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
