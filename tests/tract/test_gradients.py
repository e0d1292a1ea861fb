"""Which forwards count, by what becomes of their gradients."""

import copy

import pytest
import torch
from torch import nn
from tract_models import images_like, loss_of, small_model, update_of

from tract_transfer.tract import TrAct


def test_several_backwards_of_one_forward_count_it_once():
    """As where the gradients of several losses are taken one by one."""
    images, whole, again = images_like(4, 3, 8, 8).double(), small_model(), small_model()
    update = update_of(whole.double(), images)
    tract = TrAct(again.double())
    loss = loss_of(again, images)
    for set_to_none in (True, False):
        loss.backward(retain_graph=True)
        again.zero_grad(set_to_none=set_to_none)
    loss.backward()
    tract.step()
    torch.testing.assert_close(again[0].weight.grad, update, rtol=1e-10, atol=1e-12)


def test_a_batch_given_up_after_its_forward_is_forgotten():
    images, model = images_like(4, 3, 8, 8), small_model()
    tract = TrAct(model)
    loss_of(model, images * float("nan"))
    tract.forget()
    loss_of(model, images).backward()
    tract.step()
    assert torch.equal(model[0].weight.grad, update_of(small_model(), images))


def by_backward(model: nn.Module, images: torch.Tensor) -> None:
    loss_of(model, images).backward()


def by_autograd(model: nn.Module, images: torch.Tensor) -> None:
    weights = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model, images), weights)
    for weight, found in zip(weights, gradients, strict=True):
        weight.grad = found if weight.grad is None else weight.grad + found


@pytest.mark.parametrize("add_gradient", [by_backward, by_autograd])
def test_gradients_that_are_assigned_count_as_those_of_a_backward(add_gradient):
    images, model = images_like(4, 3, 8, 8).double(), small_model().double()
    tract = TrAct(model)
    for half in images.chunk(2):
        add_gradient(model, half)
    for weight in model.parameters():
        weight.grad = weight.grad / 2
    tract.step()
    update = update_of(small_model().double(), images)
    torch.testing.assert_close(model[0].weight.grad, update, rtol=1e-10, atol=1e-12)


def zero_by_assignment(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)


def zero_in_place(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("zero_grad", [nn.Module.zero_grad, zero_in_place, zero_by_assignment])
def test_forwards_whose_gradient_was_zeroed_do_not_count(zero_grad):
    images, model = images_like(4, 3, 8, 8).double(), small_model().double()
    tract = TrAct(model)
    by_backward(model, 3 * images + 1)
    zero_grad(model)
    by_backward(model, images)
    tract.step()
    update = update_of(small_model().double(), images)
    torch.testing.assert_close(model[0].weight.grad, update, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_images_does_not_bring_back_what_was_zeroed():
    images, model = images_like(4, 3, 8, 8).double(), small_model().double()
    tract = TrAct(model)
    by_backward(model, 3 * images + 1)
    model.zero_grad()
    model(images[:0]).sum().backward()
    by_backward(model, images)
    tract.step()
    update = update_of(small_model().double(), images)
    torch.testing.assert_close(model[0].weight.grad, update, rtol=1e-10, atol=1e-12)


def test_gradients_of_several_tasks_joined_by_hand_count_all_their_forwards():
    """As of PCGrad and its kin, by `autograd.grad`, which leaves `.grad` alone."""
    model, expected = small_model().double(), small_model().double()
    tasks = [images_like(4, 3, 8, 8, seed=seed).double() for seed in (1, 2)]
    tract = TrAct(model)
    found = [torch.autograd.grad(loss_of(model, task), model[0].weight)[0] for task in tasks]
    model[0].weight.grad = sum(found) / 2
    tract.step()
    update = update_of(expected, *tasks)
    torch.testing.assert_close(model[0].weight.grad, update, rtol=1e-10, atol=1e-12)


def replace_by_loading(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_by_hand(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


@pytest.mark.parametrize("replace", [replace_by_loading, replace_by_hand])
def test_a_weight_that_was_replaced_is_followed(replace):
    images, model = images_like(4, 3, 8, 8).double(), small_model().double()
    tract, update = TrAct(model), update_of(small_model().double(), images)
    replace(model)
    for skipped in (False, True):
        if skipped:
            by_backward(model, 3 * images + 1)
        model.zero_grad()
        by_backward(model, images)
        tract.step()
        torch.testing.assert_close(model[0].weight.grad, update, rtol=1e-10, atol=1e-12)
        model.zero_grad()


@pytest.mark.parametrize("attached", [False, True])
def test_a_step_before_the_last_micro_batch_is_refused(attached, refused):
    """Else the next backward would add a plain gradient to a treated one."""
    images, model = images_like(4, 3, 8, 8), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tract = TrAct(model)
    if attached:
        tract.attach(optimizer)
    step = optimizer.step if attached else tract.step
    by_backward(model, images)
    step()
    with refused(
        "TrAct's step() before the last micro-batch", RuntimeError, match="once an update"
    ):
        by_backward(model, images)
    for zero in (zero_in_place, zero_by_data, nn.Module.zero_grad):
        tract.forget()
        zero(model)
        by_backward(model, images)
        step()


def zero_by_data(model: nn.Module) -> None:
    """As old loops do, of which autograd knows nothing."""
    for parameter in model.parameters():
        parameter.grad.data.zero_()


@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_after_the_optimizer_s_is_refused(foreach, refused):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
    tract = TrAct(model)
    by_backward(model, images_like(4, 3, 8, 8))
    optimizer.step()
    with refused("TrAct's step() after the optimizer's", RuntimeError, match="before the optimi"):
        tract.step()


def test_an_update_may_follow_one_whose_gradient_came_otherwise():
    model = small_model()
    optimizer = torch.optim.SGD(model[:1].parameters(), lr=0.1)
    tract, weight, images = TrAct(model), model[0].weight, images_like(4, 3, 8, 8)
    by_backward(model, images)
    for _ in range(2):
        tract.step()
        optimizer.step()
        weight.grad = torch.autograd.grad(loss_of(model, images), weight)[0]
    assert weight.grad.any()


def test_a_weight_that_became_parametrized_is_told():
    model = small_model()
    tract = TrAct(model)
    nn.utils.parametrizations.weight_norm(model[0])
    model(images_like(4, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"computed from other parameters now \(weight_norm"):
        tract.step()


def test_transforms_of_torch_func_are_refused():
    model, images = small_model(), images_like(4, 3, 8, 8)
    TrAct(model)

    def loss(parameters, images):
        return torch.func.functional_call(model, parameters, images).square().sum()

    gradient, weights = torch.func.grad(loss), dict(model.named_parameters())
    single = torch.func.vmap(gradient, (None, 0))
    for call, given in ((gradient, images), (single, images[:, None])):
        with pytest.raises(RuntimeError, match=r"0 runs under a transform of torch\.func.*detach"):
            call(weights, given)
    model.eval()
    assert single(weights, images[:, None])["0.weight"].shape[0] == 4


def test_a_step_that_never_comes_is_told_once(caplog):
    """Of an optimizer that TrAct is not attached to, and a loop without `step()`."""
    model, images = small_model(), images_like(2, 3, 8, 8)
    tract = TrAct(model)
    for count in range(250):
        model.zero_grad()
        by_backward(model, images)
        if count < 120:
            tract.step()
    assert caplog.text.count("100 gradients of 0 went by without TrAct's step()") == 1
