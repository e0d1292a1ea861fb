"""TrAct's update against its formula, dz x^T (x x^T / b + lam I)^-1, and what it must not touch."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tract_transfer
from tract_transfer.tract import TrAct


def formula(layer: nn.Module, inputs: torch.Tensor, lam: float) -> torch.Tensor:
    """The update from the rows x and the gradients dz of the pre-activations z of squares."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, layer.in_features)
    else:
        unfolded = nn.functional.unfold(
            inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        rows = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    pre_activations = rows @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    dz = pre_activations  # of sum(z^2) / 2
    matrix = rows.T @ rows / len(rows) + lam * torch.eye(rows.shape[1], dtype=rows.dtype)
    return (dz.T @ rows @ torch.linalg.inv(matrix)).reshape(layer.weight.shape)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (9, 6)),
    "linear_fewer_rows_than_inputs": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear_tokens": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, 2, 1), (2, 3, 9, 8)),
    "conv_dilated": (lambda: nn.Conv2d(3, 4, (2, 3), 1, (0, 2), 2), (2, 3, 9, 8)),
    "conv_fewer_rows_than_inputs": (lambda: nn.Conv2d(3, 4, 4, 4), (1, 3, 8, 8)),
}


@pytest.mark.parametrize("lam", [0.05, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_the_formula(name, lam):
    build, shape = LAYERS[name]
    layer, inputs = build().double(), torch.randn(shape).double()
    model = nn.Sequential(layer)
    tract = TrAct(model, lam, layers=["0"])
    (model(inputs).square().sum() / 2).backward()
    tract.step()
    torch.testing.assert_close(layer.weight.grad, formula(layer, inputs, lam), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv_dilated"])
def test_the_update_is_the_authors(name):
    torch_tract = pytest.importorskip("torch_tract")
    build, shape = LAYERS[name]
    layer, inputs = build().double(), torch.randn(shape).double()
    if isinstance(layer, nn.Linear):
        theirs = torch_tract.TrActLinear(6, 4, lambda_=0.1)
    else:
        theirs = torch_tract.TrActConv2d(
            3, 4, layer.kernel_size, layer.stride, layer.padding, lambda_=0.1
        )
    theirs.double().load_state_dict(layer.state_dict())
    theirs(inputs).square().sum().backward()
    tract = TrAct(layer, 0.1, layers=[""])
    layer(inputs).square().sum().backward()
    tract.step()
    torch.testing.assert_close(layer.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bias.grad, theirs.bias.grad, rtol=1e-9, atol=1e-9)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def small_batch(num_images: int = 4) -> torch.Tensor:
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module, images: torch.Tensor) -> None:
    model(images).square().mean().backward()


def test_nothing_but_one_gradient_changes():
    plain, treated, images = small_model(), small_model(), small_batch()
    names, kind = list(treated.state_dict()), type(treated[0])
    tract = TrAct(treated)
    assert tract.layer_names == ["0"]
    assert torch.equal(plain(images), treated(images))
    assert type(treated[0]) is kind
    assert list(treated.state_dict()) == names
    for model in (plain, treated):
        backward(model, images)
    tract.step()
    for name, parameter in treated.named_parameters():
        same = torch.equal(parameter.grad, plain.get_parameter(name).grad)
        assert same == (name != "0.weight"), name
    assert torch.equal(plain.eval()(images), treated.eval()(images))


@pytest.mark.parametrize("lam_mode", ["absolute", "relative"])
def test_micro_batches_are_one_batch(lam_mode):
    images = small_batch(6).double()
    updates = []
    for parts in (1, 2, 3):
        model = nn.Sequential(small_model()[0], nn.Flatten(), nn.Linear(64, 5)).double()
        nn.init.constant_(model[2].weight, 0.1)
        nn.init.zeros_(model[2].bias)
        tract = TrAct(model, lam_mode=lam_mode)
        for part in images.chunk(parts):
            (model(part).square().mean() / parts).backward()
        tract.step()
        updates.append(model[0].weight.grad)
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(updates[2], updates[0], rtol=1e-10, atol=1e-10)


def test_a_step_starts_anew():
    images = small_batch()
    model = small_model()
    tract = TrAct(model)
    updates = []
    for _ in range(2):
        model.zero_grad()
        backward(model, images)
        tract.step()
        updates.append(model[0].weight.grad.clone())
    assert torch.equal(*updates)


def test_evaluation_does_not_count():
    images, other = small_batch(), 100 * small_batch()
    once, often = small_model(), small_model()
    tracts = [TrAct(model) for model in (once, often)]
    often.eval()(other)
    often.train()
    often[1].eval()
    with torch.no_grad():
        often(other)
    often.train()
    for model, tract in zip((once, often), tracts, strict=True):
        backward(model, images)
        tract.step()
    assert torch.equal(once[0].weight.grad, often[0].weight.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    images = small_batch().requires_grad_()
    plain, checkpointed = small_model(), small_model()
    tract = TrAct(plain)
    backward(plain, images)
    tract.step()
    tract = TrAct(checkpointed)
    checkpoint(checkpointed, images, use_reentrant=use_reentrant).square().mean().backward()
    tract.step()
    torch.testing.assert_close(checkpointed[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("scale", [1e-2, 3.0, 255.0])
def test_a_relative_lam_knows_no_scale(scale):
    """With lam relative, W' = dz (c x)^T (c^2 (x x^T / b + lam t I))^-1 = W'(x) / c for one dz."""
    inputs, dz = torch.randn(9, 6).double(), torch.randn(9, 4).double()
    updates = []
    for factor in (1.0, scale):
        layer = nn.Linear(6, 4).double()
        tract = TrAct(layer, 0.1, lam_mode="relative")
        layer(factor * inputs).backward(dz)
        tract.step()
        updates.append(layer.weight.grad)
    torch.testing.assert_close(updates[1] * scale, updates[0], rtol=1e-9, atol=1e-9)


def test_a_relative_lam_is_lam_times_the_mean_square():
    inputs = torch.randn(50, 6).double()
    layer = nn.Linear(6, 4).double()
    tract = TrAct(layer, 0.3, lam_mode="relative")
    (layer(inputs).square().sum() / 2).backward()
    tract.step()
    expected = formula(layer, inputs, 0.3 * float(inputs.square().mean()))
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-9)


def test_a_large_lam_is_the_plain_gradient_over_lam():
    model, images = small_model(), small_batch()
    tract = TrAct(model, 1e6)
    backward(model, images)
    plain = model[0].weight.grad.clone()
    tract.step()
    torch.testing.assert_close(model[0].weight.grad * 1e6, plain, rtol=1e-4, atol=1e-8)


def test_no_layers_is_nothing():
    model = small_model()
    tract = TrAct(model, layers=[])
    tract.step()
    assert tract.layer_names == []
    assert not model[0]._forward_pre_hooks
    tract.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_several_layers_are_each_treated_once():
    model, images = small_model(), small_batch()
    tract = TrAct(model, layers=["0", "4", "0"])
    assert tract.layer_names == ["0", "4"]
    backward(model, images)
    plain = copy.deepcopy(model)
    plain[4].weight.grad = model[4].weight.grad.clone()
    tract.step()
    alone = small_model()
    other = TrAct(alone)
    backward(alone, images)
    assert torch.equal(alone[4].weight.grad, plain[4].weight.grad)
    assert not torch.equal(alone[4].weight.grad, model[4].weight.grad)
    other.step()
    assert torch.equal(alone[0].weight.grad, model[0].weight.grad)


def test_detach_leaves_the_model_as_it_was():
    model = small_model()
    tract = TrAct(model)
    assert model[0]._forward_pre_hooks
    tract.detach()
    assert not model[0]._forward_pre_hooks
    backward(model, small_batch())
    with pytest.raises(RuntimeError, match="No training forward reached 0"):
        tract.step()


def test_a_copy_of_the_model_counts_for_itself():
    model, images = small_model(), small_batch()
    tract = TrAct(model)
    shadow = copy.deepcopy(model)  # as an average of the weights is made
    shadow(100 * images)
    alone = small_model()
    other = TrAct(alone)
    for each in (model, alone):
        backward(each, images)
    tract.step()
    other.step()
    assert torch.equal(model[0].weight.grad, alone[0].weight.grad)


def test_an_input_may_be_named():
    images, updates = small_batch(), []
    for named in (False, True):
        layer = small_model()[0]
        tract = TrAct(layer)
        (layer(input=images) if named else layer(images)).square().mean().backward()
        tract.step()
        updates.append(layer.weight.grad)
    assert torch.equal(*updates)


def test_a_model_may_move_after_a_forward():
    """As one that is built without memory, and asked for its shapes, does."""
    with torch.device("meta"):
        layer = nn.Conv2d(3, 4, 3, 2, 1)
        tract = TrAct(layer)
        layer(torch.zeros(1, 3, 8, 8)).sum().backward()
    layer.to_empty(device="cpu").load_state_dict(small_model()[0].state_dict())
    layer.zero_grad()
    tract.forget()
    backward(layer, small_batch())
    tract.step()
    alone = small_model()[0]
    other = TrAct(alone)
    backward(alone, small_batch())
    other.step()
    assert torch.equal(layer.weight.grad, alone.weight.grad)


def test_autocast_sums_in_float32():
    model, images = small_model(), small_batch()
    tract = TrAct(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).square().mean()
    assert tract._watched[0].waiting.dtype == torch.float32
    loss.backward()
    tract.step()
    exact = small_model()
    other = TrAct(exact)
    backward(exact, images)
    other.step()
    difference = (model[0].weight.grad - exact[0].weight.grad).norm()
    assert difference < 0.05 * exact[0].weight.grad.norm()


def test_the_layer_itself_can_be_the_model_and_the_package_names_tract():
    layer = nn.Linear(3, 2)
    assert tract_transfer.TrAct is TrAct
    assert TrAct(layer).layer_names == [""]
    with pytest.raises(AttributeError, match="no attribute 'TrAkt'"):
        _ = tract_transfer.TrAkt
