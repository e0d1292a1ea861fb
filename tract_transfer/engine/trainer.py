"""The one loop: everything that decides the numbers of a training is in `Trainer.step`."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.meter import Meter
from tract_transfer.engine.non_finite import StepGuard
from tract_transfer.engine.protocols import Batch, Ema, GradientStep, Mix, as_it_is
from tract_transfer.engine.signals import StopRequest


class Hook:
    """Watches a training: it never touches parameters, gradients or random state."""

    def before_train(self, trainer: "Trainer") -> None:
        """Called once, before the first step or the first one after a resume."""

    def after_step(self, trainer: "Trainer") -> None:
        """Called when `trainer.iteration` steps are done."""

    def after_train(self, trainer: "Trainer") -> None:
        """Called once after the last step, and where a signal or an error ended the training."""


@dataclass
class Trainer:
    """Trains `model` for `max_iters` optimizer steps.

    Args:
        model: `model(images, targets) -> dict[str, scalar loss]`, wrapped by the accelerator.
        batches: given the first iteration, yields this process's micro-batches from there on.
        tract: its `step()` comes after the last backward and before clipping.
        ema: updated after every step with the number of steps done.
        patience_iters: training ends where an evaluation comes so many iterations after `best`, or
            more; None never.
        mix: called with each micro-batch on its device; a function of the iteration alone.
        precision: the forward's type; None is float32 throughout.
        grad_clip: the largest norm of the whole gradient, or None.
        accumulate: micro-batches of a step.
        set_lr: sets the learning rates for a progress in [0, 1) and returns the factor.
        guard: what becomes of a step whose losses or gradient are not finite.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    schedule: ParamScheduler
    set_lr: Callable[[Optimizer, ParamScheduler, float], float]
    batches: Callable[[int], Iterator[Batch]]
    tract: GradientStep
    max_iters: int
    seed: int
    precision: torch.dtype | None = None
    grad_clip: float | None = None
    accumulate: int = 1
    ema: Ema | None = None
    mix: Mix = as_it_is
    patience_iters: int | None = None
    hooks: Sequence[Hook] = ()
    guard: StepGuard = field(default_factory=StepGuard)

    def __post_init__(self) -> None:
        self.iteration = 0
        self.best: dict[str, float] | None = None
        self.stop = StopRequest(can_wait=True)  # which a signal makes at any moment
        self.stop_signal: int | None = None  # taken up from it at the end of a step
        self.skipped: list[str] = []
        self.seconds = 0.0  # of training, earlier sessions included, evaluations not
        self._last = time.perf_counter()
        self.seen_images = 0
        self.meter = Meter()
        self.scaler = torch.amp.GradScaler(
            self.accelerator.device.type, enabled=self.precision == torch.float16
        )

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose numbers are reported: the averaged one where there is one."""
        if self.ema is not None:
            return self.ema.module
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def is_over(self) -> bool:
        """Whether all iterations are done, or it `stopped_early`."""
        return self.iteration >= self.max_iters or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether `patience_iters` went by without a better `best`, before the last iteration."""
        if self.patience_iters is None or self.best is None or self.iteration == self.max_iters:
            return False
        return self.iteration - self.best["iteration"] >= self.patience_iters

    def autocast(self) -> torch.autocast:
        """Return the context every forward runs in."""
        return torch.autocast(
            self.accelerator.device.type, self.precision, enabled=self.precision is not None
        )

    def train(self) -> None:
        """Run until it `is_over`, or to the end of a step with a request to `stop`."""
        self.model.train()
        try:
            for hook in self.hooks:
                hook.before_train(self)
            batches = self.batches(self.iteration)
            self.meter.started = self._last = time.perf_counter()
            while not self.is_over and self.stop_signal is None:
                self.step(batches)
                self.iteration += 1
                now = time.perf_counter()
                self.seconds, self._last = self.seconds + now - self._last, now
                # Taken up here alone: a signal during the hooks would end the run without the
                # checkpoint they are past.
                self.stop_signal = self.stop.shared(self.accelerator)
                for hook in self.hooks:
                    hook.after_step(self)
        finally:
            for hook in self.hooks:
                hook.after_train(self)

    def step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, from `accumulate` micro-batches."""
        # Random state is a function of the iteration: a resumed run needs none, and nothing that
        # looks on can disturb it.
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
        if not self.guard.lets_pass(self, losses, indices):
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
            self.ema.update(self.accelerator.unwrap_model(self.model), self.iteration + 1)
        self.guard.check_scale(self)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mix a micro-batch of the current iteration, and return the model's losses of it."""
        images, targets = self.mix(batch.images, batch.targets, self.iteration)
        losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def leave_out(self, seconds: float) -> None:
        """Take time that was not training's, such as an evaluation's, out of its speed."""
        self.meter.started += seconds
        self._last += seconds

    def read_meter(self) -> dict[str, float]:
        """Return mean losses since the last reading, and how fast it went; start anew.

        There are no losses where every step was passed over.
        """
        values = self.mean_losses()
        meter, self.meter = self.meter, Meter()
        seconds = self.meter.started - meter.started
        return {
            **({"loss": sum(values.values())} if values else {}),
            **values,
            **self.guard.counted(self),
            "images_per_second": meter.images * self.accelerator.num_processes / seconds,
            "data_fraction": meter.data_seconds / seconds,
        }

    def mean_losses(self) -> dict[str, float]:
        """Return mean losses since the last reading; every process of a group must call it."""
        meter = self.meter
        for name, total in meter.losses.items():
            meter.losses[name] = self.accelerator.reduce(total, reduction="mean")
        count = meter.steps * self.accumulate
        return {name: float(total) / count for name, total in meter.losses.items()}

    def share(self) -> None:
        """Give all processes of a group what each has counted, for a checkpoint to hold.

        Every process must call it.
        """
        self.mean_losses()
        if self.accelerator.num_processes > 1:
            self.skipped = list(dict.fromkeys(gather_object(self.skipped)))

    def state_parts(self) -> dict[str, Any]:
        """Return what a checkpoint holds in tensors."""
        model = self.accelerator.unwrap_model(self.model)
        parts = {
            "model": model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tract": self.tract.state_dict(),
        }
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        return {**parts, "losses": self.meter.losses}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds in plain values."""
        return {
            "best": self.best,
            "skipped": self.skipped,
            "passed_over": self.guard.passed_over,
            "scaler": self.scaler.state_dict(),
            "meter_steps": self.meter.steps,
            "seconds": self.seconds,
            "seen_images": self.seen_images,
        }

    def load_state(
        self, parts: Mapping[str, Any], state: Mapping[str, Any], iteration: int
    ) -> None:
        """Take up what `state_parts` and `state` gave; the run then goes on to the same bits."""
        self.load_weights(parts)
        self.optimizer.load_state_dict(parts["optimizer"])
        _lay_as_weights(self.optimizer)
        _step_as_begun(self.optimizer)
        self.tract.load_state_dict(parts["tract"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        device = self.accelerator.device
        losses = {name: total.to(device) for name, total in parts["losses"].items()}
        self.meter = Meter(losses=losses, steps=state["meter_steps"])
        self.best = state["best"]
        self.seconds, self.seen_images = state["seconds"], state["seen_images"]
        self.skipped = list(state["skipped"])
        self.guard.passed_over = list(state["passed_over"])
        self.iteration = iteration

    def load_weights(self, parts: Mapping[str, Any]) -> None:
        """Take up the weights alone, to evaluate them."""
        self.accelerator.unwrap_model(self.model).load_state_dict(parts["model"])
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
                "A training batch needs an image that can be decoded, but all were skipped: "
                f"{'; '.join(batch.skipped)}. Repair the data, or set a larger data.batch_size."
            )
        return batch


def _lay_as_weights(optimizer: Optimizer) -> None:
    """Order what an optimizer keeps of each weight in memory as that weight is.

    A checkpoint's tensors are contiguous, and fused steps walk through memory and not by strides.
    """
    for weight in (each for group in optimizer.param_groups for each in group["params"]):
        state = optimizer.state.get(weight, {})
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _step_as_begun(optimizer: Optimizer) -> None:
    """Let a gradient scaler know which step an optimizer goes on with: the one it began with.

    The options that were loaded name it, but whether it takes the scale itself, as fused steps do,
    torch notes where the optimizer is made.
    """
    if not any(group.get("fused") for group in optimizer.param_groups):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
