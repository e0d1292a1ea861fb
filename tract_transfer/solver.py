"""The optimizer and how its learning rate goes with progress."""

import warnings
from collections.abc import Sequence
from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from tract_transfer.registry import did_you_mean


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    nesterov: bool = False,
    decay_all: bool = True,
    bias_lr_factor: float = 1.0,
    bias_weight_decay: float | None = None,
    optimizer_args: dict[str, Any] | None = None,
) -> Optimizer:
    """Build any of timm's optimizers over the trainable parameters of `model`.

    `sgd` is plain SGD unless `nesterov` is set (timm's own `sgd` always is Nesterov's).

    Args:
        momentum: None takes 0.9 where the optimizer has one.
        decay_all: decay biases and normalisation layers too; False leaves them out.
        bias_lr_factor: of the parameters called bias, over `lr` (Caffe's recipes: 2).
        bias_weight_decay: of the same, in place of `weight_decay` (Caffe's recipes: 0).
        optimizer_args: further arguments of the optimizer's constructor, such as betas and eps.

    Raises:
        ValueError: unknown optimizer, or one that does not take momentum or an argument; or
            `bias_weight_decay` where biases are not decayed anyway.
    """
    known = list_optimizers()
    if optimizer not in known:
        raise ValueError(f"solver.optimizer: no {optimizer!r}.{did_you_mean(optimizer, known)}")
    if nesterov and optimizer != "sgd":
        raise ValueError(f"solver.nesterov is for sgd; {optimizer} does not take it.")
    arguments = dict(optimizer_args or {})
    if momentum is not None:
        if not get_optimizer_info(optimizer).has_momentum:
            raise ValueError(
                f"solver.momentum is not {optimizer}'s. Set solver.optimizer_args.betas instead."
            )
        arguments["momentum"] = momentum
    trained: Any = model
    if bias_lr_factor != 1 or bias_weight_decay is not None:
        if not decay_all:
            raise ValueError(
                "solver.bias_lr_factor and bias_weight_decay need solver.decay_all: true, and say "
                "themselves what a bias decays by."
            )
        decay = weight_decay if bias_weight_decay is None else bias_weight_decay
        trained = _with_biases_apart(model, lr, weight_decay, lr * bias_lr_factor, decay)
    name = "momentum" if optimizer == "sgd" and not nesterov else optimizer  # timm's plain SGD
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            built: Optimizer = create_optimizer_v2(
                trained,
                opt=name,
                lr=lr,
                weight_decay=weight_decay,
                filter_bias_and_bn=not decay_all,
                **arguments,
            )
    except (TypeError, AssertionError) as error:  # timm asserts that a fused optimizer has a GPU
        raise ValueError(
            f"solver.optimizer {optimizer} with optimizer_args {optimizer_args}: {error}"
        ) from error
    for group in built.param_groups:
        group["base_lr"] = group["lr"]
    return built


def _with_biases_apart(
    model: nn.Module, lr: float, weight_decay: float, bias_lr: float, bias_weight_decay: float
) -> list[dict[str, Any]]:
    """Return two parameter groups: what is trained and not called bias, and what is."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.rpartition(".")[2] == "bias"].append(parameter)
    settings = ((lr, weight_decay), (bias_lr, bias_weight_decay))
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for parameters, (rate, decay) in zip(groups, settings, strict=True)
        if parameters
    ]


def set_progress(optimizer: Optimizer, schedule: ParamScheduler, progress: float) -> float:
    """Set every group's learning rate for `progress` in [0, 1); return the factor."""
    factor = float(schedule(progress))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return factor


def build_schedule(
    *,
    max_iters: int,
    schedule: str = "cosine",
    warmup_iters: int = 0,
    warmup_start: float = 0.0,
    steps_iters: Sequence[int] = (),
    step_factor: float = 0.1,
    end_factor: float = 0.0,
) -> ParamScheduler:
    """Return a factor on the base learning rate as a function of progress in [0, 1).

    Args:
        schedule: "cosine" (to `end_factor`), "multistep" (times `step_factor` at each of
            `steps_iters`) or "constant".
        warmup_iters: a linear rise from `warmup_start` to the schedule's own value, before it.

    Raises:
        ValueError: an unknown schedule, or a warm-up or a step that lies outside the run.
    """
    if schedule not in ("cosine", "multistep", "constant"):
        raise ValueError(f"solver.schedule: no {schedule!r}. Known: cosine, multistep, constant.")
    if not 0 <= warmup_iters < max_iters:
        raise ValueError(
            f"solver: the warm-up of {warmup_iters} iterations outlasts {max_iters}. Shorten "
            "solver.warmup_iters (or warmup_epochs), or set it to null."
        )
    main: ParamScheduler
    if schedule == "multistep":
        if list(steps_iters) != sorted(set(steps_iters)) or not all(
            warmup_iters < step < max_iters for step in steps_iters
        ):
            raise ValueError(
                f"solver: the steps {list(steps_iters)} must ascend between the warm-up's end "
                f"{warmup_iters} and the run's end {max_iters} (in iterations)."
            )
        main = MultiStepParamScheduler(
            [step_factor**power for power in range(len(steps_iters) + 1)],
            num_updates=max_iters - warmup_iters,
            milestones=[step - warmup_iters for step in steps_iters],
        )
    elif schedule == "cosine":
        main = CosineParamScheduler(1.0, end_factor)
    else:
        main = ConstantParamScheduler(1.0)
    if not warmup_iters:
        return main
    rest = 1 - warmup_iters / max_iters
    return CompositeParamScheduler(
        [LinearParamScheduler(warmup_start, 1.0), main],
        lengths=[1 - rest, rest],  # fvcore wants them to add up to 1 exactly
        interval_scaling=["rescaled", "rescaled"],
    )
