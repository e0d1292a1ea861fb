"""Arguments that the engine refuses, and what the errors say."""

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from tract_transfer.engine.checkpoint import take_tensors
from tract_transfer.engine.solver import JoinedOptimizer, build_optimizer, build_schedule


class Grouped(nn.Linear):
    """A model that has layers, as a classifier has."""

    def group_matcher(self):
        return {}


def optimizer(model=None, **options):
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    return lambda: build_optimizer(model, **{"optimizer": "sgd", "lr": 0.1, **options})


def schedule(**options):
    return lambda: build_schedule(max_iters=10, **options)


def multistep(*steps, **options):
    return schedule(schedule="multistep", steps_iters=steps, **options)


FALLBACK = {"fallback_list": ["x"]}
SOLVER = {
    "unknown optimizer": (
        optimizer(optimizer="addamw"), r"solver\.optimizer: no 'addamw'\. Did you mean 'adamw'",
    ),
    "momentum": (optimizer(optimizer="adamw", momentum=0.9), r"optimizer_args\.betas"),
    "nesterov": (optimizer(optimizer="adamw", nesterov=True), r"solver\.nesterov is for sgd"),
    "unknown argument": (
        optimizer(optimizer="adamw", optimizer_args={"beta": 1}), r"adamw.*optimizer_args.*beta",
    ),
    "lr as argument": (optimizer(optimizer_args={"lr": 1}), "optimizer_args"),
    "fused sgd": (optimizer(optimizer_args={"fused": True}), "fused SGD is wrong"),
    "nesterov without momentum": (optimizer(nesterov=True, momentum=0.0), "[Nn]esterov"),
    "bias and decay_all": (
        optimizer(decay_all=False, bias_lr_factor=2.0),
        r"solver\.bias_lr_factor and bias_weight_decay need solver\.decay_all: true",
    ),
    "bias and layer_decay": (
        optimizer(Grouped(2, 2), layer_decay=0.5, bias_lr_factor=2.0),
        "no layer_decay or fallback_list",
    ),
    "bias and fallback_list": (
        optimizer(optimizer="muon", bias_weight_decay=0.0, optimizer_args=FALLBACK),
        "no layer_decay or fallback_list",
    ),
    "layer_decay without layers": (
        optimizer(layer_decay=0.5), "solver.layer_decay is for classifiers; Sequential has no",
    ),
    "layer_decay as argument": (
        optimizer(optimizer_args={"layer_decay": 0.5}),
        r"\['layer_decay'\] are not arguments of sgd. Set solver.layer_decay",
    ),
    "fallback_list": (
        optimizer(optimizer_args=FALLBACK), r"\['fallback_list'\] are for muon .*; sgd steps all",
    ),
    "warm-up as long as the run": (
        schedule(warmup_iters=10), "warm-up of 10 iterations is longer than the run of 10",
    ),
    "equal steps": (multistep(5, 5), "must ascend"),
    "step at the end": (multistep(10), "run's end 10"),
    "step in the warm-up": (multistep(3, warmup_iters=3), "warm-up's end 3"),
    "first epoch without learning rate": (
        schedule(schedule="cosine_epochs", warmup_iters=5, iters_per_epoch=5),
        r"solver.warmup_start must be above 0 with schedule: cosine_epochs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "match"), SOLVER.values(), ids=SOLVER)
def test_solver_options_that_do_not_fit_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [n for n in list_optimizers() if n.startswith(("bnb", "fused"))])
def test_an_optimizer_for_gpus_is_refused_without_one(name):
    with pytest.raises(ValueError, match=rf"solver\.optimizer {name}.*CUDA"):
        optimizer(optimizer=name)()


def test_a_parameter_cannot_be_in_two_optimizers(refused):
    optimizers = [torch.optim.SGD([torch.zeros(2)], lr=1.0)] * 2
    match = "more than one parameter group"
    with refused("a parameter in two optimizers", ValueError, match=match):
        JoinedOptimizer(optimizers)


def test_a_checkpoint_holds_only_tensors_and_plain_values(refused):
    name, match = "other than tensors and plain values", r"model\.odd: .* not <class 'object'>"
    with refused(f"a checkpoint of {name}", TypeError, match=match):
        take_tensors({"odd": object()}, "model", {})
