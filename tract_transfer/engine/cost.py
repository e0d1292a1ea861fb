"""What a run costs beside its time: the peak of its memory, and the energy of the machine."""

import contextlib
import itertools
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tract_transfer.engine.hooks import Evaluator, evaluate, evaluating
from tract_transfer.engine.trainer import Trainer

_SELF = Path("/proc/self")
_POWERCAP = Path("/sys/class/powercap")


class CostMeter:
    """Measures from its making to `read()`, in this process.

    Memory is the resident memory of this process at its highest, without its data workers, and
    what torch allocated on the GPU at its highest. Energy is that of whole packages and GPUs, with
    everything else that runs on them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resettable = _forget_peak_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._joules = _joules(device)
        self._started = time.perf_counter()

    def read(self, *, whole: bool) -> dict[str, Any]:
        """Return seconds, peak_memory_bytes and energy_joules, each by what it is of.

        Args:
            whole: whether the run began with this meter. The memory and the energy of a resumed
                run's last part are not those of the run, and are left out.

        Returns:
            `seconds`; `peak_memory_bytes` by "process" (Linux) and "gpu"; `energy_joules` by meter;
            None where they are left out or the machine has none that can be read.
        """
        memory = _peak_memory() if self._resettable else {}
        if self.device.type == "cuda":
            memory["gpu"] = torch.cuda.max_memory_allocated(self.device)
        now = _joules(self.device)
        spent = {
            name: joules - self._joules[name]
            for name, joules in now.items()
            if name in self._joules and joules >= self._joules[name]  # a counter may have wrapped
        }
        return {
            "seconds": time.perf_counter() - self._started,
            "peak_memory_bytes": memory or None if whole else None,
            "energy_joules": spent or None if whole else None,
        }


def _forget_peak_memory() -> bool:
    """Let the peak of resident memory begin anew (Linux); return whether it does."""
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory() -> dict[str, int]:
    """Return {"process": the highest resident memory since the reset, in bytes}."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return {"process": int(line.split()[1]) * 1024}
    return {}


def _joules(device: torch.device) -> dict[str, float]:
    """Return the counters that can be read: packages of processors (RAPL), NVIDIA's GPUs."""
    found = {}
    for folder in sorted(_POWERCAP.glob("intel-rapl:[0-9]")):
        with contextlib.suppress(OSError, ValueError):  # most systems let root alone read it
            name = f"{(folder / 'name').read_text().strip()} {folder.name}"
            found[name] = int((folder / "energy_uj").read_text()) / 1e6
    if device.type == "cuda":
        found |= _gpu_joules(device)
    return found


def _gpu_joules(device: torch.device) -> dict[str, float]:
    try:
        import pynvml
    except ImportError:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {uuid: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}
    except pynvml.NVMLError:  # not every GPU counts
        return {}


# --- What a model costs, block by block: parameters, FLOPs and what a training step must rememb

ELSEWHERE = "(elsewhere)"
# Parts that only hold the model proper: they are always opened.
_WRAPPERS = ("backbone", "model")


class Block(NamedTuple):
    """A part of a model by its dotted name; `flops` are those of a forward."""

    name: str
    kind: str
    parameters: int
    flops: int


class FirstLayer(NamedTuple):
    """A layer that reads the image: TrAct inverts a matrix of `inputs` x `inputs` for it."""

    name: str
    kind: str
    outputs: int
    inputs: int
    rows: int


def measure_blocks(model: nn.Module, run: Callable[[], object], depth: int = 1) -> list[Block]:
    """Run an evaluation and return the cost of every block, in their order.

    A multiplication and its addition count as two FLOPs; what is no convolution, product of
    matrices or attention counts as none. What no block has done itself is `(elsewhere)`.

    Args:
        run: calls the model, or a method of it.
        depth: how many levels of parts to open; `backbone` and `model` are no level.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        _Call(model, run)()
    # Modules have names below the one that was called, `_Call.model`.
    counts = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    own = {name.removeprefix("_Call.model."): count for name, count in counts.items()}

    def flops(name: str, module: nn.Module) -> int:
        if name in own:
            return own[name]
        return sum(flops(f"{name}.{child}", part) for child, part in module.named_children())

    blocks = [
        Block(name, type(part).__name__, _count(part), flops(name, part))
        for name, part in _blocks(model, depth)
    ]
    rest = counter.get_total_flops() - sum(block.flops for block in blocks)
    parameters = _count(model) - sum(block.parameters for block in blocks)
    return blocks + ([Block(ELSEWHERE, "", parameters, rest)] if rest or parameters else [])


def measure_first_layers(
    model: nn.Module, names: list[str], run: Callable[[], object], num_images: int
) -> list[FirstLayer]:
    """Run an evaluation of `num_images` images and return what the named layers multiply."""
    layers = {name: model.get_submodule(name) for name in names}
    numbers: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            numbers[name] = output.numel()

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        outputs = len(weight)
        rows = numbers[name] // outputs // num_images
        kind = type(layer).__name__
        found.append(FirstLayer(name, kind, outputs, weight.numel() // outputs, rows))
    return found


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that a training forward keeps for its backward, weights left out.

    Args:
        run: calls the model, or a method of it, and returns what holds the graph.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # views share their storage: it counts once
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()  # alive until all is counted, so that no address comes twice
    del graph
    return sum(kept.values())


class _Call(nn.Module):
    """Makes any method of a model one call of a module, below which all parts have names."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> object:
        return self.run()


def _blocks(model: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for child, part in model.named_children():
        left = depth if child in _WRAPPERS else depth - 1
        has_parts = any(True for _ in part.children())
        if has_parts and (left > 0 or child in _WRAPPERS):
            yield from _blocks(part, left, f"{prefix}{child}.")
        else:
            yield f"{prefix}{child}", part


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


# --- What a run would cost: parameters, FLOPs, memory and time, from two steps and one batch.

_RSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
logger = logging.getLogger(__name__)


def dry_run(
    trainer: Trainer,
    eval_batches: Iterable[object],
    make_evaluator: Callable[[], Evaluator],
    *,
    num_eval_batches: int,
    num_evaluations: int,
) -> dict[str, str]:
    """Run two steps and one evaluation batch; return what was measured, ready to print.

    FLOPs count a multiplication and its addition as two, and are those of one test image's
    forward. Memory is the peak of this process, or of its GPU.
    """
    device = trainer.accelerator.device
    parameters = list(trainer.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    batches = trainer.batches(0)
    trainer.model.train()
    logger.info("Two training steps")
    trainer.step(batches)  # the first step warms up
    started = time.perf_counter()
    trainer.iteration = 1
    trainer.step(batches)
    losses = trainer.read_meter()
    step_seconds = time.perf_counter() - started
    model = trainer.evaluated_model
    logger.info("One batch of the evaluation")
    started = time.perf_counter()
    first = list(itertools.islice(iter(eval_batches), 1))
    evaluate(model, first, make_evaluator(), device=device, precision=trainer.precision)  # type: ignore[arg-type]
    eval_seconds = (time.perf_counter() - started) * num_eval_batches
    image = first[0].to(device).images[:1]  # type: ignore[attr-defined]
    total = step_seconds * trainer.max_iters + eval_seconds * num_evaluations
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_BYTES
    )
    return {
        "parameters": f"{sum(p.numel() for p in parameters):,} ({trainable:,} trained)",
        "FLOPs of a forward": _flops(model, model, image),
        "peak memory": f"{peak / 2**30:.2f} GiB",
        "loss after two steps": f"{losses['loss']:.4f}",
        "a step": f"{step_seconds:.3f} s",
        "an evaluation": f"{eval_seconds:.1f} s (x {num_evaluations})",
        "the whole run": f"about {timedelta(seconds=round(total))} ({trainer.max_iters} steps)",
    }


def dry_run_features(
    model: nn.Module, pooled: Callable[[Tensor], Tensor], images: Tensor, num_images: int
) -> dict[str, str]:
    """Extract features of one batch (B, 3, H, W); return what those of `num_images` would cost.

    FLOPs are counted as by `dry_run`.
    """
    started = time.perf_counter()
    with evaluating(model):
        pooled(images).sum().item()  # waits for the device
    seconds = (time.perf_counter() - started) * num_images / len(images)
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} (frozen)",
        "FLOPs of a forward": _flops(model, pooled, images[:1]),
        "features": f"about {seconds:.0f} s for {num_images} images",
    }


def _flops(model: nn.Module, call: Callable[[Tensor], object], image: Tensor) -> str:
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        call(image)
    return f"{counter.get_total_flops() / 1e9:.3f} G an image"
