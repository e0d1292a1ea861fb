"""Check that each kind of detector learns: overfit 20 real photographs and measure AP on them.

Backbones start from random weights, so the whole detector must learn. A detector with a wrong
target, box or gradient cannot overfit 20 images.

    python benchmarks/overfit_detectors.py --voc data/samples/voc [--kinds c4] [--precision bf16]

A plain ViT has no locality built in, so from random weights it needs more iterations.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tract_transfer.config.schema import load_config
from tract_transfer.run.evaluate import evaluate_run
from tract_transfer.run.run import run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "detection" / "r18_fpn_voc07.yaml"
NUM_IMAGES = 20
SETTINGS = [
    "model.weights=null",
    "data.transforms={short_sides_px: [192], max_side_px: 288, flip_prob: 0.0}",
    "data.batch_size=4",
    "data.num_workers=1",
    "data.cache=ram",
    "solver.optimizer=adamw",
    "solver.momentum=null",
    "solver.weight_decay=1e-4",
    "solver.schedule=cosine",
    "solver.steps_iters=null",
    "solver.warmup_iters=50",
    "evaluation.every_iters=null",
    "engine.checkpoint.every_iters=null",
    "engine.grad_clip=10.0",
    "engine.channels_last=true",
]
# Small settings that suffice on a CPU.
SIZE = "short_side_px: 192, max_side_px: 288"
PROPOSALS = "rpn: {pre_nms_train: 600, post_nms_train: 300, post_nms_test: 300}"
ROIS = "box: {rois_per_image: 64}"
NECK = f"fpn_channels: 64, head_dim: 256, {PROPOSALS}, {ROIS}"
RESNET = "model.backbone.name=torchvision/resnet18"
# Iterations to overfit where 200 are too few, and learning rates other than 5e-4.
ITERS = {"detectron2_c4": 300, "vitdet": 600}
LRS = {"vitdet": 1e-3}
# Kind -> (title, overrides)
KINDS = {
    "fpn": ("torchvision_fpn, ResNet-18", [RESNET, f"model.detector.args={{{SIZE}, {NECK}}}"]),
    "c4": (
        "torchvision_c4, ResNet-18",
        [
            RESNET,
            "model.detector.name=torchvision_c4",
            f"model.detector.args={{{SIZE}, {PROPOSALS}, {ROIS}}}",
        ],
    ),
    "c5": (
        "torchvision_c5, VGG-11 with BatchNorm",
        [
            "model.backbone.name=torchvision/vgg11_bn",
            "model.detector.name=torchvision_c5",
            f"model.detector.args={{{SIZE}, {ROIS}, rpn: {{anchor_scales: [2, 4, 8, 16]}}}}",
        ],
    ),
    "vitdet": (
        "torchvision_vitdet, ViT-Ti/16",
        [
            "model.backbone.name=timm/vit_tiny_patch16_224",
            "model.detector.name=torchvision_vitdet",
            f"model.detector.args={{{SIZE}, {NECK}}}",
        ],
    ),
    "detectron2": (
        "detectron2 (FPN), ResNet-18",
        [
            RESNET,
            "model.detector.name=detectron2",
            f"model.detector.args={{{SIZE}, options: {{MODEL.FPN.OUT_CHANNELS: 64, "
            "MODEL.ROI_BOX_HEAD.FC_DIM: 256, MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE: 64}}",
        ],
    ),
    "detectron2_c4": (
        "detectron2 (C4), ResNet-18",
        [
            RESNET,
            "model.detector.name=detectron2",
            f"model.detector.args={{{SIZE}, neck: c4, "
            "options: {MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE: 64}}",
        ],
    ),
}


def write_devkit(voc: Path, folder: Path) -> Path:
    """Write a devkit of sets `learn` and `other` with images of `voc`; return its folder."""
    source = voc / "VOCdevkit" / "VOC2007"
    year = folder / "VOCdevkit" / "VOC2007"
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (year / name).symlink_to((source / name).resolve())
    names = (source / "ImageSets" / "Main" / "train.txt").read_text().split()
    for name, first in (("learn", 0), ("other", NUM_IMAGES)):
        chosen = names[first : first + NUM_IMAGES]
        (year / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    return folder


def main() -> None:
    """Print a Markdown table with a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voc", type=Path, required=True, help="folder that contains VOCdevkit")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--iters", type=int, help="default: depends on the kind")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--lr", type=float, help="default: depends on the kind")
    parser.add_argument("--tract", action="store_true", help="train with TrAct")
    arguments = parser.parse_args()
    print("| detector | iterations | AP50 | AP75 | s/iteration |", flush=True)
    print("| --- | --- | --- | --- | --- |", flush=True)
    for kind in arguments.kinds:
        title, overrides = KINDS[kind]
        iters = arguments.iters or ITERS.get(kind, 200)
        with tempfile.TemporaryDirectory() as folder:
            root = write_devkit(arguments.voc, Path(folder))
            learn, other = (f"{{root: {root}, sets: [2007/{name}]}}" for name in ("learn", "other"))
            settings = [
                *SETTINGS,
                *overrides,
                f"output_dir={folder}/run",
                f"solver.max_iters={iters}",
                f"solver.lr={arguments.lr or LRS.get(kind, 5e-4)}",
                f"engine.precision={arguments.precision}",
                f"tract.enabled={str(arguments.tract).lower()}",
            ]
            started = time.perf_counter()
            run(load_config(CONFIG, [*settings, f"data.train={learn}", f"data.test={other}"]))
            seconds = time.perf_counter() - started
            # A run does not report on its training images, so evaluate them afterwards.
            swapped = [*settings, f"data.train={other}", f"data.test={learn}"]
            metrics = evaluate_run(load_config(CONFIG, swapped))
        print(
            f"| {title} | {iters} | {100 * metrics['ap50']:.1f} | {100 * metrics['ap75']:.1f} "
            f"| {seconds / iters:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
