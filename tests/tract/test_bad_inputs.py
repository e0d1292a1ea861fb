"""What TrAct refuses, and its messages."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from timm.optim import Lookahead
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from tract_models import backward, images_like, small_model

import tract_transfer.tract.watch as watch_module
from tract_transfer.tract import TrAct


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, images, weight, bias):
        return super()._conv_forward(images, weight - weight.mean(), bias)


class OwnSame(Conv2dSame):
    def forward(self, images):
        return super().forward(2 * images)


def with_own_forward() -> nn.Conv2d:
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda images: nn.functional.conv2d(2 * images, layer.weight)
    return layer


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def attach(make_optimizer):
    def attempt():
        model = small_model()
        TrAct(model).attach(make_optimizer(model.parameters()))

    return attempt


def attach_twice():
    model = small_model()
    tract, optimizer = TrAct(model), torch.optim.SGD(model.parameters(), lr=0.1)
    tract.attach(optimizer)
    tract.attach(optimizer)


def step_after(change=None, images=None, before=None, **options):
    """Make TrAct, change the model, run a backward, maybe something else, and step."""

    def attempt():
        model = small_model()
        tract = TrAct(model, **options)
        if change:
            change(model)
        backward(model, images_like(4, 3, 8, 8) if images is None else images)
        if before:
            before(model, tract)
        tract.step()

    return attempt


def optimizer_step(model, tract):
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def image_with(value):
    images = images_like(4, 3, 8, 8)
    images[1, 2, 3, 4] = value
    return images


def complex_forward():
    layer = nn.Linear(3, 2, dtype=torch.complex64)
    TrAct(layer)
    layer(torch.zeros(2, 3, dtype=torch.complex64))


def sharded_along_its_inputs():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        layer = fully_shard(
            nn.Linear(4, 2, bias=False), mesh=mesh, shard_placement_fn=lambda _: Shard(1)
        )
        tract = TrAct(layer)
        layer(torch.ones(3, 4)).sum().backward()
        tract.step()
    finally:
        torch.distributed.destroy_process_group()


def transform():
    model, images = small_model(), images_like(4, 3, 8, 8)
    TrAct(model)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, images).square().sum()

    torch.func.grad(loss)(dict(model.named_parameters()))


CHANGES = "changes its weight or its input in the forward"
LAYERS = {
    "frozen": (lambda: small_model()[0].requires_grad_(False), "0.weight is frozen"),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), "ConvTranspose2d"),
    "3-D": (lambda: nn.Conv3d(3, 4, 3), "Conv3d"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "LazyConv2d"),
    "normalization": (lambda: nn.BatchNorm2d(3), "Linear and Conv2d layers; 0 is a BatchNorm2d"),
    "standardized": (lambda: ScaledStdConv2d(3, 4, 3), CHANGES),
    "parametrized": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), CHANGES),
    "spectrally normalized": (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), CHANGES),
    "changed convolution": (lambda: OwnConvolution(3, 4, 3), CHANGES),
    "changed 'same' convolution": (lambda: OwnSame(3, 4, 3), CHANGES),
    "patched": (with_own_forward, CHANGES),
    "too large": (lambda: nn.Linear(150_528, 2, device="meta"), r"150,528 \(84 GiB\), more than"),
}
MODELS = {
    "on feature maps": (lambda: nn.Sequential(nn.Conv2d(16, 4, 3), nn.Linear(4, 2)), "none does"),
    "without layers": (lambda: nn.Sequential(nn.ReLU()), "none does. Name it"),
    "with a transposed stem": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "none does"),
    "with two stems": (
        lambda: nn.ModuleDict({"left": nn.Conv2d(3, 4, 3), "right": nn.Conv2d(3, 4, 3)}),
        r"2 could: \['left', 'right'\].*layers=.*tract\.layers",
    ),
    "on videos": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Linear(4, 2)), "none does"),
    "on text": (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2)), "Conv2d.*none does"),
}
ANOTHER_STATE = {"mean.7": torch.eye(27)}
TABLE = {
    **{
        f"TrAct with lam {lam!r}": (
            lambda lam=lam: TrAct(small_model(), lam), ValueError, "a lam above 0",
        )
        for lam in (0, -0.1, float("nan"), float("inf"), "0.1")
    },
    **{
        f"TrAct on a {kind} layer": (
            lambda build=build: TrAct(nn.Sequential(build()), layers=["0"]), ValueError, match,
        )
        for kind, (build, match) in LAYERS.items()
    },
    **{
        f"TrAct of a model {kind}": (lambda build=build: TrAct(build()), ValueError, match)
        for kind, (build, match) in MODELS.items()
    },
    "TrAct with an unknown lam_mode": (lambda: TrAct(small_model(), lam_mode="auto"),
        ValueError, "'absolute' or 'relative', got 'auto'"),
    "TrAct with update_every 0": (lambda: TrAct(small_model(), update_every=0),
        ValueError, "update_every must be 1 or more steps, got 0"),
    "TrAct with a string as layers": (
        lambda: TrAct(small_model(), layers="0"), ValueError, "layers must be a list of names"),
    "TrAct of an optimizer": (lambda: TrAct(torch.optim.SGD(small_model().parameters())),
        TypeError, r"takes the model, an nn\.Module; got SGD"),
    "TrAct on a layer that is not there": (
        lambda: TrAct(timm.create_model("test_resnet"), layers=["layer1.0.conv3"]),
        ValueError, r"no layer 'layer1\.0\.conv3'.*'layer1\.0\.conv1'"),
    "TrAct on a layer with no similar name": (
        lambda: TrAct(timm.create_model("test_resnet"), layers=["xyz"]),
        ValueError, r"no layer 'xyz'. Its first layers are \['conv1.0', "),
    "TrAct on a weight that two layers share": (
        lambda: TrAct(tied()), ValueError, r"0.weight is also the weight of \['1'\].*Untie"),
    "TrAct attached to no optimizer": (
        attach(lambda _: None), ValueError, "takes a torch optimizer, got NoneType"),
    "TrAct attached to an optimizer without the weight": (
        attach(lambda weights: torch.optim.SGD(list(weights)[1:], lr=0.1)),
        ValueError, r"does not hold 0\.weight"),
    "TrAct attached twice": (attach_twice, ValueError, "already attached to this optimizer"),
    "TrAct attached to an optimizer with a line search": (
        attach(lambda weights: torch.optim.LBFGS(weights, line_search_fn="strong_wolfe")),
        ValueError, r"line search of LBFGS.*line_search_fn=None"),
    "TrAct attached to an optimizer that calls no hooks": (
        attach(lambda weights: Lookahead(torch.optim.SGD(weights, lr=0.1))),
        ValueError, r"Lookahead calls no hooks\. Attach to the optimizer"),
    "TrAct on a layer frozen later": (
        step_after(lambda model: model[0].weight.requires_grad_(False)),
        RuntimeError, r"0.weight was frozen after TrAct was made: detach"),
    "TrAct on a layer parametrized later": (
        step_after(lambda model: nn.utils.parametrizations.weight_norm(model[0])),
        RuntimeError, r"computed from others \(weight_norm"),
    "tract.step() before the backward": (step_after(before=lambda model, _: model.zero_grad()),
        RuntimeError, r"0\.weight has no gradient.*backward"),
    "tract.step() without a forward": (step_after(before=lambda _, tract: tract.step()),
        RuntimeError, r"0\.weight got no training forward"),
    "TrAct's step() after the optimizer's": (step_after(before=optimizer_step), RuntimeError,
        r"0\.weight was written to.*before the optimizer"),
    **{
        f"TrAct with an input of {value}": (
            step_after(images=image_with(value)), RuntimeError, "input of 0 is not finite in step 0"
        )
        for value in (float("nan"), float("inf"), 1e30)
    },
    "TrAct with a batch without images": (
        step_after(images=torch.zeros(0, 3, 8, 8)), RuntimeError, "no process had an image"),
    "TrAct with an input of torch.complex64": (
        complex_forward, TypeError, r"a real input to the layer, got torch\.complex64"),
    "TrAct on a weight sharded along its inputs": (
        sharded_along_its_inputs, RuntimeError, "is sharded along its inputs.*dimension 0"),
    "TrAct under torch.func.grad": (
        transform, RuntimeError, r"0 runs under a transform of torch\.func"),
    "the state of another TrAct": (
        lambda: TrAct(small_model(), update_every=5).load_state_dict(ANOTHER_STATE),
        ValueError, r"update_every = 5 on \['0'\] does not hold \['mean\.7'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused(name, refused):
    attempt, error, match = TABLE[name]
    with refused(name, error, match=match):
        attempt()


def test_lam_below_rounding_is_raised_and_logged_once(caplog):
    """Flat images of 0 to 255 make a matrix of rank 1 that float32 cannot tell from singular."""
    layer = nn.Conv2d(3, 4, 16, 16)
    tract = TrAct(layer, 1e-6)
    for _ in range(2):
        layer.zero_grad()
        layer(200 + 5 * torch.rand(2, 3, 64, 64)).sum().backward()
        tract.step()
        assert torch.isfinite(layer.weight.grad).all()
    assert caplog.text.count("lam = 1e-06 is below the rounding error of x x^T / b of") == 1
    assert "'relative'" in caplog.text


def test_matrix_that_is_not_positive_is_refused(monkeypatch):
    """No input makes one, but a device with wrong sums could."""
    monkeypatch.setattr(watch_module, "gram_matrix", lambda *_: (-torch.eye(3), 1))
    layer = nn.Linear(3, 2)
    tract = TrAct(layer, 0.5)
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"\+ 0\.5 I of the layer is singular in step 0: lam is"):
        tract.step()
    assert not layer.weight.grad.any()
