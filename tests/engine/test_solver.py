"""Schedules computed by hand, and optimizers that are torch's and timm's."""

import copy
import math

import pytest
import timm
import torch
from run_folders import assert_bits
from timm.optim import create_optimizer_v2
from torch import nn

from tract_transfer.build import trainer as build
from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.file import ConfigError
from tract_transfer.engine.solver import (
    JoinedOptimizer,
    build_optimizer,
    build_schedule,
    set_progress,
)
from tract_transfer.models import HEADS, Classifier, build_backbone
from tract_transfer.tract import TrAct, find_first_layers

MODELS = {
    "vit_small_patch16_224": {
        "img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3,
    },
    "resnet18": {},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
}  # fmt: skip


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def classifier(name="vit_small_patch16_224"):
    backbone = build_backbone(f"timm/{name}", args=MODELS[name])
    return Classifier(backbone, HEADS.get("linear")(backbone.feature_dim, 7))


def build_from(config):
    return build_trainer(config, build_data(config), build_accelerator(config))


def settings_of(model, optimizer, rate=lambda group: group["lr"]):
    """Name -> (learning rate, weight decay) of each trained parameter."""
    settings = {
        id(p): (rate(group), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: settings[id(p)] for name, p in model.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------- schedules


def lr_factors(max_iters: int, **arguments) -> list[float]:
    schedule = build_schedule(max_iters=max_iters, **arguments)
    return [schedule(iteration / max_iters) for iteration in range(max_iters)]


def test_cosine_falls_from_one_to_its_end():
    factors = lr_factors(100, schedule="cosine", end_factor=0.2)
    assert factors == pytest.approx([0.6 + 0.4 * math.cos(math.pi * i / 100) for i in range(100)])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_iters, max_iters", [(1, 2), (5, 50), (7, 9), (333, 1000)])
def test_the_warm_up_rises_linearly_to_the_start_of_the_schedule(schedule, warmup_iters, max_iters):
    options = {"schedule": schedule, "warmup_iters": warmup_iters}
    factors = lr_factors(max_iters, **options, warmup_start=0.1)
    rise = [0.1 + 0.9 * i / warmup_iters for i in range(warmup_iters + 1)]
    assert factors[: warmup_iters + 1] == pytest.approx(rise, abs=1e-5)
    rest = lr_factors(max_iters - warmup_iters, schedule=schedule)
    assert factors[warmup_iters:] == pytest.approx(rest, abs=1e-5)
    assert lr_factors(max_iters, **options)[0] == 0


@pytest.mark.parametrize("warmup_iters", [0, 1, 3, 10])
def test_multistep_falls_exactly_at_its_steps(warmup_iters):
    for max_iters in (*range(24, 64), 997, 70_000):
        steps = sorted({warmup_iters + 1, max_iters // 2, max_iters - 1})
        settings = {"schedule": "multistep", "steps_iters": steps, "step_factor": 0.1}
        schedule = build_schedule(max_iters=max_iters, warmup_iters=warmup_iters, **settings)
        for power, step in enumerate(steps):
            before, at = schedule((step - 1) / max_iters), schedule(step / max_iters)
            assert before == pytest.approx(0.1**power, rel=1e-4), (max_iters, step)
            assert at == pytest.approx(0.1 ** (power + 1)), (max_iters, step)


@pytest.mark.parametrize("warmup_iters", [0, 20])
def test_cosine_epochs_is_cosine_at_the_start_of_each_epoch(warmup_iters):
    options = {
        "max_iters": 95,
        "warmup_iters": warmup_iters,
        "warmup_start": 0.1,
        "end_factor": 0.01,
    }
    smooth = build_schedule(schedule="cosine", **options)
    stepped = build_schedule(schedule="cosine_epochs", iters_per_epoch=10, **options)
    for iteration in range(95):
        assert stepped(iteration / 95) == smooth(iteration // 10 * 10 / 95)
    assert len({stepped(i / 95) for i in range(95)}) == 10


def test_set_progress_scales_every_group_by_its_own_base():
    optimizer = build_optimizer(small_model(), optimizer="sgd", lr=0.4)
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 4.0, "base_lr": 4.0})
    schedule = build_schedule(max_iters=100)
    for _ in range(2):  # it does not accumulate
        assert set_progress(optimizer, schedule, 0.5) == pytest.approx(0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 2.0])
    set_progress(optimizer, schedule, 0.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.4, 4.0])


def test_a_config_sets_the_schedule_by_epochs(tmp_path, load_tiny):
    config = load_tiny(
        tmp_path, "solver={schedule: cosine_epochs, max_epochs: 3, max_iters: null}",
        "data.batch_size=200",
    )  # fmt: skip
    trainer = build_from(config)
    factors = [trainer.set_lr(trainer.optimizer, trainer.schedule, i / 6) for i in range(6)]
    assert factors == pytest.approx([1, 1, 0.75, 0.75, 0.25, 0.25])
    assert trainer.max_iters == 6
    load_tiny(tmp_path, "solver.schedule=cosine_epochs", "solver.end_factor=0.1")
    with pytest.raises(ConfigError, match=r"end_factor has no use here: .*cosine or cosine_epochs"):
        load_tiny(tmp_path, "solver.schedule=constant", "solver.end_factor=0.1")


# ---------------------------------------------------------------------------------- optimizers


def loss_of(model, seed):
    return model(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))).square().mean()


def trained(build):
    model = small_model()
    optimizer = build(model)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, None])
def test_sgd_is_torch_s(nesterov, momentum):
    ours = trained(
        lambda model: build_optimizer(
            model, optimizer="sgd", lr=0.1, weight_decay=0.01, momentum=momentum, nesterov=nesterov
        )
    )

    def torch_s(nesterov):
        settings = {"lr": 0.1, "weight_decay": 0.01, "momentum": momentum or 0.9}
        return trained(lambda m: torch.optim.SGD(m.parameters(), **settings, nesterov=nesterov))

    torch.testing.assert_close(ours, torch_s(nesterov), rtol=0, atol=0)
    assert not torch.allclose(ours, torch_s(not nesterov))


@pytest.mark.parametrize("name, kind", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_torch_s_fused_one_by_default(name, kind):
    options = {"optimizer": name, "lr": 0.01, "weight_decay": 0.1}
    ours = trained(lambda model: build_optimizer(model, **options))
    plain = trained(lambda model: kind(model.parameters(), lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(ours, plain)
    fused = trained(lambda model: kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=True))
    assert ours.equal(fused)
    # The state from a checkpoint is contiguous; these weights are not.
    strided = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    for model, changes in (
        (small_model(), {"optimizer_args": {"fused": False}}),
        (small_model(), {"optimizer_args": {"foreach": True}}),
        (small_model(), {"optimizer": "sgd"}),
        (strided, {}),
    ):
        assert not build_optimizer(model, **{**options, **changes}).defaults["fused"]


@pytest.mark.parametrize(
    "name, lr",
    [("lamb", 0.02), ("muon", 0.02), ("nadamw", 0.002), ("adafactor", 0.02), ("lion", 0.001)],
)
def test_any_of_timm_s_optimizers_learns(name, lr):
    torch.manual_seed(0)
    model = classifier().train()
    optimizer = build_optimizer(model, optimizer=name, lr=lr, weight_decay=0.02, layer_decay=0.9)
    images, targets = torch.rand(14, 3, 32, 32), torch.arange(14) % 7
    losses = []
    for _ in range(12):
        loss = model(images, targets)["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_arguments_reach_the_optimizer():
    arguments = {"betas": (0.8, 0.9), "eps": 1e-3}
    built = build_optimizer(small_model(), optimizer="adamw", lr=0.1, optimizer_args=arguments)
    assert built.defaults | arguments == built.defaults
    for name in ("lars", "muon", "rmsprop", "madgrad"):
        built = build_optimizer(small_model(), optimizer=name, lr=0.1, momentum=0.25)
        assert {group["momentum"] for group in built.param_groups} == {0.25}


# ------------------------------------------------------------------------------ parameter groups


@pytest.mark.parametrize(
    "factor, decay, expected", [(2.0, 0.0, 0.0), (3.0, None, 0.3), (1.0, 0.1, 0.1)]
)
def test_biases_can_have_another_rate_and_decay(factor, decay, expected):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(
        model, optimizer="sgd", lr=0.1, weight_decay=0.3, bias_lr_factor=factor,
        bias_weight_decay=decay,
    )  # fmt: skip
    assert settings_of(model, optimizer) == {
        "1.weight": (0.1, 0.3), "1.bias": (0.1 * factor, expected), "3.weight": (0.1, 0.3),
        "3.bias": (0.1 * factor, expected),
    }  # fmt: skip
    set_progress(optimizer, build_schedule(max_iters=10), 0.5)
    assert settings_of(model, optimizer)["3.bias"][0] == pytest.approx(0.05 * factor)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("name", MODELS)
def test_rates_and_decays_are_those_of_timm_s_own_classifier(name, layer_decay, decay_all):
    """Without `decay_all`, biases, norms and position embeddings are exempt."""
    options = {"lr": 0.1, "weight_decay": 0.3, "layer_decay": layer_decay}
    ours = classifier(name)
    optimizer = build_optimizer(ours, optimizer="adamw", **options, decay_all=decay_all)
    settings = settings_of(ours, optimizer)
    theirs = timm.create_model(name, num_classes=7, **MODELS[name])
    if decay_all:
        theirs.no_weight_decay = set
    built = create_optimizer_v2(theirs, "adamw", **options, filter_bias_and_bn=not decay_all)
    expected = settings_of(theirs, built, lambda group: group["lr"] * group.get("lr_scale", 1))
    heads = {"fc.weight", "head.weight", "head.fc.weight"} & expected.keys()
    assert settings["head.weight"] == pytest.approx(expected[heads.pop()]) == (0.1, 0.3)
    trunk = {n.removeprefix("backbone.model."): v for n, v in settings.items() if n[:5] != "head."}
    assert len(trunk) > 20
    for key, value in trunk.items():
        assert value == pytest.approx(expected[key]), key
    assert {decay for _, decay in settings.values()} == ({0.3} if decay_all else {0.0, 0.3})
    assert (len({lr for lr, _ in settings.values()}) > 3) == (layer_decay is not None)
    assert all(group["base_lr"] == group["lr"] for group in optimizer.param_groups)


def test_a_config_sets_layer_decay(tmp_path, load_tiny):
    trainer = build_from(load_tiny(tmp_path, "solver.layer_decay=0.75", "solver.lr=0.2"))
    settings = settings_of(trainer.model, trainer.optimizer, lambda group: group["base_lr"])
    assert settings["head.weight"][0] == 0.2
    assert settings["backbone.model.conv1.weight"][0] < 0.2 * 0.75**2
    words = ("model.backbone={name: torchvision/squeezenet1_1}", "solver.layer_decay=0.5")
    message = r"solver.layer_decay: needs a backbone.*timm's do; torchvision/squeezenet1_1 does not"
    with pytest.raises(ConfigError, match=message):
        build_from(load_tiny(tmp_path, *words, "data.transforms.size_px=64"))


def test_muon_leaves_the_parameters_of_fallback_list_to_adamw():
    model = classifier()
    patterns = ["head.*", "*pos_embed"]
    optimizer = build_optimizer(
        model, optimizer="muon", lr=0.1, optimizer_args={"fallback_list": patterns}
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if group.get("use_fallback")]
    left = {names[id(p)] for group in groups for p in group["params"]}
    assert left == {"head.weight", "head.bias", "backbone.model.pos_embed"}


# ---------------------------------------------------------------------------- joined optimizers


def parts_of(model):
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model[3].parameters(), lr=0.01),
    ]


def test_a_joined_optimizer_has_a_closure_a_state_and_copies():
    model = small_model()
    optimizer = JoinedOptimizer(parts_of(model))
    assert optimizer.state == {}

    def closure():
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert set(optimizer.state[model[0].weight]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[model[3].weight])
    assert len(optimizer.state) == 4
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[1] is copied.optimizers[1].param_groups[0]
    with pytest.raises(ValueError, match=r"to one of \.optimizers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_joined_optimizer_resumes_to_the_same_bits():
    model, other = small_model(), small_model()
    optimizer, resumed = (JoinedOptimizer(parts_of(network)) for network in (model, other))
    for seed in range(4):
        if seed == 2:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.2
        for network, its in ((model, optimizer), (other, resumed))[: 1 + (seed >= 2)]:
            its.zero_grad()
            loss_of(network, seed).backward()
            its.step()
    assert_bits(other.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="shorter"):
        resumed.load_state_dict({"optimizers": []})


def test_tract_schedulers_and_a_gradient_scaler_see_one_optimizer_that_steps_like_its_parts():
    by_hand, attached = small_model(), small_model()
    tract, parts = TrAct(by_hand), parts_of(by_hand)
    optimizer = JoinedOptimizer(parts_of(attached))
    TrAct(attached).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (*parts, optimizer)]
    for seed in range(3):
        by_hand.zero_grad()
        loss_of(by_hand, seed).backward()
        tract.step()
        for part in parts:
            part.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(attached, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
        for scheduler in schedulers:
            scheduler.step()
    for name, parameter in attached.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name))


def test_a_config_sets_the_optimizer_of_the_first_layer(tmp_path, load_tiny, monkeypatch):
    words = [
        "solver={optimizer: adam, momentum: null, lr: 0.001}",
        "solver.first_layer={optimizer: sgd, lr: 0.08, momentum: 0.9}",
    ]
    config = load_tiny(tmp_path, *words)
    trainer = build_from(config)
    first, rest = trainer.optimizer.optimizers
    assert isinstance(first, torch.optim.SGD)
    assert isinstance(rest, torch.optim.Adam)
    (name,) = find_first_layers(trainer.model)
    held = [id(p) for group in first.param_groups for p in group["params"]]
    assert held == [id(p) for p in trainer.model.get_submodule(name).parameters()]
    trainer.set_lr(trainer.optimizer, trainer.schedule, 0.0)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == pytest.approx(80 * rates[-1])
    wrong = load_tiny(tmp_path, words[0], "solver.first_layer={optimizer: sdg, lr: 0.08}")
    message = r"^solver.first_layer.optimizer: no 'sdg'. Did you mean 'sgd'"
    with pytest.raises(ConfigError, match=message):
        build_from(wrong)
    plain = build.build_model

    def frozen(*arguments):
        model = plain(*arguments)
        model.backbone.model.conv1.requires_grad_(False)
        return model

    monkeypatch.setattr(build, "build_model", frozen)
    with pytest.raises(ConfigError, match=r"solver.first_layer: .*conv1'\] are frozen.*null"):
        build_from(config)
