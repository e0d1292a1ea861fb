import math

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from tract_transfer.engine.solver import build_optimizer, build_schedule, set_progress


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def lr_factors(max_iters: int, **arguments) -> list[float]:
    schedule = build_schedule(max_iters=max_iters, **arguments)
    return [schedule(iteration / max_iters) for iteration in range(max_iters)]


# ----------------------------------------------------------------------------------- schedules


def test_cosine_falls_from_one_to_its_end():
    factors = lr_factors(100, schedule="cosine")
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 1e-3
    expected = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert factors == pytest.approx(expected)
    ending = lr_factors(100, schedule="cosine", end_factor=0.2)
    assert ending[50] == pytest.approx(0.6)
    assert ending[-1] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_iters, max_iters", [(1, 2), (5, 50), (7, 9), (333, 1000)])
def test_the_warm_up_rises_by_equal_steps_to_the_schedule_s_own_value(
    schedule, warmup_iters, max_iters
):
    factors = lr_factors(max_iters, schedule=schedule, warmup_iters=warmup_iters, warmup_start=0.1)
    rise = [0.1 + 0.9 * i / warmup_iters for i in range(warmup_iters + 1)]
    assert factors[: warmup_iters + 1] == pytest.approx(rise, abs=1e-5)
    rest = lr_factors(max_iters - warmup_iters, schedule=schedule)
    assert factors[warmup_iters:] == pytest.approx(rest, abs=1e-5)


def test_a_warm_up_starts_at_nothing_unless_told():
    assert lr_factors(10, warmup_iters=4)[0] == 0


@pytest.mark.parametrize("warmup_iters", [0, 1, 3, 10])
def test_multistep_falls_exactly_at_its_steps(warmup_iters):
    for max_iters in (*range(24, 64), 997, 70_000):
        steps = sorted({warmup_iters + 1, max_iters // 2, max_iters - 1})
        schedule = build_schedule(
            max_iters=max_iters,
            schedule="multistep",
            warmup_iters=warmup_iters,
            steps_iters=steps,
            step_factor=0.1,
        )
        for power, step in enumerate(steps):
            before, at = schedule((step - 1) / max_iters), schedule(step / max_iters)
            assert before == pytest.approx(0.1**power, rel=1e-4), (max_iters, step)
            assert at == pytest.approx(0.1 ** (power + 1)), (max_iters, step)


def test_set_progress_scales_every_group_by_its_own_base():
    optimizer = build_optimizer(model(), optimizer="sgd", lr=0.4)
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 4.0, "base_lr": 4.0})
    schedule = build_schedule(max_iters=100)
    for _ in range(2):  # it does not accumulate
        assert set_progress(optimizer, schedule, 0.5) == pytest.approx(0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 2.0])
    set_progress(optimizer, schedule, 0.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.4, 4.0])


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"warmup_iters": 10}, "warm-up of 10 iterations outlasts 10"),
        ({"warmup_iters": -1}, "warm-up of -1"),
        ({"schedule": "multistep", "steps_iters": [5, 3]}, "must ascend"),
        ({"schedule": "multistep", "steps_iters": [5, 5]}, "must ascend"),
        ({"schedule": "multistep", "steps_iters": [10]}, "run's end 10"),
        ({"schedule": "multistep", "steps_iters": [3], "warmup_iters": 3}, "warm-up's end 3"),
        ({"schedule": "linear"}, "no 'linear'. Known: cosine, cosine_epochs, multistep, constant"),
    ],
)
def test_a_schedule_outside_the_run_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        build_schedule(max_iters=10, **arguments)


# ---------------------------------------------------------------------------------- optimizers


def trained(build, steps: int = 4) -> torch.Tensor:
    net = model()
    optimizer = build(net)
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, None])
def test_sgd_is_torch_s(nesterov, momentum):
    ours = trained(
        lambda net: build_optimizer(
            net, optimizer="sgd", lr=0.1, weight_decay=0.01, momentum=momentum, nesterov=nesterov
        )
    )
    expected = {"lr": 0.1, "weight_decay": 0.01, "nesterov": nesterov}
    theirs = trained(
        lambda net: torch.optim.SGD(net.parameters(), momentum=momentum or 0.9, **expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    other = trained(
        lambda net: torch.optim.SGD(
            net.parameters(), momentum=momentum or 0.9, lr=0.1, nesterov=not nesterov
        )
    )
    assert not torch.allclose(ours, other)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "lars", "rmsprop", "lion", "adafactor"])
def test_any_of_timm_s_optimizers_steps(name):
    assert name in list_optimizers()
    start = trained(lambda net: build_optimizer(net, optimizer=name, lr=0.01), steps=0)
    end = trained(lambda net: build_optimizer(net, optimizer=name, lr=0.01))
    assert end.isfinite().all()
    assert not torch.equal(start, end)


@pytest.mark.parametrize("name, kind", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_torch_s_adam_takes_its_fused_step_and_the_same_way(name, kind):
    told = {"optimizer": name, "lr": 0.01, "weight_decay": 0.1}
    ours = trained(lambda net: build_optimizer(net, **told))
    assert ours.equal(trained(lambda net: build_optimizer(net, **told)))
    theirs = trained(lambda net: kind(net.parameters(), lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(ours, theirs)
    fused = trained(lambda net: kind(net.parameters(), lr=0.01, weight_decay=0.1, fused=True))
    assert ours.equal(fused)
    plain = build_optimizer(model(), **told, optimizer_args={"fused": False})
    assert not plain.defaults["fused"]
    assert not build_optimizer(model(), **told, optimizer_args={"foreach": True}).defaults["fused"]


def test_what_a_fused_step_would_spoil_is_not_fused():
    """Weights whose memory is in another order than that of the state a checkpoint brings back."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    assert not build_optimizer(net, optimizer="adamw", lr=0.1).defaults["fused"]
    assert not build_optimizer(model(), optimizer="sgd", lr=0.1).defaults["fused"]


def test_arguments_reach_the_optimizer():
    optimizer = build_optimizer(
        model(), optimizer="adamw", lr=0.1, optimizer_args={"betas": [0.8, 0.9], "eps": 1e-3}
    )
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-3
    for name in ("lars", "muon", "rmsprop", "madgrad"):
        built = build_optimizer(model(), optimizer=name, lr=0.1, momentum=0.25)
        assert {group["momentum"] for group in built.param_groups} == {0.25}


def test_decay_spares_biases_and_norms_unless_told():
    net = model()
    every = build_optimizer(net, optimizer="sgd", lr=0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in every.param_groups] == [0.3]
    some = build_optimizer(net, optimizer="sgd", lr=0.1, weight_decay=0.3, decay_all=False)
    decay = {id(p): g["weight_decay"] for g in some.param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in net.named_parameters()} == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.3,
        "3.bias": 0.0,
    }  # fmt: skip
    assert all(group["base_lr"] == 0.1 for group in some.param_groups)


def groups_of(net, optimizer) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay)."""
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {n: settings[id(p)] for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "factor, decay, expected", [(2.0, 0.0, 0.0), (3.0, None, 0.3), (1.0, 0.1, 0.1)]
)
def test_biases_have_a_rate_and_a_decay_of_their_own(factor, decay, expected):
    net = model()
    net[0].requires_grad_(False)
    optimizer = build_optimizer(
        net, optimizer="sgd", lr=0.1, weight_decay=0.3, bias_lr_factor=factor,
        bias_weight_decay=decay,
    )  # fmt: skip
    assert groups_of(net, optimizer) == {
        "1.weight": (0.1, 0.3), "1.bias": (0.1 * factor, expected), "3.weight": (0.1, 0.3),
        "3.bias": (0.1 * factor, expected),
    }  # fmt: skip
    set_progress(optimizer, build_schedule(max_iters=10), 0.5)
    assert groups_of(net, optimizer)["3.bias"][0] == pytest.approx(0.05 * factor)


def test_biases_like_the_rest_are_the_rest():
    told = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01}
    plain = trained(lambda net: build_optimizer(net, **told))
    apart = trained(lambda net: build_optimizer(net, **told, bias_weight_decay=0.01))
    faster = trained(lambda net: build_optimizer(net, **told, bias_lr_factor=2.0))
    torch.testing.assert_close(apart, plain)
    assert not torch.allclose(faster, plain)


def test_frozen_parameters_are_left_out():
    net = model()
    net[0].requires_grad_(False)
    held = [
        p for g in build_optimizer(net, optimizer="sgd", lr=1).param_groups for p in g["params"]
    ]
    assert len(held) == 4


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"optimizer": "addamw"}, r"solver\.optimizer: no 'addamw'\. Did you mean 'adamw'"),
        ({"optimizer": "sdg"}, "Did you mean 'sgd'"),
        ({"optimizer": "adamw", "momentum": 0.9}, r"optimizer_args\.betas"),
        ({"optimizer": "adamw", "nesterov": True}, r"solver\.nesterov is for sgd"),
        ({"optimizer": "adamw", "optimizer_args": {"beta": 1}}, r"adamw.*optimizer_args.*beta"),
        ({"optimizer": "sgd", "optimizer_args": {"lr": 1}}, "optimizer_args"),
        ({"optimizer": "sgd", "optimizer_args": {"fused": True}}, "fused SGD begins with arbitrar"),
        ({"optimizer": "sgd", "nesterov": True, "momentum": 0.0}, "[Nn]esterov"),
        (
            {"optimizer": "sgd", "decay_all": False, "bias_lr_factor": 2.0},
            r"solver\.bias_lr_factor and bias_weight_decay need solver\.decay_all: true",
        ),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        build_optimizer(model(), lr=0.1, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they need a GPU, and there is one")
@pytest.mark.parametrize("name", [n for n in list_optimizers() if n.startswith(("bnb", "fused"))])
def test_an_optimizer_for_a_gpu_says_so(name):
    with pytest.raises(ValueError, match=rf"solver\.optimizer {name}.*CUDA"):
        build_optimizer(model(), optimizer=name, lr=0.1)
