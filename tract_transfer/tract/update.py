"""TrAct: a gradient step on the first layer's pre-activations.

The weights that come closest to such a step are the plain gradient, right-multiplied by
(x x^T / b + lam I)^-1 (Petersen, Borgelt, Ermon, NeurIPS 2024, equation 6). The matrix depends on
the layer's input alone. So a forward pre-hook adds it up, one call multiplies the finished
gradient, and the model, its forward, its state dict and its backward stay as they are.
"""

# R rows the layer multiplies, N inputs a row, O outputs

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tract_transfer.tract.find import check_layer, find_first_layers
from tract_transfer.tract.gram import gram_matrix


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
        model: any module; place it on its device before or after.
        lam: the regulariser, in units of a squared input: 0.1 suits inputs of mean 0 and
            standard deviation 1 (paper: 0.05 for short training, 0.2 for long).
        lam_mode: "absolute", or "relative", which takes lam times the mean square of the inputs
            and so does not depend on their scale.
        layers: dotted names of the layers to treat; None finds the first. An empty list makes a
            TrAct that does nothing.

    Raises:
        ValueError: lam is not positive, or a layer cannot be found or treated.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 0.1,
        *,
        lam_mode: Literal["absolute", "relative"] = "absolute",
        layers: Sequence[str] | None = None,
    ) -> None:
        if not 0 < lam < float("inf"):
            raise ValueError(f"TrAct needs a lam above 0, got {lam}. The paper's default is 0.1.")
        if lam_mode not in ("absolute", "relative"):
            raise ValueError(f"lam_mode is 'absolute' or 'relative', got {lam_mode!r}.")
        self.lam = lam
        self.lam_mode = lam_mode
        if isinstance(layers, str):
            raise ValueError(f"layers is a list of names: [{layers!r}], got {layers!r}.")
        names = find_first_layers(model) if layers is None else list(dict.fromkeys(layers))
        self._treated = [_Treated(name, check_layer(model, name)) for name in names]
        self._handles: list[RemovableHandle] = [
            each.layer.register_forward_pre_hook(each.watch, with_kwargs=True)
            for each in self._treated
        ]

    @property
    def layer_names(self) -> list[str]:
        """Dotted names of the treated layers."""
        return [each.name for each in self._treated]

    @torch.no_grad()
    def step(self) -> None:
        """Multiply the gradients of the treated layers; call it once before the optimizer's step.

        Raises:
            RuntimeError: no training forward or no gradient reached a layer since the last step,
                or its input was not finite, or too large for lam in float32.
        """
        for each in self._treated:
            gradient = each.layer.weight.grad
            if gradient is None:
                raise RuntimeError(
                    f"{each.name}.weight has no gradient. Call backward() before TrAct's step(), "
                    "and zero_grad() after it."
                )
            matrix = each.take_mean_gram()
            num_inputs = len(matrix)
            lam: float | Tensor = self.lam
            if self.lam_mode == "relative":
                lam = self.lam * matrix.trace() / num_inputs
            matrix.diagonal().add_(lam)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                raise RuntimeError(
                    f"x x^T / b + {self.lam} I of {each.name} is singular in float32: lam is "
                    "too small for inputs of this size. Normalise the images, or set lam_mode to "
                    "'relative' or a larger lam."
                )
            columns = gradient.reshape(-1, num_inputs).T.to(matrix.dtype)
            gradient.copy_(torch.cholesky_solve(columns, factor).T.reshape(gradient.shape))

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call `step` at the start of every `optimizer.step()`; the handle's remove() undoes it.

        Raises:
            ValueError: the optimizer does not hold the weight of a treated layer.
        """
        # accelerate wraps the optimizer that steps.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for each in self._treated:
            if id(each.layer.weight) not in held:
                raise ValueError(f"The optimizer does not hold {each.name}.weight.")

        def before_step(*_: Any) -> None:
            self.step()

        return optimizer.register_step_pre_hook(before_step)

    def detach(self) -> None:
        """Remove the forward hooks; the model is then as it was."""
        for handle in self._handles:
            handle.remove()


@dataclass
class _Treated:
    """One treated layer, and what its forwards since the last step have added up to."""

    name: str
    layer: nn.Linear | nn.Conv2d
    gram: Tensor | None = None  # (N, N), the sum of x x^T
    num_rows: int = 0  # R

    def watch(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        """The forward pre-hook: add up x x^T of a training forward."""
        if not (module.training and torch.is_grad_enabled()):
            return
        images = inputs[0] if inputs else named["input"]
        if not images.is_floating_point():
            raise TypeError(
                f"TrAct needs a floating-point input to {self.name}, got {images.dtype}."
            )
        with torch.no_grad():
            gram, num_rows = gram_matrix(self.layer, images)
        self.gram = gram if self.gram is None else self.gram + gram
        self.num_rows += num_rows

    def take_mean_gram(self) -> Tensor:
        """Return x x^T / b over all processes, (N, N), and start anew."""
        gram, num_rows = self.gram, self.num_rows
        self.gram, self.num_rows = None, 0
        if gram is None:
            raise RuntimeError(
                f"No training forward reached {self.name} since the last step. TrAct must be made "
                "on the module that runs, in train mode; call its step() once an iteration."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.tensor([num_rows], dtype=torch.float64, device=gram.device)
            torch.distributed.all_reduce(count)
            torch.distributed.all_reduce(gram)
            num_rows = int(count)
        if not torch.isfinite(gram).all():
            raise RuntimeError(
                f"The input of {self.name} is not finite (NaN, infinity, or too large to square "
                "in float32). Check the images and their normalisation."
            )
        return gram / max(num_rows, 1)
