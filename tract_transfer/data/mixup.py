"""mixup and CutMix over a batch, by torchvision's v2, drawn from (seed, iteration) alone."""

# B images, K classes, H height and W width in pixels

import torch
from torch import Tensor
from torchvision.transforms import v2

from tract_transfer.data.sampling import mix


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
