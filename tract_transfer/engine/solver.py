"""The optimizer and how its learning rate goes with progress."""

import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from tract_transfer.registry import did_you_mean

# What timm's factory takes beside an optimizer's own arguments.
_FALLBACK = ("fallback_list", "fallback_no_weight_decay")
_FUSED, _UNFUSED = ("adam", "adamw"), ("sgd", "momentum")
_SCHEDULES = ("cosine", "cosine_epochs", "multistep", "constant")
_LAYER_DECAY = ("layer_decay_min_scale", "layer_decay_no_opt_scale")


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
    optimizer_args: dict[str, Any] | None = None,
) -> Optimizer:
    """Build any of timm's optimizers over the trainable parameters of `model`.

    `sgd` is plain SGD unless `nesterov` is set (timm's own `sgd` always is Nesterov's).

    Args:
        momentum: None takes 0.9 where the optimizer has one.
        decay_all: decay biases and normalisation layers too; False leaves them out, and what the
            model's `no_weight_decay()` names, as timm's recipes do (position embeddings).
        bias_lr_factor: of the parameters called bias, over `lr` (Caffe's recipes: 2).
        bias_weight_decay: of the same, in place of `weight_decay` (Caffe's recipes: 0).
        layer_decay: the learning rate of each layer over that of the next (BEiT, and timm's
            layers); the head's is `lr`. The model tells its layers by `group_matcher()`.
        optimizer_args: further arguments of the optimizer's constructor, such as betas and eps.
            `fallback_list` names parameters, by patterns, that muon leaves to AdamW.

    Raises:
        ValueError: unknown optimizer, or one that does not take momentum or an argument; options
            of biases beside others that group parameters; or a model that tells no layers.
    """
    arguments, fallback = _arguments(optimizer, momentum, nesterov, optimizer_args or {})
    if bias_lr_factor == 1 and bias_weight_decay is None:
        groups = _groups(model, weight_decay, decay_all, layer_decay, fallback)
    elif decay_all and layer_decay is None and not fallback:
        decay = weight_decay if bias_weight_decay is None else bias_weight_decay
        groups = _with_biases_apart(model, lr, weight_decay, lr * bias_lr_factor, decay)
    else:
        raise ValueError(
            "solver.bias_lr_factor and bias_weight_decay need solver.decay_all: true and no "
            "layer_decay or fallback_list, and say themselves what a bias decays by."
        )
    _choose_fused(optimizer, arguments, model)
    try:
        return _create(optimizer, nesterov, groups, lr=lr, weight_decay=weight_decay, **arguments)
    except (TypeError, AssertionError) as error:  # timm asserts that APEX's have a GPU
        raise ValueError(
            f"solver.optimizer {optimizer} with optimizer_args {optimizer_args}: {error}"
        ) from error


def _create(
    optimizer: str, nesterov: bool, groups: list[dict[str, Any]], **arguments: Any
) -> Optimizer:
    """Let timm make the optimizer; each group's `base_lr` is what a schedule multiplies."""
    name = "momentum" if optimizer == "sgd" and not nesterov else optimizer  # timm's plain SGD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        built: Optimizer = create_optimizer_v2(groups, opt=name, **arguments)
    for group in built.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)
        group["base_lr"] = group["lr"]
    return built


def _choose_fused(optimizer: str, arguments: dict[str, Any], model: nn.Module) -> None:
    """Take the fused step of torch's Adam and AdamW where nothing else is asked for.

    It walks through memory and not by strides, so that weights, gradients and moments must lie
    alike: by default weights are contiguous.

    Raises:
        ValueError: it is asked for where it computes something else.
    """
    contiguous = all(each.is_contiguous() for each in model.parameters() if each.requires_grad)
    if arguments.get("fused") and optimizer in _UNFUSED:
        raise ValueError(
            "solver.optimizer_args.fused: torch's fused SGD begins with arbitrary momentum where a "
            "gradient scaler skips the first step, and fails where a gradient comes later than the "
            "others. Leave it out."
        )
    devices = {each.device.type for each in model.parameters()}
    told = arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}
    if optimizer in _FUSED and contiguous and devices <= {"cpu", "cuda"} and not told:
        arguments["fused"] = True


def _arguments(
    optimizer: str, momentum: float | None, nesterov: bool, optimizer_args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the optimizer's own arguments, and what tells timm's factory which AdamW steps.

    Raises:
        ValueError: unknown optimizer, or an argument that it does not take.
    """
    known = list_optimizers()
    if optimizer not in known:
        raise ValueError(f"solver.optimizer: no {optimizer!r}.{did_you_mean(optimizer, known)}")
    if nesterov and optimizer != "sgd":
        raise ValueError(f"solver.nesterov is for sgd; {optimizer} does not take it.")
    if grouping := optimizer_args.keys() & {"layer_decay", "param_group_fn", *_LAYER_DECAY}:
        raise ValueError(
            f"solver.optimizer_args: {sorted(grouping)} are not {optimizer}'s own. Set "
            "solver.layer_decay."
        )
    arguments = {key: value for key, value in optimizer_args.items() if key not in _FALLBACK}
    fallback = {key: value for key, value in optimizer_args.items() if key in _FALLBACK}
    if momentum is not None:
        if not get_optimizer_info(optimizer).has_momentum:
            raise ValueError(
                f"solver.momentum is not {optimizer}'s. Set solver.optimizer_args.betas instead."
            )
        arguments["momentum"] = momentum
    if fallback and "muon" not in optimizer:
        raise ValueError(
            f"solver.optimizer_args: {sorted(fallback)} are for muon and its kin, which leave "
            f"parameters to AdamW; {optimizer} steps all itself. Leave them out."
        )
    return arguments, fallback


def _groups(
    model: nn.Module,
    weight_decay: float,
    decay_all: bool,
    layer_decay: float | None,
    fallback: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return timm's parameter groups: by decay, and with `layer_decay` by layer."""
    spared: Collection[str] = () if decay_all else getattr(model, "no_weight_decay", set)()
    settings = {
        "weight_decay": weight_decay,
        "weight_decay_exclude_1d": not decay_all,
        "no_weight_decay_list": spared,
        **fallback,
    }
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, **settings)
    elif hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(model, layer_decay=layer_decay, **settings)
    else:
        raise ValueError(
            f"solver.layer_decay is for classifiers; {type(model).__name__} does not tell its "
            "layers. Set it to null."
        )
    return groups


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
    iters_per_epoch: int = 1,
) -> ParamScheduler:
    """Return a factor on the base learning rate as a function of progress in [0, 1).

    Args:
        schedule: "cosine" (to `end_factor`), "cosine_epochs" (the same, with its warm-up, held
            through every epoch at its value at the beginning), "multistep" (times `step_factor`
            at each of `steps_iters`) or "constant".
        warmup_iters: a linear rise from `warmup_start` to the schedule's own value, before it.

    Raises:
        ValueError: an unknown schedule, a warm-up or a step that lies outside the run, or a first
            epoch of learning rate 0.
    """
    _check_schedule(schedule, max_iters, warmup_iters, warmup_start, steps_iters)
    main: ParamScheduler
    if schedule == "multistep":
        main = MultiStepParamScheduler(
            [step_factor**power for power in range(len(steps_iters) + 1)],
            num_updates=max_iters - warmup_iters,
            milestones=[step - warmup_iters for step in steps_iters],
        )
    elif schedule in ("cosine", "cosine_epochs"):
        main = CosineParamScheduler(1.0, end_factor)
    else:
        main = ConstantParamScheduler(1.0)
    if warmup_iters:
        rest = 1 - warmup_iters / max_iters
        main = CompositeParamScheduler(
            [LinearParamScheduler(warmup_start, 1.0), main],
            lengths=[1 - rest, rest],  # fvcore wants them to add up to 1 exactly
            interval_scaling=["rescaled", "rescaled"],
        )
    return _ByEpoch(main, max_iters, iters_per_epoch) if schedule == "cosine_epochs" else main


def _check_schedule(
    schedule: str,
    max_iters: int,
    warmup_iters: int,
    warmup_start: float,
    steps_iters: Sequence[int],
) -> None:
    if schedule not in _SCHEDULES:
        raise ValueError(f"solver.schedule: no {schedule!r}. Known: {', '.join(_SCHEDULES)}.")
    if schedule == "cosine_epochs" and warmup_iters and not warmup_start:
        raise ValueError(
            "solver.warmup_start must be above 0 with schedule: cosine_epochs, which holds it "
            "through the whole first epoch. Set it, such as 0.001."
        )
    if not 0 <= warmup_iters < max_iters:
        raise ValueError(
            f"solver: the warm-up of {warmup_iters} iterations outlasts {max_iters}. Shorten "
            "solver.warmup_iters (or warmup_epochs), or set it to null."
        )
    ascending = list(steps_iters) == sorted(set(steps_iters))
    inside = all(warmup_iters < step < max_iters for step in steps_iters)
    if schedule == "multistep" and not (ascending and inside):
        raise ValueError(
            f"solver: the steps {list(steps_iters)} must ascend between the warm-up's end "
            f"{warmup_iters} and the run's end {max_iters} (in iterations)."
        )


class _ByEpoch(ParamScheduler):  # type: ignore[misc]
    """A schedule that is held through every epoch at its value at the beginning."""

    def __init__(self, schedule: ParamScheduler, max_iters: int, iters_per_epoch: int) -> None:
        self._schedule = schedule
        self._max_iters = max_iters
        self._iters_per_epoch = iters_per_epoch

    def __call__(self, where: float) -> float:
        iteration = round(where * self._max_iters)
        begin = iteration - iteration % self._iters_per_epoch
        return float(self._schedule(begin / self._max_iters))


# --- One optimizer made of several, each over parameters of its own.


class JoinedOptimizer(Optimizer):
    """Steps several optimizers as one: the paper's first layer by SGD, and the rest by Adam.

        first = torch.optim.SGD(model.conv1.parameters(), lr=0.08, momentum=0.9)
        rest = torch.optim.Adam(others, lr=1e-3)
        optimizer = JoinedOptimizer([first, rest])

    Its `param_groups` are theirs, so that schedulers, clipping, gradient scalers and
    `TrAct.attach` see one optimizer.

    Raises:
        ValueError: none is given, or two hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise ValueError("JoinedOptimizer needs an optimizer at least.")
        self.optimizers = list(optimizers)
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._see_theirs()

    def _see_theirs(self) -> None:
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        self.state = _States(self.optimizers)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": {}, "param_groups": []})
        self._see_theirs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: which optimizer is to step it?"""
        if "state" in vars(self) and isinstance(self.state, _States):
            raise ValueError("Add a parameter group to one of .optimizers, before they are joined.")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step each of them, after `closure` where there is one; return what it returned."""
        loss = closure() if closure is not None else None
        for each in self.optimizers:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each, in order."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: it is of another number of optimizers, or of others.
        """
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"This is the state of {len(states)} joined optimizers, and here are "
                f"{len(self.optimizers)}. Build it from the same config."
            )
        for each, state in zip(self.optimizers, states, strict=True):
            each.load_state_dict(state)
        self._see_theirs()


class _States(MutableMapping[Tensor, Any]):
    """The state of a parameter, in the optimizer that steps it."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, parameter: Tensor) -> dict[Tensor, Any]:
        for each in self._optimizers:
            if any(parameter is held for group in each.param_groups for held in group["params"]):
                return each.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for each in self._optimizers for parameter in each.state)

    def __len__(self) -> int:
        return sum(len(each.state) for each in self._optimizers)


def keep_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Keep `parameters` alone in an optimizer that has not stepped yet; empty groups go."""
    kept = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) in kept]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
