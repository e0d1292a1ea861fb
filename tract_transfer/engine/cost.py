"""Costs: time, memory and energy of a run, FLOPs and memory of a model, and estimates of a run."""

import contextlib
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tract_transfer.data.loader import Batch
from tract_transfer.engine.hooks import Evaluator, evaluate, evaluating
from tract_transfer.engine.trainer import Trainer

_SELF = Path("/proc/self")
_POWERCAP = Path("/sys/class/powercap")
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
_WRAPPERS = ("backbone", "model")  # modules that only hold the model proper
logger = logging.getLogger(__name__)


class CostMeter:
    """Measures this process from the creation of the meter to `read`.

    Memory is the peak of the process without its data workers, and of torch's allocations on the
    GPU. Energy is that of whole processors and GPUs, with everything else that runs on them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._can_reset = False
        with contextlib.suppress(OSError):
            (_SELF / "clear_refs").write_text("5")  # resets the peak of resident memory (Linux)
            self._can_reset = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._joules = _joules(device)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the creation."""
        return time.perf_counter() - self._started

    def read(self, *, whole: bool) -> dict[str, Any]:
        """Return `seconds`, `peak_memory_bytes` and `energy_joules`.

        Memory is by "process" (Linux) and "gpu", energy by counter; None if there is none, or if
        the meter has not measured the `whole` run but its last part.
        """
        seconds = self.seconds
        memory, used = {}, {}
        if self._can_reset and whole:
            status = (_SELF / "status").read_text().partition("VmHWM:")[2]
            memory["process"] = int(status.split()[0]) * 1024
        if self.device.type == "cuda" and whole:
            memory["gpu"] = torch.cuda.max_memory_allocated(self.device)
        for name, joules in _joules(self.device).items() if whole else ():
            if joules >= self._joules.get(name, float("inf")):  # a counter may have wrapped
                used[name] = joules - self._joules[name]
        return {
            "seconds": seconds,
            "peak_memory_bytes": memory or None,
            "energy_joules": used or None,
        }


def _joules(device: torch.device) -> dict[str, float]:
    """Return the readable energy counters: processors (RAPL), and NVIDIA's GPUs."""
    counters = {}
    for folder in sorted(_POWERCAP.glob("intel-rapl:[0-9]")):
        with contextlib.suppress(OSError, ValueError):  # most systems let only root read it
            name = f"{(folder / 'name').read_text().strip()} {folder.name}"
            counters[name] = int((folder / "energy_uj").read_text()) / 1e6
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            import pynvml

            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            with contextlib.suppress(pynvml.NVMLError):  # not every GPU has a counter
                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                counters[uuid] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    return counters


class Block(NamedTuple):
    """A part of a model by its dotted name, with the FLOPs of a forward."""

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


def count_flops(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Evaluate with `run`; return the FLOPs of each called module by dotted name, the total as "".

    A multiply-add counts as two. Only convolutions, matrix products and attention count.
    """
    counter = FlopCounterMode(display=False)
    # torch names modules relative to the first one that is called, which must hold the model.
    root = nn.Module()
    root.model, root.forward = model, run
    # torch does not count the fused attention of CPUs, but its matrix products.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
        root()
    flops = {
        str(name).removeprefix("Module.model."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }
    return {**flops, "": counter.get_total_flops()}


def measure_blocks(model: nn.Module, run: Callable[[], object], depth: int = 1) -> list[Block]:
    """Evaluate with `run` and return the cost of every block, in order.

    `depth` levels of modules are opened; `backbone` and `model` are not levels. What belongs to no
    block is `(elsewhere)`.
    """
    counts = count_flops(model, run)

    def flops(name: str, module: nn.Module) -> int:
        if name in counts:
            return counts[name]
        return sum(flops(f"{name}.{child}", part) for child, part in module.named_children())

    blocks = [
        Block(name, type(part).__name__, _num_parameters(part), flops(name, part))
        for name, part in _blocks(model, depth)
    ]
    parameters = _num_parameters(model) - sum(block.parameters for block in blocks)
    rest = counts[""] - sum(block.flops for block in blocks)
    return blocks + ([Block("(elsewhere)", "", parameters, rest)] if rest or parameters else [])


def _blocks(model: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for child, part in model.named_children():
        is_wrapper = child in _WRAPPERS
        if any(part.children()) and (is_wrapper or depth > 1):
            yield from _blocks(part, depth - (not is_wrapper), f"{prefix}{child}.")
        else:
            yield f"{prefix}{child}", part


def measure_first_layers(
    model: nn.Module, names: list[str], run: Callable[[], object], num_images: int
) -> list[FirstLayer]:
    """Evaluate `num_images` images with `run` and return the sizes of the named layers."""
    counts, layers = count_flops(model, run), []
    for name in names:
        layer, weight = model.get_submodule(name), model.get_parameter(f"{name}.weight")
        outputs, inputs = len(weight), weight[0].numel()
        rows = counts[name] // (2 * outputs * inputs * num_images)
        layers.append(FirstLayer(name, type(layer).__name__, outputs, inputs, rows))
    return layers


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes, besides weights, that a training forward keeps for its backward.

    `run` calls the model, or a method of it, and returns what holds the graph.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:  # views share a storage, which counts once
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()  # kept until all is counted, so that no address is reused
    del graph
    return sum(sizes.values())


def dry_run(
    trainer: Trainer,
    eval_batches: Iterable[Batch],
    make_evaluator: Callable[[], Evaluator],
    *,
    num_eval_batches: int,
    num_evaluations: int,
) -> dict[str, str]:
    """Run two steps and one evaluation batch; return measurements and estimates to print."""
    device = trainer.accelerator.device
    batches = trainer.batches(0)
    trainer.model.train()
    logger.info("Two training steps")
    trainer.step(batches)  # warms up
    started = time.perf_counter()
    trainer.iteration = 1
    trainer.step(batches)
    loss = trainer.read_meter()["loss"]
    step_seconds = time.perf_counter() - started
    logger.info("One batch of the evaluation")
    started = time.perf_counter()
    first = next(iter(eval_batches))
    model = trainer.evaluated_model
    evaluate(model, [first], make_evaluator(), device=device, precision=trainer.precision)
    eval_seconds = (time.perf_counter() - started) * num_eval_batches
    image = first.to(device).images[:1]
    total = step_seconds * trainer.max_iters + eval_seconds * num_evaluations
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "parameters": f"{_num_parameters(trainer.model):,} ({trained:,} trained)",
        "FLOPs of a forward": _giga_flops(model, lambda: model(image)),
        "peak memory": f"{peak / 2**30:.2f} GiB",
        "loss after two steps": f"{loss:.4f}",
        "a step": f"{step_seconds:.3f} s",
        "an evaluation": f"{eval_seconds:.1f} s (x {num_evaluations})",
        "the whole run": f"about {timedelta(seconds=round(total))} ({trainer.max_iters} steps)",
    }


def dry_run_features(
    model: nn.Module, pooled: Callable[[Tensor], Tensor], images: Tensor, num_images: int
) -> dict[str, str]:
    """Extract features of one batch (B, 3, H, W); return estimates for `num_images` to print."""
    started = time.perf_counter()
    with evaluating(model):
        pooled(images).sum().item()  # waits for the device
    seconds = (time.perf_counter() - started) * num_images / len(images)
    return {
        "parameters": f"{_num_parameters(model):,} (frozen)",
        "FLOPs of a forward": _giga_flops(model, lambda: pooled(images[:1])),
        "features": f"about {seconds:.0f} s for {num_images} images",
    }


def _giga_flops(model: nn.Module, run: Callable[[], object]) -> str:
    return f"{count_flops(model, run)[''] / 1e9:.3f} G an image"


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
