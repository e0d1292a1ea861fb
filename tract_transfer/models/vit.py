"""A plain ViT under a detector: images of any size, and a pyramid of its one map."""

# B images, C channels, H and W cells of the finest map asked for

from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn

from tract_transfer.models.backbones import Backbone


def accept_any_size(backbone: Backbone) -> None:
    """Let a ViT of timm's resample its position embeddings to every image it sees.

    Its state dict, and what it makes of images of its own size, stay. A backbone that is no such
    ViT, or takes any size anyway, stays as it is.
    """
    model = backbone.model
    if backbone.image_size_px is None or not hasattr(model, "dynamic_img_size"):
        return
    patches = model.patch_embed  # as timm makes them for dynamic_img_size=True
    patches.strict_img_size, patches.flatten = False, False
    patches.output_fmt = Format.NHWC
    model.dynamic_img_size = True
    backbone.image_size_px = None


class SimplePyramid(nn.Module):
    """The simple feature pyramid (Li et al., ECCV 2022): one map -> maps of 1/4 to 2 times its
    stride, and one of 4 times, each {name: (B, out_channels, H / 2^level, W / 2^level)}.

    Finer maps come from transposed convolutions, coarser ones from pooling; each level ends with a
    1x1 and a 3x3 convolution, with LayerNorms over the channels.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                    *_output(quarter, out_channels),
                ),
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2), *_output(half, out_channels)
                ),
                nn.Sequential(*_output(channels, out_channels)),
                nn.Sequential(nn.MaxPool2d(2), *_output(channels, out_channels)),
            ]
        )
        self.coarsest = nn.MaxPool2d(1, stride=2)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        (features,) = maps.values()
        found = {str(number): level(features) for number, level in enumerate(self.levels)}
        return {**found, "pool": self.coarsest(found["3"])}


def _output(channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]
