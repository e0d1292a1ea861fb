"""The optimizer, and its learning rate as a function of progress."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn
from torch.optim import Optimizer

from tract_transfer.registry import did_you_mean

Schedule = Callable[[float], float]
# Arguments of timm's factory that name the parameters which muon leaves to AdamW.
FALLBACK = ("fallback_list", "fallback_no_weight_decay")
_FACTORY = {"layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale", "param_group_fn"}


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
    layer_decay: float | None = None,
    optimizer_args: Mapping[str, Any] | None = None,
    section: str = "solver",
) -> Optimizer:
    """Build one of timm's optimizers; a schedule multiplies the `base_lr` of parameter groups.

    `sgd` is plain SGD unless `nesterov` is set (timm's own `sgd` always is Nesterov's).

    Args:
        momentum: None takes 0.9 if the optimizer has one.
        decay_all: decay biases and normalization layers too; False exempts them, and the parameters
            in the model's `no_weight_decay()`, as timm's recipes do (position embeddings).
        bias_lr_factor: learning rate of biases, over `lr` (Caffe's recipes: 2).
        bias_weight_decay: theirs in place of `weight_decay` (Caffe's recipes: 0).
        layer_decay: learning rate of each layer over that of the next (BEiT, with timm's layers);
            the head has `lr`. Needs the model's `group_matcher()`.
        optimizer_args: further arguments of the optimizer's constructor, such as betas and eps.
            `fallback_list` names parameters, by patterns, that muon leaves to AdamW.
        section: of the config that has these options, for errors.
    """
    arguments = dict(optimizer_args or {})
    if momentum is not None:
        arguments["momentum"] = momentum
    _check_optimizer(section, optimizer, arguments, nesterov)
    fallback = {key: arguments.pop(key) for key in FALLBACK if key in arguments}
    if bias_lr_factor == 1 and bias_weight_decay is None:
        groups = _groups(model, weight_decay, decay_all, layer_decay, fallback)
    elif decay_all and layer_decay is None and not fallback:
        bias_decay = weight_decay if bias_weight_decay is None else bias_weight_decay
        groups = _bias_groups(model, (lr, weight_decay), (lr * bias_lr_factor, bias_decay))
    else:
        raise ValueError(
            "solver.bias_lr_factor and bias_weight_decay need solver.decay_all: true and no "
            "layer_decay or fallback_list."
        )
    if optimizer in ("adam", "adamw") and _can_be_fused(model, arguments):
        arguments["fused"] = True
    name = "momentum" if optimizer == "sgd" and not nesterov else optimizer  # timm's plain SGD
    try:
        built: Optimizer = create_optimizer_v2(groups, name, lr, weight_decay, **arguments)
    except (TypeError, AssertionError) as error:  # timm asserts that APEX's have a GPU
        raise ValueError(
            f"{section}.optimizer {optimizer} with optimizer_args {optimizer_args}: {error}"
        ) from error
    for group in built.param_groups:
        group["base_lr"] = group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
    return built


def _check_optimizer(section: str, name: str, arguments: Mapping[str, Any], nesterov: bool) -> None:
    """Raise ValueError for an unknown optimizer or for options that it does not take."""
    names = list_optimizers()
    if name not in names:
        raise ValueError(f"{section}.optimizer: no {name!r}.{did_you_mean(name, names)}")
    has_momentum = get_optimizer_info(name).has_momentum
    args = f"{section}.optimizer_args"
    fallback = sorted(arguments.keys() & set(FALLBACK))
    problems = {
        f"{section}.nesterov is for sgd, not for {name}.": nesterov and name != "sgd",
        f"{args}: {sorted(_FACTORY & arguments.keys())} are not arguments of {name}. Set "
        "solver.layer_decay.": _FACTORY & arguments.keys(),
        f"{section}.momentum: {name} has none. Set {args}.betas instead.": (
            "momentum" in arguments and not has_momentum
        ),
        f"{args}: {fallback} are for muon and its variants, which leave parameters to "
        f"AdamW; {name} steps all of them. Remove them.": fallback and "muon" not in name,
        # It starts from arbitrary momentum if a gradient scaler skips the first step, and fails if
        # a parameter gets its first gradient later than the others.
        f"{args}.fused: torch's fused SGD is wrong after skipped steps. Remove it.": (
            arguments.get("fused") and name in ("sgd", "momentum")
        ),
    }
    if problem := next((text for text, is_wrong in problems.items() if is_wrong), None):
        raise ValueError(problem)


def _can_be_fused(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether to use the fused step of torch's Adam and AdamW by default.

    It walks through memory, not by strides, and only contiguous weights are sure to have the layout
    of their gradients and moments.
    """
    parameters = list(model.parameters())
    return (
        all(parameter.is_contiguous() for parameter in parameters if parameter.requires_grad)
        and {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}
        and not arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}
    )


def _groups(
    model: nn.Module,
    weight_decay: float,
    decay_all: bool,
    layer_decay: float | None,
    fallback: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return timm's parameter groups: by weight decay, and with `layer_decay` by layer."""
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "weight_decay_exclude_1d": not decay_all,
        "no_weight_decay_list": () if decay_all else getattr(model, "no_weight_decay", set)(),
        **fallback,
    }
    if layer_decay is None:
        return list(param_groups_weight_decay(model, **settings))
    if hasattr(model, "group_matcher"):
        return list(param_groups_layer_decay(model, layer_decay=layer_decay, **settings))
    raise ValueError(
        f"solver.layer_decay is for classifiers; {type(model).__name__} has no group_matcher. "
        "Set it to null."
    )


def _bias_groups(
    model: nn.Module, weights: tuple[float, float], biases: tuple[float, float]
) -> list[dict[str, Any]]:
    """Return up to two groups, weights and biases, with their (learning rate, weight decay)."""
    params: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            params[name.rpartition(".")[2] == "bias"].append(parameter)
    pairs = zip(params, (weights, biases), strict=True)
    return [{"params": p, "lr": lr, "weight_decay": decay} for p, (lr, decay) in pairs if p]


def set_progress(optimizer: Optimizer, schedule: Schedule, progress: float) -> float:
    """Set the learning rate of every group for `progress` in [0, 1); return the factor."""
    factor = float(schedule(progress))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return factor


def build_schedule(
    *,
    max_iters: int,
    schedule: Literal["cosine", "cosine_epochs", "multistep", "constant"] = "cosine",
    warmup_iters: int = 0,
    warmup_start: float = 0.0,
    steps_iters: Sequence[int] = (),
    step_factor: float = 0.1,
    end_factor: float = 0.0,
    iters_per_epoch: int = 1,
) -> Schedule:
    """Return the factor on the base learning rate as a function of progress in [0, 1).

    Args:
        schedule: "cosine" (to `end_factor`), "cosine_epochs" (cosine and warm-up, constant in each
            epoch at the value of its start), "multistep" (times `step_factor` at each of
            `steps_iters`) or "constant".
        warmup_iters: length of a linear rise from `warmup_start` to the start of the schedule.

    Raises:
        ValueError: a warm-up or step outside the run, or a first epoch with learning rate 0.
    """
    _check_schedule(schedule, max_iters, warmup_iters, warmup_start, list(steps_iters))
    main: Schedule = ConstantParamScheduler(1.0)
    if schedule == "multistep":
        main = MultiStepParamScheduler(
            [step_factor**power for power in range(len(steps_iters) + 1)],
            num_updates=max_iters - warmup_iters,
            milestones=[step - warmup_iters for step in steps_iters],
        )
    elif schedule in ("cosine", "cosine_epochs"):
        main = CosineParamScheduler(1.0, end_factor)
    else:
        assert schedule == "constant", schedule
    if warmup_iters:
        rest = 1 - warmup_iters / max_iters
        main = CompositeParamScheduler(
            [LinearParamScheduler(warmup_start, 1.0), main],
            lengths=[1 - rest, rest],  # fvcore requires a sum of exactly 1
            interval_scaling=["rescaled", "rescaled"],
        )
    if schedule != "cosine_epochs":
        return main

    def by_epoch(progress: float) -> float:
        epoch = round(progress * max_iters) // iters_per_epoch
        return float(main(epoch * iters_per_epoch / max_iters))

    return by_epoch


def _check_schedule(
    schedule: str, max_iters: int, warmup_iters: int, warmup_start: float, steps: list[int]
) -> None:
    if schedule == "cosine_epochs" and warmup_iters and not warmup_start:
        raise ValueError(
            "solver.warmup_start must be above 0 with schedule: cosine_epochs, which keeps it "
            "through the first epoch. Set it, such as 0.001."
        )
    if not 0 <= warmup_iters < max_iters:
        raise ValueError(
            f"solver: the warm-up of {warmup_iters} iterations is longer than the run of "
            f"{max_iters}. Shorten solver.warmup_iters (or warmup_epochs), or set it to null."
        )
    inside = all(warmup_iters < step < max_iters for step in steps)
    if schedule == "multistep" and not (inside and steps == sorted(set(steps))):
        raise ValueError(
            f"solver: the steps {steps} must ascend between the warm-up's end {warmup_iters} and "
            f"the run's end {max_iters} (in iterations)."
        )


class JoinedOptimizer(Optimizer):
    """Steps several optimizers as one, such as SGD for the first layer and Adam for the rest.

        first = torch.optim.SGD(model.conv1.parameters(), lr=0.08, momentum=0.9)
        rest = torch.optim.Adam(others, lr=1e-3)
        optimizer = JoinedOptimizer([first, rest])

    Its `param_groups` are those of the optimizers: schedulers, clipping, gradient scalers and
    `TrAct.attach` treat it as one.

    Raises:
        ValueError: two of them hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self.optimizers = list(optimizers)

    @property
    def state(self) -> Any:
        """The state of each parameter, in a new dict."""
        return {key: state for part in self.optimizers for key, state in part.state.items()}

    @state.setter
    def state(self, _: Any) -> None:
        """Ignore the empty state that torch sets at creation."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()  # torch's keeps no `optimizers` for a copy

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group after creation: none of the optimizers would step it."""
        if "optimizers" in vars(self):
            raise ValueError("Add a parameter group to one of .optimizers, before they are joined.")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Call `closure`, step each optimizer, and return the result of `closure`."""
        loss = closure() if closure is not None else None
        for part in self.optimizers:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer, in order."""
        return {"optimizers": [part.state_dict() for part in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; ValueError if it has another number of optimizers."""
        for part, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]


def keep_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove all but `parameters` from an optimizer that has not stepped yet."""
    kept = set(parameters)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in kept]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
