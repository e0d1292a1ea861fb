"""TrAct's step in the optimizer's own."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tract_models import backward, images_like, loss_of, small_model

from tract_transfer.tract import TrAct


def batches(count: int = 3) -> list[torch.Tensor]:
    return [images_like(4, 3, 8, 8, seed=seed).double() for seed in range(count)]


def sgd(model, kind=torch.optim.SGD, **options):
    return kind(model.parameters(), lr=0.1, **options)


def weight_by_hand(data: list[torch.Tensor], treated: bool = True, **options) -> torch.Tensor:
    """The first weight after SGD steps on batches, with explicit steps of TrAct."""
    model = small_model().double()
    optimizer, tract = sgd(model, **options), TrAct(model, layers=None if treated else [])
    for images in data:
        optimizer.zero_grad()
        backward(model, images)
        tract.step()
        optimizer.step()
    return model[0].weight


def test_attached_optimizer_steps_as_an_explicit_one_until_it_is_removed():
    model = small_model().double()
    optimizer = sgd(model, momentum=0.9)
    handle = TrAct(model).attach(optimizer)

    def train():
        model.load_state_dict(small_model().state_dict())
        optimizer.state.clear()
        for images in batches():
            optimizer.zero_grad()
            backward(model, images)
            optimizer.step()
        return model[0].weight

    assert torch.equal(train(), weight_by_hand(batches(), momentum=0.9))
    handle.remove()
    assert torch.equal(train(), weight_by_hand(batches(), treated=False, momentum=0.9))


class Nested(torch.optim.SGD):
    """torch hooks its step and its parent's."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("closure_as", ["nothing", "argument", "keyword"])
def test_class_whose_step_calls_its_parents_steps_once(closure_as):
    """With a closure, as Lightning gives one, and after a step that failed."""
    torch.optim.SGD([torch.zeros(1)])  # makes torch patch the parent
    model = small_model().double()
    optimizer, tract = sgd(model, Nested), TrAct(model)
    tract.attach(optimizer)
    for attempt, images in enumerate([*batches(1), *batches(2)]):

        def closure(images=images):
            model.zero_grad()
            loss = loss_of(model, images)
            loss.backward()
            return loss

        if closure_as == "nothing":
            closure()
        arguments = [closure] if closure_as == "argument" else []
        keywords = {"closure": closure} if closure_as == "keyword" else {}
        optimizer.fails = attempt == 0
        with pytest.raises(KeyboardInterrupt) if optimizer.fails else nullcontext():
            assert (optimizer.step(*arguments, **keywords) is None) == (closure_as == "nothing")
    assert torch.equal(model[0].weight, weight_by_hand(batches(2)))
    assert tract.num_steps == (3 if closure_as == "nothing" else 2)


def test_update_without_gradients_is_skipped_and_its_forward_not_counted():
    """Lightning makes one where `training_step` returned None."""
    model = small_model().double()
    optimizer, tract = sgd(model), TrAct(model)
    tract.attach(optimizer)
    loss_of(model, 100 * batches()[0])
    optimizer.step()
    assert tract.num_steps == 0
    backward(model, batches()[0])
    optimizer.step()
    assert torch.equal(model[0].weight, weight_by_hand(batches(1)))


def test_lbfgs_sees_a_treated_gradient_at_each_evaluation():
    images, model = batches()[0], small_model().double()
    optimizer = sgd(model, torch.optim.LBFGS, max_iter=3)
    tract = TrAct(model)
    tract.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        return loss

    first = loss_of(model, images).item()
    optimizer.step(closure)
    assert tract.num_steps >= 3
    assert loss_of(model, images).item() < first


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021)."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})

    def step(self, closure):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        with torch.no_grad():
            norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
            moves = [0.5 * weight.grad / norm for weight in weights]
            torch._foreach_add_(weights, moves)
        self.zero_grad()
        loss = closure()
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)
        self.base.step()
        self.zero_grad()
        return loss


def test_sam_climbs_by_the_plain_gradient_and_descends_by_the_treated():
    def weight(attach_to: str) -> torch.Tensor:
        model = small_model().double()
        sam, tract = Sam(sgd(model)), TrAct(model)
        if attach_to:
            tract.attach({"sam": sam, "base": sam.base}[attach_to])
        for images in batches():

            def closure(images=images):
                backward(model, images)
                if not attach_to:
                    tract.step()

            backward(model, images)
            if not attach_to:
                tract.forget()
            sam.step(closure)
        assert tract.num_steps == 3
        return model[0].weight

    for attach_to in ("sam", "base"):
        torch.testing.assert_close(weight(attach_to), weight(""), rtol=1e-12, atol=1e-12)


def test_optimizer_that_lost_the_weight_is_refused_until_it_holds_the_new_one():
    """`load_state_dict(assign=True)` makes new parameters; optimizers keep the old ones."""
    model = small_model()
    optimizer = sgd(model)
    TrAct(model).attach(optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    backward(model, images_like(4, 3, 8, 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"0\.weight is another parameter.*after anything"):
            optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
