"""The solver's section of a config: optimizer, learning rate, schedule and lengths."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tract_transfer.config_sections import Count, Fraction, Positive, Section


class FirstLayerConfig(Section):
    """Another optimizer for the first layer alone, on the same schedule."""

    optimizer: str
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction | None = None
    nesterov: bool = False
    optimizer_args: dict[str, Any] = Field(default={})


# What an option of the solver is for, said where it would be ignored.
USES = {
    "end_factor": "it is of schedule: cosine or cosine_epochs",
    "step_factor": "it is of schedule: multistep",
    "warmup_start": "it is of a warm-up, and there is none",
    "ema_warmup": "it is of the average that ema_decay asks for",
}


class SolverConfig(Section):
    """Lengths are in epochs or in iterations: the one given counts."""

    optimizer: str
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction | None = None
    nesterov: bool = False
    decay_all: bool = True
    bias_lr_factor: Positive = 1.0
    bias_weight_decay: Annotated[float, Field(ge=0)] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer_args: dict[str, Any] = Field(default={})
    max_epochs: Positive | None = None
    max_iters: Count | None = None
    schedule: Literal["cosine", "cosine_epochs", "multistep", "constant"] = "cosine"
    end_factor: Fraction = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    warmup_iters: Annotated[int, Field(ge=0)] | None = None
    warmup_start: Fraction = 0.0
    steps_epochs: list[Positive] | None = None
    steps_iters: list[Count] | None = None
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_warmup: bool = False
    first_layer: FirstLayerConfig | None = None

    @model_validator(mode="after")
    def _lengths_are_one(self) -> "SolverConfig":
        for what in ("max", "warmup", "steps"):
            given = [getattr(self, f"{what}_{unit}") is not None for unit in ("epochs", "iters")]
            one = f"give one of solver.{what}_epochs and solver.{what}_iters"
            if all(given):
                raise ValueError(
                    f"{one}, and null unsets what a base gives: solver.{what}_epochs: null"
                )
            if what == "max" and not any(given):
                raise ValueError(one)
        steps = self.steps_epochs or self.steps_iters
        if (self.schedule == "multistep") != bool(steps):
            raise ValueError(
                "solver.schedule: multistep and solver.steps_epochs (or steps_iters) go together"
            )
        return self

    @model_validator(mode="after")
    def _parts_end_before_the_whole(self) -> "SolverConfig":
        """Compares what has one unit; build_schedule compares the rest, in iterations."""
        for unit in ("epochs", "iters"):
            length = getattr(self, f"max_{unit}")
            warmup = getattr(self, f"warmup_{unit}")
            steps = getattr(self, f"steps_{unit}")
            if length and warmup and warmup >= length:
                raise ValueError(
                    f"warmup_{unit} must be less than max_{unit}, and {warmup:g} is not less than "
                    f"{length:g}. Shorten it, or set solver.warmup_{unit}: null"
                )
            if length and steps and max(steps) >= length:
                raise ValueError(
                    f"steps_{unit} must lie before max_{unit}, and {max(steps):g} is not before "
                    f"{length:g}. Move them, or set solver.schedule: constant and "
                    f"solver.steps_{unit}: null"
                )
        return self

    @model_validator(mode="after")
    def _options_are_the_schedules(self) -> "SolverConfig":
        ignored = {
            "end_factor": "cosine" not in self.schedule and self.end_factor != 0,
            "step_factor": self.schedule != "multistep" and self.step_factor != 0.1,
            "ema_warmup": self.ema_decay is None and self.ema_warmup,
            "warmup_start": not (self.warmup_epochs or self.warmup_iters)
            and self.warmup_start != 0,
        }
        for key, is_ignored in ignored.items():
            if is_ignored:
                raise ValueError(f"solver.{key} has no use here: {USES[key]}")
        return self
