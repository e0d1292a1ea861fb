"""What TrAct's update equals, whatever the loop does around it."""

import copy

import pytest
import timm
import torch
from torch import nn
from tract_models import images_like, loss_of, small_model, update_of

from tract_transfer.tract import TrAct, gram_matrix


def test_a_step_is_one_on_the_pre_activations():
    """With b rows of full rank and lam -> 0, x^T (W - eta dW')^T moves z by eta b dz."""
    inputs, dz = images_like(4, 6).double(), images_like(4, 3, seed=2).double()
    layer = nn.Linear(6, 3).double()
    tract = TrAct(layer, 1e-12)
    before = layer(inputs)
    before.backward(dz)
    tract.step()
    with torch.no_grad():
        layer.weight -= layer.weight.grad
        moved = before - layer(inputs)
    torch.testing.assert_close(moved, 4 * dz, rtol=1e-6, atol=1e-6)


def test_crops_of_several_sizes_are_one_sum():
    """Several forwards, then one backward (multi-crop): each window counts once."""
    large, small = images_like(2, 3, 16, 16).double(), images_like(6, 3, 8, 8, seed=2).double()
    model = small_model().double()
    tract = TrAct(model)
    (loss_of(model, large) + loss_of(model, small)).backward()
    plain = model[0].weight.grad.clone()
    tract.step()
    parts = [gram_matrix(model[0], crops) for crops in (large, small)]
    mean = sum(gram for gram, _ in parts) / sum(rows for _, rows in parts)
    expected = plain.flatten(1) @ torch.linalg.inv(mean + 0.1 * torch.eye(27).double())
    torch.testing.assert_close(
        model[0].weight.grad, expected.view_as(plain), rtol=1e-10, atol=1e-12
    )


def test_zeros_of_the_padding_are_rows():
    images = images_like(2, 3, 8, 8).double()
    padded, explicit = small_model().double(), small_model().double()
    explicit[0].padding = (0, 0)  # what its forward goes by
    updates = update_of(padded, images), update_of(explicit, nn.functional.pad(images, (1,) * 4))
    torch.testing.assert_close(*updates, rtol=1e-10, atol=1e-12)


def test_the_memory_format_does_not_matter():
    images = images_like(2, 3, 8, 8)
    plain, last = small_model(), small_model().to(memory_format=torch.channels_last)
    update = update_of(last, images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(update, update_of(plain, images))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_steps_as_an_eager_one(fullgraph):
    images = images_like(4, 3, 8, 8)
    eager, compiled = small_model(), small_model()
    tracts = [TrAct(eager), TrAct(compiled)]
    run = torch.compile(compiled, backend="aot_eager", fullgraph=fullgraph)
    for batch in (images, images[:2], 3 * images):
        for model, forward, tract in zip((eager, compiled), (eager, run), tracts, strict=True):
            model.zero_grad()
            for half in batch.chunk(2):
                loss_of(forward, half).backward()
            tract.step()
        torch.testing.assert_close(compiled[0].weight.grad, eager[0].weight.grad)
    run.eval()
    with torch.no_grad():
        run(images)
    assert not tracts[1]._watched[0].reached


@pytest.mark.parametrize("has_run", [False, True])
def test_a_model_compiled_before_is_treated_too(has_run):
    """Also where graphs without the hooks are there, of one size of the two to come."""
    images, model = images_like(6, 3, 8, 8), small_model()
    run = torch.compile(model, backend="aot_eager", dynamic=False)
    if has_run:
        loss_of(run, images[:4]).backward()
        model.zero_grad()
    tract, parts = TrAct(run), images.split(4)
    for part in parts:
        (loss_of(run, part) * len(part) / len(images)).backward()
    tract.step()
    torch.testing.assert_close(model[0].weight.grad, update_of(small_model(), *parts))


def test_clipping_after_sees_the_treated_norm_and_before_the_plain_one():
    images, models = images_like(4, 3, 8, 8), [small_model() for _ in range(4)]
    treated, plain, after, before = models
    tracts = {model: TrAct(model) for model in (treated, after, before)}
    for model in models:
        loss_of(model, images).backward()
    tracts[treated].step()
    norms = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in (treated, plain)]
    tracts[after].step()
    nn.utils.clip_grad_norm_(after.parameters(), 0.5 * float(norms[0]))
    nn.utils.clip_grad_norm_(before.parameters(), 0.5 * float(norms[1]))
    tracts[before].step()
    for model in (after, before):
        torch.testing.assert_close(model[0].weight.grad, treated[0].weight.grad / 2)
    assert not torch.isclose(*norms)


@pytest.mark.parametrize("name", ["crossvit_9_240", "repvgg_a0"])
def test_both_first_layers_of_a_model_are_treated(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    tract = TrAct(model)
    assert len(tract.layer_names) == 2
    model(torch.randn(2, 3, 240, 240)).square().mean().backward()
    plain = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    tract.step()
    changed = {
        key for key, weight in model.named_parameters() if not torch.equal(weight.grad, plain[key])
    }
    assert changed == {f"{layer}.weight" for layer in tract.layer_names}


def test_what_another_hook_makes_of_the_input_counts():
    images, hooked, plain = images_like(4, 3, 8, 8), small_model(), small_model()
    tract = TrAct(hooked)
    hooked[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 5 + 1,))
    loss_of(hooked, images).backward()
    tract.step()
    torch.testing.assert_close(hooked[0].weight.grad, update_of(plain, images * 5 + 1))


def test_a_copy_of_a_treated_model_is_not_treated():
    model, images = small_model(), images_like(4, 3, 8, 8)
    tract = TrAct(model)
    shadow = copy.deepcopy(model)
    loss_of(shadow, images).backward()
    plain = shadow[0].weight.grad.clone()
    other = TrAct(shadow)
    with pytest.raises(RuntimeError, match="No training forward reached 0"):
        other.step()
    assert torch.equal(shadow[0].weight.grad, plain)
    tract.detach()
    TrAct(model)
