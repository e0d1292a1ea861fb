"""TrAct: a gradient step on the first layer's pre-activations.

The step on the weights that comes closest to it is the plain gradient, right-multiplied by
(x x^T / b + lam I)^-1, where the b columns of x are the layer's inputs (Petersen, Borgelt, Ermon,
NeurIPS 2024, equation 6). The matrix depends only on these inputs. So a forward hook sums x x^T
(watch.py, gram.py), one call multiplies the finished gradient, and the model, its forward, its
backward and its state dict do not change.
"""

import logging
import sys
from collections import deque
from collections.abc import Sequence
from typing import Literal, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tract_transfer.tract.attach import Attached
from tract_transfer.tract.diagnose import LayerReport, Report, describe_layer
from tract_transfer.tract.find import check_layer, find_first_layers
from tract_transfer.tract.gram import DampedFactor, damped_factor
from tract_transfer.tract.watch import WatchedLayer, mean_of

logger = logging.getLogger(__name__)
package_logger = logging.getLogger(__package__)

MOMENTUM = 0.9  # of the running mean that update_every > 1 keeps


class TrAct:
    """Multiply the gradient of the first layer of `model`, before each optimizer step.

        tract = TrAct(model)
        ...
        loss.backward(); tract.step(); optimizer.step()

    In a loop that you cannot edit, call `TrAct(model).attach(optimizer)` once. Clip gradients
    after `step`. All training forwards since the last step count, so gradient accumulation equals
    one large batch; forwards without gradient or in eval mode do not count. In a process group
    every process must call `step`, which sums the matrix over all processes.

    Args:
        model: any module. Move, wrap and compile it before or after.
        lam: the damping, in units of a squared input: 0.1 suits inputs of mean 0 and standard
            deviation 1 (paper: 0.05 for short training, 0.2 for long).
        lam_mode: "absolute", or "relative" to multiply lam by the mean square of the inputs, which
            makes it independent of their scale.
        layers: dotted names of the layers to treat. None finds the first layer; an empty list
            makes a TrAct that does nothing.
        update_every: steps between two measurements of the matrix. Above 1, TrAct uses a running
            mean of the measured matrices: save it in checkpoints (`state_dict`).

    Raises:
        ValueError: lam or update_every is not positive, or a layer is missing or not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 0.1,
        *,
        lam_mode: Literal["absolute", "relative"] = "absolute",
        layers: Sequence[str] | None = None,
        update_every: int = 1,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"TrAct takes the model, an nn.Module; got {type(model).__name__}. Pass an "
                "optimizer to attach()."
            )
        if not (isinstance(lam, SupportsFloat) and 0 < lam < float("inf")):
            raise ValueError(f"TrAct needs a lam above 0, got {lam!r}. The paper's default is 0.1.")
        if lam_mode not in ("absolute", "relative"):
            raise ValueError(f"lam_mode must be 'absolute' or 'relative', got {lam_mode!r}.")
        if update_every < 1:
            raise ValueError(f"update_every must be 1 or more steps, got {update_every}.")
        names = find_first_layers(model) if layers is None else list(layers)
        if isinstance(layers, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'layers must be a list of names, e.g. ["conv1"]; got {layers!r}.')
        self.lam = lam
        self.lam_mode = lam_mode
        self.update_every = update_every
        self.num_steps = 0
        self._watched = [
            WatchedLayer(name, check_layer(model, name), self.detach)
            for name in dict.fromkeys(names)
        ]
        self._means: dict[str, Tensor] = {}  # running means of x x^T / b, with update_every > 1
        self._factors: dict[str, DampedFactor] = {}
        self._treated: dict[str, Tensor] = {}  # gradients of the last step, for a report
        # Layer, step, health of the factor, and the event of its copy from a GPU.
        self._unread: deque[tuple[str, int, Tensor, torch.cuda.Event | None]] = deque()
        self._warned: set[str] = set()
        self._attached: list[Attached] = []
        for watched in self._watched:
            watched.start()
            self._log_layer(watched)
        if self._watched and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs compiled before would run without the hooks

    def __repr__(self) -> str:
        return (
            f"TrAct(layers={self.layer_names}, lam={self.lam:g}, lam_mode={self.lam_mode!r}, "
            f"update_every={self.update_every})"
        )

    def _log_layer(self, watched: WatchedLayer) -> None:
        weight, kind = watched.layer.weight, type(watched.layer).__name__
        if isinstance(watched.layer, nn.Conv2d):
            kind += f" with kernel {weight.shape[2]} x {weight.shape[3]}"
        package_logger.info(
            "TrAct treats %s: %s, %d inputs an output, lam = %g (%s)",
            watched.title, kind, weight.shape[1:].numel(), self.lam, self.lam_mode,
        )  # fmt: skip

    @property
    def layer_names(self) -> list[str]:
        """Dotted names of the treated layers."""
        return [watched.name for watched in self._watched]

    @torch.no_grad()
    def step(self) -> None:
        """Multiply the gradients of the treated layers. Call it once before the optimizer's step.

        On a GPU this does not wait for the device. If a matrix was not finite or not positive, the
        layer's update is zero, and a later `step` or `state_dict` raises the error.

        Raises:
            RuntimeError: no training forward or no gradient reached a layer since the last step,
                its input was not finite, or the optimizer has already stepped.
        """
        for watched in self._watched:
            watched.check_order()
        self._multiply_gradients()

    @torch.no_grad()
    def _multiply_gradients(self) -> None:
        """What `step` and attached optimizers do."""
        # Check all layers before the first gradient changes.
        gradients = [watched.local_gradient() for watched in self._watched]
        measures = self.num_steps % self.update_every == 0
        for watched, gradient in zip(self._watched, gradients, strict=True):
            if measures:
                self._measure(watched, gradient.device)
            treated = self._treated[watched.name] = self._factors[watched.name].times(gradient)
            gradient.copy_(treated)
            watched.finish_step()
        self._set_num_steps(self.num_steps + 1)
        self._report_problems(wait=False)

    def _measure(self, watched: WatchedLayer, device: torch.device) -> None:
        """Factorise x x^T / b of the forwards since the last step, or its running mean."""
        mean = watched.mean(device)
        if self.update_every > 1:
            mean, self._means[watched.name] = self._running_mean(watched.name, mean)
        factor = self._factors[watched.name] = damped_factor(mean, self.lam, self.lam_mode)
        health, copied = factor.health, None
        if health.is_cuda:
            health, copied = health.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._unread.append((watched.title, self.num_steps, health, copied))

    def _running_mean(self, name: str, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the running mean with a new measurement, and the same to keep, without its NaNs.

        A matrix that is not finite is reported, and replaced at the next measurement.
        """
        old = self._means.get(name, mean).to(mean)
        old = torch.where(old.isfinite().all(), old, mean)
        running = torch.lerp(mean, old, MOMENTUM)
        return running, torch.where(mean.isfinite().all(), running, old)

    def _set_num_steps(self, num_steps: int) -> None:
        self.num_steps = num_steps
        for watched in self._watched:
            watched.counts = num_steps % self.update_every == 0

    def _report_problems(self, *, wait: bool) -> None:
        """Raise or log what is wrong with the factors that the device has finished."""
        while self._unread:
            title, step, health, copied = self._unread[0]
            if copied is not None and not copied.query():
                if not wait:
                    return
                copied.synchronize()
            self._unread.popleft()
            is_finite, is_positive, has_lam = health.tolist()
            if not is_finite:
                raise RuntimeError(
                    f"The input of {title} is not finite in step {step} (NaN, infinity, or too "
                    "large to square in float32), or no process had an image. Check the images and "
                    "their normalization; call forget() after a forward that you do not use."
                )
            if not is_positive:
                raise RuntimeError(
                    f"x x^T / b + {self.lam:g} I of {title} is singular in step {step}: lam is too "
                    "small for inputs of this size. Normalize the images, set lam_mode to "
                    "'relative', or use a larger lam."
                )
            if not (has_lam or title in self._warned):
                self._warned.add(title)
                logger.warning(
                    "lam = %g is below the rounding error of x x^T / b of %s and was raised to it, "
                    "because the inputs are large. Normalize the images, or set lam_mode to "
                    "'relative'.",
                    self.lam,
                    title,
                )

    def attach(self, optimizer: Optimizer) -> Attached:
        """Call `step` at the start of every `optimizer.step()`.

        Returns:
            A handle whose `remove()` undoes it.

        Raises:
            ValueError: the optimizer does not hold the weight of a treated layer, this TrAct is
                already attached to it, it runs a line search, or its step calls no hooks.
        """
        attached = Attached(optimizer, self._watched, self._multiply_gradients, self)
        self._attached.append(attached)
        return attached

    def detach(self) -> None:
        """Remove all hooks from the model and from attached optimizers."""
        for watched in self._watched:
            watched.remove()
        for attached in self._attached:
            attached.remove()

    def forget(self) -> None:
        """Do not count the forwards since the last step, for a batch that you do not use."""
        for watched in self._watched:
            watched.forget()

    @torch.no_grad()
    def report(self) -> Report:
        """Report what TrAct does to each layer, and whether lam and the inputs suit each other.

        Between a backward and `step` the report is of that gradient and of this process's forwards
        since the last step; otherwise of the last step, whose gradient and matrix TrAct keeps. With
        FSDP gradients are the rows that this process holds. Means and standard deviations of the
        inputs are those of the first forward after TrAct was made or last reported, in this process
        and outside compiled graphs. A report changes nothing in a training, waits for the device,
        and takes the time of the eigenvalues of an n x n matrix.

        Returns:
            A dict of layer name -> LayerReport. Print it, or read its figures and findings.

        Raises:
            RuntimeError: no training forward has reached a layer.
        """
        return Report({watched.name: self._report_layer(watched) for watched in self._watched})

    def _report_layer(self, watched: WatchedLayer) -> LayerReport:
        factor, treated = self._factors.get(watched.name), self._treated.get(watched.name)
        plain, summed, gradients = watched.pending_gradient(), watched.summed(), None
        if summed is not None and (plain is not None or factor is None):
            mean = mean_of(summed)
            if self.update_every > 1:
                mean, _ = self._running_mean(watched.name, mean)
            factor = damped_factor(mean, self.lam, self.lam_mode)
        if factor is not None and plain is not None:
            gradients = plain, factor.times(plain)
        elif factor is not None and treated is not None:
            gradients = factor.undo(treated), treated
        weight = watched.layer.weight
        if factor is None and isinstance(weight, nn.Parameter) and weight.requires_grad:
            raise RuntimeError(
                f"report() of {watched.title} needs a forward in train mode and its backward first."
            )
        report = describe_layer(watched, self.lam, self.lam_mode, factor, gradients)
        watched.wants_moments = True
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: empty unless update_every is above 1.

        Raises:
            RuntimeError: as `step` does, for any earlier step.
        """
        self._report_problems(wait=True)
        if self.update_every == 1:
            return {}
        means = {f"mean.{name}": mean for name, mean in self._means.items()}
        return {"num_steps": torch.tensor(self.num_steps), **means}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it belongs to other layers, or only one of the two has update_every = 1.
        """
        names = self.layer_names if state.get("num_steps", 1) else []  # no mean before a step
        expected = {"num_steps", *(f"mean.{name}" for name in names)}
        if set(state) != (expected if self.update_every > 1 else set()):
            raise ValueError(
                f"The state of a TrAct with update_every = {self.update_every} on "
                f"{self.layer_names} does not hold {sorted(state)}."
            )
        if self.update_every == 1:
            return
        self._set_num_steps(int(state["num_steps"]))
        self._means.clear()
        for watched in self._watched if names else []:
            mean = state[f"mean.{watched.name}"].to(watched.layer.weight.device)
            self._means[watched.name] = mean
            self._factors[watched.name] = damped_factor(mean, self.lam, self.lam_mode)
