"""Augmentation policies on uint8 RGB (3, H, W), from torchvision's v2.

All randomness comes from torch's global CPU generator, which the loader seeds for every sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from tract_transfer.data.sampling import mix
from tract_transfer.registry import Registry

AUGMENTATIONS = Registry("AUGMENTATIONS")


@AUGMENTATIONS.register("rand_augment")
def rand_augment(
    *,
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
    interpolation: str = "nearest",
    fill: Sequence[int] | None = None,
) -> v2.Transform:
    """RandAugment (Cubuk et al. 2020): `num_ops` operations of one strength after each other.

    Args:
        magnitude: in 0..num_magnitude_bins - 1.
        fill: RGB, 0 to 255, of what comes in from outside the image; None is black.

    Raises:
        ValueError: num_ops or magnitude is out of range.
    """
    if num_ops < 1:
        raise ValueError(f"num_ops: must be 1 or more, got {num_ops}.")
    if not 0 <= magnitude < num_magnitude_bins:
        raise ValueError(
            f"magnitude: must lie in 0..num_magnitude_bins - 1 = {num_magnitude_bins - 1}, got "
            f"{magnitude}."
        )
    mode = interpolation_mode(interpolation)
    return v2.RandAugment(num_ops, magnitude, num_magnitude_bins, mode, _colour(fill))


@AUGMENTATIONS.register("auto_augment_cifar10")
def auto_augment_cifar10(
    *, interpolation: str = "nearest", fill: Sequence[int] | None = None
) -> v2.Transform:
    """AutoAugment with the policy found on CIFAR-10 (Cubuk et al. 2019)."""
    return _auto_augment(AutoAugmentPolicy.CIFAR10, interpolation, fill)


@AUGMENTATIONS.register("auto_augment_imagenet")
def auto_augment_imagenet(
    *, interpolation: str = "nearest", fill: Sequence[int] | None = None
) -> v2.Transform:
    """AutoAugment with the policy found on ImageNet (Cubuk et al. 2019)."""
    return _auto_augment(AutoAugmentPolicy.IMAGENET, interpolation, fill)


@AUGMENTATIONS.register("auto_augment_svhn")
def auto_augment_svhn(
    *, interpolation: str = "nearest", fill: Sequence[int] | None = None
) -> v2.Transform:
    """AutoAugment with the policy found on SVHN (Cubuk et al. 2019)."""
    return _auto_augment(AutoAugmentPolicy.SVHN, interpolation, fill)


@AUGMENTATIONS.register("trivial_augment")
def trivial_augment(
    *,
    num_magnitude_bins: int = 31,
    interpolation: str = "nearest",
    fill: Sequence[int] | None = None,
) -> v2.Transform:
    """TrivialAugment, wide (Mueller and Hutter 2021): one operation of any strength.

    Raises:
        ValueError: num_magnitude_bins is out of range.
    """
    if num_magnitude_bins < 2:
        raise ValueError(f"num_magnitude_bins: must be 2 or more, got {num_magnitude_bins}.")
    mode = interpolation_mode(interpolation)
    return v2.TrivialAugmentWide(num_magnitude_bins, mode, _colour(fill))


@AUGMENTATIONS.register("three_augment")
def three_augment(
    *, solarize_threshold: int = 128, blur_sigma_px: Sequence[float] = (0.1, 2.0)
) -> v2.Transform:
    """3-Augment (DeiT III, section 3): grayscale, solarize or Gaussian blur, each as often.

    Args:
        solarize_threshold: of 0..255; values from it on are inverted.
        blur_sigma_px: the least and the largest standard deviation of the blur; the kernel
            reaches to three of the largest.

    Raises:
        ValueError: blur_sigma_px is no range above 0.
    """
    if len(blur_sigma_px) != 2 or not 0 < blur_sigma_px[0] <= blur_sigma_px[1]:
        raise ValueError(
            f"blur_sigma_px: must be the least and the largest, above 0, got {blur_sigma_px}."
        )
    low, high = blur_sigma_px
    return v2.RandomChoice(
        [
            v2.Grayscale(num_output_channels=3),
            v2.RandomSolarize(solarize_threshold, p=1.0),
            v2.GaussianBlur(2 * math.ceil(3 * high) + 1, (low, high)),
        ]
    )


def interpolation_mode(name: str) -> InterpolationMode:
    """Return torchvision's mode of that name.

    Raises:
        ValueError: it is none of nearest, bilinear and bicubic.
    """
    known = ("nearest", "bilinear", "bicubic")
    if name not in known:
        raise ValueError(f"interpolation: must be one of {known}, got {name!r}.")
    return InterpolationMode(name)


def _auto_augment(
    policy: AutoAugmentPolicy, interpolation: str, fill: Sequence[int] | None
) -> v2.Transform:
    return v2.AutoAugment(policy, interpolation_mode(interpolation), _colour(fill))


def _colour(fill: Sequence[int] | None) -> list[int] | None:
    if fill is not None and (len(fill) != 3 or not all(0 <= value <= 255 for value in fill)):
        raise ValueError(f"fill: must be three whole numbers of 0..255, got {list(fill)}.")
    return None if fill is None else list(fill)


# --- mixup and CutMix over a batch, by torchvision's v2, drawn from (seed, iteration) alone.


class BatchMix:
    """Mixes every image of a batch, and its target, with its neighbour's.

    Strength, kind and rectangle are one draw an iteration, the same for all its micro-batches and
    processes: a function of (seed, iteration) alone. Which images meet depends on how the batch is
    cut, as they meet within a micro-batch of a process.

    Args:
        mixup_alpha: of the Beta distribution of mixup's strength (Zhang et al. 2018); 0 is none.
        cutmix_alpha: of the Beta distribution of the area CutMix pastes (Yun et al. 2019); 0 is
            none.
        prob: of mixing an iteration's images at all.
        switch_prob: of CutMix where both are given.

    Raises:
        ValueError: neither is given.
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
        """Mix a batch.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1].
            targets: int64 (B,).

        Returns:
            Images, float32 in [0, 1] where they are mixed by mixup, and targets, float32 (B, K)
            that add up to 1; both as they came where this iteration mixes nothing.
        """
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            torch.default_generator.manual_seed(mix(self._seed, iteration, -1))  # no sample's
            is_mixed, by_cutmix = torch.rand(2).tolist()
            if is_mixed >= self._prob:
                return images, targets
            if by_cutmix < self._cutmix_prob:
                mixed = self._cutmix(images, targets)
            else:
                whole = images.dtype == torch.uint8
                mixed = self._mixup(images.float() / 255 if whole else images, targets)
        return mixed[0], mixed[1]
