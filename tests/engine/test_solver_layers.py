"""Layer decay and what is spared from weight decay: timm's, on our classifiers; epoch schedules."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ConfigError
from tract_transfer.engine.solver import build_optimizer, build_schedule, set_progress
from tract_transfer.models import HEADS, Classifier, build_backbone

VIT_ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 3,
    "embed_dim": 48,
    "num_heads": 3,
}
MODELS = {
    "vit_small_patch16_224": VIT_ARGS,
    "resnet18": {},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
}


def classifier(name="vit_small_patch16_224"):
    backbone = build_backbone(f"timm/{name}", args=MODELS[name])
    return Classifier(backbone, HEADS.get("linear")(backbone.feature_dim, 7))


def settings_of(model, optimizer, rate):
    """Name -> (learning rate, weight decay) for each parameter."""
    found = {
        id(p): (rate(group), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_layer_decay_is_that_of_timm_s_own_classifier(name, decay_all):
    ours = classifier(name)
    optimizer = build_optimizer(
        ours, optimizer="adamw", lr=0.1, weight_decay=0.3, layer_decay=0.75, decay_all=decay_all
    )
    found = settings_of(ours, optimizer, lambda group: group["lr"])
    theirs = timm.create_model(name, num_classes=7, **MODELS[name])
    if decay_all:
        theirs.no_weight_decay = set
    built = create_optimizer_v2(
        theirs, "adamw", lr=0.1, weight_decay=0.3, layer_decay=0.75,
        filter_bias_and_bn=not decay_all,
    )  # fmt: skip
    expected = settings_of(theirs, built, lambda group: group["lr"] * group["lr_scale"])
    heads = {"fc.weight", "head.weight", "head.fc.weight"} & expected.keys()
    assert found["head.weight"] == pytest.approx(expected[heads.pop()]) == (0.1, 0.3)
    trunk = {n.removeprefix("backbone.model."): v for n, v in found.items() if n[:5] != "head."}
    assert len(trunk) > 20
    for key, value in trunk.items():
        assert value == pytest.approx(expected[key]), key
    assert len({lr for lr, _ in found.values()}) > 3


def test_layer_decay_of_one_is_none():
    model = classifier()
    optimizer = build_optimizer(model, optimizer="sgd", lr=0.1, layer_decay=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_the_schedule_keeps_the_layers_apart():
    model = classifier()
    optimizer = build_optimizer(model, optimizer="sgd", lr=0.1, layer_decay=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    for _ in range(2):
        set_progress(optimizer, build_schedule(max_iters=10), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [lr / 2 for lr in before]
    )


def test_position_embeddings_are_spared_as_in_timm_s_recipes_unless_told():
    model = classifier()
    for decay_all, decay in ((False, 0.0), (True, 0.3)):
        optimizer = build_optimizer(
            model, optimizer="adamw", lr=0.1, weight_decay=0.3, decay_all=decay_all
        )
        found = settings_of(model, optimizer, lambda group: group["lr"])
        for name in ("pos_embed", "cls_token"):
            assert found[f"backbone.model.{name}"] == (0.1, decay)
        assert found["backbone.model.blocks.0.mlp.fc1.weight"] == (0.1, 0.3)
        assert found["backbone.model.blocks.0.mlp.fc1.bias"] == (0.1, decay)


def test_muon_leaves_to_adamw_what_the_fallback_list_names():
    model = classifier()
    patterns = ["head.*", "*pos_embed"]
    optimizer = build_optimizer(
        model, optimizer="muon", lr=0.1, optimizer_args={"fallback_list": patterns}
    )
    left = {
        name
        for group in optimizer.param_groups
        if group.get("use_fallback")
        for name, p in model.named_parameters()
        if any(p is held for held in group["params"])
    }
    assert left == {"head.weight", "head.bias", "backbone.model.pos_embed"}


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (
            lambda: nn.Linear(2, 2),
            {"layer_decay": 0.5},
            r"solver.layer_decay is for classifiers; Li",
        ),
        (
            classifier,
            {"layer_decay": 0.5, "bias_lr_factor": 2.0},
            "no layer_decay or fallback_list",
        ),
        (
            classifier,
            {
                "optimizer": "muon",
                "bias_weight_decay": 0.0,
                "optimizer_args": {"fallback_list": ["x"]},
            },
            "no layer_decay or fallback_list",
        ),
        (
            classifier,
            {"optimizer_args": {"fallback_list": ["x"]}},
            r"\['fallback_list'\] are for muon and its kin.*sgd steps all itself",
        ),
        (
            classifier,
            {"optimizer_args": {"layer_decay": 0.5}},
            r"\['layer_decay'\] are not sgd's own. Set solver.layer_decay",
        ),
    ],
)
def test_groupings_that_do_not_fit_are_refused(make, arguments, says):
    with pytest.raises(ValueError, match=says):
        build_optimizer(make(), **{"optimizer": "sgd", "lr": 0.1, **arguments})


def test_torchvision_tells_no_layers(tmp_path, load_tiny):
    words = ("model.backbone={name: torchvision/squeezenet1_1}", "solver.layer_decay=0.5")
    config = load_tiny(tmp_path, *words, "data.transforms.size_px=64")
    message = r"solver.layer_decay: needs a backbone.*timm's do; torchvision/squeezenet1_1 does not"
    with pytest.raises(ConfigError, match=message):
        build_trainer(config, build_data(config), build_accelerator(config))


def test_a_config_s_layer_decay_reaches_the_optimizer(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "solver.layer_decay=0.75", "solver.lr=0.2")
    trainer = build_trainer(config, build_data(config), build_accelerator(config))
    found = settings_of(trainer.model, trainer.optimizer, lambda group: group["base_lr"])
    assert found["head.weight"][0] == 0.2
    assert found["backbone.model.conv1.weight"][0] < 0.2 * 0.75**2


@pytest.mark.parametrize("warmup_iters", [0, 20])
def test_a_schedule_by_epochs_is_the_other_at_their_beginnings(warmup_iters):
    told = {"max_iters": 95, "warmup_iters": warmup_iters, "warmup_start": 0.1, "end_factor": 0.01}
    smooth = build_schedule(schedule="cosine", **told)
    stepped = build_schedule(schedule="cosine_epochs", iters_per_epoch=10, **told)
    for iteration in range(95):
        assert stepped(iteration / 95) == smooth(iteration // 10 * 10 / 95)
    assert len({stepped(i / 95) for i in range(95)}) == 10


def test_a_first_epoch_of_no_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"solver.warmup_start must be above 0 with schedule: cos"):
        build_schedule(max_iters=20, schedule="cosine_epochs", warmup_iters=5, iters_per_epoch=5)


def test_a_config_s_epochs_hold_the_rate(tmp_path, load_tiny):
    config = load_tiny(
        tmp_path, "solver={schedule: cosine_epochs, max_epochs: 3, max_iters: null}",
        "data.batch_size=200",
    )  # fmt: skip
    trainer = build_trainer(config, build_data(config), build_accelerator(config))
    rates = []
    trainer.optimizer.register_step_post_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    trainer.train()
    assert rates == pytest.approx([0.05, 0.05, 0.0375, 0.0375, 0.0125, 0.0125])


def test_end_factor_is_of_both_cosines(tmp_path, load_tiny):
    load_tiny(tmp_path, "solver.schedule=cosine_epochs", "solver.end_factor=0.1")
    with pytest.raises(ConfigError, match=r"end_factor has no use here: .*cosine or cosine_epochs"):
        load_tiny(tmp_path, "solver.schedule=constant", "solver.end_factor=0.1")


@pytest.mark.parametrize("name", ["lamb", "muon", "nadamw"])
def test_the_recipes_optimizers_learn(name):
    torch.manual_seed(0)
    model = classifier().train()
    lr = {"lamb": 0.02, "muon": 0.02, "nadamw": 0.002}[name]
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
