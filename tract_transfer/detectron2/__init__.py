"""The optional detector `detectron2`: registered here, without importing detectron2."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.detectors import DETECTORS
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
    options: Mapping[str, Any] | None = None,
) -> TwoStageDetector:
    """Build a Faster R-CNN from detectron2's feature pyramid, region proposal and box heads.

    Args:
        num_classes: K, without a background.
        neck: "fpn" is detectron2's Base-RCNN-FPN, "c4" its Base-RCNN-C4 with the backbone's fourth
            stage as res5.
        num_levels: number of backbone strides used by the pyramid, the coarsest ones; None uses 4,
            or all if there are fewer. Only for neck fpn.
        options: overrides of the detectron2 keys that its stages read, such as
            {"MODEL.RPN.NMS_THRESH": 0.8}; the backbone and the data determine other keys.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of detectron2's imports
            from tract_transfer.detectron2.detector import c4_stages, fpn_stages
    except ImportError as error:
        raise ImportError(
            "The detector detectron2 needs the package detectron2, which is not on PyPI. Install "
            f"it from source (see docs/guides/detectron2.md), or use torchvision_fpn ({error})."
        ) from error
    if neck == "fpn":
        stages = fpn_stages(backbone, num_classes, options or {}, num_levels)
    elif num_levels is None:
        stages = c4_stages(backbone, num_classes, options or {})
    else:
        raise ValueError("num_levels: only neck fpn has levels; c4 reads one map. Remove it.")
    return TwoStageDetector(backbone, *stages, short_side_px, max_side_px, difficult_in_training)
