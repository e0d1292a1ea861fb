"""What a reader finds wrong with a dataset, raised or collected; and the check of a box."""

import math
import os
from pathlib import Path

Box = tuple[float, float, float, float]  # xyxy pixels, 0-based, x2 and y2 exclusive
Size = tuple[int, int]  # height, width
# float32, in which boxes are kept, still tells such sides from 0 in an image of 65,536 px.
_MIN_SIDE_PX = 0.01
# Less than this is a rounding of the tool that wrote the box.
_OVERHANG_PX = 1.0


def is_below(folder: Path, file: str | Path) -> bool:
    """Whether `file`, taken from `folder` on, is a path below it.

    By its text: a link that lies in the folder may lead out of it, for who laid it there meant it.
    """
    for place, path in (
        (folder.absolute(), folder.absolute() / file),
        (folder.resolve(), folder / file),  # where the folder itself was reached by a link
    ):
        top = Path(os.path.normpath(place))
        if top in Path(os.path.normpath(path)).parents:
            return True
    return False


class Findings:
    """What a reader finds wrong: raised at once, or collected to tell all of it.

    Args:
        invalid_boxes: `error`; or `clip`: a box is cut at the border of its image, and left out
            where nothing remains or its numbers are none. Each such box is listed in `mended`.
        collect: note every problem in `problems` and go on without what has it.

    An overhang of less than a pixel is a rounding error: such a box is cut without a word.
    """

    def __init__(self, invalid_boxes: str = "error", collect: bool = False) -> None:
        if invalid_boxes not in ("error", "clip"):
            raise ValueError(f"data.invalid_boxes must be error or clip, got {invalid_boxes!r}.")
        self.problems: list[str] = []
        self.mended: list[str] = []
        self._clip = invalid_boxes == "clip"
        self._collect = collect

    def wrong(self, error: Exception) -> None:
        """Raise `error`, or note it."""
        if not self._collect:
            raise error
        self.problems.append(str(error))

    def invalid_box(self, message: str) -> None:
        """Raise or note that a box is none; under `clip` it counts as mended."""
        if self._clip:
            self.mended.append(f"{message}: left out")
        else:
            hint = "Correct it, or set data.invalid_boxes: clip."
            self.wrong(ValueError(f"{message}. {hint}"))

    def box(self, box: Box, size: Size, place: str, written: str) -> Box | None:
        """Return the box within its image; None for one that is not to be used.

        Args:
            box: xyxy pixels, 0-based, x2 and y2 exclusive.
            size: (height, width) of its image.
            place: what an error calls the object.
            written: the numbers as the annotation has them.
        """
        if not all(map(math.isfinite, box)):
            self.invalid_box(f"{place}: the box must have finite numbers, not {written}")
            return None
        x1, y1, x2, y2 = box
        if x2 - x1 < _MIN_SIDE_PX or y2 - y1 < _MIN_SIDE_PX:
            self.invalid_box(f"{place}: the box is empty or inverted: {written}")
            return None
        height, width = size
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        is_left = inside[2] - inside[0] >= _MIN_SIDE_PX and inside[3] - inside[1] >= _MIN_SIDE_PX
        if max(-x1, -y1, x2 - width, y2 - height) >= _OVERHANG_PX or not is_left:
            message = (
                f"{place}: the box must lie in the image of {width}x{height} pixels, but is "
                f"{written}"
            )
            if not (self._clip and is_left):
                self.invalid_box(message)
                return None
            self.mended.append(f"{message}: cut at the border")
        return inside
