"""Our backbones under detectron2's contract; importing this imports detectron2."""

import math
from collections.abc import Mapping, Sequence

import detectron2.modeling
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor

from tract_transfer.models.backbones import Backbone, MapInfo


class MapBackbone(detectron2.modeling.Backbone):  # type: ignore[misc]
    """The deepest map of each stride, named as in detectron2: `res4` has the stride 2^4.

    Images come as `backbone` takes them: it normalises, unless its mean is 0 and its std 1.

    Args:
        out_features: the maps that forward returns; None returns all.

    Raises:
        ValueError: a stride is no power of 2, the backbone takes one image size alone, or it has
            no such map.
    """

    def __init__(self, backbone: Backbone, out_features: Sequence[str] | None = None) -> None:
        super().__init__()
        if backbone.image_size_px is not None:
            raise ValueError(
                "detectron2 gives its backbone images of any size, and this one takes "
                f"{backbone.image_size_px} px alone."
            )
        known = named_by_stride(backbone)
        names = list(known) if out_features is None else list(out_features)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"The backbone has the maps {list(known)}, got {names}.")
        self.backbone = backbone
        self.maps_of = {name: known[name] for name in names}
        self.largest_stride = max(info.stride for _, info in self.maps_of.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return {"res2": (B, C, H / 4, W / 4), ...} of images (B, 3, H, W)."""
        maps = self.backbone.maps(images, [name for name, _ in self.maps_of.values()])
        return dict(zip(self.maps_of, maps.values(), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map that forward returns."""
        return _shapes(self.maps_of)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of the largest stride: some backbones need it."""
        return self.largest_stride


class GivenMaps(detectron2.modeling.Backbone):  # type: ignore[misc]
    """Stands below detectron2's pyramid where the maps were computed already."""

    def __init__(self, maps_of: Mapping[str, tuple[str, MapInfo]]) -> None:
        super().__init__()
        self.maps_of = dict(maps_of)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the backbone's maps under detectron2's names."""
        return {name: maps[own] for name, (own, _) in self.maps_of.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map."""
        return _shapes(self.maps_of)


def pooled_top(names: Sequence[str]) -> LastLevelMaxPool:
    """Return the pyramid's pooled top level, above the last of `names` (detectron2's is p5)."""
    top = LastLevelMaxPool()
    top.in_feature = f"p{names[-1].removeprefix('res')}"
    return top


def named_by_stride(backbone: Backbone) -> dict[str, tuple[str, MapInfo]]:
    """Return {"res2": (the backbone's own name, its channels and stride), ...}, finest first."""
    found = {}
    for name, info in backbone.pyramid().items():
        level = math.log2(info.stride)
        if not level.is_integer():
            raise ValueError(
                f"detectron2 takes strides that are powers of 2, and the backbone's {name} has "
                f"{info.stride}."
            )
        found[f"res{int(level)}"] = (name, info)
    return found


def _shapes(maps_of: Mapping[str, tuple[str, MapInfo]]) -> dict[str, ShapeSpec]:
    return {name: ShapeSpec(**info._asdict()) for name, (_, info) in maps_of.items()}
