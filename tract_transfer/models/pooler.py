"""What a proposal's maps are at a fixed number of cells."""

# R proposals of all images, C channels, S pooled side

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_area, roi_align, roi_pool

from tract_transfer.models.options import BoxOptions

USUAL_SIDE_PX, USUAL_LEVEL = 224, 4  # a box of 224 px belongs on the map of stride 2^4


class RoiPooler(nn.Module):
    """(maps, proposals) -> (R, C, S, S) float32, each proposal from the map its size suits.

    A box of 224 px is pooled from stride 16, one of half the side from half the stride (Lin et
    al., CVPR 2017, equation 1), as far as there are maps.
    """

    def __init__(self, strides: Sequence[int], options: BoxOptions) -> None:
        super().__init__()
        self.strides = list(strides)
        self.options = options

    def forward(self, maps: Sequence[Tensor], proposals: Sequence[Tensor]) -> Tensor:
        """Pool the (P, 4) xyxy proposals of each image; of `maps` those of `strides`, in order."""
        boxes = torch.cat(list(proposals))
        image = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(proposals)])
        rois = torch.cat([image, boxes], 1)
        # Coordinates of the maps' own type would be rounded to 8 bits under autocast.
        used = [maps[level].float() for level in range(len(self.strides))]
        if len(used) == 1:
            return self._pool(used[0], rois, self.strides[0])
        level_of = self._level_of(boxes)
        side = self.options.pool_size
        pooled = used[0].new_zeros(len(rois), used[0].shape[1], side, side)
        for level, (features, stride) in enumerate(zip(used, self.strides, strict=True)):
            row = torch.where(level_of == level)[0]
            pooled[row] = self._pool(features, rois[row], stride)
        return pooled

    def _level_of(self, boxes: Tensor) -> Tensor:
        side = box_area(boxes).sqrt() / USUAL_SIDE_PX
        level = (
            torch.floor(USUAL_LEVEL + torch.log2(side + 1e-8)) - self.strides[0].bit_length() + 1
        )
        return level.clamp(0, len(self.strides) - 1).long()

    def _pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        options = self.options
        if options.pooler == "roi_pool":
            pooled: Tensor = roi_pool(features, rois, options.pool_size, 1 / stride)
        else:
            pooled = roi_align(
                features,
                rois,
                options.pool_size,
                1 / stride,
                options.sampling_ratio,
                aligned=True,
            )
        return pooled
