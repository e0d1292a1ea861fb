"""Compare fine-tuning speed in images/s: ours, Hugging Face's Trainer and timm's loop.

All three use the same network, weights, batch, precision, memory format, optimizer (fused AdamW,
cosine), augmentation (random resized crop, flip, bilinear) and parquet files, on the CPU:

ours  what tools/train_net.py builds, with its log and `data.cache: device` (or `--cache ram`)
hf    transformers.Trainer, with images transformed by torchvision as in its examples
timm  timm's loader with prefetcher, optimizer and scheduler, combined as in its train.py (which is
      not part of the package)

First finds the best number of data workers from `--workers` for each; workers are persistent. Then
they take turns, each in a separate process, timed after a warm-up. Prints the median of the paired
ratios.

    python benchmarks/finetune_speed.py --data data/samples/cifar100 [--turns 5] [--iters 60]
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SIZE_PX, SCALE, LR, WEIGHT_DECAY, LOG_EVERY = 32, (0.3, 1.0), 1e-3, 0.05, 20
Setup = argparse.Namespace  # options shared by all three
PRECISIONS = {"bf16": torch.bfloat16, "fp32": None}
CONFIG = """
task: classification
output_dir: {folder}
model: {{backbone: {backbone}, head: {{name: linear}}}}
data:
  train: {{source: huggingface, path: {data}, split: train, label_column: {label}}}
  test: {{source: huggingface, path: {data}, split: test, label_column: {label}}}
  transforms:
    {{size_px: {size_px}, crop: random_resized, scale: {scale}, flip_prob: 0.5}}
  batch_size: {batch_size}
  num_workers: {workers}
  cache: {cache}
solver:
  {{optimizer: adamw, optimizer_args: {{fused: true}}, lr: {lr}, weight_decay: {decay},
    schedule: cosine, max_iters: {iters}}}
engine: {{precision: {precision}, channels_last: true, device: cpu}}
"""


class Clock:
    """Measures the time from the end of iteration `skipped` to the end of iteration `iters`."""

    def __init__(self, setup: Setup) -> None:
        self._first, self._last = setup.skipped, setup.iters
        self._images = (self._last - self._first) * setup.batch_size
        self._marks: dict[int, float] = {}

    def tick(self, iteration: int) -> None:
        """Record the end of an iteration."""
        self._marks[iteration] = time.perf_counter()

    def images_per_second(self) -> float:
        """Return the speed of the timed iterations."""
        return self._images / (self._marks[self._last] - self._marks[self._first])


def network(setup: Setup, num_classes: int) -> tuple[nn.Module, list[float], list[float]]:
    """Return the network for normalized images, and their normalization mean and std."""
    from tract_transfer.models import build_backbone

    torch.manual_seed(0)
    backbone = build_backbone(setup.backbone["name"], args=setup.backbone.get("args"))
    model = nn.Sequential(backbone.model, nn.Linear(backbone.feature_dim, num_classes))
    mean, std = (stat.flatten().tolist() for stat in (backbone.mean, backbone.std))
    return model.to(memory_format=torch.channels_last), mean, std


def ours(setup: Setup, workers: int) -> float:
    """Train with what train_net.py builds from a config, with its logging hook."""
    from tract_transfer.build.data import build_data
    from tract_transfer.build.trainer import build_accelerator, build_trainer
    from tract_transfer.config.schema import load_config
    from tract_transfer.engine.hooks import Hook, LogProgress, MetricsFile

    clock = Clock(setup)

    class Ticks(Hook):
        def after_step(self, trainer: Any) -> None:
            clock.tick(trainer.iteration)

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "config.yaml")
        path.write_text(
            CONFIG.format(
                folder=name, data=setup.data, label=setup.label, workers=workers,
                backbone=json.dumps(setup.backbone), size_px=SIZE_PX, scale=list(SCALE),
                batch_size=setup.batch_size, cache=setup.cache, lr=LR, decay=WEIGHT_DECAY,
                iters=setup.iters, precision=setup.precision,
            )
        )  # fmt: skip
        config: Any = load_config(path)
        trainer = build_trainer(config, build_data(config), build_accelerator(config))
        with contextlib.closing(MetricsFile(Path(name), tensorboard=True)) as metrics:
            log = LogProgress(metrics, every_iters=LOG_EVERY, iters_per_epoch=100)
            trainer.hooks = [log, Ticks()]
            trainer.train()
    return clock.images_per_second()


class WithLoss(nn.Module):
    """A network with the interface that transformers.Trainer expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return loss and logits."""
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face(setup: Setup, workers: int) -> float:
    """Train with transformers.Trainer, with transforms and collation as in its examples."""
    import datasets
    import transformers
    from torchvision import transforms

    rows = datasets.load_dataset(str(setup.data), split="train")
    image = next(k for k, v in rows.features.items() if isinstance(v, datasets.Image))
    num_classes = rows.features[setup.label].num_classes
    model, mean, std = network(setup, num_classes)
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE_PX, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = [augment(picture.convert("RGB")) for picture in batch[image]]
        return {"pixel_values": pixels, "labels": batch[setup.label]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": pixels, "labels": labels}

    clock = Clock(setup)

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, bf16=setup.precision == "bf16", max_steps=setup.iters,
            per_device_train_batch_size=setup.batch_size, learning_rate=LR,
            weight_decay=WEIGHT_DECAY, lr_scheduler_type="cosine", max_grad_norm=0.0,
            logging_steps=LOG_EVERY, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_drop_last=True,
            dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=WithLoss(model),
            args=arguments,
            train_dataset=rows.with_transform(transform),
            data_collator=collate,
            callbacks=[Ticks()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.images_per_second()


def timm_loop(setup: Setup, workers: int) -> float:
    """Train with timm's components, combined as in its train.py."""
    import datasets
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    features = datasets.load_dataset(str(setup.data), split="train").features
    image = next(k for k, v in features.items() if isinstance(v, datasets.Image))
    model, mean, std = network(setup, features[setup.label].num_classes)
    keys = {"input_key": image, "target_key": setup.label}
    dataset = create_dataset(f"hfds/{setup.data}", None, "train", is_training=True, **keys)
    loader = create_loader(
        dataset, (3, SIZE_PX, SIZE_PX), setup.batch_size, is_training=True, scale=SCALE,
        color_jitter=0.0, interpolation="bilinear", mean=tuple(mean), std=tuple(std),
        num_workers=workers, persistent_workers=workers > 0, device=torch.device("cpu"),
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "adamw", LR, WEIGHT_DECAY, fused=True)
    epochs = -(-setup.iters // len(loader))
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    precision, losses, clock, done = PRECISIONS[setup.precision], AverageMeter(), Clock(setup), 0
    model.train()
    for _ in range(epochs):
        for images, targets in itertools.islice(loader, setup.iters - done):
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", precision, enabled=precision is not None):
                loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            done += 1
            schedule.step_update(done, metric=losses.avg)
            clock.tick(done)
    return clock.images_per_second()


LOOPS: dict[str, Callable[[Setup, int], float]] = {
    "ours": ours,
    "hf": hugging_face,
    "timm": timm_loop,
}


def once(name: str, workers: int) -> float:
    """Measure one loop in a separate process, with the arguments of this one."""
    command = [sys.executable, *sys.argv, "--once", name, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return float(done.stdout.splitlines()[-1])


def best_workers(cache: str, counts: list[int]) -> dict[str, int]:
    """Return the fastest number of workers of each loop; 0 for ours with `cache: device`."""
    chosen = {}
    for name in LOOPS:
        tried = [0] if name == "ours" and cache == "device" else counts
        rates = {n: once(name, n) for n in tried} if len(tried) > 1 else {tried[0]: 0.0}
        chosen[name] = max(rates, key=lambda count: rates[count])
        speeds = ", ".join(f"{n}: {rate:,.0f} images/s" for n, rate in rates.items())
        print(f"{name}: {chosen[name]} workers ({speeds})", file=sys.stderr)
    return chosen


def main() -> None:
    """Find the numbers of workers, measure in turns and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-100 as parquet files"
    )
    parser.add_argument("--label", default="fine_label")
    parser.add_argument(
        "--backbone", type=json.loads, default={"name": "cifar/resnet18", "args": {"width": 32}}
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--cache", choices=("device", "ram"), default="device")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--iters", type=int, default=60, help="iterations per turn, with skipped ones"
    )
    parser.add_argument("--skipped", type=int, default=10, help="untimed iterations at the start")
    parser.add_argument("--once", nargs=2, metavar=("LOOP", "WORKERS"), help=argparse.SUPPRESS)
    setup = parser.parse_args()
    if not setup.data.is_dir():
        parser.error(f"{setup.data} is not a folder. Set --data to a folder of parquet files")
    if not 0 < setup.skipped < setup.iters:
        parser.error("--skipped must be greater than 0 and less than --iters")
    setup.data = setup.data.resolve()
    if setup.once:
        print(LOOPS[setup.once[0]](setup, int(setup.once[1])))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {vars(setup)}")
    workers = best_workers(setup.cache, setup.workers)
    rates: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(setup.turns):
        for name in sorted(LOOPS, reverse=turn % 2 == 1):
            rates[name].append(once(name, workers[name]))
            print(f"turn {turn}: {name} {rates[name][-1]:,.0f} images/s", file=sys.stderr)
    print("| loop | workers | images/s | ours / loop |\n| --- | --- | --- | --- |")
    for name, speeds in rates.items():
        ratios = [a / b for a, b in zip(rates["ours"], speeds, strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(
            f"| {name} | {workers[name]} | {statistics.median(speeds):,.0f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )


if __name__ == "__main__":
    main()
