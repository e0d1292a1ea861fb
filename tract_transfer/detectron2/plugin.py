"""TrAct, our backbones and our evaluators in detectron2's own trainers.

    from tract_transfer.detectron2_plugin import TractTrainer, add_tract_config

    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file("mine.yaml")    # SOLVER.TRACT.ENABLED: True, MODEL.BACKBONE.FREEZE_AT: 0
    TractTrainer(cfg).train()

Importing this imports detectron2, and registers our backbones there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

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

from tract_transfer.detectron2.detector import MapBackbone, pooled_top
from tract_transfer.evaluation import EVALUATORS
from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.freeze import freeze_stages
from tract_transfer.models.weights import build_from_metadata, load_weights, read_metadata
from tract_transfer.tract import TrAct


def add_tract_config(cfg: CfgNode) -> None:
    """Add our keys to a detectron2 config, all of them off.

    SOLVER.TRACT: ENABLED; LAM and LAM_MODE, "relative" because detectron2's own pixels are 0..255
    (see TrAct); LAYERS, dotted names, or () to find the first.
    MODEL.TRACT_BACKBONE: what build_tract_transfer_backbone builds. NAME, STEM and ARGS are those
    of `build_backbone`; WEIGHTS is a run folder, which needs no NAME, or a file, "pretrained", or
    "". OUT_FEATURES are the maps it puts out, () for all; res4 is that of stride 2^4.
    TEST.VOC_PROTOCOL: one of EVALUATORS.
    """
    cfg.SOLVER.TRACT = CfgNode({"ENABLED": False, "LAM": 0.1, "LAM_MODE": "relative", "LAYERS": ()})
    cfg.MODEL.TRACT_BACKBONE = CfgNode(
        {"NAME": "", "STEM": "default", "WEIGHTS": "", "OUT_FEATURES": ()}
    )
    cfg.MODEL.TRACT_BACKBONE.ARGS = CfgNode(new_allowed=True)
    cfg.TEST.VOC_PROTOCOL = "voc2007_devkit"


# ------------------------------------------------------------------------------------- TrAct


def attach_tract(cfg: CfgNode, model: nn.Module, optimizer: Optimizer) -> TrAct | None:
    """Let every `optimizer.step()` begin with TrAct's, before detectron2 clips.

    Neither an `after_backward` hook, which DefaultTrainer never calls, nor an optimizer's step
    pre-hook, which runs after detectron2's clipping, would do. So it is this optimizer's own
    `step` that begins with TrAct's.

    Returns:
        What was attached, or None where SOLVER.TRACT.ENABLED is False.

    Raises:
        ValueError: the layer cannot be found or treated, or is frozen (MODEL.BACKBONE.FREEZE_AT).
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
            "SOLVER.TRACT.LAYERS names the layer, SOLVER.TRACT.ENABLED False leaves TrAct off."
        ) from error

    def step(self: Optimizer, closure: Any = None) -> Any:
        tract.step()
        return type(self).step(self, closure)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return tract


class TractTrainer(DefaultTrainer):  # type: ignore[misc]
    """detectron2's DefaultTrainer with TrAct (SOLVER.TRACT) and our VOC evaluator.

    A trainer of your own needs no more than `attach_tract` in its `build_optimizer`.
    """

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Return detectron2's optimizer, with TrAct if it is enabled."""
        optimizer: Optimizer = super().build_optimizer(cfg, model)
        attach_tract(cfg, model, optimizer)
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> "VocDatasetEvaluator":
        """Return our evaluator under TEST.VOC_PROTOCOL."""
        return VocDatasetEvaluator(dataset_name, cfg.TEST.VOC_PROTOCOL)


# --------------------------------------------------------------------------------- backbones


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_tract_transfer_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MapBackbone:
    """Build the backbone of MODEL.TRACT_BACKBONE with its weights; detectron2 normalises.

    MODEL.BACKBONE.FREEZE_AT counts its stages as those of a ResNet.

    Raises:
        ValueError: the config's colours are not the backbone's, or the backbone does not fit.
    """
    backbone = _features(cfg)
    expected = _colours(backbone)
    told = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
    }
    if not _same_colours(told, expected):
        raise ValueError(
            f"{backbone.origin['name']} needs {json.dumps(expected)}, and the config says "
            f"{json.dumps(told)}. set_normalization(cfg) sets them."
        )
    backbone.set_normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    freeze_stages(backbone, cfg.MODEL.BACKBONE.FREEZE_AT)
    return MapBackbone(backbone, list(cfg.MODEL.TRACT_BACKBONE.OUT_FEATURES) or None)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_tract_transfer_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone of MODEL.TRACT_BACKBONE below a pyramid of MODEL.FPN."""
    section = cfg.MODEL.FPN
    bottom_up = build_tract_transfer_backbone(cfg, input_shape)
    names = list(section.IN_FEATURES)
    unknown = [name for name in names if name not in bottom_up.output_shape()]
    if unknown or not names:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be of {list(bottom_up.output_shape())}, got {names}."
        )
    return FPN(
        bottom_up,
        names,
        section.OUT_CHANNELS,
        norm=section.NORM,
        top_block=pooled_top(names),
        fuse_type=section.FUSE_TYPE,
    )


def set_normalization(cfg: CfgNode) -> None:
    """Set INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD as MODEL.TRACT_BACKBONE needs them."""
    for key, value in _colours(_features(cfg)).items():
        cfg.merge_from_list([key, value])


def _features(cfg: CfgNode) -> Backbone:
    """The backbone of MODEL.TRACT_BACKBONE, which normalises images in [0, 1]."""
    section = cfg.MODEL.TRACT_BACKBONE
    published = section.WEIGHTS == "pretrained"
    if section.NAME:
        backbone = build_backbone(
            section.NAME, stem=section.STEM, args=dict(section.ARGS), pretrained=published
        )
    elif section.WEIGHTS and not published:
        backbone = build_from_metadata(read_metadata(Path(section.WEIGHTS)))
    else:
        raise ValueError(
            "Set MODEL.TRACT_BACKBONE.WEIGHTS to a run folder, or NAME to a backbone's such as "
            "timm/resnet50."
        )
    if section.WEIGHTS and not published:
        load_weights(backbone, Path(section.WEIGHTS))
    return backbone


def _colours(backbone: Backbone) -> dict[str, Any]:
    mean, std = backbone.mean.flatten(), backbone.std.flatten()
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * value, 4) for value in mean.tolist()],
        "MODEL.PIXEL_STD": [round(255 * value, 4) for value in std.tolist()],
    }


def _same_colours(told: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    if told["INPUT.FORMAT"] != expected["INPUT.FORMAT"]:
        return False
    pairs = [(told[key], expected[key]) for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")]
    return all(
        len(a) == len(b) and all(abs(x - y) < 0.01 for x, y in zip(a, b, strict=True))
        for a, b in pairs
    )


# -------------------------------------------------------------------------------- evaluation


class VocDatasetEvaluator(DatasetEvaluator):  # type: ignore[misc]
    """Our evaluators for a dataset registered in detectron2's catalogs.

    Difficult objects come from the XML files of a VOC dataset, where detectron2 leaves them out,
    and from `iscrowd` of any other.

    Args:
        dataset_name: registered, with `thing_classes`.
        protocol: one of EVALUATORS.
    """

    def __init__(self, dataset_name: str, protocol: str = "voc2007_devkit") -> None:
        self.protocol = protocol
        self.class_names: list[str] = list(MetadataCatalog.get(dataset_name).thing_classes)
        self._targets = _targets(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._evaluator = EVALUATORS.get(self.protocol)(self.class_names)

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add images: `image_id` of each input, `instances` of each output, in its own pixels."""
        found = [output["instances"] for output in outputs]
        self._evaluator.update(
            [
                {"boxes": x.pred_boxes.tensor, "scores": x.scores, "labels": x.pred_classes}
                for x in found
            ],
            [self._targets[each["image_id"]] for each in inputs],
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return {"bbox": {"AP": ..., "AP50": ..., "AP50-<class>": ...}} in percent."""
        metrics = {
            name.replace("ap", "AP", 1).replace("ar", "AR", 1): 100 * value
            for name, value in self._evaluator.compute().items()
        }
        by_class = self.details()["per_class"]
        return {"bbox": {**metrics, **{f"AP50-{n}": 100 * ap for n, ap in by_class.items()}}}

    def details(self) -> dict[str, Any]:
        """Return the protocol in words, counts and curves; after `evaluate`."""
        details: dict[str, Any] = self._evaluator.details()
        return details


def _targets(dataset_name: str) -> dict[Any, dict[str, Any]]:
    """The ground truth by detectron2's image_id."""
    metadata = MetadataCatalog.get(dataset_name)
    is_voc = metadata.get("dirname") and metadata.get("split")  # as register_pascal_voc sets them
    folder = Path(metadata.dirname) / "Annotations" if is_voc else None
    targets = {}
    for index, record in enumerate(DatasetCatalog.get(dataset_name)):
        objects = record["annotations"]
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        difficult = [bool(each.get("iscrowd", 0)) for each in objects]
        if folder is not None:
            difficult = _difficult(folder / f"{record['image_id']}.xml", len(objects))
        targets[record["image_id"]] = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([each["category_id"] for each in objects], dtype=torch.int64),
            "difficult": torch.tensor(difficult, dtype=torch.bool),
            "image_id": index,  # detectron2's own may be a name
        }
    return targets


def _difficult(xml: Path, count: int) -> list[bool]:
    """The flags of an annotation file, in the order detectron2 reads its objects."""
    import defusedxml.ElementTree

    objects = defusedxml.ElementTree.parse(xml).findall("object")
    if len(objects) != count:
        raise ValueError(
            f"{xml} has {len(objects)} objects and the registered dataset {count}. Register the "
            "dataset from these files."
        )
    return [(each.findtext("difficult") or "0").strip() == "1" for each in objects]
