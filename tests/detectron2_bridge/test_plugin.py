"""TrAct, our backbones and our evaluators in detectron2's own trainers."""

import copy
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
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.layers import Conv2d
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.structures import Boxes, BoxMode, Instances
    from detectron2.utils.events import EventStorage
    from detectron2_records import NAME, registered

    from tract_transfer.detectron2.plugin import (
        TractTrainer,
        VocDatasetEvaluator,
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
# Of detectron2's Base-RCNN-FPN: a small ResNet-18 on a CPU.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [48], [64], [96]],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATASETS.TRAIN": (NAME,),
    "DATASETS.TEST": (NAME,),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.TRACT.ENABLED": True,
}


def config(folder, **changes):
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list([word for pair in {**SMALL, **changes}.items() for word in pair])
    return cfg


# ------------------------------------------------------------------------------------ TrAct


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "stem.conv1"), (OURS, "backbone.model.conv1.0")]
)
def test_its_trainer_trains_with_tract_and_evaluates(dataset, tmp_path, monkeypatch, changes, name):
    steps = []
    step = TrAct.step

    def counted(self):
        before = self._watched[0].layer.weight.grad.clone()
        step(self)
        steps.append((self.layer_names, torch.equal(before, self._watched[0].layer.weight.grad)))

    monkeypatch.setattr(TrAct, "step", counted)
    cfg = config(tmp_path, **changes)
    if changes:
        cfg.MODEL.TRACT_BACKBONE.ARGS.drop_path_rate = 0.1
        set_normalization(cfg)
    trainer = TractTrainer(cfg)
    weight = trainer.model.get_parameter(f"backbone.bottom_up.{name}.weight")
    before = weight.detach().clone()
    trainer.train()
    assert steps == [([f"backbone.bottom_up.{name}"], False)] * 2
    assert weight.isfinite().all()
    assert not torch.equal(before, weight)
    metrics = TractTrainer.test(trainer.cfg, trainer.model)["bbox"]
    assert {"AP", "AP50", "AP75"} <= metrics.keys()
    assert all(0 <= value <= 100 for value in metrics.values())


def one_step(cfg):
    """Return the image, the stem's plain gradient, the negative step over the lr, and TrAct."""
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
    return image, plain, (before - layer.weight.detach()) / cfg.SOLVER.BASE_LR, tract


@pytest.mark.parametrize("limit", [None, 0.05])
def test_a_step_is_tracts_and_then_clipped(tmp_path, limit):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # installs the hooks of its step
    cfg = config(tmp_path, **{"SOLVER.WEIGHT_DECAY": 0.0, "SOLVER.BASE_LR": 1.0})
    if limit:
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
    if limit:
        assert expected.norm() != pytest.approx(limit, rel=0.1)
        expected *= min(1.0, limit / expected.norm())
    atol = 1e-3 * expected.abs().max()
    torch.testing.assert_close(stepped.double(), expected, rtol=1e-2, atol=atol)


def test_disabled_tract_leaves_the_optimizer_unchanged(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    cfg = config(tmp_path, **{"SOLVER.TRACT.ENABLED": False})
    assert attach_tract(cfg, None, optimizer) is None
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("name", ["build_resnet_fpn_backbone", OURS["MODEL.BACKBONE.NAME"]])
def test_a_frozen_stem_is_refused(tmp_path, name):
    changes = {**OURS, "MODEL.BACKBONE.NAME": name, "MODEL.BACKBONE.FREEZE_AT": 2}
    cfg = config(tmp_path, **changes)
    set_normalization(cfg)
    model = build_model(cfg)
    with pytest.raises(ValueError, match=r"conv1\S*\.weight is frozen.*FREEZE_AT 0"):
        attach_tract(cfg, model, build_optimizer(cfg, model))


def test_its_norm_and_activation_do_not_change_the_treatment():
    torch.manual_seed(0)
    wrapped = Conv2d(3, 4, 5, 2, 2, norm=nn.BatchNorm2d(4), activation=nn.ReLU())
    plain = nn.Conv2d(3, 4, 5, 2, 2)
    plain.load_state_dict({n: p for n, p in wrapped.state_dict().items() if "norm" not in n})
    images = torch.randn(2, 3, 16, 16)
    for model in (
        nn.Sequential(wrapped),
        nn.Sequential(plain, copy.deepcopy(wrapped.norm), nn.ReLU()),
    ):
        tract = TrAct(model)
        assert tract.layer_names == ["0"]
        model(images).square().mean().backward()
        tract.step()
    torch.testing.assert_close(wrapped.weight.grad, plain.weight.grad)


def test_a_convolution_that_changes_its_weight_is_refused():
    class Standardized(Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean())

    with pytest.raises(ValueError, match="changes its weight or its input"):
        TrAct(nn.Sequential(Standardized(3, 4, 3)))


def test_attach_works_on_its_clipping_optimizers():
    """They replace the optimizer's class, so torch's hooks run after the clipping."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-3
    cfg.SOLVER.MOMENTUM = cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.BASE_LR = 1.0
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4).double(), torch.randn(9, 6).double()
    optimizer = build_optimizer(cfg, layer)
    TrAct(layer).attach(optimizer)
    before = layer.weight.detach().clone()
    (layer(inputs).square().sum() / 2).backward()
    clipped = layer.weight.grad.clamp(-1e-3, 1e-3)
    optimizer.step()
    matrix = inputs.T @ inputs / 9 + 0.1 * torch.eye(6).double()
    torch.testing.assert_close(before - layer.weight, clipped @ torch.linalg.inv(matrix))


# -------------------------------------------------------------------------------- backbones


def test_our_backbone_gets_the_images_it_was_trained_on(tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone("timm/test_resnet")
    backbone.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    save_backbone(tmp_path, backbone, {})
    of_run = {"MODEL.TRACT_BACKBONE.NAME": "", "MODEL.TRACT_BACKBONE.WEIGHTS": str(tmp_path)}
    cfg = config(tmp_path, **{**OURS, **of_run})
    set_normalization(cfg)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [102.0, 127.5, 153.0]
    model = build_model(cfg).eval()
    image = torch.randint(256, (3, 64, 96))
    with torch.no_grad():
        ours = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
        expected = backbone.eval().maps(image[None] / 255, list(backbone.pyramid()))
    by_stride = {info.stride: name for name, info in backbone.pyramid().items()}
    assert list(ours) == ["res1", "res2", "res3", "res4", "res5"]
    for name, shape in model.backbone.bottom_up.output_shape().items():
        feature_map = expected[by_stride[shape.stride]]
        torch.testing.assert_close(ours[name], feature_map, rtol=1e-4, atol=1e-5)
        assert ours[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"needs .*RGB.* got .*BGR.*set_normalization"),
        ({"MODEL.BACKBONE.FREEZE_AT": 9}, "freeze_at 9"),
        ({"MODEL.TRACT_BACKBONE.NAME": ""}, "WEIGHTS to a run folder"),
        ({"MODEL.TRACT_BACKBONE.OUT_FEATURES": ("res9",)}, "has the feature maps"),
        ({"MODEL.FPN.IN_FEATURES": ["res9"]}, r"IN_FEATURES must be in"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(tmp_path, changes, message):
    cfg = config(tmp_path, **OURS)
    if changes:
        set_normalization(cfg)
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


# ------------------------------------------------------------------------------- evaluators


def outputs_of(records, shift=0.0):
    """Every object as a detection, shifted."""
    inputs, outputs = [], []
    for record in records:
        boxes = torch.tensor([o["bbox"] for o in record["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((64, 96), pred_boxes=Boxes(boxes + shift))
        instances.scores = torch.full((len(boxes),), 0.9)
        instances.pred_classes = torch.tensor([o["category_id"] for o in record["annotations"]])
        inputs.append({"image_id": record["image_id"]})
        outputs.append({"instances": instances})
    return inputs, outputs


@pytest.mark.parametrize("protocol", ["voc2007_devkit", "detectron2", "area", "coco"])
def test_metrics_are_percent_and_reset_discards_images(dataset, protocol):
    evaluator = VocDatasetEvaluator(NAME, protocol)
    evaluator.process(*outputs_of(dataset))
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP50-left"] == pytest.approx(100)
    assert evaluator.details()["num_difficult"] == 1
    evaluator.reset()
    evaluator.process(*outputs_of(dataset, shift=30.0))
    assert evaluator.evaluate()["bbox"]["AP50"] == 0


def test_difficult_objects_of_a_voc_dataset_are_read_from_its_files(tmp_path):
    xml = tmp_path / "Annotations" / "000001.xml"
    xml.parent.mkdir()
    flags = ("<object><difficult>1</difficult></object>", "<object/>")
    xml.write_text(f"<annotation>{''.join(flags)}</annotation>")
    box = {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    name = f"{NAME}_voc"
    DatasetCatalog.register(name, lambda: [{"image_id": "000001", "annotations": [box, box]}])
    try:
        metadata = MetadataCatalog.get(name)
        metadata.set(thing_classes=["cat"], dirname=str(tmp_path), year=2007, split="test")
        assert VocDatasetEvaluator(name)._targets["000001"]["difficult"].tolist() == [True, False]
        xml.write_text("<annotation></annotation>")
        with pytest.raises(ValueError, match="0 objects and the registered dataset 2"):
            VocDatasetEvaluator(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
