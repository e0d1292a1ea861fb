import copy

import pytest
import torch
from torch import nn

from tract_transfer.build import trainer as build
from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.file import ConfigError
from tract_transfer.engine.solver import JoinedOptimizer, keep_parameters
from tract_transfer.tract import TrAct, find_first_layers


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def parts_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model[2].parameters(), lr=0.01),
    ]


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    loss = model(inputs).square().mean()
    loss.backward()
    return loss


def test_it_steps_as_its_parts_do():
    apart, joined = small_model(), small_model()
    parts, optimizer = parts_of(apart), JoinedOptimizer(parts_of(joined))
    for seed in range(3):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        for each in parts:
            each.zero_grad()
            each.param_groups[0]["lr"] *= 0.5
        backward(apart, seed)
        for each in parts:
            each.step()

        def closure(seed=seed):
            optimizer.zero_grad()
            return backward(joined, seed)

        assert optimizer.step(closure) > 0
    for name, parameter in joined.named_parameters():
        assert torch.equal(parameter, apart.get_parameter(name))
        assert parameter in optimizer.state


def test_each_parameter_s_state_is_its_own_optimizer_s():
    model = small_model()
    optimizer = JoinedOptimizer(parts_of(model))
    assert len(optimizer.state) == 0
    backward(model, 0)
    optimizer.step()
    assert set(optimizer.state[model[0].weight]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[model[2].weight])
    assert len(optimizer.state) == len(list(optimizer.state)) == 4
    optimizer.state_dict()
    shadow = copy.deepcopy(optimizer)
    assert len(shadow.optimizers) == len(shadow.param_groups) == 2
    with pytest.raises(ValueError, match=r"to one of \.optimizers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_its_state_goes_on():
    model, other = small_model(), small_model()
    optimizer, resumed = (JoinedOptimizer(parts_of(each)) for each in (model, other))
    for seed in range(4):
        if seed == 2:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.2
        for network, its in ((model, optimizer), (other, resumed)):
            if network is model or seed >= 2:
                its.zero_grad()
                backward(network, seed)
                its.step()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    with pytest.raises(ValueError, match="state of 0 joined optimizers, and here are 2"):
        resumed.load_state_dict({"optimizers": []})


def test_tract_and_a_gradient_scaler_see_one_optimizer():
    by_hand, attached = small_model(), small_model()
    tract, parts = TrAct(by_hand), parts_of(by_hand)
    optimizer = JoinedOptimizer(parts_of(attached))
    TrAct(attached).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(3):
        by_hand.zero_grad()
        backward(by_hand, seed)
        tract.step()
        for each in parts:
            each.step()
        optimizer.zero_grad()
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        scaler.scale(attached(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, parameter in attached.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name))


def test_what_two_would_step_is_refused(refused):
    model = small_model()
    with refused(
        "a parameter in two optimizers", ValueError, match="more than one parameter group"
    ):
        JoinedOptimizer([torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2)])
    with refused("a joined optimizer of none", ValueError, match="needs an optimizer at least"):
        JoinedOptimizer([])


def test_parameters_kept_are_those_that_move():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1
    )
    keep_parameters(optimizer, [model[2].weight])
    assert len(optimizer.param_groups) == 1
    backward(model, 0)
    optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"2.weight"}


def test_a_config_names_the_first_layer_s_own(tmp_path, load_tiny):
    words = [
        "solver={optimizer: adam, momentum: null, lr: 0.001}",
        "solver.first_layer={optimizer: sgd, lr: 0.08, momentum: 0.9}",
    ]
    config = load_tiny(tmp_path, *words)
    trainer = build_trainer(config, build_data(config), build_accelerator(config))
    first, rest = trainer.optimizer.optimizers
    assert isinstance(first, torch.optim.SGD)
    assert isinstance(rest, torch.optim.Adam)
    (name,) = find_first_layers(trainer.model)
    held = [id(each) for group in first.param_groups for each in group["params"]]
    assert held == [id(each) for each in trainer.model.get_submodule(name).parameters()]
    trainer.set_lr(trainer.optimizer, trainer.schedule, 0.0)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == pytest.approx(80 * rates[-1])
    wrong = load_tiny(tmp_path, words[0], "solver.first_layer={optimizer: sdg, lr: 0.08}")
    with pytest.raises(ConfigError, match=r"solver.first_layer.*Did you mean 'sgd'"):
        build_trainer(wrong, build_data(wrong), build_accelerator(wrong))


def test_a_frozen_first_layer_has_no_optimizer_of_its_own(tmp_path, load_tiny, monkeypatch):
    config = load_tiny(tmp_path, "solver.first_layer={optimizer: sgd, lr: 0.08}")
    plain = build.build_model

    def frozen(*arguments):
        model = plain(*arguments)
        model.backbone.model.conv1.requires_grad_(False)
        return model

    monkeypatch.setattr(build, "build_model", frozen)
    with pytest.raises(ConfigError, match=r"solver.first_layer: .*conv1'\] are frozen.*null"):
        build_trainer(config, build_data(config), build_accelerator(config))
