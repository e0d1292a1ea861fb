"""Hooks of a training: log files, the screen, checkpoints and evaluations."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tract_transfer.data.loader import Batch
from tract_transfer.engine import screen
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.trainer import Hook, Trainer
from tract_transfer.files import METRICS_NAME, reports_full_disk, sync, write_text

logger = logging.getLogger(__name__)


def due(iteration: int, every_iters: int | None) -> bool:
    """Whether something with this interval happens after `iteration`."""
    return every_iters is not None and iteration > 0 and iteration % every_iters == 0


class MetricsFile:
    """`metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self.path = folder / METRICS_NAME
        self._board_folder = folder / "tensorboard" if tensorboard else None
        self._board: Any = None

    def write(self, iteration: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Append a line of the training (split "train") or of an evaluation on `split`."""
        line = {"iteration": iteration, "epoch": round(epoch, 6), "split": split, **values}
        with reports_full_disk(self.path.parent, self.path.name), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._add_to_board(line)

    def sync(self) -> None:
        """Wait until the lines are on the disk: no resume writes those before a checkpoint."""
        if self.path.exists():
            sync(self.path)

    def cut_after(self, iteration: int) -> None:
        """Drop what a resumed run writes again: lines after `iteration`, and evaluations at it.

        TensorBoard's files are rewritten from the other lines, because a kill loses what they had
        in memory. If lines cannot be read, a copy is kept as `broken-metrics.jsonl`.
        """
        kept = [
            line
            for line in self._read()
            if line["iteration"] < iteration + (line["split"] == "train")
        ]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if self._board_folder is not None:
            self.close()
            for file in self._board_folder.glob("events.out.tfevents.*"):
                file.unlink()
            for line in kept:
                self._add_to_board(line)

    def best(self, split: str, metric: str) -> float | None:
        """Return the largest value of a metric so far; None if there is none."""
        values = [line.get(metric) for line in self._read() if line["split"] == split]
        return max((v for v in values if isinstance(v, int | float) and v == v), default=None)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _add_to_board(self, line: Mapping[str, Any]) -> None:
        if self._board_folder is None:
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # An open TensorBoard drops what it has read from the earlier files.
            self._board = SummaryWriter(self._board_folder, purge_step=0)
        for name, value in line.items():
            if name not in ("iteration", "epoch", "split"):
                self._board.add_scalar(f"{line['split']}/{name}", value, line["iteration"])

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines: a kill may have cut off the last one."""
        lines, broken = [], []
        texts = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
                lines.append({**line, "iteration": int(line["iteration"]), "split": line["split"]})
            except (ValueError, TypeError, KeyError):  # noqa: PERF203 - a file is read once
                broken.append(number)
        if broken:
            copy = self.path.with_name(f"broken-{self.path.name}")
            shutil.copyfile(self.path, copy)
            logger.warning("%s: cannot read lines %s. Copied to %s.", self.path, broken, copy)
        return lines


@dataclass
class LogProgress(Hook):
    """Reads the meter at an interval, for metrics.jsonl, the log and the screen."""

    metrics: MetricsFile
    every_iters: int
    iters_per_epoch: int
    _line: screen.ProgressLine | None = field(default=None, init=False)

    def before_train(self, trainer: Trainer) -> None:
        self._line = screen.ProgressLine("iter", trainer.max_iters, trainer.iteration)
        self._line.start()

    def after_step(self, trainer: Trainer) -> None:
        assert self._line is not None
        done, is_last = trainer.iteration, trainer.iteration == trainer.max_iters
        if not due(done, self.every_iters) and not is_last:
            self._line.update(done)
            return
        values = trainer.read_meter()
        values["lr"] = trainer.optimizer.param_groups[0]["lr"]
        epoch = done / self.iters_per_epoch
        if trainer.accelerator.is_main_process:
            self.metrics.write(done, epoch, "train", values)
        texts = progress_texts(values, epoch, trainer.accelerator.device)
        names = ("loss", "epoch", "speed", "lr", "memory", "data")  # as far as the line is wide
        self._line.update(done, [texts[name] for name in names if name in texts])
        line = f"iter {done}/{trainer.max_iters}  {'  '.join(texts.values())}"
        shown = {} if is_last else screen.IN_PLACE  # the last line stays
        logger.info("%s  eta %s", line, self._line.eta(), extra=shown)

    def after_train(self, trainer: Trainer) -> None:
        if self._line is not None:
            self._line.stop()


def progress_texts(
    values: Mapping[str, float], epoch: float, device: torch.device
) -> dict[str, str]:
    """Return what is shown of a reading of the meter, by name, in the order of the log."""
    texts = {
        "epoch": f"epoch {epoch:.2f}",
        "loss": f"loss {values.get('loss', float('nan')):.4f}",
        "lr": f"lr {values['lr']:.2g}",
        "speed": f"{values['images_per_second']:.0f} images/s",
        "data": f"data {values['data_fraction']:.0%}",
    }
    if device.type == "cuda":
        texts["memory"] = f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return texts


@dataclass
class SaveCheckpoints(Hook):
    """Syncs `metrics` and saves a checkpoint at the intervals, at the end and after a signal."""

    checkpointer: Checkpointer
    every_iters: Sequence[int | None]
    metrics: MetricsFile

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.stop_signal is not None or trainer.iteration == trainer.max_iters
        if last or any(due(trainer.iteration, every) for every in self.every_iters):
            trainer.share()
            if trainer.accelerator.is_main_process:
                self.metrics.sync()
                self.checkpointer.save(trainer.iteration, trainer.state_parts(), trainer.state())
            trainer.accelerator.wait_for_everyone()


@dataclass
class PeriodicEvaluation(Hook):
    """Evaluates at an interval; follows SaveCheckpoints, so that an evaluation can be repeated.

    Args:
        evaluate: returns the metrics of the current model.
        at_end: evaluate after the last iteration too.
        split: "val" or "test".
        metric: the key of the metrics that decides `trainer.best`.
        checkpointer: marks the best checkpoint; None if none is selected.
        selects: update `trainer.best` without a checkpointer too, for patience.
    """

    evaluate: Callable[[], dict[str, float]]
    every_iters: int | None
    at_end: bool
    split: str
    metric: str
    metrics: MetricsFile
    iters_per_epoch: int
    checkpointer: Checkpointer | None = None
    selects: bool = False
    _best: float | None = field(default=None, init=False)

    def before_train(self, trainer: Trainer) -> None:
        self._best = self.metrics.best(self.split, self.metric)
        if trainer.iteration:  # the run may have ended between a checkpoint and its evaluation
            self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        at_end = trainer.iteration == trainer.max_iters
        is_due = self.at_end if at_end else due(trainer.iteration, self.every_iters)
        if not is_due or trainer.stop_signal is not None:
            return
        started = time.perf_counter()
        values = self.evaluate()
        trainer.exclude_time(time.perf_counter() - started)
        if trainer.accelerator.is_main_process:
            self._log(trainer, values)
        # On every process: patience must end the training at the same iteration.
        value = values[self.metric] if self.selects or self.checkpointer else None
        if value is not None and (trainer.best is None or value > trainer.best["value"]):
            trainer.best = {"iteration": trainer.iteration, "value": value}
            if self.checkpointer is not None and trainer.accelerator.is_main_process:
                self.checkpointer.mark_best(trainer.iteration, value)

    def _log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Log an evaluation, the deciding metric first, and mark the best so far."""
        epoch = trainer.iteration / self.iters_per_epoch
        self.metrics.write(trainer.iteration, epoch, self.split, values)
        value = values[self.metric]
        is_best = self._best is None or value > self._best
        if is_best:
            self._best = value
        deciding = format_metrics({self.metric: value}) + " (best so far)" * is_best
        others = format_metrics({name: v for name, v in values.items() if name != self.metric})
        line = f"iter {trainer.iteration}  {self.split} {deciding}  {others}".rstrip()
        logger.info(line, extra=screen.BEST if is_best else None)


def format_metrics(values: Mapping[str, Any]) -> str:
    """Return `top1 91.25%  loss 0.3412`."""
    return "  ".join(f"{name} {format_metric(name, value)}" for name, value in values.items())


def format_metric(name: str, value: float) -> str:
    """Return a loss as `0.3412`, any other metric as `91.25%`."""
    return f"{value:.4f}" if "loss" in name else f"{value:.2%}"


class Evaluator(Protocol):
    """Collects predictions; `compute` is exact on any number of processes."""

    def update(self, predictions: Any, targets: Any) -> None:
        """Add a batch: the outputs of the model in eval mode, and the loader's targets."""

    def compute(self) -> dict[str, float]:
        """Return the metrics over all processes; a collective."""

    def details(self) -> dict[str, Any]:
        """Return what accompanies the metrics as JSON: protocol, counts, classes."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluator: Evaluator,
    *,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> list[str]:
    """Feed every batch to `evaluator`; return the items that could not be decoded."""
    skipped: list[str] = []
    with evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            skipped += batch.skipped
            if not len(batch.images):
                continue
            with torch.autocast(device.type, precision, enabled=precision is not None):
                predictions = model(batch.images)
            evaluator.update(predictions, batch.targets)
    return skipped


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
