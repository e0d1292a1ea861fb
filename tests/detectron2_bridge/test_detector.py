"""The detector made of detectron2's stages; what it is not installed for says how to install it."""

import copy
import importlib.util
import json
import operator
import sys

import pytest
import torch

from tract_transfer.config.schema import ConfigError
from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.models.weights import load_weights, save_backbone
from tract_transfer.run.run import run
from tract_transfer.tract import TrAct

SMALL = {
    "fpn": {
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    },
    "c4": {
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    },
}
needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="detectron2 is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of what detectron2 imports


def detector(neck="fpn", options=None, backbone="timm/test_resnet", **args):
    torch.manual_seed(0)
    sizes = {"short_side_px": 64, "max_side_px": 96}
    given = {**SMALL[neck], **(options or {})}
    features = build_backbone(backbone)
    return DETECTORS.get("detectron2")(features, 3, neck=neck, options=given, **{**sizes, **args})


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels, difficult=()):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
    }


IMAGES = [picture(64, 96), picture(80, 64, 1)]
TARGETS = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2]), target([[1, 2, 30, 70]], [1])]


def losses_of(model, *inputs):
    torch.manual_seed(1)  # of the samples that both stages draw
    return model.train()(*inputs)


def as_generalized_rcnn(model):
    """A copy of the detector's parts in detectron2's own meta-architecture."""
    from detectron2.modeling import FPN, GeneralizedRCNN

    from tract_transfer.detectron2.detector import MapBackbone, named_by_stride

    model = copy.deepcopy(model)
    colours = {
        "pixel_mean": (255 * model.backbone.mean).flatten().tolist(),
        "pixel_std": (255 * model.backbone.std).flatten().tolist(),
    }
    model.backbone.set_normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    known = named_by_stride(model.backbone)
    names = [name for name, (own, _) in known.items() if own in model.map_names]
    body = MapBackbone(model.backbone, names)
    if isinstance(model.neck, FPN):
        model.neck.bottom_up = body
        body = model.neck
    return GeneralizedRCNN(
        backbone=body,
        proposal_generator=model.rpn.rpn,
        roi_heads=model.roi_heads.heads,
        **colours,
    )


@needs_detectron2
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_it_computes_what_generalized_rcnn_does(neck):
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    model = detector(neck).eval()
    reference = as_generalized_rcnn(model)
    inputs = [
        {
            "image": image,
            "instances": Instances(
                tuple(image.shape[-2:]), gt_boxes=Boxes(t["boxes"]), gt_classes=t["labels"]
            ),
        }
        for image, t in zip(IMAGES, TARGETS, strict=True)
    ]
    with EventStorage():
        expected = losses_of(reference, inputs)
    found = losses_of(model, IMAGES, TARGETS)
    names = {"loss_rpn_loc": "loss_rpn_box", "loss_box_reg": "loss_box"}
    assert sorted(found) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    for name, loss in expected.items():
        torch.testing.assert_close(found[names.get(name, name)], loss, rtol=1e-4, atol=1e-5)
    image = picture(64, 96, 2)
    with torch.no_grad():
        (seen,) = model.eval()([image])
        (wanted,) = reference.eval()([{"image": image}])
    torch.testing.assert_close(
        seen["boxes"], wanted["instances"].pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )
    torch.testing.assert_close(seen["scores"], wanted["instances"].scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["labels"], wanted["instances"].pred_classes)


@needs_detectron2
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_every_weight_learns_and_tract_finds_the_first_layer(neck):
    model = detector(neck)
    tract = TrAct(model)
    assert tract.layer_names == ["backbone.model.conv1.0"]
    sum(losses_of(model, IMAGES, TARGETS).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    tract.step()
    assert model.backbone.model.conv1[0].weight.grad.isfinite().all()
    empty = losses_of(model, IMAGES, [target([], []), target([], [])])
    assert all(loss.isfinite() for loss in empty.values())
    assert empty["loss_box"] == empty["loss_rpn_box"] == 0


@needs_detectron2
@torch.no_grad()
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_detections_are_in_the_pixels_of_each_image(neck):
    model = detector(neck).eval()
    images = [picture(300, 400), picture(30, 20), picture(64, 96)]
    for image, each in zip(images, model(images), strict=True):
        height, width = image.shape[-2:]
        boxes, scores = each["boxes"], each["scores"]
        assert boxes.dtype == scores.dtype == torch.float32
        assert 0 < len(boxes) == len(scores) == len(each["labels"])
        assert boxes.min() >= 0
        assert width / 2 < boxes[:, [0, 2]].max() <= width * (1 + 1e-6)
        assert boxes[:, [1, 3]].max() <= height * (1 + 1e-6)
        assert set(each["labels"].tolist()) <= {0, 1, 2}
        assert torch.equal(scores, scores.sort(descending=True).values)


@needs_detectron2
def test_under_autocast_boxes_and_scores_are_float32():
    model = detector()
    seen = []
    pooler = model.roi_heads.heads.box_pooler
    pooler.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses_of(model, IMAGES, TARGETS)
        (found,) = model.eval()([IMAGES[0]])
    assert {each.dtype for each in seen} == {torch.float32}
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert len(found["scores"].unique()) > len(found["scores"]) / 2  # and not on a grid of 8 bits


@needs_detectron2
def test_difficult_objects_can_be_dropped():
    hard = [target([[5, 5, 40, 50]], [0], [True]), TARGETS[1]]
    absent = [target([], []), TARGETS[1]]
    kept, dropped = detector(), detector(difficult_in_training="drop")
    same = losses_of(dropped, IMAGES, hard)["loss_cls"]
    assert same == losses_of(kept, IMAGES, absent)["loss_cls"]
    assert same != losses_of(kept, IMAGES, hard)["loss_cls"]


@needs_detectron2
@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_a_crowd_is_never_learnt(neck, policy):
    model = detector(neck, difficult_in_training=policy)
    with_crowd = target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2], [False, True])
    with_crowd["crowd"] = torch.tensor([False, True])
    alone = {"boxes": torch.tensor([[1.0, 1, 60, 60]]), "labels": torch.tensor([1])}
    alone |= {name: torch.tensor([True]) for name in ("difficult", "crowd")}
    without = [target([[5, 5, 40, 50]], [0]), target([], [])]
    assert losses_of(model, IMAGES, [with_crowd, alone]) == losses_of(model, IMAGES, without)
    assert losses_of(model, IMAGES, TARGETS) != losses_of(model, IMAGES, without)


@needs_detectron2
def test_the_pyramid_stands_on_the_last_strides():
    model = detector(num_levels=3)
    assert model.map_names == ["layer2", "layer3", "layer4"]
    assert model.rpn.names == ["p3", "p4", "p5", "p6"]
    assert model.roi_heads.names == ["p3", "p4", "p5"]
    cells = model.rpn.rpn.anchor_generator.cell_anchors
    sides = [(each[1, 2] - each[1, 0]).item() for each in cells]
    assert sides == [64, 128, 256, 512]
    with pytest.raises(ValueError, match=r"num_levels: 6 of .*\[2, 4, 8, 16, 32\]"):
        detector(num_levels=6)


@needs_detectron2
def test_a_saved_backbone_is_whole(tmp_path):
    model = detector("c4")
    save_backbone(tmp_path, model.backbone, {})
    back = build_backbone("timm/test_resnet")
    load_weights(back, tmp_path)
    name = "model.layer4.0.conv1.weight"
    assert torch.equal(back.get_parameter(name), model.backbone.get_parameter(name))


@needs_detectron2
@pytest.mark.parametrize(
    "key, value, name",
    [
        ("MODEL.RPN.NMS_THRESH", 0.5, "rpn.rpn.nms_thresh"),
        ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 4, "rpn.rpn.min_box_size"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "rpn.rpn.anchor_generator.offset"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 7, "roi_heads.heads.batch_size_per_image"),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5, "roi_heads.heads.box_predictor.smooth_l1_beta"),
        ("TEST.DETECTIONS_PER_IMAGE", 3, "roi_heads.heads.box_predictor.test_topk_per_image"),
    ],
)
@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_detectron2_s_own_keys_reach_its_stages(neck, key, value, name):
    reached = operator.attrgetter(name)
    assert reached(detector(neck, {key: value})) == value != reached(detector(neck))


@needs_detectron2
@pytest.mark.parametrize(
    "neck, options, says",
    [
        ("fpn", {"MODEL.RPN.NMS_TRESH": 0.5}, r"options\.MODEL\.RPN\.NMS_TRESH: .*NMS_THRESH'"),
        ("fpn", {"MODEL.ROI_HEADS.NUM_CLASSES": 9}, "backbone and data give"),
        ("fpn", {"SOLVER.BASE_LR": 0.1}, "no key that the stages of neck fpn read"),
        ("c4", {"MODEL.FPN.OUT_CHANNELS": 16}, "no key that the stages of neck c4 read"),
        ("c4", {"MODEL.ROI_BOX_HEAD.NUM_FC": 1}, "no key that the stages of neck c4 read"),
        ("fpn", {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": "many"}, "BATCH_SIZE_PER_IMAGE: "),
    ],
)
def test_what_no_stage_reads_is_refused(neck, options, says):
    with pytest.raises(ValueError, match=says):
        detector(neck, options)


@needs_detectron2
def test_a_backbone_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="c4 needs a ResNet of stages"):
        detector("c4", backbone="timm/convnext_atto")
    with pytest.raises(ValueError, match=r"2 strides at least, .* has \[16\]"):
        detector(backbone="timm/test_vit")
    with pytest.raises(ValueError, match="images of any size"):
        detector(backbone="cifar/vit")
    with pytest.raises(ValueError, match="num_levels: is of neck fpn"):
        detector("c4", num_levels=3)


@needs_detectron2
def test_a_run_of_ours_trains_and_measures_it(load_tiny, tmp_path):
    sizes = {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [96]]}
    args = {"short_side_px": 64, "max_side_px": 64, "options": {**SMALL["fpn"], **sizes}}
    config = load_tiny(
        tmp_path,
        f"model.detector={json.dumps({'name': 'detectron2', 'args': args})}",
        "tract.enabled=true",
        task="detection",
    )
    results = run(config)
    assert 0 <= results["metrics"]["ap50"] <= 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_without_detectron2_it_says_how_to_install_it(load_tiny, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tract_transfer.detectron2.detector", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match=r"Install it from its source.*docs/detectron2\.md"):
        DETECTORS.get("detectron2")(build_backbone("timm/test_resnet"), 3)
    config = load_tiny(tmp_path, "model.detector={name: detectron2}", task="detection")
    with pytest.raises(ConfigError, match="Install it from its source"):
        run(config)
