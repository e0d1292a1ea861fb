"""TrAct and our backbones in detectron2's own trainers."""

import warnings

import pytest
import torch
from torch import nn

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import save_backbone
from tract_transfer.tract import TrAct

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage
    from detectron2_records import NAME, registered

    from tract_transfer.detectron2.plugin import (
        TractTrainer,
        add_tract_config,
        attach_tract,
        set_normalization,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered(tmp_path_factory.mktemp("images")) as records:
        yield records


OURS = {
    "MODEL.BACKBONE.NAME": "build_tract_transfer_fpn_backbone",
    "MODEL.TRACT_BACKBONE.NAME": "timm/test_resnet",
}


def config(tmp_path, **changes):
    """detectron2's own ResNet-18 in an FPN, small, on a CPU."""
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [48], [64], [96]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "DATASETS.TRAIN": (NAME,),
        "DATASETS.TEST": (NAME,),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.STEPS": (),
        "SOLVER.TRACT.ENABLED": True,
        **changes,
    }
    cfg.merge_from_list([word for pair in settings.items() for word in pair])
    return cfg


# ------------------------------------------------------------------------------------- TrAct


def test_its_trainer_trains_and_evaluates(dataset, tmp_path, monkeypatch):
    steps = []
    step = TrAct.step

    def counted(self):
        before = self._watched[0].layer.weight.grad.clone()
        step(self)
        steps.append((self.layer_names, torch.equal(before, self._watched[0].layer.weight.grad)))

    monkeypatch.setattr(TrAct, "step", counted)
    trainer = TractTrainer(config(tmp_path))
    before = trainer.model.backbone.bottom_up.stem.conv1.weight.detach().clone()
    trainer.train()
    assert steps == [(["backbone.bottom_up.stem.conv1"], False)] * 3
    assert not torch.equal(before, trainer.model.backbone.bottom_up.stem.conv1.weight)
    metrics = TractTrainer.test(trainer.cfg, trainer.model)["bbox"]
    assert {"AP", "AP50", "AP75"} <= metrics.keys()
    assert all(0 <= value <= 100 for value in metrics.values())


def one_step(cfg):
    """The image, the stem's plain gradient, and the negative step that was taken, over the lr."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    layer = model.backbone.bottom_up.stem.conv1
    optimizer = build_optimizer(cfg, model)
    tract = attach_tract(cfg, model, optimizer)
    before = layer.weight.detach().clone()
    torch.manual_seed(1)
    image = 255 * torch.rand(3, 64, 96)
    objects = Instances((64, 96), gt_boxes=Boxes([[5, 5, 60, 50]]), gt_classes=torch.tensor([1]))
    with EventStorage():
        sum(model([{"image": image, "instances": objects}]).values()).backward()
    plain = layer.weight.grad.clone()
    optimizer.step()
    lr = cfg.SOLVER.BASE_LR
    return image, plain, (before - layer.weight.detach()) / lr, tract


@pytest.mark.parametrize("clip", [False, True])
def test_the_step_is_tract_s_and_then_clipped(tmp_path, clip):
    changes = {"SOLVER.WEIGHT_DECAY": 0.0, "SOLVER.BASE_LR": 1.0}
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # its step has hooks from here on
    cfg = config(tmp_path, **changes)
    if clip:
        limit = 0.05
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = limit
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    image, plain, stepped, tract = one_step(cfg)
    assert tract.layer_names == ["backbone.bottom_up.stem.conv1"]
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    windows = nn.functional.unfold((image - mean)[None].double(), 7, padding=3, stride=2)[0]
    gram = windows @ windows.T / windows.shape[1]
    lam = cfg.SOLVER.TRACT.LAM * gram.trace() / len(gram)
    matrix = gram + lam * torch.eye(len(gram))
    expected = torch.linalg.solve(matrix, plain.flatten(1).double().T).T.reshape(plain.shape)
    if clip:
        assert expected.norm() != pytest.approx(limit, rel=0.1)
        expected *= min(1.0, limit / expected.norm())
    torch.testing.assert_close(
        stepped.double(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max()
    )


def test_without_it_nothing_changes(tmp_path):
    cfg = config(tmp_path, **{"SOLVER.TRACT.ENABLED": False, "SOLVER.WEIGHT_DECAY": 0.0})
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert attach_tract(cfg, model, optimizer) is None
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("name", ["build_resnet_fpn_backbone", OURS["MODEL.BACKBONE.NAME"]])
def test_a_frozen_stem_is_refused(tmp_path, name):
    changes = {**OURS, "MODEL.BACKBONE.NAME": name, "MODEL.BACKBONE.FREEZE_AT": 2}
    cfg = config(tmp_path, **changes)
    set_normalization(cfg)
    model = build_model(cfg)
    with pytest.raises(ValueError, match=r"conv1\S*\.weight is frozen.*FREEZE_AT 0"):
        attach_tract(cfg, model, build_optimizer(cfg, model))


# --------------------------------------------------------------------------------- backbones


def test_our_backbone_sees_what_it_was_trained_on(tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone("timm/test_resnet")
    backbone.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    save_backbone(tmp_path, backbone, {})
    changes = {**OURS, "MODEL.TRACT_BACKBONE.NAME": "", "SOLVER.TRACT.ENABLED": False}
    cfg = config(tmp_path, **changes, **{"MODEL.TRACT_BACKBONE.WEIGHTS": str(tmp_path)})
    set_normalization(cfg)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [102.0, 127.5, 153.0]
    model = build_model(cfg).eval()
    image = torch.randint(256, (3, 64, 96))
    with torch.no_grad():
        seen = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
        expected = backbone.eval().maps(image[None] / 255, list(backbone.pyramid()))
    by_stride = {info.stride: name for name, info in backbone.pyramid().items()}
    assert list(seen) == ["res1", "res2", "res3", "res4", "res5"]
    for name, shape in model.backbone.bottom_up.output_shape().items():
        torch.testing.assert_close(
            seen[name], expected[by_stride[shape.stride]], rtol=1e-4, atol=1e-5
        )
        assert seen[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_our_backbone_trains_with_tract_in_its_trainer(dataset, tmp_path):
    cfg = config(tmp_path, **OURS)
    cfg.MODEL.TRACT_BACKBONE.ARGS.drop_path_rate = 0.1
    set_normalization(cfg)
    trainer = TractTrainer(cfg)
    before = trainer.model.backbone.bottom_up.backbone.model.conv1[0].weight.detach().clone()
    trainer.train()
    after = trainer.model.backbone.bottom_up.backbone.model.conv1[0].weight
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, r"INPUT.FORMAT.*RGB.*config says.*BGR.*set_normalization"),
        ({"MODEL.BACKBONE.FREEZE_AT": 9}, "freeze_at 9 must be at most"),
        ({"MODEL.TRACT_BACKBONE.NAME": ""}, "WEIGHTS to a run folder"),
        ({"MODEL.TRACT_BACKBONE.OUT_FEATURES": ("res9",)}, "has the maps"),
        ({"MODEL.FPN.IN_FEATURES": ["res9"]}, r"IN_FEATURES must be of"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, says):
    cfg = config(tmp_path, **OURS, **{"SOLVER.TRACT.ENABLED": False})
    if changes:
        set_normalization(cfg)
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    with pytest.raises(ValueError, match=says):
        build_model(cfg)
