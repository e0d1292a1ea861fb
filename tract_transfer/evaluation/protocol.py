"""What a VOC average precision depends on, and the named protocols."""

from dataclasses import dataclass, replace
from typing import Literal

Method = Literal["11point", "11point_float", "area"]
METHODS: dict[Method, str] = {
    "11point": "the mean interpolated precision at recalls 0, 0.1, ..., 1",
    "11point_float": "the mean interpolated precision at 11 multiples of the float 0.1 (a recall "
    "of exactly 0.3, 0.6 or 0.7 falls short of its point)",
    "area": "the area under the interpolated precision-recall curve",
}


@dataclass(frozen=True)
class VocProtocol:
    """How boxes are read, ranked, matched and averaged.

    Boxes come 0-based with exclusive ends. VOC's own are 1-based with inclusive ends: 1 is added to
    x1 and y1 (`min_offset`), x2 and y2 stay, and a width is x2 - x1 + 1 (`pixel_offset`). Both
    give the same overlaps, but for what rounding does to them.

    Attributes:
        name: what a config and a report call it.
        reproduces: whose number it is, the first half of its sentence.
        method: how precision and recall become one number; see METHODS.
        iou_strict: a match needs IoU > threshold, not >=.
        min_offset: added to x1 and y1 before all else, 0 or 1.
        pixel_offset: added to x2 - x1, 0 or 1.
        round_scores: decimals that scores are rounded to before they are ranked; None leaves them.
        round_boxes: the same of the coordinates of detections, which are then taken as float32.
        stable_ties: equal scores rank by image id, then order in the image; False leaves them as
            NumPy's default argsort does, which differs from machine to machine.
        absent_as_zero: a class without an object that counts has AP 0 in the mean; False leaves it
            out. Either way it is reported as absent.
    """

    name: str
    reproduces: str
    method: Method
    iou_strict: bool = False
    min_offset: int = 0
    pixel_offset: int = 0
    round_scores: int | None = None
    round_boxes: int | None = None
    stable_ties: bool = True
    absent_as_zero: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}.")
        if not {self.min_offset, self.pixel_offset} <= {0, 1}:
            raise ValueError(f"min_offset and pixel_offset must be 0 or 1, got {self}.")

    @property
    def sentence(self) -> str:
        """The protocol in words, to print beside the number."""
        width = "x2 - x1, x2 exclusive"
        if self.pixel_offset:
            width = f"x2 - x1 + 1{' after 1 was added to x1 and y1' if self.min_offset else ''}"
        rounding = [
            f"{what} rounded to {decimals} decimal{'s' if decimals > 1 else ''}"
            for what, decimals in (("scores", self.round_scores), ("boxes", self.round_boxes))
            if decimals is not None
        ]
        ties = (
            "in the order of the images" if self.stable_ties else "as NumPy's argsort leaves them"
        )
        absent = "count as 0 in the mean" if self.absent_as_zero else "are left out of the mean"
        return (
            f"VOC AP ({self.name}), {self.reproduces}: {METHODS[self.method]}; a match has IoU "
            f"{'>' if self.iou_strict else '>='} threshold, a width is {width}; difficult objects "
            f"are neither missed nor false; {' and '.join(rounding) or 'nothing rounded'} before "
            f"ranking, equal scores {ties}; classes without an object {absent}; ap is the mean of "
            "this AP over IoU 0.50:0.05:0.95, not COCO's AP"
        )


_KIT = VocProtocol(
    "voc2007_devkit",
    "as VOCevaldet.m of the VOC 2007 development kit defines it",
    "11point",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _KIT,
        replace(
            _KIT,
            name="area",
            reproduces="as VOCevaldet.m of the kits since VOC 2010 defines it",
            method="area",
        ),
        VocProtocol(
            "detectron2",
            "equal to detectron2's pascal_voc_evaluation for VOC 2007",
            "11point_float",
            iou_strict=True,
            min_offset=1,
            pixel_offset=1,
            round_scores=3,
            round_boxes=1,
            stable_ties=False,
            absent_as_zero=True,
        ),
    )
}
