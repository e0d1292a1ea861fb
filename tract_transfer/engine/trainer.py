"""The training loop. Everything that decides the numbers of a training is in `Trainer.step`."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from tract_transfer.data.loader import Batch
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.group import StopRequest
from tract_transfer.engine.non_finite import StepGuard
from tract_transfer.engine.solver import Schedule
from tract_transfer.tract import TrAct


class Hook:
    """Watches a training; it never changes parameters, gradients or random state."""

    def before_train(self, trainer: "Trainer") -> None:
        """Called before the first step, and before the first after a resume."""

    def after_step(self, trainer: "Trainer") -> None:
        """Called after each step, when `trainer.iteration` steps are done."""

    def after_train(self, trainer: "Trainer") -> None:
        """Called at the end, also after a signal or an error."""


@dataclass
class Meter:
    """Sums since the last log line; losses stay on the device until they are read."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def count(self, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the losses of a step's micro-batches, without a synchronization."""
        for name, loss in (item for by_name in losses for item in by_name.items()):
            self.losses[name] = self.losses.get(name, 0) + loss.detach().double()
        self.steps += 1


@dataclass
class Trainer:
    """Trains `model` for `max_iters` optimizer steps.

    Args:
        model: `model(images, targets) -> dict[str, scalar loss]`, wrapped by the accelerator.
        set_lr: sets the learning rates for a progress in [0, 1) and returns the factor.
        batches: given the first iteration, yields this process's micro-batches from there on.
        tract: its `step()` comes after the last backward and before clipping.
        precision: dtype of the forward; None is float32.
        grad_clip: largest norm of the whole gradient, or None.
        accumulate: micro-batches of a step.
        ema: averaged weights, updated after every step.
        mix: mixup, CutMix or another change of a micro-batch on its device, as a function of
            images, targets and the iteration; None changes nothing.
        patience_iters: training ends if an evaluation is this many iterations or more after `best`.
        guard: decides about steps whose losses or gradient are not finite.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    set_lr: Callable[[Optimizer, Schedule, float], float]
    batches: Callable[[int], Iterator[Batch]]
    tract: TrAct
    max_iters: int
    seed: int
    precision: torch.dtype | None = None
    grad_clip: float | None = None
    accumulate: int = 1
    ema: ModelEmaV3 | None = None
    mix: Callable[[Any, Any, int], tuple[Any, Any]] | None = None
    patience_iters: int | None = None
    hooks: Sequence[Hook] = ()
    guard: StepGuard = field(default_factory=StepGuard)

    def __post_init__(self) -> None:
        self.iteration = 0
        self.best: dict[str, float] | None = None
        self.stop = StopRequest(can_wait=True)  # set by a signal at any moment
        self.stop_signal: int | None = None  # read from `stop` at the end of a step
        self.skipped: list[str] = []  # images that could not be decoded
        self.seconds = 0.0  # of training, including earlier sessions, excluding evaluations
        self._last = time.perf_counter()
        self.seen_images = 0
        self.meter = Meter()
        device_type = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.precision == torch.float16)
        self.unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        self.evaluated_model: nn.Module = self.ema.module if self.ema else self.unwrapped

    @property
    def stopped_early(self) -> bool:
        """Whether `patience_iters` passed without a better `best`, before the last iteration."""
        if self.patience_iters is None or self.best is None or self.iteration == self.max_iters:
            return False
        return self.iteration - self.best["iteration"] >= self.patience_iters

    def autocast(self) -> torch.autocast:
        """Return the context in which every forward runs."""
        device_type = self.accelerator.device.type
        return torch.autocast(device_type, self.precision, enabled=self.precision is not None)

    def train(self) -> None:
        """Train to the last iteration, an early stop, or the end of a step with a signal."""
        self.model.train()
        try:
            for hook in self.hooks:
                hook.before_train(self)
            batches = self.batches(self.iteration)
            self.meter.started = self._last = time.perf_counter()
            while self.iteration < self.max_iters and not (self.stopped_early or self.stop_signal):
                self.step(batches)
                self.iteration += 1
                now = time.perf_counter()
                self.seconds, self._last = self.seconds + now - self._last, now
                # Read only here: a signal during the hooks would end the training without the
                # checkpoint that they are already past.
                self.stop_signal = self.stop.shared(self.accelerator)
                for hook in self.hooks:
                    hook.after_step(self)
        finally:
            for hook in self.hooks:
                hook.after_train(self)

    def step(self, batches: Iterator[Batch]) -> None:
        """Do one optimizer step of `accumulate` micro-batches."""
        # Random state is a function of the iteration: a resumed run does not need to restore any,
        # and hooks cannot disturb it.
        seed_all(self.seed, self.iteration, self.accelerator.process_index)
        self.set_lr(self.optimizer, self.schedule, self.iteration / self.max_iters)
        self.guard.remember(self.model)
        losses, indices = [], []
        for micro in range(self.accumulate):
            batch = self._next(batches)
            last = micro + 1 == self.accumulate
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    losses.append(self.losses(batch))
                    loss = torch.stack(list(losses[-1].values())).sum() / self.accumulate
                self.scaler.scale(loss).backward()
            indices.append(batch.indices)
        if not self.guard.allows_step(
            self.model, losses, indices, self.iteration + 1, self.accelerator, self.scaler
        ):
            self.tract.forget()
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.meter.count(losses)
        self.tract.step()
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.unwrapped, self.iteration + 1)
        self.guard.check_scale(self.scaler, self.iteration + 1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mix a micro-batch and return the model's losses, by name."""
        images, targets = batch.images, batch.targets
        if self.mix is not None:
            images, targets = self.mix(images, targets, self.iteration)
        losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def exclude_time(self, seconds: float) -> None:
        """Exclude the time of an evaluation from the speed of the training."""
        self.meter.started += seconds
        self._last += seconds

    def read_meter(self) -> dict[str, float]:
        """Return and reset mean losses and speed since the last call; no losses if all skipped."""
        values = self.mean_losses()
        meter, self.meter = self.meter, Meter()
        seconds = self.meter.started - meter.started
        if values:
            values = {"loss": sum(values.values()), **values}
        if self.guard.non_finite == "skip":
            values["skipped_steps"] = len(self.guard.skipped_steps)
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        values["images_per_second"] = meter.images * self.accelerator.num_processes / seconds
        values["data_fraction"] = meter.data_seconds / seconds
        return values

    def mean_losses(self) -> dict[str, float]:
        """Return mean losses since the last reading; a collective."""
        meter = self.meter
        for name, total in meter.losses.items():
            meter.losses[name] = self.accelerator.reduce(total, reduction="mean")
        count = meter.steps * self.accumulate
        return {name: float(total) / count for name, total in meter.losses.items()}

    def share(self) -> None:
        """Give all processes what each has counted, for a checkpoint to hold; a collective."""
        self.mean_losses()
        if self.accelerator.num_processes > 1:
            self.skipped = list(dict.fromkeys(gather_object(self.skipped)))

    def state_parts(self) -> dict[str, Any]:
        """Return the tensors of a checkpoint."""
        return {
            "model": self.unwrapped.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tract": self.tract.state_dict(),
            **({"ema": self.ema.module.state_dict()} if self.ema else {}),
            "losses": self.meter.losses,
        }

    def state(self) -> dict[str, Any]:
        """Return the plain values of a checkpoint."""
        return {
            "best": self.best,
            "skipped": self.skipped,
            "passed_over": self.guard.skipped_steps,
            "scaler": self.scaler.state_dict(),
            "meter_steps": self.meter.steps,
            "seconds": self.seconds,
            "seen_images": self.seen_images,
        }

    def load_state(
        self, parts: Mapping[str, Any], state: Mapping[str, Any], iteration: int
    ) -> None:
        """Load what `state_parts` and `state` returned; training resumes to the same bits."""
        self.load_weights(parts)
        self.optimizer.load_state_dict(parts["optimizer"])
        _adapt_loaded_state(self.optimizer)
        self.tract.load_state_dict(parts["tract"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        losses = {name: t.to(self.accelerator.device) for name, t in parts["losses"].items()}
        self.meter = Meter(losses=losses, steps=state["meter_steps"])
        self.best, self.skipped = state["best"], list(state["skipped"])
        self.seconds, self.seen_images = state["seconds"], state["seen_images"]
        self.guard.skipped_steps = list(state["passed_over"])
        self.iteration = iteration

    def load_weights(self, parts: Mapping[str, Any]) -> None:
        """Load only the weights, to evaluate them."""
        self.unwrapped.load_state_dict(parts["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])

    def _next(self, batches: Iterator[Batch]) -> Batch:
        started = time.perf_counter()
        batch = next(batches).to(self.accelerator.device)
        self.meter.data_seconds += time.perf_counter() - started
        self.meter.images += len(batch.images)
        self.seen_images += len(batch.images) * self.accelerator.num_processes
        self.skipped += [item for item in batch.skipped if item not in self.skipped]
        if not len(batch.images):
            raise ValueError(
                f"No image of a training batch can be decoded: {'; '.join(batch.skipped)}. Repair "
                "the data, or set a larger data.batch_size."
            )
        return batch


def _adapt_loaded_state(optimizer: Optimizer) -> None:
    """Adapt a loaded state to the weights, and the optimizer to the state."""
    # Tensors of a checkpoint are contiguous, and fused steps walk through memory, not by strides.
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    # Gradient scalers read whether a step is fused from the optimizer as it was created.
    if not any(group.get("fused") for group in optimizer.param_groups):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
