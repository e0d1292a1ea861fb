"""TrAct's step in the optimizer's own."""

import copy

import pytest
import torch
from tract_models import images_like, loss_of, small_model

from tract_transfer.tract import TrAct


def test_an_attached_optimizer_steps_as_an_explicit_one():
    images = images_like(4, 3, 8, 8)
    explicit, attached, plain = small_model(), small_model(), small_model()
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (explicit, attached, plain)
    ]
    tract = TrAct(explicit)
    handle = TrAct(attached).attach(optimizers[1])
    for _ in range(3):
        for model, optimizer in zip((explicit, attached, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, images).backward()
            if model is explicit:
                tract.step()
            optimizer.step()
    assert torch.equal(explicit[0].weight, attached[0].weight)
    assert not torch.equal(explicit[0].weight, plain[0].weight)
    handle.remove()
    attached.load_state_dict(plain.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[2].state_dict()))
    for model, optimizer in zip((attached, plain), optimizers[1:], strict=True):
        optimizer.zero_grad()
        loss_of(model, images).backward()
        optimizer.step()
    assert torch.equal(attached[0].weight, plain[0].weight)


def test_an_optimizer_without_the_weight_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"does not hold 0\.weight"):
        TrAct(model).attach(torch.optim.SGD(model[4].parameters(), lr=0.1))


def test_a_skipped_step_leaves_nothing_behind():
    """A GradScaler skips after an overflow: its forwards do not count in the next step."""
    images, large = images_like(4, 3, 8, 8), images_like(4, 3, 8, 8, seed=2)
    plain, scaled = small_model(), small_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, scaled)]
    TrAct(plain).attach(optimizers[0])
    TrAct(scaled).attach(optimizers[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for batch, factor in ((large, float("inf")), (images, 1.0)):
        scaler.scale(loss_of(scaled, batch) * factor).backward()
        scaler.step(optimizers[1])
        scaler.update()
        optimizers[1].zero_grad()
    assert scaler.get_scale() == 2.0
    loss_of(plain, images).backward()
    optimizers[0].step()
    torch.testing.assert_close(scaled[0].weight, plain[0].weight)


def test_a_closure_is_followed_by_the_step():
    """As Lightning gives one: forward and backward run inside the optimizer's step."""
    images, by_hand, given = images_like(4, 3, 8, 8), small_model(), small_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (by_hand, given)]
    tract = TrAct(by_hand)
    TrAct(given).attach(optimizers[1])
    for keyword in (True, False):
        optimizers[0].zero_grad()
        loss_of(by_hand, images).backward()
        tract.step()
        optimizers[0].step()

        def closure():
            optimizers[1].zero_grad()
            loss = loss_of(given, images)
            loss.backward()
            return loss

        loss = optimizers[1].step(closure=closure) if keyword else optimizers[1].step(closure)
        assert loss > 0
        torch.testing.assert_close(given[0].weight, by_hand[0].weight, rtol=0, atol=0)


def test_a_class_whose_step_calls_its_parent_s_steps_once():
    """torch hooks both; a step that failed does not keep the next from being treated."""

    class Clipping(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise KeyboardInterrupt
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1)])  # with which torch patches the parent
    images, by_hand, given = images_like(4, 3, 8, 8), small_model(), small_model()
    tract, plain = TrAct(by_hand), torch.optim.SGD(by_hand.parameters(), lr=0.1)
    optimizer = Clipping(given.parameters(), lr=0.1)
    counted = TrAct(given)
    counted.attach(optimizer)
    for attempt in range(3):
        for model in (by_hand, given):
            model.zero_grad()
            loss_of(model, images).backward()
        optimizer.fails = attempt == 1
        if optimizer.fails:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            tract.forget()
            continue
        optimizer.step()
        tract.step()
        plain.step()
        assert torch.equal(given[0].weight, by_hand[0].weight)
    assert counted.num_steps == 3


def test_an_update_without_gradients_is_passed_over_and_its_forward_not_counted():
    """As where Lightning's `training_step` returned None."""
    skipped, images = images_like(2, 3, 8, 8), images_like(4, 3, 8, 8)
    by_hand, given = small_model(), small_model()
    tract, attached = TrAct(by_hand), TrAct(given)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (by_hand, given)]
    attached.attach(optimizers[1])
    loss_of(given, skipped)
    optimizers[1].step()
    assert torch.equal(given[0].weight, by_hand[0].weight)
    assert attached.num_steps == 0
    for model in (by_hand, given):
        loss_of(model, images).backward()
    tract.step()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(given[0].weight, by_hand[0].weight)


def test_lbfgs_sees_a_treated_gradient_at_each_evaluation():
    images, model = images_like(4, 3, 8, 8), small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
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


def test_a_line_search_is_refused():
    """It compares losses with the slope along the gradient: of the plain one."""
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match=r"line search of LBFGS.*line_search_fn=None"):
        TrAct(model).attach(optimizer)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021), in the two forms that are in use."""

    def __init__(self, base: torch.optim.Optimizer, rho: float) -> None:
        self.base, self.rho = base, rho
        super().__init__(base.param_groups, {})
        self.moves: list[torch.Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        self.moves = [self.rho * weight.grad / norm for weight in weights]
        torch._foreach_add_(weights, self.moves)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        torch._foreach_sub_(weights, self.moves)
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


@pytest.mark.parametrize("form", ["by hand", "two steps", "closure"])
def test_sam_climbs_by_the_plain_gradient_and_descends_by_the_treated(form):
    model, by_hand = small_model().double(), small_model().double()
    batches = [images_like(4, 3, 8, 8, seed=seed).double() for seed in range(3)]
    optimizers = [Sam(torch.optim.SGD(m.parameters(), lr=0.1), 0.5) for m in (by_hand, model)]
    hand, tract = TrAct(by_hand), TrAct(model)
    if form != "by hand":
        tract.attach(optimizers[1] if form == "closure" else optimizers[1].base)
    for images in batches:
        loss_of(by_hand, images).backward()
        optimizers[0].first_step()
        hand.forget()
        loss_of(by_hand, images).backward()
        hand.step()
        optimizers[0].second_step()

        def closure(images=images):
            loss = loss_of(model, images)
            loss.backward()
            return loss

        closure()
        if form == "closure":
            optimizers[1].step(closure)
            continue
        optimizers[1].first_step()
        closure()
        if form == "by hand":
            tract.step()
        optimizers[1].second_step()
    torch.testing.assert_close(model[0].weight, by_hand[0].weight, rtol=1e-12, atol=1e-12)
    assert hand.num_steps == tract.num_steps == 3


def test_an_optimizer_that_lost_the_weight_is_told():
    """`load_state_dict(assign=True)` makes new parameters; optimizers keep the old ones."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrAct(model).attach(optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    loss_of(model, images_like(4, 3, 8, 8)).backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"0\.weight is another parameter.*after what"):
            optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
