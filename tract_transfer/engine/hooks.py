"""What watches a training: log files, the screen, checkpoints and evaluations."""

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from tract_transfer.data.loader import Batch
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.trainer import Hook, Trainer
from tract_transfer.files import reports_full_disk, sync, write_text

METRICS_NAME = "metrics.jsonl"
LINE_SECONDS = 5.0  # a plain log line at most this often
logger = logging.getLogger(__name__)


def due(iteration: int, every_iters: int | None) -> bool:
    """Whether what happens every so many iterations happens after `iteration`."""
    return every_iters is not None and iteration > 0 and iteration % every_iters == 0


class MetricsFile:
    """`metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self.path = folder / METRICS_NAME
        self._board_folder = folder / "tensorboard" if tensorboard else None
        self._board = self._open_board()

    def write(self, iteration: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Append a line: numbers of training, or of an evaluation on `split`.

        Raises:
            DiskFullError: there is no room for it.
        """
        line = {"iteration": iteration, "epoch": round(epoch, 6), "split": split, **values}
        with reports_full_disk(self.path.parent, self.path.name), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def sync(self) -> None:
        """Wait until the lines are on the disk: those before a checkpoint must not be lost."""
        if self.path.exists():
            sync(self.path)

    def cut_after(self, iteration: int) -> None:
        """Drop what a resumed run writes again: all after `iteration`, and evaluations at it.

        TensorBoard's files are written anew from the lines that stay, for a kill loses what it had
        in memory. Lines that cannot be read are dropped and named; the file stays beside, as
        `broken-metrics.jsonl`.
        """
        kept = [
            line
            for line in self._read()
            if line["iteration"] < iteration
            or (line["iteration"] == iteration and line["split"] == "train")
        ]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if self._board_folder is None:
            return
        self.close()
        for file in self._board_folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._board = self._open_board()
        for line in kept:
            self._show(line)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _open_board(self) -> Any:
        if self._board_folder is None:
            return None
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # A TensorBoard that is looking on forgets what it has read of the files before.
        return SummaryWriter(self._board_folder, purge_step=0)  # type: ignore[no-untyped-call]

    def _show(self, line: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in line.items():
                if name not in ("iteration", "epoch", "split"):
                    self._board.add_scalar(f"{line['split']}/{name}", value, line["iteration"])

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines; the last may have been cut off in writing, and is not one then."""
        lines, broken = [], []
        texts = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
                lines.append({**line, "iteration": int(line["iteration"]), "split": line["split"]})
            except (ValueError, TypeError, KeyError):  # noqa: PERF203 - a file is read once
                broken.append(number)
        if broken:
            aside = self.path.with_name(f"broken-{self.path.name}")
            shutil.copyfile(self.path, aside)
            logger.warning("%s: lines %s cannot be read. Kept as %s.", self.path, broken, aside)
        return lines


class LogProgress(Hook):
    """Reads the meter every so often, to metrics.jsonl and to the screen."""

    def __init__(self, metrics: MetricsFile, *, every_iters: int, iters_per_epoch: int) -> None:
        self.metrics = metrics
        self.every_iters = every_iters
        self.iters_per_epoch = iters_per_epoch
        self._bar: Progress | None = None
        self._line_at = 0.0

    def before_train(self, trainer: Trainer) -> None:
        self._started, self._first = time.perf_counter(), trainer.iteration
        if sys.stderr.isatty() and trainer.accelerator.is_main_process:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=trainer.max_iters)

    def after_step(self, trainer: Trainer) -> None:
        done = trainer.iteration
        if not due(done, self.every_iters) and done != trainer.max_iters:
            return
        values = trainer.read_meter()
        values["lr"] = trainer.optimizer.param_groups[0]["lr"]
        epoch = done / self.iters_per_epoch
        if trainer.accelerator.is_main_process:
            self.metrics.write(done, epoch, "train", values)
        rate = (time.perf_counter() - self._started) / (done - self._first)
        eta = timedelta(seconds=round(rate * (trainer.max_iters - done)))
        text = (
            f"iter {done}/{trainer.max_iters}  epoch {epoch:.2f}  "
            f"loss {values.get('loss', float('nan')):.4f}  "
            f"lr {values['lr']:.2g}  {values['images_per_second']:.0f} images/s  "
            f"data {values['data_fraction']:.0%}  eta {eta}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        if time.perf_counter() - self._line_at > LINE_SECONDS or done == trainer.max_iters:
            self._line_at = time.perf_counter()
            logger.info(text)

    def after_train(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()


class SaveCheckpoints(Hook):
    """Writes a checkpoint at every interval given, at the end, and where a signal ends it all.

    The lines of `metrics` before it are on the disk first.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        every_iters: Sequence[int | None],
        metrics: MetricsFile | None = None,
    ) -> None:
        self.checkpointer = checkpointer
        self.every_iters = every_iters
        self.metrics = metrics

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.stop_signal is not None or trainer.iteration == trainer.max_iters
        if last or any(due(trainer.iteration, every) for every in self.every_iters):
            trainer.share()
            if trainer.accelerator.is_main_process:
                if self.metrics is not None:
                    self.metrics.sync()
                self.checkpointer.save(trainer.iteration, trainer.state_parts(), trainer.state())
            trainer.accelerator.wait_for_everyone()


class PeriodicEvaluation(Hook):
    """Evaluates every so often. It comes after SaveCheckpoints: a failed evaluation can be retried.

    Args:
        evaluate: returns the metrics of the model as it stands.
        at_end: evaluate after the last iteration too.
        split: "val" or "test".
        metric: the key of the metrics that `trainer.best` is the best of.
        checkpointer: where the best is marked; None where no checkpoint is selected.
        selects: keep `trainer.best` without a checkpointer too: patience counts from it.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        *,
        every_iters: int | None,
        at_end: bool,
        split: str,
        metric: str,
        metrics: MetricsFile,
        iters_per_epoch: int,
        checkpointer: Checkpointer | None = None,
        selects: bool = False,
    ) -> None:
        self.evaluate = evaluate
        self.every_iters = every_iters
        self.at_end = at_end
        self.split = split
        self.metric = metric
        self.metrics = metrics
        self.iters_per_epoch = iters_per_epoch
        self.checkpointer = checkpointer
        self.selects = selects or checkpointer is not None

    def before_train(self, trainer: Trainer) -> None:
        if trainer.iteration:  # the run may have ended between a checkpoint and its evaluation
            self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        at_end = trainer.iteration == trainer.max_iters
        wanted = self.at_end if at_end else due(trainer.iteration, self.every_iters)
        if not wanted or trainer.stop_signal is not None:
            return
        started = time.perf_counter()
        values = self.evaluate()
        trainer.exclude_time(time.perf_counter() - started)
        if trainer.accelerator.is_main_process:
            epoch = trainer.iteration / self.iters_per_epoch
            self.metrics.write(trainer.iteration, epoch, self.split, values)
            logger.info("iter %d  %s %s", trainer.iteration, self.split, format_metrics(values))
        if not self.selects:
            return
        # Every process has the metrics, and has to end the training at the same iteration.
        value = values[self.metric]
        if trainer.best is None or value > trainer.best["value"]:
            trainer.best = {"iteration": trainer.iteration, "value": value}
            if self.checkpointer is not None and trainer.accelerator.is_main_process:
                self.checkpointer.mark_best(trainer.iteration, value)


def format_metrics(values: Mapping[str, Any]) -> str:
    """Return `top1 91.25 %  loss 0.3412`: fractions in percent."""
    return "  ".join(f"{name} {format_metric(name, value)}" for name, value in values.items())


def format_metric(name: str, value: float) -> str:
    """Return `91.25%`, or `0.3412` of a loss."""
    return f"{value:.4f}" if name == "loss" else f"{value:.2%}"


# --- A model over a loader, into an evaluator.


class Evaluator(Protocol):
    """Collects predictions; `compute` is exact on any number of processes."""

    def update(self, predictions: Any, targets: Any) -> None:
        """Add a batch: what the model answers in eval mode, and the loader's targets."""

    def compute(self) -> dict[str, float]:
        """Return the metrics, of all processes together; every one must call it."""

    def details(self) -> dict[str, Any]:
        """Return what stands beside the metrics, as JSON has it: protocol, counts, classes."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every part of it back in its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process of a group the main one's buffers, which a checkpoint holds.

    Each process updates batch-norm statistics from its own images; training shares them again
    only at the next forward.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


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
