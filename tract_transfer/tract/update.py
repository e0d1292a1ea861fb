"""TrAct: a gradient step on the first layer's pre-activations.

The weights that come closest to such a step are the plain gradient, right-multiplied by
(x x^T / b + lam I)^-1 (Petersen, Borgelt, Ermon, NeurIPS 2024, equation 6). The matrix depends on
the layer's input alone. So a forward hook adds it up, one call multiplies the finished
gradient, and the model, its forward, its state dict and its backward stay as they are.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tract_transfer.tract.find import check_layer, find_first_layers
from tract_transfer.tract.lags import float32_factors
from tract_transfer.tract.watch import WatchedLayer

# --- TrAct's step, called by an optimizer's own hooks.


class Attached:
    """A `step` that comes before every update of `optimizer`; `remove()` takes it off.

    Where the optimizer is given a closure that runs forward and backward, as Lightning and L-BFGS
    do, `step` follows each of its runs.

    Args:
        is_due: whether a forward has come since `step` was last called.

    Raises:
        ValueError: no optimizer, or one whose step calls no hooks.
    """

    def __init__(
        self, optimizer: Optimizer, step: Callable[[], None], is_due: Callable[[], bool]
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"attach takes a torch optimizer, got {type(optimizer).__name__}.")
        # Of the class or, as with detectron2's clipping ones, of the parent whose step it calls.
        steps = [vars(each).get("step") for each in type(optimizer).__mro__]
        if not any(getattr(method, "hooked", False) for method in steps):
            raise ValueError(
                f"The step of {type(optimizer).__name__} calls no hooks. Attach to the optimizer "
                "that it wraps."
            )
        self.optimizer = optimizer
        self._step = step
        self._is_due = is_due
        self._is_stepping = False
        self._treated: Callable[[], Any] | None = None  # the closure of the step that runs
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_on(self) -> bool:
        """Whether it has not been removed."""
        return bool(self._handles)

    def _before(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args begins with the optimizer itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # A class whose step calls its parent's runs the hooks of both.
        is_done = not self._is_due() if closure is None else closure is self._treated
        if self._is_stepping and is_done:
            return None
        self._is_stepping = True
        if closure is None:
            self._step()
            return None

        def treated() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._step()
            return loss

        self._treated = treated
        if "closure" in kwargs:
            return args, {**kwargs, "closure": treated}
        return (args[0], treated, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        self._is_stepping, self._treated = False, None


# --- The damped inverse of a Gram matrix, and its product with a gradient. Nothing waits for a

EXACT_SIZE = 256  # up to which N the factor is of float64, at no cost that counts


class DampedFactor(NamedTuple):
    """The Cholesky `factor` (N, N) of x x^T / b + lam I.

    `health` is (finite, positive definite, lam is as asked for). Without the first two the factor
    is of no use, and the update is zero.
    """

    factor: Tensor
    health: Tensor

    def times(self, gradient: Tensor) -> Tensor:
        """Return gradient (O, ...) (x x^T / b + lam I)^-1, in the shape of `gradient`."""
        columns = gradient.reshape(len(gradient), -1).T.to(self.factor.dtype)
        with float32_factors(gradient.device.type):
            solved = torch.cholesky_solve(columns, self.factor).T.reshape(gradient.shape)
        return torch.where(self.health[:2].all(), solved, 0)


def damped_factor(gram: Tensor, lam: float, *, relative: bool) -> DampedFactor:
    """Factorise gram + lam I.

    `relative` takes lam times the mean of the diagonal. Neither is taken below what rounding can
    take from an eigenvalue, 4 eps of the trace, which keeps a matrix without full rank positive.
    For inputs of standard deviation 1 that is less than a hundredth of any lam in use.

    Args:
        gram: (N, N), the mean of x x^T; float32 or float64.
    """
    rounding = 4 * torch.finfo(gram.dtype).eps
    exact = len(gram) <= EXACT_SIZE and gram.device.type in ("cpu", "cuda")
    matrix = gram.to(torch.float64 if exact else gram.dtype, copy=True)
    finite = matrix.sum().isfinite()
    diagonal = matrix.diagonal()
    trace = diagonal.sum()
    wanted = lam * trace / len(gram) if relative else torch.full_like(trace, lam)
    damping = torch.maximum(wanted, rounding * trace)
    # A blank batch under a relative lam: any positive matrix will do, for its gradient is 0 too.
    diagonal += torch.where(damping > 0, damping, 1)
    with float32_factors(gram.device.type):
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return DampedFactor(factor, torch.stack([finite, failed == 0, damping <= wanted]))


logger = logging.getLogger(__name__)

KEPT = 0.9  # of the running mean, at each measurement with update_every > 1


class TrAct:
    """TrAct for the first layer of `model`.

        tract = TrAct(model)
        ...
        loss.backward(); tract.step(); optimizer.step()

    In a loop that is not yours, `TrAct(model).attach(optimizer)` once is enough. Clip after
    `step`. Forwards without gradient or in eval mode do not count; all training forwards since
    the last step do, so that gradient accumulation equals one large batch. In a process group
    every process must call `step`; the matrix is summed over all of them.

    Args:
        model: any module; place, wrap and compile it before or after.
        lam: the regulariser, in units of a squared input: 0.1 suits inputs of mean 0 and
            standard deviation 1 (paper: 0.05 for short training, 0.2 for long).
        lam_mode: "absolute", or "relative", which takes lam times the mean square of the inputs
            and so does not depend on their scale.
        layers: dotted names of the layers to treat; None finds the first. An empty list makes a
            TrAct that does nothing.
        update_every: steps between two measurements of the matrix; above 1 it is a running mean
            of those measured, and part of what a checkpoint must hold (`state_dict`).

    Raises:
        ValueError: lam or update_every is not positive, or a layer cannot be found or treated.
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
                f"TrAct takes the model, an nn.Module; got {type(model).__name__}. An optimizer "
                "goes to attach()."
            )
        if not (isinstance(lam, SupportsFloat) and 0 < lam < float("inf")):
            raise ValueError(f"TrAct needs a lam above 0, got {lam!r}. The paper's default is 0.1.")
        if lam_mode not in ("absolute", "relative"):
            raise ValueError(f"lam_mode is 'absolute' or 'relative', got {lam_mode!r}.")
        if update_every < 1:
            raise ValueError(f"update_every is a number of steps, 1 at least; got {update_every}.")
        names = find_first_layers(model) if layers is None else list(layers)
        if isinstance(layers, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'layers is a list of names, such as ["conv1"]; got {layers!r}.')
        self.lam = lam
        self.lam_mode = lam_mode
        self.update_every = update_every
        self.num_steps = 0
        self._watched = [
            WatchedLayer(name, check_layer(model, name), self.detach)
            for name in dict.fromkeys(names)
        ]
        self._means: dict[str, Tensor] = {}
        self._factors: dict[str, DampedFactor] = {}
        self._unread: deque[tuple[str, int, Tensor, Any]] = deque()
        self._warned: set[str] = set()
        self._attached: list[Attached] = []
        for each in self._watched:
            each.start()
        if self._watched and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # What was compiled before runs without the hooks.

    def __repr__(self) -> str:
        return (
            f"TrAct(layers={self.layer_names}, lam={self.lam:g}, lam_mode={self.lam_mode!r}, "
            f"update_every={self.update_every})"
        )

    @property
    def layer_names(self) -> list[str]:
        """Dotted names of the treated layers."""
        return [each.name for each in self._watched]

    @torch.no_grad()
    def step(self) -> None:
        """Multiply the gradients of the treated layers; call it once before the optimizer's step.

        On a GPU nothing waits for the device: that a matrix was not finite or not positive is
        told by a later step or by `state_dict`, and until then the layer's update is zero.

        Raises:
            RuntimeError: no training forward or no gradient reached a layer since the last step,
                its input was not finite, or the optimizer has stepped already.
        """
        for each in self._watched:
            each.check_order()
        self._step()

    def _step(self) -> None:
        gradients = []
        for each in self._watched:
            self._follow(each)
            gradients.append(each.gradient_rows())
            each.check_reached()
        measures = self.num_steps % self.update_every == 0
        for each, gradient in zip(self._watched, gradients, strict=True):
            if measures:
                self._measure(each, gradient.device)
            gradient.copy_(self._factors[each.name].times(gradient))
            each.keep_treated()
            each.forget()
        self.num_steps += 1
        for each in self._watched:
            each.counts = self.num_steps % self.update_every == 0
        self._read(wait=False)

    def _follow(self, each: WatchedLayer) -> None:
        each.follow_weight()
        if not each.moved:
            return
        for attached in self._attached:
            if attached.is_on and not _holds(attached.optimizer, each):
                raise RuntimeError(
                    f"{each.title}.weight is another parameter than when TrAct was attached, and "
                    "the optimizer does not hold it. Make and attach the optimizer after what "
                    "replaces parameters, such as load_state_dict(assign=True)."
                )
        each.moved = False

    def _measure(self, each: WatchedLayer, device: torch.device) -> None:
        mean = each.mean(device)
        if self.update_every > 1:
            old = self._means.get(each.name, mean).to(mean)
            # What is not finite is told of, and not kept: the first until the next comes.
            old = torch.where(old.isfinite().all(), old, mean)
            running = torch.lerp(mean, old, KEPT)
            self._means[each.name] = torch.where(mean.isfinite().all(), running, old)
            mean = running
        factor = damped_factor(mean, self.lam, relative=self.lam_mode == "relative")
        self._factors[each.name] = factor
        if factor.health.is_cuda:
            on_host = factor.health.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._unread.append((each.title, self.num_steps, on_host, done))
        else:
            self._unread.append((each.title, self.num_steps, factor.health, None))

    def _read(self, *, wait: bool) -> None:
        """Raise what the matrices that are done have to tell."""
        while self._unread:
            name, step, health, done = self._unread[0]
            if done is not None and not done.query():
                if not wait:
                    return
                done.synchronize()
            self._unread.popleft()
            finite, positive, as_asked = health.tolist()
            if not finite:
                raise RuntimeError(
                    f"The input of {name} is not finite in step {step} (NaN, infinity, or too "
                    "large to square in float32), or no process had an image. Check the images and "
                    "their normalisation; call forget() after a forward whose batch is given up."
                )
            if not positive:
                raise RuntimeError(
                    f"x x^T / b + {self.lam:g} I of {name} is singular in step {step}: lam is too "
                    "small for inputs of this size. Normalise the images, or set lam_mode to "
                    "'relative' or a larger lam."
                )
            if not (as_asked or name in self._warned):
                self._warned.add(name)
                logger.warning(
                    "lam = %g is below the rounding of x x^T / b of %s, and was raised to it: the "
                    "inputs are large. Normalise the images, or set lam_mode to 'relative'.",
                    self.lam,
                    name,
                )

    def attach(self, optimizer: Optimizer) -> Attached:
        """Call `step` before every update of `optimizer`; `remove()` of what it returns undoes it.

        An update that finds no gradient at the treated layers passes them over, as the optimizer
        does: Lightning makes one where `training_step` returned None.

        Raises:
            ValueError: the optimizer does not hold the weight of a treated layer, has this TrAct
                already, or its step calls no hooks.
        """
        # accelerate wraps the optimizer that steps.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if any(each.optimizer is optimizer and each.is_on for each in self._attached):
            raise ValueError("This TrAct is attached to this optimizer already: once is enough.")
        if any(group.get("line_search_fn") for group in getattr(optimizer, "param_groups", ())):
            raise ValueError(
                f"The line search of {type(optimizer).__name__} compares losses with the slope "
                "along the gradient, which TrAct changes. Set line_search_fn=None."
            )
        attached = Attached(
            optimizer, self._step_if_used, lambda: any(each.reached for each in self._watched)
        )
        for each in self._watched:
            if not _holds(optimizer, each):
                attached.remove()
                raise ValueError(f"The optimizer does not hold {each.title}.weight.")
        self._attached.append(attached)
        return attached

    @torch.no_grad()
    def _step_if_used(self) -> None:
        if all(each.layer.weight.grad is None for each in self._watched):
            for each in self._watched:
                each.forget()
        else:
            self._step()

    def detach(self) -> None:
        """Remove all hooks; the model, and the optimizers attached to, are then as they were."""
        for each in self._watched:
            each.stop()
        for attached in self._attached:
            attached.remove()

    def forget(self) -> None:
        """Leave out the forwards since the last step: for a batch that is given up after one."""
        for each in self._watched:
            each.forget()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: nothing but with update_every above 1.

        Raises:
            RuntimeError: as `step` does, of any step before.
        """
        self._read(wait=True)
        if self.update_every == 1:
            return {}
        state = {f"mean.{name}": mean for name, mean in self._means.items()}
        return {"num_steps": torch.tensor(self.num_steps), **state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of other layers, or of a TrAct with update_every above 1 where this
                one measures at every step, or the other way round.
        """
        measured = self.layer_names if state.get("num_steps", 1) else []  # none before a step
        expected = {"num_steps", *(f"mean.{name}" for name in measured)}
        if set(state) != (expected if self.update_every > 1 else set()):
            raise ValueError(
                f"A state of TrAct with update_every = {self.update_every} on {self.layer_names} "
                f"does not hold {sorted(state)}."
            )
        if self.update_every == 1:
            return
        self.num_steps = int(state["num_steps"])
        self._means.clear()
        for each in self._watched:
            each.counts = self.num_steps % self.update_every == 0
        for each in self._watched if measured else []:
            mean = self._means[each.name] = state[f"mean.{each.name}"].to(each.layer.weight.device)
            relative = self.lam_mode == "relative"
            self._factors[each.name] = damped_factor(mean, self.lam, relative=relative)


def _holds(optimizer: Optimizer, each: WatchedLayer) -> bool:
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(parameter is each.layer.weight for parameter in held)
