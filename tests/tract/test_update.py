"""TrAct's update against its formula, dz x^T (x x^T / b + lam I)^-1, and what it leaves alone."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from tract_models import backward, images_like, loss_of, small_model, update_of

import tract_transfer
import tract_transfer.tract.watch as watch_module
from tract_transfer.tract import TrAct, gram_matrix


def formula(layer: nn.Module, inputs: torch.Tensor, lam: float) -> torch.Tensor:
    """The update for the loss sum(z^2) / 2 of the pre-activations z, whose gradient is dz = z."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if isinstance(layer, nn.Conv2d):
        how = layer.kernel_size, layer.dilation, layer.padding, layer.stride
        rows = nn.functional.unfold(inputs, *how).mT.flatten(0, 1)
    dz = rows @ layer.weight.detach().flatten(1).T + layer.bias.detach()
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


@pytest.mark.parametrize("lam, lam_mode", [(0.05, "absolute"), (1, "absolute"), (0.3, "relative")])
@pytest.mark.parametrize("name", LAYERS)
def test_update_is_the_formula(name, lam, lam_mode):
    build, shape = LAYERS[name]
    layer, inputs = build().double(), torch.randn(shape).double()
    tract = TrAct(nn.Sequential(layer), lam, lam_mode=lam_mode, layers=["0"])
    (layer(inputs).square().sum() / 2).backward()
    tract.step()
    if lam_mode == "relative":
        gram, num_rows = gram_matrix(layer, inputs)
        lam *= float(gram.trace()) / len(gram) / num_rows
    torch.testing.assert_close(layer.weight.grad, formula(layer, inputs, lam), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv_dilated"])
def test_update_is_the_authors(name):
    torch_tract = pytest.importorskip("torch_tract")
    build, shape = LAYERS[name]
    layer, inputs = build().double(), torch.randn(shape).double()
    if isinstance(layer, nn.Linear):
        theirs = torch_tract.TrActLinear(6, 4, lambda_=0.1)
    else:
        how = layer.kernel_size, layer.stride, layer.padding
        theirs = torch_tract.TrActConv2d(3, 4, *how, lambda_=0.1)
    theirs.double().load_state_dict(layer.state_dict())
    theirs(inputs).square().sum().backward()
    tract = TrAct(layer, 0.1, layers=[""])
    layer(inputs).square().sum().backward()
    tract.step()
    for ours, other in ((layer.weight, theirs.weight), (layer.bias, theirs.bias)):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", [None, [], ["0"], ["0", "4", "0"]])
def test_only_the_gradients_of_the_layers_change(layers):
    plain, treated, images = small_model(), small_model(), images_like(4, 3, 8, 8)
    names, kind = list(treated.state_dict()), type(treated[0])
    tract = TrAct(treated, layers=layers)
    assert tract.layer_names == (["0"] if layers is None else list(dict.fromkeys(layers)))
    assert torch.equal(plain(images), treated(images))
    assert type(treated[0]) is kind
    assert list(treated.state_dict()) == names
    for model in (plain, treated):
        backward(model, images)
    tract.step()
    for name, parameter in treated.named_parameters():
        same = torch.equal(parameter.grad, plain.get_parameter(name).grad)
        assert same == (name.removesuffix(".weight") not in tract.layer_names), name
    assert torch.equal(plain.eval()(images), treated.eval()(images))


@pytest.mark.parametrize("lam_mode", ["absolute", "relative"])
def test_micro_batches_are_one_batch(lam_mode):
    images = images_like(6, 3, 8, 8).double()
    updates = [
        update_of(small_model().double(), *images.split(sizes), lam_mode=lam_mode)
        for sizes in (6, 3, [1, 3, 2])
    ]
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0], rtol=1e-10, atol=1e-12)


def test_crops_of_several_sizes_are_one_sum():
    """Several forwards, then one backward (multi-crop): each window counts once."""
    large, small = images_like(2, 3, 16, 16).double(), images_like(6, 3, 8, 8, seed=2).double()
    model = small_model().double()
    tract = TrAct(model)
    (loss_of(model, large) + loss_of(model, small)).backward()
    plain = model[0].weight.grad.flatten(1).clone()
    tract.step()
    parts = [gram_matrix(model[0], crops) for crops in (large, small)]
    mean = sum(gram for gram, _ in parts) / sum(rows for _, rows in parts)
    assert_multiplied(plain, mean, model)


def assert_multiplied(plain: torch.Tensor, mean: torch.Tensor, model: nn.Module) -> None:
    expected = plain @ torch.linalg.inv(mean + 0.1 * torch.eye(27).double())
    torch.testing.assert_close(model[0].weight.grad.flatten(1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fullgraph, has_run", [(True, False), (False, False), (True, True)])
def test_compiled_model_steps_as_an_eager_one(fullgraph, has_run):
    """Even if it has run before, so that one of the sizes has a graph without the hooks."""
    images, eager, compiled = images_like(4, 3, 8, 8), small_model(), small_model()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=fullgraph)
    if has_run:
        backward(run, images[:2])
    tracts = [TrAct(eager), TrAct(run if has_run else compiled)]
    for batch in (images, images[:2], 3 * images):
        for model, forward, tract in zip((eager, compiled), (eager, run), tracts, strict=True):
            model.zero_grad()
            for half in batch.chunk(2):
                backward(forward, half)
            tract.step()
        torch.testing.assert_close(compiled[0].weight.grad, eager[0].weight.grad)
    run.eval()
    with torch.no_grad():
        run(images)
    assert not tracts[1]._watched[0].reached


def test_autocast_sums_in_float32():
    model, images = small_model(), images_like(4, 3, 8, 8)
    tract = TrAct(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, images)
    assert tract._watched[0].waiting.dtype == torch.float32
    loss.backward()
    tract.step()
    exact = update_of(small_model(), images)
    assert (model[0].weight.grad - exact).norm() < 0.05 * exact.norm()


def test_copies_of_a_treated_model_are_not_treated():
    model, images = small_model(), images_like(4, 3, 8, 8)
    TrAct(model)
    shadow = copy.deepcopy(model)
    backward(shadow, images)
    plain = shadow[0].weight.grad.clone()
    other = TrAct(shadow)
    with pytest.raises(RuntimeError, match="got no training forward"):
        other.step()
    assert torch.equal(shadow[0].weight.grad, plain)


def test_detach_removes_all_hooks():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tract = TrAct(model)
    tract.attach(optimizer)
    assert model[0]._forward_hooks
    assert optimizer._optimizer_step_pre_hooks
    tract.detach()
    assert not model[0]._forward_hooks
    assert not model[0].weight._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_package_exports_tract_and_the_model_may_be_the_layer():
    assert tract_transfer.TrAct is TrAct
    assert TrAct(nn.Linear(3, 2)).layer_names == [""]
    with pytest.raises(AttributeError, match="no attribute 'TrAkt'"):
        _ = tract_transfer.TrAkt


def test_factor_stays_between_two_measurements(monkeypatch):
    """The forwards of the steps between are not summed, so they cost nothing."""
    calls = []
    monkeypatch.setattr(watch_module, "gram_matrix", lambda *a: calls.append(1) or gram_matrix(*a))
    batches = [images_like(4, 3, 8, 8, seed=seed).double() for seed in range(4)]
    model = small_model().double()
    tract = TrAct(model, update_every=2)
    means = [gram_matrix(model[0], batch)[0] / (4 * 16) for batch in batches]
    kept = 0.9 * means[0] + 0.1 * means[2]
    for batch, mean in zip(batches, (means[0], means[0], kept, kept), strict=True):
        model.zero_grad()
        backward(model, batch)
        plain = model[0].weight.grad.flatten(1).clone()
        tract.step()
        assert_multiplied(plain, mean, model)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="got no training forward"):
        tract.step()


@pytest.mark.parametrize("broken", [0, 2])
def test_measurement_that_is_not_finite_is_not_kept(broken):
    model = small_model().double()
    tract = TrAct(model, update_every=2)
    means = []
    for step in range(5):
        batch = images_like(4, 3, 8, 8, seed=step).double()
        if step == broken:
            batch[1, 2, 3, 4] = float("nan")
        elif step % 2 == 0:
            means.append(gram_matrix(model[0], batch)[0] / (4 * 16))
        model.zero_grad()
        backward(model, batch)
        message = f"The input of 0 is not finite in step {broken}"
        with pytest.raises(RuntimeError, match=message) if step == broken else nullcontext():
            tract.step()
        assert step != broken or not model[0].weight.grad.any()
    expected = 0.9 * means[0] + 0.1 * means[1]
    torch.testing.assert_close(tract.state_dict()["mean.0"], expected)


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("update_every", [1, 2])
def test_state_continues_where_it_was_taken(update_every, num_steps):
    model, other = small_model(), small_model()
    tract = TrAct(model, update_every=update_every)

    def run(model: nn.Module, tract: TrAct, seed: int) -> torch.Tensor:
        model.zero_grad()
        backward(model, images_like(4, 3, 8, 8, seed=seed))
        tract.step()
        return model[0].weight.grad.clone()

    for seed in range(num_steps):
        run(model, tract, seed)
    resumed = TrAct(other, update_every=update_every)
    resumed.load_state_dict(copy.deepcopy(tract.state_dict()))
    assert bool(tract.state_dict()) == (update_every > 1)
    for seed in range(3, 6):
        assert torch.equal(run(model, tract, seed), run(other, resumed, seed))
