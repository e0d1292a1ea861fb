"""What TrAct cannot treat, and what it says."""

import logging

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import tract_transfer.tract.watch as watch_module
from tract_transfer.tract import TrAct, gram_matrix


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def backward(model: nn.Module, images: torch.Tensor) -> None:
    model(images).square().mean().backward()


@pytest.mark.parametrize("lam", [0, -0.1, float("nan"), float("inf")])
def test_lam_is_positive(lam, refused):
    with refused(f"TrAct with lam {lam}", ValueError, match="lam above 0"):
        TrAct(small_model(), lam)


def test_wrong_arguments_are_refused(refused):
    with refused(
        "TrAct with an unknown lam_mode", ValueError, match="'absolute' or 'relative', got 'auto'"
    ):
        TrAct(small_model(), lam_mode="auto")
    with refused("TrAct with a string as layers", ValueError, match="layers is a list of names"):
        TrAct(small_model(), layers="0")
    with pytest.raises(ValueError, match="layers is a list of names"):
        TrAct(small_model(), layers=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"a lam above 0, got '0\.1'"):
        TrAct(small_model(), lam="0.1")
    with pytest.raises(TypeError, match=r"takes the model, an nn\.Module; got SGD"):
        TrAct(torch.optim.SGD(small_model().parameters()))
    with pytest.raises(ValueError, match="update_every is a number of steps, 1 at least; got 0"):
        TrAct(small_model(), update_every=0)


def frozen() -> nn.Module:
    model = small_model()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "build, says",
    [
        (frozen, "0.weight is frozen"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "groups=2"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "ConvTranspose2d"),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3)), "Conv3d"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "LazyConv2d"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3)), "BatchNorm2d"),
        (lambda: nn.Sequential(ScaledStdConv2d(3, 4, 3)), "weight standardisation"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))),
            "a parametrization",
        ),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4))), "a parametrization"),
        (lambda: nn.Sequential(nn.Linear(150_528, 2)), r"has 150,528 \(84 GiB\), and 16,384"),
    ],
)
def test_a_layer_tract_cannot_treat_is_refused(build, says):
    with pytest.raises(ValueError, match=says):
        TrAct(build(), layers=["0"])


def test_an_unknown_layer_names_the_nearest(refused):
    model = timm.create_model("test_resnet")
    with refused(
        "TrAct on a layer that is not there",
        ValueError,
        match=r"no layer 'layer1\.0\.conv3'.*'layer1\.0\.conv1'",
    ):
        TrAct(model, layers=["layer1.0.conv3"])


def test_a_name_like_no_other_is_told_where_the_model_begins():
    with pytest.raises(ValueError, match=r"no layer 'xyz'. It begins with \['conv1.0', "):
        TrAct(timm.create_model("test_resnet"), layers=["xyz"])


def test_a_layer_is_treated_once(caplog):
    """By the latest, as when a notebook's cell runs again."""
    model, images = small_model(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    earlier = TrAct(model)
    earlier.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        earlier.attach(optimizer)
    assert not caplog.text
    later = TrAct(model)
    assert "An earlier TrAct on 0 is detached now." in caplog.text
    later.attach(optimizer)
    backward(model, images)
    optimizer.step()
    assert (earlier.num_steps, later.num_steps) == (0, 1)


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


@pytest.mark.parametrize(
    "build", [lambda: OwnConvolution(3, 4, 3), lambda: OwnSame(3, 4, 3), with_own_forward]
)
def test_a_forward_of_its_own_is_refused_wherever_it_hides(build):
    with pytest.raises(ValueError, match="changes its weight or its input in the forward"):
        TrAct(nn.Sequential(build()))


def test_a_weight_that_two_layers_share_is_refused(refused):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with refused(
        "TrAct on a weight that two layers share",
        ValueError,
        match=r"0.weight is also that of \['1'\].*Untie",
    ):
        TrAct(model)


def test_a_layer_frozen_later_is_told(refused):
    model = small_model()
    tract = TrAct(model)
    model[0].weight.requires_grad_(False)
    backward(model, torch.randn(4, 3, 8, 8))
    with refused(
        "TrAct on a layer frozen later",
        RuntimeError,
        match=r"0.weight was frozen after TrAct was made. detach",
    ):
        tract.step()


def test_what_is_no_optimizer_is_refused(refused):
    with refused(
        "TrAct attached to no optimizer", ValueError, match="takes a torch optimizer, got NoneType"
    ):
        TrAct(nn.Linear(3, 2)).attach(None)


def test_a_step_without_forward_or_backward_is_refused(refused):
    model = small_model()
    tract = TrAct(model)
    with refused(
        "tract.step() before the backward",
        RuntimeError,
        match=r"0\.weight has no gradient.*backward",
    ):
        tract.step()
    backward(model, torch.randn(4, 3, 8, 8))
    tract.step()
    with refused(
        "tract.step() without a forward", RuntimeError, match="No training forward reached 0"
    ):
        tract.step()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64])
def test_an_integer_or_complex_input_is_refused(dtype, refused):
    layer = nn.Linear(3, 2)
    TrAct(layer)
    with refused(
        f"TrAct with an input of {dtype}", TypeError, match=f"floating-point input.*{dtype}"
    ):
        layer(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_input_is_refused(value, refused):
    model, images = small_model(), torch.randn(4, 3, 8, 8)
    tract = TrAct(model)
    images[1, 2, 3, 4] = value
    backward(model, images)
    with refused(
        f"TrAct with an input of {value}", RuntimeError, match="input of 0 is not finite in step 0"
    ):
        tract.step()


def test_a_lam_below_rounding_is_raised_and_told(caplog):
    """Flat images of 0 to 255 make a matrix of rank 1 that float32 cannot tell from singular."""
    layer = nn.Conv2d(3, 4, 16, 16)
    tract = TrAct(layer, 1e-6)
    for _ in range(2):
        layer.zero_grad()
        layer(200 + 5 * torch.rand(2, 3, 64, 64)).sum().backward()
        tract.step()
        assert torch.isfinite(layer.weight.grad).all()
    assert caplog.text.count("lam = 1e-06 is below the rounding of x x^T / b of") == 1
    assert "'relative'" in caplog.text


def test_a_batch_without_images_is_told():
    layer = nn.Conv2d(3, 4, 3)
    tract = TrAct(layer)
    layer(torch.zeros(0, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="no process had an image"):
        tract.step()


def test_a_matrix_that_is_not_positive_is_told(monkeypatch):
    """No input makes one; a device whose sums are wrong could."""
    monkeypatch.setattr(watch_module, "gram_matrix", lambda *_: (-torch.eye(3), 1))
    layer = nn.Linear(3, 2)
    tract = TrAct(layer, 0.5)
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"\+ 0\.5 I of the layer is singular in step 0: lam is"):
        tract.step()
    assert not layer.weight.grad.any()


@pytest.fixture
def group_of_one():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_weight_sharded_along_its_inputs_is_refused(group_of_one):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False))
    fully_shard(model, mesh=group_of_one, shard_placement_fn=lambda _: Shard(1))
    tract = TrAct(model)
    backward(model, torch.randn(4, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"0\.weight is sharded along its inputs.*dimension 0"):
        tract.step()


def test_an_unfolded_input_is_said_so(caplog):
    with caplog.at_level(logging.DEBUG, logger="tract_transfer"):
        gram_matrix(nn.Conv2d(3, 4, 3, dilation=1), torch.randn(2, 3, 9, 9))
        assert not caplog.text
        gram_matrix(nn.Conv2d(3, 4, 3, dilation=2), torch.randn(2, 3, 9, 9))
    assert "TrAct unfolds a dilated convolution's input" in caplog.text
