"""Augmentation policies for images, and mixup and CutMix for batches, by torchvision's v2.

A policy takes uint8 RGB (3, H, W). All its random numbers are from torch's global CPU generator,
which the loader seeds for every sample.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from tract_transfer.data.sampling import mix
from tract_transfer.registry import Registry

AUGMENTATIONS = Registry("AUGMENTATIONS")
# A config's `augment_args` are checked against these types.
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Byte = Annotated[int, Field(ge=0, le=255)]
Color = Annotated[list[Byte], Field(min_length=3, max_length=3)]


@AUGMENTATIONS.register("rand_augment")
def rand_augment(
    *,
    num_ops: Annotated[int, Field(ge=1)] = 2,
    magnitude: Annotated[int, Field(ge=0)] = 9,
    num_magnitude_bins: int = 31,
    interpolation: Interpolation = "nearest",
    fill: Color | None = None,
) -> v2.Transform:
    """RandAugment (Cubuk et al. 2020): `num_ops` operations of one magnitude in sequence.

    `fill` is the RGB in 0..255 of pixels from outside the image; None is black.
    """
    if magnitude >= num_magnitude_bins:
        largest = f"num_magnitude_bins - 1 = {num_magnitude_bins - 1}"
        raise ValueError(f"magnitude: must be at most {largest}, got {magnitude}.")
    mode = InterpolationMode(interpolation)
    return v2.RandAugment(num_ops, magnitude, num_magnitude_bins, mode, fill)


def _auto_augment(policy: AutoAugmentPolicy) -> Callable[..., v2.Transform]:
    def auto_augment(
        *, interpolation: Interpolation = "nearest", fill: Color | None = None
    ) -> v2.Transform:
        """AutoAugment with the policy found on this data set (Cubuk et al. 2019)."""
        return v2.AutoAugment(policy, InterpolationMode(interpolation), fill)

    return auto_augment


for _policy in AutoAugmentPolicy:  # cifar10, imagenet, svhn
    AUGMENTATIONS.register(f"auto_augment_{_policy.value}")(_auto_augment(_policy))


@AUGMENTATIONS.register("trivial_augment")
def trivial_augment(
    *,
    num_magnitude_bins: Annotated[int, Field(ge=2)] = 31,
    interpolation: Interpolation = "nearest",
    fill: Color | None = None,
) -> v2.Transform:
    """TrivialAugment, wide (Mueller and Hutter 2021): one operation of any magnitude."""
    return v2.TrivialAugmentWide(num_magnitude_bins, InterpolationMode(interpolation), fill)


@AUGMENTATIONS.register("three_augment")
def three_augment(
    *, solarize_threshold: int = 128, blur_sigma_px: Sequence[float] = (0.1, 2.0)
) -> v2.Transform:
    """3-Augment (DeiT III, section 3): grayscale, solarize or Gaussian blur, equally often.

    Args:
        solarize_threshold: in 0..255; values from it up are inverted.
        blur_sigma_px: smallest and largest standard deviation; the kernel extends to thrice that.
    """
    if len(blur_sigma_px) != 2 or not 0 < blur_sigma_px[0] <= blur_sigma_px[1]:
        raise ValueError(
            f"blur_sigma_px: must be the smallest and the largest, above 0, got {blur_sigma_px}."
        )
    low, high = blur_sigma_px
    blur = v2.GaussianBlur(2 * math.ceil(3 * high) + 1, (low, high))
    return v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(solarize_threshold, p=1.0), blur])


class BatchMix:
    """Mixes every image of a batch, and its target, with its neighbor.

    Strength, kind and rectangle are drawn once per iteration, for all its micro-batches and
    processes: a function of (seed, iteration) alone. Which images are neighbors depends on how the
    batch is divided, as images mix within a micro-batch of a process.

    Args:
        mixup_alpha: of the Beta distribution of mixup's strength (Zhang et al. 2018); 0 disables.
        cutmix_alpha: of the Beta distribution of CutMix's area (Yun et al. 2019); 0 disables.
        prob: probability of mixing the images of an iteration.
        switch_prob: probability of CutMix if both are enabled.
    """

    def __init__(
        self,
        num_classes: int,
        seed: int,
        *,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
    ) -> None:
        if not (mixup_alpha or cutmix_alpha):
            raise ValueError("data.mixup needs a mixup_alpha or a cutmix_alpha above 0.")
        both = mixup_alpha and cutmix_alpha
        self._cutmix_prob = switch_prob if both else float(bool(cutmix_alpha))
        self._mixup = v2.MixUp(alpha=mixup_alpha or 1.0, num_classes=num_classes)
        self._cutmix = v2.CutMix(alpha=cutmix_alpha or 1.0, num_classes=num_classes)
        self._prob = prob
        self._seed = seed

    def __call__(self, images: Tensor, targets: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Mix (B, 3, H, W), uint8 or float in [0, 1], and int64 (B,).

        Returns:
            Images, float32 in [0, 1] after mixup, and targets, float32 (B, K) whose rows add up to
            1; both unchanged if this iteration mixes nothing.
        """
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too. -1 is no sample's index.
            torch.default_generator.manual_seed(mix(self._seed, iteration, -1))
            mixing, kind = torch.rand(2).tolist()
            if mixing >= self._prob:
                return images, targets
            if kind < self._cutmix_prob:
                mixed = self._cutmix(images, targets)
            else:
                is_uint8 = images.dtype == torch.uint8
                mixed = self._mixup(images.float() / 255 if is_uint8 else images, targets)
        return mixed[0], mixed[1]
