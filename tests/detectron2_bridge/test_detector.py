"""The detector made of detectron2's stages computes what detectron2 does."""

import copy
import json
import operator
import sys

import pytest
import torch
from small_detectors import IMAGES, TARGETS, losses_of, picture, target

from tract_transfer.config.file import ConfigError
from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.models.backbone import Backbone, MapInfo
from tract_transfer.run.run import run
from tract_transfer.tract import TrAct

COMMON = {
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}
SMALL = {
    "fpn": {**COMMON, "MODEL.FPN.OUT_CHANNELS": 16, "MODEL.ROI_BOX_HEAD.FC_DIM": 32},
    "c4": {**COMMON, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4},
}
both_necks = pytest.mark.parametrize("neck", ["fpn", "c4"])
pytestmark = pytest.mark.filterwarnings("ignore")  # from detectron2's imports


def detector(neck="fpn", options=None, backbone="timm/test_resnet", **args):
    pytest.importorskip("detectron2")
    torch.manual_seed(0)
    args = {"short_side_px": 64, "max_side_px": 96, **args}
    options = {**SMALL[neck], **(options or {})}
    backbone = build_backbone(backbone)
    return DETECTORS.get("detectron2")(backbone, 3, neck=neck, options=options, **args)


def as_generalized_rcnn(model):
    """A copy of the detector's parts in detectron2's own meta-architecture."""
    from detectron2.modeling import FPN, GeneralizedRCNN

    from tract_transfer.detectron2.detector import MapBackbone, named_by_stride

    model = copy.deepcopy(model)
    pixels = {
        "pixel_mean": (255 * model.backbone.mean).flatten().tolist(),
        "pixel_std": (255 * model.backbone.std).flatten().tolist(),
    }
    model.backbone.set_normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    named = named_by_stride(model.backbone)
    body = MapBackbone(
        model.backbone, [name for name, (ours, _) in named.items() if ours in model.map_names]
    )
    if isinstance(model.neck, FPN):
        model.neck.bottom_up = body
        body = model.neck
    rpn, roi_heads = model.rpn.rpn, model.roi_heads.heads
    return GeneralizedRCNN(backbone=body, proposal_generator=rpn, roi_heads=roi_heads, **pixels)


@both_necks
def test_losses_and_detections_are_those_of_generalized_rcnn(neck):
    model = detector(neck).eval()
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    reference = as_generalized_rcnn(model)
    inputs = []
    for image, truth in zip(IMAGES, TARGETS, strict=True):
        objects = {"gt_boxes": Boxes(truth["boxes"]), "gt_classes": truth["labels"]}
        inputs.append({"image": image, "instances": Instances(image.shape[-2:], **objects)})
    losses = losses_of(model)
    torch.manual_seed(1)  # as losses_of does, for the samples of both stages
    with EventStorage():
        expected = reference.train()(inputs)
    names = {"loss_rpn_loc": "loss_rpn_box", "loss_box_reg": "loss_box"}
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    for name, loss in expected.items():
        torch.testing.assert_close(losses[names.get(name, name)], loss, rtol=1e-4, atol=1e-5)
    image = picture(64, 96, 2)
    with torch.no_grad():
        (ours,) = model.eval()([image])
        theirs = reference.eval()([{"image": image}])[0]["instances"]
    boxes = theirs.pred_boxes.tensor
    torch.testing.assert_close(ours["boxes"], boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(ours["scores"], theirs.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["labels"], theirs.pred_classes)


@both_necks
def test_every_weight_learns_and_tract_finds_the_first_layer(neck):
    model = detector(neck)
    tract = TrAct(model)
    assert tract.layer_names == ["backbone.model.conv1.0"]
    sum(losses_of(model).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    tract.step()
    assert model.backbone.model.conv1[0].weight.grad.isfinite().all()
    empty = losses_of(model, [target([], []), target([], [])])
    assert all(loss.isfinite() for loss in empty.values())
    assert empty["loss_box"] == empty["loss_rpn_box"] == 0


def test_boxes_and_scores_are_float32_under_autocast():
    model = detector()
    pooled = []
    pooler = model.roi_heads.heads.box_pooler
    pooler.register_forward_pre_hook(lambda _module, inputs: pooled.extend(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses_of(model)
        (detections,) = model.eval()([IMAGES[0]])
    assert {feature_map.dtype for feature_map in pooled} == {torch.float32}
    assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32
    scores = detections["scores"]
    assert len(scores.unique()) > len(scores) / 2  # not rounded to 8 bits


def test_arguments_reach_the_pyramid_and_the_detector():
    model = detector(num_levels=3, difficult_in_training="drop")
    assert model.difficult_in_training == "drop"
    assert model.map_names == ["layer2", "layer3", "layer4"]
    assert model.rpn.names == ["p3", "p4", "p5", "p6"]
    assert model.roi_heads.names == ["p3", "p4", "p5"]
    anchors = model.rpn.rpn.anchor_generator.cell_anchors
    assert [(sides[1, 2] - sides[1, 0]).item() for sides in anchors] == [64, 128, 256, 512]


def test_the_stage_that_c4_borrows_remains_part_of_the_backbone():
    model = detector("c4")
    assert list(model.backbone.state_dict()) == list(
        build_backbone("timm/test_resnet").state_dict()
    )
    assert not [name for name in model.roi_heads.state_dict() if "res5" in name]


@both_necks
def test_keys_of_detectron2_reach_its_stages(neck):
    keys = {
        "MODEL.RPN.NMS_THRESH": (0.5, "rpn.rpn.nms_thresh"),
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (4, "rpn.rpn.min_box_size"),
        "MODEL.ANCHOR_GENERATOR.OFFSET": (0.5, "rpn.rpn.anchor_generator.offset"),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (7, "roi_heads.heads.batch_size_per_image"),
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (0.5, "roi_heads.heads.box_predictor.smooth_l1_beta"),
        "TEST.DETECTIONS_PER_IMAGE": (3, "roi_heads.heads.box_predictor.test_topk_per_image"),
    }
    plain, changed = detector(neck), detector(neck, {key: v for key, (v, _) in keys.items()})
    for value, name in keys.values():
        attribute = operator.attrgetter(name)
        assert attribute(changed) == value != attribute(plain)


UNREAD = "do not read this key"


@pytest.mark.parametrize(
    "neck, args, message",
    [
        ("fpn", {"options": {"MODEL.RPN.NMS_TRESH": 0.5}}, r"options\.MODEL\.RPN.*NMS_THRESH'"),
        ("fpn", {"options": {"MODEL.ROI_HEADS.NUM_CLASSES": 9}}, "the data determine it"),
        ("fpn", {"options": {"SOLVER.BASE_LR": 0.1}}, f"stages of neck fpn {UNREAD}"),
        ("c4", {"options": {"MODEL.FPN.OUT_CHANNELS": 16}}, f"stages of neck c4 {UNREAD}"),
        ("c4", {"options": {"MODEL.ROI_BOX_HEAD.NUM_FC": 1}}, f"stages of neck c4 {UNREAD}"),
        ("fpn", {"options": {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": "many"}}, "PER_IMAGE: "),
        (
            "c4",
            {"backbone": "timm/convnext_atto"},
            "C4 detector needs a ResNet, whose stage layer4",
        ),
        ("fpn", {"backbone": "timm/test_vit"}, r"at least 2 strides, .* has \[16\]"),
        ("fpn", {"backbone": "cifar/vit"}, "images of any size"),
        ("fpn", {"num_levels": 6}, r"num_levels: 6; .*\[2, 4, 8, 16, 32\]"),
        ("c4", {"num_levels": 3}, "num_levels: only neck fpn"),
    ],
)
def test_options_and_backbones_that_do_not_fit_are_refused(neck, args, message):
    with pytest.raises(ValueError, match=message):
        detector(neck, **args)


def test_strides_must_be_powers_of_two(monkeypatch):
    monkeypatch.setattr(Backbone, "pyramid", lambda _: {"a": MapInfo(8, 12)})
    with pytest.raises(ValueError, match="powers of 2; the stride of a is 12"):
        detector()


def test_our_trainer_trains_and_evaluates_it(load_tiny, tmp_path):
    pytest.importorskip("detectron2")
    sizes = {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [96]]}
    args = {"short_side_px": 64, "max_side_px": 64, "options": {**SMALL["fpn"], **sizes}}
    section = json.dumps({"name": "detectron2", "args": args})
    words = (f"model.detector={section}", "tract.enabled=true")
    results = run(load_tiny(tmp_path, *words, task="detection"))
    assert 0 <= results["metrics"]["ap50"] <= 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_without_detectron2_the_error_names_the_installation(load_tiny, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tract_transfer.detectron2.detector", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match=r"from source \(see docs/guides/detectron2\.md\)"):
        DETECTORS.get("detectron2")(build_backbone("timm/test_resnet"), 3)
    config = load_tiny(tmp_path, "model.detector={name: detectron2}", task="detection")
    with pytest.raises(ConfigError, match="Install it from source"):
        run(config)
