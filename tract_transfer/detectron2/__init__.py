"""The detector of detectron2, where that is installed: the registry itself does not import it."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.detectors import DETECTORS, NOTHING
from tract_transfer.models.detection.two_stage import TwoStageDetector


@DETECTORS.register("detectron2")
def detectron2_detector(
    backbone: Backbone,
    num_classes: int,
    *,
    neck: Literal["fpn", "c4"] = "fpn",
    short_side_px: int = 800,
    max_side_px: int = 1333,
    num_levels: int | None = None,
    difficult_in_training: Literal["keep", "drop"] = "keep",
    options: Mapping[str, Any] = NOTHING,
) -> TwoStageDetector:
    """Faster R-CNN of detectron2's own pyramid, region proposal and box heads.

    Args:
        num_classes: K, without a background.
        neck: "fpn" is detectron2's Base-RCNN-FPN, "c4" its Base-RCNN-C4 with the backbone's own
            fourth stage as res5.
        num_levels: how many of the backbone's strides, the last ones, the pyramid stands on; None
            takes 4, or all there are. Of neck fpn alone.
        options: over detectron2's own keys, such as {"MODEL.RPN.NMS_THRESH": 0.8}: all that its
            stages read.

    Raises:
        ImportError: detectron2 is not installed.
        ValueError: the backbone does not fit, or an option is unknown, of another type, or given
            by the backbone and the data.
    """
    if backbone.image_size_px is not None:
        raise ValueError(
            "detectron2 needs a backbone for images of any size, and this one takes "
            f"{backbone.image_size_px} px alone."
        )
    build_c4, build_fpn = _import_builders()
    if neck == "c4" and num_levels is not None:
        raise ValueError("num_levels: is of neck fpn; c4 reads one map. Leave it out.")
    if neck == "c4":
        build = build_c4
    else:
        levels = num_levels or min(4, len(backbone.pyramid()))
        build = partial(build_fpn, num_levels=levels)
    detector: TwoStageDetector = build(
        backbone,
        num_classes,
        options=options,
        short_side_px=short_side_px,
        max_side_px=max_side_px,
        difficult_in_training=difficult_in_training,
    )
    return detector


def _import_builders() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what detectron2 itself imports
            from tract_transfer.detectron2.detector import build_c4, build_fpn
    except ImportError as error:
        raise ImportError(
            "The detector detectron2 needs the package detectron2, which has no release on the "
            "package index. Install it from its source, as docs/detectron2.md tells, or use "
            f"torchvision_fpn ({error})."
        ) from error
    return build_c4, build_fpn
