"""TrAct, backbones and evaluators in detectron2's own trainers (docs/guides/detectron2.md).

Importing this module imports detectron2 and registers our backbones there.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.structures import BoxMode
from torch import nn
from torch.optim import Optimizer

from tract_transfer.detectron2.detector import MapBackbone, as_dict, build_pyramid
from tract_transfer.evaluation import find_evaluator
from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.freeze import freeze_stages
from tract_transfer.models.weights import build_from_metadata, load_weights, read_metadata
from tract_transfer.models.weights_detectron2 import pixel_normalization
from tract_transfer.tract import TrAct


def add_tract_config(cfg: CfgNode) -> None:
    """Add our keys to a detectron2 config, all of them off.

    SOLVER.TRACT: ENABLED; LAM and LAM_MODE, "relative" because detectron2's pixels are 0..255 (see
    TrAct); LAYERS, dotted names, or () to find the first layer.
    MODEL.TRACT_BACKBONE: what build_tract_transfer_backbone builds. NAME, STEM and ARGS are those
    of `build_backbone`; WEIGHTS is a run folder (without NAME), a file, "pretrained", or "".
    OUT_FEATURES names the feature maps it returns, () for all; res4 has stride 2^4.
    TEST.VOC_PROTOCOL: one of EVALUATORS.
    """
    cfg.SOLVER.TRACT = CfgNode({"ENABLED": False, "LAM": 0.1, "LAM_MODE": "relative", "LAYERS": ()})
    cfg.MODEL.TRACT_BACKBONE = CfgNode(
        {"NAME": "", "STEM": "default", "WEIGHTS": "", "OUT_FEATURES": ()}
    )
    cfg.MODEL.TRACT_BACKBONE.ARGS = CfgNode(new_allowed=True)
    cfg.TEST.VOC_PROTOCOL = "voc2007_devkit"


def attach_tract(cfg: CfgNode, model: nn.Module, optimizer: Optimizer) -> TrAct | None:
    """Make every `optimizer.step()` start with TrAct's step, if SOLVER.TRACT.ENABLED.

    This replaces the optimizer's `step`. DefaultTrainer never calls an `after_backward` hook, and
    an optimizer's step pre-hook runs after detectron2 clips gradients.
    """
    section = cfg.SOLVER.TRACT
    if not section.ENABLED:
        return None
    try:
        tract = TrAct(
            model, section.LAM, lam_mode=section.LAM_MODE, layers=list(section.LAYERS) or None
        )
    except ValueError as error:
        raise ValueError(
            f"{error} In a detectron2 config: MODEL.BACKBONE.FREEZE_AT 0 trains the stem, "
            "SOLVER.TRACT.LAYERS names the layer, SOLVER.TRACT.ENABLED False disables TrAct."
        ) from error

    def step(self: Optimizer, closure: Any = None) -> Any:
        tract.step()
        return type(self).step(self, closure)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return tract


class TractTrainer(DefaultTrainer):  # type: ignore[misc]
    """detectron2's DefaultTrainer with TrAct (SOLVER.TRACT) and our VOC evaluator.

    Your own trainer only needs to call `attach_tract` in its `build_optimizer`.
    """

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Return detectron2's optimizer, with TrAct if it is enabled."""
        optimizer: Optimizer = super().build_optimizer(cfg, model)
        attach_tract(cfg, model, optimizer)
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> "VocDatasetEvaluator":
        """Return our evaluator with TEST.VOC_PROTOCOL."""
        return VocDatasetEvaluator(dataset_name, cfg.TEST.VOC_PROTOCOL)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_tract_transfer_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MapBackbone:
    """Build the backbone of MODEL.TRACT_BACKBONE with its weights; detectron2 normalizes images.

    MODEL.BACKBONE.FREEZE_AT counts its stages as those of a ResNet.
    """
    backbone = _build_weighted(cfg)
    expected = pixel_normalization(backbone)
    actual = {key: list(cfg.MODEL[key]) for key in expected}
    is_close = [
        len(actual[key]) == 3 and np.allclose(actual[key], values, rtol=0, atol=0.01)
        for key, values in expected.items()
    ]
    if cfg.INPUT.FORMAT != "RGB" or not all(is_close):
        raise ValueError(
            f"{backbone.origin['name']} needs RGB images and {expected}, got {cfg.INPUT.FORMAT} "
            f"and {actual}. Call set_normalization(cfg)."
        )
    backbone.set_normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    freeze_stages(backbone, cfg.MODEL.BACKBONE.FREEZE_AT)
    return MapBackbone(backbone, list(cfg.MODEL.TRACT_BACKBONE.OUT_FEATURES) or None)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_tract_transfer_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone of MODEL.TRACT_BACKBONE below the pyramid MODEL.FPN."""
    bottom_up = build_tract_transfer_backbone(cfg, input_shape)
    names, shapes = list(cfg.MODEL.FPN.IN_FEATURES), bottom_up.output_shape()
    if not names or not set(names) <= shapes.keys():
        raise ValueError(f"MODEL.FPN.IN_FEATURES must be in {list(shapes)}, got {names}.")
    return build_pyramid(cfg, bottom_up, names)


def set_normalization(cfg: CfgNode) -> None:
    """Set INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD to what MODEL.TRACT_BACKBONE needs."""
    cfg.INPUT.FORMAT = "RGB"
    for key, values in pixel_normalization(_build_weighted(cfg)).items():
        setattr(cfg.MODEL, key, values)


def _build_weighted(cfg: CfgNode) -> Backbone:
    """Build the backbone of MODEL.TRACT_BACKBONE, which normalizes images in [0, 1]."""
    section = cfg.MODEL.TRACT_BACKBONE
    pretrained = section.WEIGHTS == "pretrained"
    if section.NAME:
        backbone = build_backbone(
            section.NAME, stem=section.STEM, args=dict(section.ARGS), pretrained=pretrained
        )
    elif section.WEIGHTS and not pretrained:
        backbone = build_from_metadata(read_metadata(Path(section.WEIGHTS)))
    else:
        raise ValueError(
            "Set MODEL.TRACT_BACKBONE.WEIGHTS to a run folder, or NAME to a backbone such as "
            "timm/resnet50."
        )
    if section.WEIGHTS and not pretrained:
        load_weights(backbone, Path(section.WEIGHTS))
    return backbone


class VocDatasetEvaluator(DatasetEvaluator):  # type: ignore[misc]
    """Our evaluators for a dataset registered in detectron2's catalogs.

    The difficult flags are read from the XML files of a VOC dataset, as detectron2 drops them, and
    from `iscrowd` for other datasets. `protocol` is one of EVALUATORS.
    """

    def __init__(self, dataset_name: str, protocol: str = "voc2007_devkit") -> None:
        class_names = list(MetadataCatalog.get(dataset_name).thing_classes)
        self._make_evaluator = partial(find_evaluator(protocol, "detection"), class_names)
        self._targets = _targets(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Discard all images."""
        self._evaluator = self._make_evaluator()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add images: `image_id` of each input, `instances` of each output, in image pixels."""
        predictions = [as_dict(output["instances"]) for output in outputs]
        targets = [self._targets[record["image_id"]] for record in inputs]
        self._evaluator.update(predictions, targets)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return {"bbox": {"AP": ..., "AP50": ..., "AP50-<class>": ...}} in percent."""
        metrics = {
            name.replace("ap", "AP", 1).replace("ar", "AR", 1): 100 * value
            for name, value in self._evaluator.compute().items()
        }
        by_class = self.details()["per_class"]
        return {"bbox": {**metrics, **{f"AP50-{n}": 100 * ap for n, ap in by_class.items()}}}

    def details(self) -> dict[str, Any]:
        """Return the protocol in words, counts and curves; call `evaluate` first."""
        details: dict[str, Any] = self._evaluator.details()
        return details


def _targets(dataset_name: str) -> dict[Any, dict[str, Any]]:
    """Return the ground truth by detectron2's image_id."""
    metadata = MetadataCatalog.get(dataset_name)
    is_voc = metadata.get("dirname") and metadata.get("split")  # set by register_pascal_voc
    targets = {}
    for index, record in enumerate(DatasetCatalog.get(dataset_name)):
        objects = record["annotations"]
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        difficult = [bool(o.get("iscrowd", 0)) for o in objects]
        if is_voc:
            import defusedxml.ElementTree

            xml = Path(metadata.dirname) / "Annotations" / f"{record['image_id']}.xml"
            elements = defusedxml.ElementTree.parse(xml).findall("object")  # detectron2's order
            difficult = [(e.findtext("difficult") or "0").strip() == "1" for e in elements]
            if len(difficult) != len(objects):
                raise ValueError(
                    f"{xml} has {len(difficult)} objects and the registered dataset "
                    f"{len(objects)}. Register the dataset from these files."
                )
        targets[record["image_id"]] = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([o["category_id"] for o in objects], dtype=torch.int64),
            "difficult": torch.tensor(difficult, dtype=torch.bool),
            "image_id": index,  # detectron2's can be a string
        }
    return targets
