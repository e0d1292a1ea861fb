"""Images as tiles of pixels, which make a convolution of any stride one of stride 1."""

# B images, C channels, H x W pixels, Y x X tiles of Sy x Sx pixels

import itertools
import math
from collections.abc import Iterable, Sequence
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

    def overlaps(self, target: Tensor, first: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Views that pair pixels of a target with those of the images that are its tiles.

        Args:
            target: (b, y, x, C Sy Sx).
            first: which tile (Y, X) it begins with.

        Returns:
            Views of the target and of all B images, of one size but for b and B. No view holds the
            target's tiles, or parts of tiles, that lie outside the images or the canvas.
        """
        target = target.unflatten(3, (-1, *self.stride))
        sizes = zip(self.stride, self.before, self.images.shape[2:], strict=True)
        parts: Iterable[tuple[int, ...]]
        if all(before % step == size % step == 0 for step, before, size in sizes):
            source, steps, parts = tiles_of(self.images, self.stride), (1, 1), [()]
        else:  # Pixel by pixel of a tile.
            source, steps = self.images.movedim(1, 3), self.stride
            parts = itertools.product(*map(range, self.stride))
        found = []
        for pixel in parts:
            ours: list[Any] = [slice(None)]
            theirs = [slice(None)]
            for axis, step in enumerate(steps):
                # Tile t begins with pixel, or tile, step t + offset of the source.
                within = pixel[axis] if pixel else 0
                offset = within - self.before[axis] * step // self.stride[axis]
                filled = -((offset - source.shape[1 + axis]) // step)
                start = max(first[axis], -(offset // step))
                stop = min(first[axis] + target.shape[1 + axis], self.size[axis], filled)
                stop = max(start, stop)
                ours.append(slice(start - first[axis], stop - first[axis]))
                theirs.append(slice(start * step + offset, stop * step + offset, step))
            index = (*ours, slice(None), *pixel)
            found.append((target[index], source[tuple(theirs)]))
        return found

    def cut(self, rows: Sequence[range], columns: Sequence[range]) -> Tensor:
        """Return (B, y, x, C Sy Sx), the tiles of each range after those of the one before."""
        counts = [list(map(len, ranges)) for ranges in (rows, columns)]
        # The values of a tile first in memory: copied in rows, not in tiles.
        piece = self.images.new_zeros(self.channels, len(self.images), *map(sum, counts))
        piece = piece.movedim(0, 3)
        for band, own_rows in zip(piece.split(counts[0], 1), rows, strict=True):
            for part, own_columns in zip(band.split(counts[1], 2), columns, strict=True):
                for target, source in self.overlaps(part, (own_rows.start, own_columns.start)):
                    target.copy_(source)
        return piece
