"""Images as tiles of pixels, which make a convolution of any stride one of stride 1."""

# B images, C channels, H x W pixels, Y x X tiles of Sy x Sx pixels

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


def tiles_of(images: Tensor, stride: tuple[int, int]) -> Tensor:
    """View (B, C, H, W) as (B, Y, X, C, Sy, Sx)."""
    tiles: Tensor = images.unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return tiles.permute(0, 2, 4, 1, 3, 5)


class Canvas(NamedTuple):
    """Tiles of Sy x Sx pixels taken for channels, (B, Y, X, C Sy Sx), of images with zeros around.

    Args:
        images: (B, C, H, W) in pixels.
        stride: (Sy, Sx).
        before: zeros above and to the left of the images, in pixels.
        size: (Y, X), in tiles; what of the images lies beyond is left out.
    """

    images: Tensor
    stride: tuple[int, int]
    before: tuple[int, int]
    size: tuple[int, int]

    @property
    def channels(self) -> int:
        """How many values a tile has."""
        return self.images.shape[1] * math.prod(self.stride)

    def filled(self, axis: int) -> range:
        """Rows (axis 0) or columns (1) of tiles that hold a pixel."""
        before, step, count = self.before[axis], self.stride[axis], self.images.shape[2 + axis]
        return range(before // step, min((before + count - 1) // step + 1, self.size[axis]))

    def copy_to(self, target: Tensor, images: slice, first: tuple[int, int]) -> None:
        """Copy to `target` (b, y, x, C Sy Sx), zero or as before, the tiles from `first` on."""
        target = target.unflatten(3, (-1, *self.stride))
        sizes = zip(self.stride, self.before, self.images.shape[2:], strict=True)
        parts: Iterable[tuple[int, ...]]
        if all(before % step == size % step == 0 for step, before, size in sizes):
            source, steps, parts = tiles_of(self.images[images], self.stride), (1, 1), [()]
        else:  # Pixel by pixel of a tile.
            source, steps = self.images[images].movedim(1, 3), self.stride
            parts = itertools.product(*map(range, self.stride))
        for pixel in parts:
            ours: list[Any] = [slice(None)]
            theirs = [slice(None)]
            for axis, step in enumerate(steps):
                # Tile t begins with pixel, or tile, step t + offset of the source.
                within = pixel[axis] if pixel else 0
                offset = within - self.before[axis] * step // self.stride[axis]
                start, stop = first[axis], first[axis] + target.shape[1 + axis]
                start = max(start, -(offset // step))
                stop = max(start, min(stop, -((offset - source.shape[1 + axis]) // step)))
                ours.append(slice(start - first[axis], stop - first[axis]))
                theirs.append(slice(start * step + offset, stop * step + offset, step))
            index = (*ours, slice(None), *pixel)
            target[index].copy_(source[tuple(theirs)])

    def cut(self, rows: slice, columns: slice) -> Tensor:
        """Return (B, rows, columns, C Sy Sx)."""
        ranges = [range(n)[s] for n, s in zip(self.size, (rows, columns), strict=True)]
        # The values of a tile first in memory: copied in rows, not in tiles.
        piece = self.images.new_zeros(self.channels, len(self.images), *map(len, ranges))
        piece = piece.movedim(0, 3)
        self.copy_to(piece, slice(None), (ranges[0].start, ranges[1].start))
        return piece
