"""Compare the time of our training step with reference loops: same detector, input and optimizer.

- `detectron2`: our Trainer on the detector `detectron2` (FPN); detectron2's SimpleTrainer on a
  GeneralizedRCNN built from the same parts.
- `torchvision`: our Trainer on `torchvision_fpn`; the loop of torchvision's references/detection on
  the same model.
- `faster_rcnn`: our Trainer on `torchvision_fpn`; that loop on torchvision's FasterRCNN.

Random images in memory, float32, CPU. The two loops alternate step by step. Prints the median of
the paired ratios.

    python benchmarks/detectron2_step.py [--pairs detectron2 torchvision] [--blocks 20]
"""

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from tract_transfer.data.loader import Batch
from tract_transfer.engine.hooks import LogProgress, MetricsFile
from tract_transfer.engine.solver import build_optimizer, build_schedule, set_progress
from tract_transfer.engine.trainer import Trainer
from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.tract import TrAct

SIZE_PX, NUM_IMAGES, NUM_CLASSES, LR = 320, 2, 20, 1e-3
Loop = Callable[[], None]  # runs one step


def make_detector(name: str, **args: Any) -> nn.Module:
    """Build a detector on a ResNet-18."""
    torch.manual_seed(0)
    sizes = {"short_side_px": SIZE_PX, "max_side_px": SIZE_PX}
    backbone = build_backbone("torchvision/resnet18")
    model: nn.Module = DETECTORS.get(name)(backbone, NUM_CLASSES, **sizes, **args)
    return model.train()


def make_batches() -> list[Batch]:
    """Make random images of one size with five objects each."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        shape = (NUM_IMAGES, 3, SIZE_PX, SIZE_PX)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        targets = []
        for number in range(NUM_IMAGES):
            corners = torch.rand(5, 2, generator=generator) * (SIZE_PX - 100)
            sides = 20 + torch.rand(5, 2, generator=generator) * 80
            targets.append(
                {
                    "boxes": torch.cat([corners, corners + sides], 1),
                    "labels": torch.randint(0, NUM_CLASSES, (5,), generator=generator),
                    "difficult": torch.zeros(5, dtype=torch.bool),
                    "image_id": number,
                }
            )
        batches.append(Batch(list(images), targets, list(range(NUM_IMAGES)), []))
    return batches


def our_loop(model: nn.Module, batches: Sequence[Batch], folder: Path) -> Loop:
    """Return a step of our Trainer with its logging hook."""
    trainer = Trainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=build_optimizer(model, optimizer="sgd", lr=LR, momentum=0.9),
        schedule=build_schedule(max_iters=100_000),
        set_lr=set_progress,
        batches=lambda start: itertools.cycle(batches),
        tract=TrAct(model, layers=[]),
        max_iters=100_000,
        seed=0,
        hooks=[
            LogProgress(MetricsFile(folder, tensorboard=True), every_iters=20, iters_per_epoch=100)
        ],
    )
    for hook in trainer.hooks:
        hook.before_train(trainer)
    endless = trainer.batches(0)

    def step() -> None:
        trainer.step(endless)
        trainer.iteration += 1
        for hook in trainer.hooks:
            hook.after_step(trainer)

    return step


def detectron2_loop(model: nn.Module, batches: Sequence[Batch]) -> Loop:
    """Return a step of SimpleTrainer on a GeneralizedRCNN with a copy of the detector's parts."""
    from detectron2.engine import SimpleTrainer
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from tract_transfer.detectron2.detector import MapBackbone, named_by_stride

    model = copy.deepcopy(model)
    mean, std = (255 * stat.flatten() for stat in (model.backbone.mean, model.backbone.std))
    model.backbone.set_normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    names = [
        n for n, (name, _) in named_by_stride(model.backbone).items() if name in model.map_names
    ]
    model.neck.bottom_up = MapBackbone(model.backbone, names)
    rcnn = GeneralizedRCNN(
        backbone=model.neck,
        proposal_generator=model.rpn.rpn,
        roi_heads=model.roi_heads.heads,
        pixel_mean=mean.tolist(),
        pixel_std=std.tolist(),
    )
    size = (SIZE_PX, SIZE_PX)
    inputs = [
        [
            {
                "image": image,
                "instances": Instances(size, gt_boxes=Boxes(t["boxes"]), gt_classes=t["labels"]),
            }
            for image, t in zip(batch.images, batch.targets, strict=True)
        ]
        for batch in batches
    ]
    optimizer = torch.optim.SGD(rcnn.parameters(), lr=LR, momentum=0.9, foreach=True)
    trainer = SimpleTrainer(rcnn, itertools.cycle(inputs), optimizer)
    storage = EventStorage()

    def step() -> None:
        with storage:
            trainer.run_step()
        storage.step()
        trainer.iter += 1

    return step


def torchvision_loop(model: nn.Module, batches: Sequence[Batch], shift: int) -> Loop:
    """Return a step of train_one_epoch in torchvision's references/detection.

    Images are converted to float once, outside the step, as its data workers do.
    """
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9
    )
    inputs = [
        (
            [image.float() / 255 for image in batch.images],
            [{**t, "labels": t["labels"] + shift} for t in batch.targets],
        )
        for batch in batches
    ]
    endless = itertools.cycle(inputs)

    def step() -> None:
        images, targets = next(endless)
        losses = model(images, targets)
        loss = sum(losses.values())
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss is {value}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def torchvision_faster_rcnn() -> nn.Module:
    """Build torchvision's FasterRCNN with the default numbers of proposals of torchvision_fpn."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return FasterRCNN(
        backbone,
        NUM_CLASSES + 1,
        min_size=SIZE_PX,
        max_size=SIZE_PX,
        rpn_post_nms_top_n_train=1000,
    ).train()


def make_pair(name: str, batches: Sequence[Batch], folder: Path) -> dict[str, Loop]:
    """Return our loop and the reference loop of a comparison."""
    if name == "detectron2":
        model = make_detector("detectron2")
        theirs = detectron2_loop(model, batches)
    elif name == "torchvision":
        model = make_detector("torchvision_fpn")
        theirs = torchvision_loop(copy.deepcopy(model), batches, shift=0)
    else:
        model = make_detector("torchvision_fpn", box={"sampling_ratio": 2})  # as FasterRCNN
        theirs = torchvision_loop(torchvision_faster_rcnn(), batches, shift=1)
    return {"ours": our_loop(model, batches, folder), "theirs": theirs}


def measure(loops: dict[str, Loop], blocks: int) -> tuple[list[float], float]:
    """Return the paired ratios and the median seconds of our steps."""
    for step in loops.values():
        for _ in range(3):
            step()
    ratios, ours = [], []
    for block in range(blocks):
        seconds = {}
        for name in list(loops) if block % 2 else list(loops)[::-1]:
            started = time.perf_counter()
            loops[name]()
            seconds[name] = time.perf_counter() - started
        ratios.append(seconds["ours"] / seconds["theirs"])
        ours.append(seconds["ours"])
    return ratios, statistics.median(ours)


def main() -> None:
    """Measure and print the ratio of each comparison."""
    comparisons = ["detectron2", "torchvision", "faster_rcnn"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=comparisons, default=comparisons)
    parser.add_argument("--blocks", type=int, default=20, help="number of steps of each loop")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    batches = make_batches()
    for name in arguments.pairs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                loops = make_pair(name, batches, Path(folder))
            except ImportError as error:
                print(f"{name}: skipped. {error}")
                continue
            ratios, seconds = measure(loops, arguments.blocks)
        print(
            f"{name}: ours / theirs median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, "
            f"max {max(ratios):.3f}, {len(ratios)} pairs of steps; our step {seconds:.2f} s)"
        )


if __name__ == "__main__":
    main()
