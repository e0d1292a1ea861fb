from dataclasses import FrozenInstanceError

import pytest

from tract_transfer.models.detection.options import BoxOptions, RpnOptions, with_options


def test_what_is_given_goes_over_the_defaults_and_the_rest_stays():
    defaults = RpnOptions(nms_iou=0.6, post_nms_test=300)
    assert with_options(defaults, {}, "rpn") == defaults
    chosen = with_options(defaults, {"nms_iou": 0.8, "anchor_scales": [8, 16]}, "rpn")
    assert (chosen.nms_iou, chosen.post_nms_test) == (0.8, 300)
    assert list(chosen.anchor_scales) == [8, 16]
    assert defaults.nms_iou == 0.6
    with pytest.raises(FrozenInstanceError):
        defaults.nms_iou = 0.5


@pytest.mark.parametrize(
    "defaults, given, says",
    [
        (RpnOptions(), {"nms_io": 0.5}, r"^rpn\.nms_io: unknown\. Did you mean 'nms_iou'\?"),
        (RpnOptions(), {"nms_iou": 1.5}, r"^rpn\.nms_iou: .*less than or equal to 1, got 1\.5"),
        (RpnOptions(), {"post_nms_test": 10.0}, r"^rpn\.post_nms_test: .*integer"),
        (RpnOptions(), {"anchor_scales": []}, r"^rpn\.anchor_scales: .*at least 1"),
        (RpnOptions(), {"anchor_ratios": [1.0, -1.0]}, r"^rpn\.anchor_ratios\.1: .*greater than 0"),
        (RpnOptions(), {"min_size_px": float("inf")}, r"^rpn\.min_size_px: .*finite"),
        (RpnOptions(), {"bg_iou": 0.8}, r"bg_iou 0\.8 must not exceed fg_iou 0\.7"),
        (BoxOptions(), {"pooler": "roi_crop"}, r"^box\.pooler: .*'roi_align' or 'roi_pool'"),
        (BoxOptions(), {"box_std": [0.1]}, r"^box\.box_std: .*at least 4"),
        (BoxOptions(), {"bg_iou": [0.1, 0.6]}, r"\[0\.1, 0\.6\) must be a range below fg_iou 0\.5"),
        (BoxOptions(), {"class_agnostic": "no"}, r"^box\.class_agnostic: .*boolean"),
    ],
    ids=str,
)
def test_a_wrong_option_says_which_and_why(defaults, given, says):
    key = "rpn" if isinstance(defaults, RpnOptions) else "box"
    with pytest.raises(ValueError, match=says):
        with_options(defaults, given, key)


def test_options_made_in_code_are_checked_too():
    with pytest.raises(ValueError, match="nms_iou"):
        BoxOptions(nms_iou=2.0)
