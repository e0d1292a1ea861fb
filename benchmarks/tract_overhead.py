"""Measure the time and peak memory that TrAct adds to a training step.

Three first layers with equal weights share the rest of a model: plain, ours (TrAct's hooks and
`step()`), and the layer of the authors' package torch_tract. They alternate step by step in random
order, with a second plain layer whose ratio to the first should be 1. Steps vary by more than 1 %,
so TrAct's own work is also timed within the step. Peaks are of torch's allocations, measured in a
separate process for each variant.

    python benchmarks/tract_overhead.py [--cases vgg16] [--precisions bf16] [--steps 20]

On a CPU, set MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 so that glibc
keeps its memory. Otherwise steps also pay page faults for memory that was returned to the system.
Their number varies, and can be higher with TrAct.
"""

# B images, H height and W width in pixels

import argparse
import copy
import functools
import itertools
import json
import operator
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tract_transfer.models import build_backbone
from tract_transfer.tract import TrAct

NUM_CLASSES = 100
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
VARIANTS = ("plain", "again", "official", "ours")


@dataclass(frozen=True)
class Case:
    """A model and its batch; `images` is (B, H, W)."""

    title: str
    build: Callable[[], nn.Module]
    first_layer: str
    images: tuple[int, int, int]
    channels_last: bool = True


def cifar_resnet18() -> nn.Module:
    """Build a ResNet-18 with a 3x3 stem of stride 1 and a max-pool, as in the paper."""
    backbone = build_backbone("cifar/resnet18")
    return nn.Sequential(backbone.model, nn.Linear(backbone.feature_dim, NUM_CLASSES))


def vgg16() -> nn.Module:
    """Build VGG-16's convolutions, as in Faster R-CNN, with pooling and a linear head."""
    features = torchvision.models.vgg16().features
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, NUM_CLASSES))
    return nn.Sequential(features, *head)


CASES = {
    "resnet18": Case("ResNet-18, 128 x 32 px", cifar_resnet18, "0.conv1", (128, 32, 32)),
    "resnet50": Case(
        "ResNet-50, 16 x 224 px",
        lambda: timm.create_model("resnet50", num_classes=NUM_CLASSES),
        "conv1",
        (16, 224, 224),
    ),
    "vit_small": Case(
        "ViT-S/16, 32 x 224 px",
        lambda: timm.create_model("vit_small_patch16_224", num_classes=NUM_CLASSES),
        "patch_embed.proj",
        (32, 224, 224),
        channels_last=False,
    ),
    "vgg16": Case("VGG-16, 1 x 600 x 800 px", vgg16, "0.0", (1, 600, 800)),
}


class Bench:
    """One model, batch and optimizer with exchangeable first layers."""

    def __init__(
        self, case: Case, batch_size: int, precision: torch.dtype | None, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        self.first_layer = case.first_layer
        self.model = case.build().train().to(device)
        self.images = torch.randn(batch_size, 3, *case.images[1:], device=device)
        self.targets = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)
        if case.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        plain = self.model.get_submodule(case.first_layer)
        names = ("plain", "again", "ours", "official")
        self.layers = {name: copy.deepcopy(plain) for name in names}
        # A layer that is not in use has no gradient, so SGD skips its weight.
        parameters = [*self.model.parameters(), *nn.ModuleDict(self.layers).parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        self.marks: list[float] | None = None
        self.use("ours")
        self.mark_hooks(self.layers["ours"])
        self.tract = TrAct(self.model, layers=[case.first_layer])
        self.mark_hooks(self.layers["ours"])

    def mark_hooks(self, layer: nn.Module) -> None:
        """Mark the time around TrAct's hooks; call before and after it registers them."""
        layer.register_forward_pre_hook(lambda *_: self.mark())
        layer.register_forward_hook(lambda *_: self.mark())
        layer.weight.register_hook(lambda _: self.mark())
        layer.weight.register_post_accumulate_grad_hook(lambda _: self.mark())

    def add_official(self) -> None:
        """Add torch_tract's layer if it is installed and works at this precision."""
        try:
            import torch_tract

            self.layers["official"] = torch_tract.TrAct(self.layers["official"])
            self.step("official")
        except (ImportError, RuntimeError) as error:
            print(f"torch_tract is skipped: {str(error).splitlines()[0]}", file=sys.stderr)
            del self.layers["official"]

    def use(self, variant: str) -> None:
        """Use the first layer of a variant."""
        self.model.set_submodule(self.first_layer, self.layers[variant])

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> None:
        """Record the time if TrAct's own work is being timed."""
        if self.marks is not None:
            self.wait()
            self.marks.append(time.perf_counter())

    def step(self, variant: str) -> float:
        """Run one training step; return its seconds."""
        self.use(variant)
        self.wait()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        if variant == "ours":
            self.mark()
            self.tract.step()
            self.mark()
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - started

    def own_work(self) -> tuple[float, float]:
        """Return the seconds that TrAct's hooks and its `step()` take within a step."""
        self.marks = []
        self.step("ours")
        spans = [after - before for before, after in zip(*[iter(self.marks)] * 2, strict=True)]
        self.marks = None
        return sum(spans[:-1]), spans[-1]


def interval(ratios: list[float]) -> str:
    """Format the median with its 95 % interval from order statistics."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 0.98 * n**0.5
    low, high = max(0, round(n / 2 - reach) - 1), min(n - 1, round(n / 2 + reach))
    return f"{statistics.median(ratios):.4f} [{ordered[low]:.4f}, {ordered[high]:.4f}]"


def allocated_peak(run: Callable[[], object], device: torch.device) -> float:
    """Run; return the peak of torch's allocations in MiB, including oneDNN's buffers.

    The memory of the whole process varies by 5 % between processes.
    """
    if device.type == "cuda":
        run()
        return torch.cuda.max_memory_allocated(device) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    counts = [event for event in events if event["name"] == "[memory]"]
    first = min(counts, key=operator.itemgetter("ts"))["args"]
    # Subtract the count that an earlier profile of this process left.
    before = first["Total Allocated"] - first["Bytes"]
    return (max(event["args"]["Total Allocated"] for event in counts) - before) / 2**20


def peak_of(variant: str, words: list[str]) -> float:
    """Train a few steps of one variant in a separate process; return its peak in MiB."""
    command = [sys.executable, __file__, *words, "--peak_of", variant]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(process.stdout)


def measure_times(bench: Bench, steps: int) -> dict[str, str]:
    """Return the cells of a table row on time."""
    random_order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS if name in bench.layers}
    for name in seconds:
        bench.step(name)
    for _ in range(steps):
        for name in random_order.sample(list(seconds), len(seconds)):
            seconds[name].append(bench.step(name))
    work = [bench.own_work() for _ in range(max(steps // 2, 4))]
    step = statistics.median(seconds["plain"])
    hook, solve = (statistics.median(column) for column in zip(*work, strict=True))
    cells = {"step": f"{1e3 * step:.0f} ms"}
    for name in VARIANTS[1:]:
        pairs = zip(seconds.get(name, ()), seconds["plain"], strict=False)
        ratios = [other / plain for other, plain in pairs]
        cells[name] = interval(ratios) if ratios else "fails"
    cells["added"] = f"{1e3 * hook:.1f} + {1e3 * solve:.1f} ms"
    cells["share"] = f"{(hook + solve) / step:.2%}"
    return cells


def measure_peaks(variants: list[str], words: list[str]) -> dict[str, str]:
    """Return the cells of a table row on memory."""
    peaks = {name: peak_of(name, words) for name in variants}
    ratios = [f"{name} {peaks[name] / peaks['plain']:.4f}" for name in variants[1:]]
    return {"peak": f"{peaks['plain']:.0f} MiB", "peaks": ", ".join(ratios)}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=10, help="timed steps per variant")
    parser.add_argument("--no_peaks", action="store_true", help="skip peak memory")
    parser.add_argument("--batch_size", type=int, help="instead of the case's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak_of", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(arguments: argparse.Namespace, name: str, precision: str) -> Bench:
    """Build the bench of a case, with torch_tract's layer if needed."""
    case, device = CASES[name], torch.device(arguments.device)
    batch_size = arguments.batch_size or case.images[0]
    bench = Bench(case, batch_size, PRECISIONS[precision], device)
    if arguments.peak_of in (None, "official"):
        bench.add_official()
    return bench


def train(arguments: argparse.Namespace, name: str, precision: str) -> None:
    """Take two steps of the variant `--peak_of`."""
    bench = build(arguments, name, precision)
    for _ in range(2):
        bench.step(arguments.peak_of)


def main() -> None:
    """Print a Markdown table with a row for each case and precision."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.peak_of is None:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", file=sys.stderr)
        print(
            "| case | precision | plain step | second plain / plain | torch_tract / plain ", end=""
        )
        print("| ours / plain | hooks + step() | share of the step | plain peak | peaks / plain |")
        print("| --- " * 10 + "|", flush=True)
    for name, precision in itertools.product(arguments.cases, arguments.precisions):
        if arguments.peak_of is not None:
            print(allocated_peak(functools.partial(train, arguments, name, precision), device))
            continue
        bench = build(arguments, name, precision)
        cells = {"case": CASES[name].title, "precision": precision}
        cells |= measure_times(bench, arguments.steps)
        words = ["--cases", name, "--precisions", precision, "--device", arguments.device]
        words += ["--batch_size", str(len(bench.images))]
        variants = [v for v in VARIANTS if v in bench.layers and v != "again"]
        del bench
        if not arguments.no_peaks:
            cells |= measure_peaks(variants, words)
        print("| " + " | ".join(cells.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
