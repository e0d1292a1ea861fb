"""Which forwards count: those whose gradient the weight holds at the step, once each."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tract_models import backward, images_like, loss_of, small_model, update_of

from tract_transfer.tract import TrAct

# Each scenario leaves the gradient of `images` in the model, and does something else besides.


def several_backwards_of_one_forward(model, tract, images):
    loss = loss_of(model, images)
    for set_to_none in (True, False):
        loss.backward(retain_graph=True)
        model.zero_grad(set_to_none=set_to_none)
    loss.backward()


def batch_given_up_after_its_forward(model, tract, images):
    loss_of(model, images * float("nan"))
    tract.forget()
    backward(model, images)


def forwards_in_eval_mode_or_without_gradient(model, tract, images):
    model.eval()(100 * images)
    model.train()
    with torch.no_grad():
        model(100 * images)
    backward(model, images)


def forward_of_a_copy(model, tract, images):
    copy.deepcopy(model)(100 * images)
    backward(model, images)


def earlier_step(model, tract, images):
    backward(model, 3 * images + 1)
    tract.step()
    model.zero_grad()
    backward(model, images)


def earlier_step_whose_gradient_was_assigned(model, tract, images):
    earlier_step(model, tract, images)
    for _ in range(2):
        tract.step()
        with torch.no_grad():
            model[0].weight.add_(0)  # as an optimizer writes to it
        gradients = torch.autograd.grad(loss_of(model, images), list(model.parameters()))
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight.grad = gradient


def gradients_scaled_by_hand(model, tract, images):
    for half in images.chunk(2):
        backward(model, half)
    for weight in model.parameters():
        weight.grad = weight.grad / 2


def gradients_of_several_tasks_joined_by_hand(model, tract, images):
    """As PCGrad does, by `autograd.grad`, which leaves `.grad` alone."""
    weights = list(model.parameters())
    tasks = [torch.autograd.grad(loss_of(model, half), weights) for half in images.chunk(2)]
    for weight, first, second in zip(weights, *tasks, strict=True):
        weight.grad = (first + second) / 2


def zero_by_assignment(model):
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)


def zero_in_place(model):
    model.zero_grad(set_to_none=False)


def zero_by_data(model):
    """As old loops do, which autograd does not notice."""
    for parameter in model.parameters():
        parameter.grad.data.zero_()


def gradient_zeroed_by(zero_grad):
    def scenario(model, tract, images):
        backward(model, 3 * images + 1)
        zero_grad(model)
        backward(model, images)

    scenario.__name__ = f"gradient_zeroed_by_{zero_grad.__name__}"
    return scenario


def micro_batch_without_images_after_zero_grad(model, tract, images):
    backward(model, 3 * images + 1)
    model.zero_grad()
    model(images[:0]).sum().backward()
    backward(model, images)


def weight_replaced_by(replace):
    def scenario(model, tract, images):
        replace(model)
        earlier_step(model, tract, images)
        gradient_zeroed_by(nn.Module.zero_grad)(model, tract, images)

    scenario.__name__ = f"weight_replaced_by_{replace.__name__}"
    return scenario


def loading(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def hand(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def activation_checkpointing(model, tract, images, use_reentrant=False):
    images = images.requires_grad_()
    outputs = checkpoint(model, images, use_reentrant=use_reentrant)
    outputs.square().sum(1).mean().backward()


def reentrant_checkpointing(model, tract, images):
    activation_checkpointing(model, tract, images, use_reentrant=True)


def input_changed_by_another_hook(model, tract, images):
    model[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 5 + 1,))
    backward(model, (images - 1) / 5)


def input_passed_by_name(model, tract, images):
    model[1:](model[0](input=images)).square().sum(1).mean().backward()


def moved_after_a_forward(model, tract, images):
    """For example a model on the meta device that is asked for its shapes."""
    state = copy.deepcopy(model.state_dict())
    backward(model, 3 * images)
    model.to("meta").float().zero_grad()
    backward(model, images.float().to("meta"))
    model.double().to_empty(device="cpu").load_state_dict(state)
    model.zero_grad()
    tract.forget()
    backward(model, images)


def explicit_padding(model, tract, images):
    """Zeros of the padding are rows like others; the forward uses the attribute as it is set."""
    model[0].padding = (0, 0)
    backward(model, nn.functional.pad(images, (1,) * 4))


@pytest.mark.parametrize(
    "scenario",
    [
        several_backwards_of_one_forward,
        batch_given_up_after_its_forward,
        forwards_in_eval_mode_or_without_gradient,
        forward_of_a_copy,
        earlier_step,
        earlier_step_whose_gradient_was_assigned,
        gradients_scaled_by_hand,
        gradients_of_several_tasks_joined_by_hand,
        *map(gradient_zeroed_by, (nn.Module.zero_grad, zero_in_place, zero_by_assignment)),
        micro_batch_without_images_after_zero_grad,
        *map(weight_replaced_by, (loading, hand)),
        activation_checkpointing,
        reentrant_checkpointing,
        input_changed_by_another_hook,
        input_passed_by_name,
        moved_after_a_forward,
        explicit_padding,
    ],
)
def test_update_is_that_of_one_plain_batch(scenario):
    images = images_like(4, 3, 8, 8).double()
    expected = update_of(small_model().double(), images)
    model = small_model().double()
    tract = TrAct(model)
    scenario(model, tract, images)
    tract.step()
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attached", [False, True])
def test_step_before_the_last_micro_batch_is_refused(attached, refused):
    """Otherwise the next backward would add a plain gradient to a treated one."""
    images, model = images_like(4, 3, 8, 8), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tract = TrAct(model)
    if attached:
        tract.attach(optimizer)
    step = optimizer.step if attached else tract.step
    backward(model, images)
    step()
    with refused(
        "TrAct's step() before the last micro-batch", RuntimeError, match="once an update"
    ):
        backward(model, images)
    for zero in (zero_in_place, zero_by_data, nn.Module.zero_grad):
        tract.forget()
        zero(model)
        backward(model, images)
        step()


def test_missing_step_is_logged_once(caplog):
    """The optimizer is one that TrAct is not attached to, or the loop has no `step()`."""
    model, images = small_model(), images_like(2, 3, 8, 8)
    tract = TrAct(model)
    for count in range(250):
        model.zero_grad()
        backward(model, images)
        if count < 120:
            tract.step()
    assert caplog.text.count("0 got 100 gradients without TrAct's step()") == 1


def test_latest_tract_on_a_layer_is_the_only_one(caplog):
    """As when a cell of a notebook runs again."""
    caplog.set_level(logging.WARNING, "tract_transfer")
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    earlier = TrAct(model)
    earlier.attach(optimizer)
    assert not caplog.text
    later = TrAct(model)
    assert "Detaching an earlier TrAct on 0." in caplog.text
    later.attach(optimizer)
    backward(model, images_like(4, 3, 8, 8))
    optimizer.step()
    assert (earlier.num_steps, later.num_steps) == (0, 1)
