"""What TrAct's update equals, whatever the loop does around it."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tract_transfer.tract.watch as watch_module
from tract_transfer.tract import TrAct, gram_matrix
from tract_transfer.tract.lags import Canvas, lag_gram


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, 2, 1)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def images_like(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).square().sum(1).mean()


def update_of(model: nn.Module, *batches: torch.Tensor, **options) -> torch.Tensor:
    """The treated gradient after a backward through the mean over all images."""
    tract = TrAct(model, **options)
    count = sum(len(batch) for batch in batches)
    for batch in batches:
        (loss_of(model, batch) * len(batch) / count).backward()
    tract.step()
    tract.detach()
    return model.get_parameter(f"{tract.layer_names[0]}.weight").grad


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


def test_a_model_compiled_before_is_treated_too():
    images, model = images_like(4, 3, 8, 8), small_model()
    run = torch.compile(model, backend="aot_eager")
    tract = TrAct(run)
    loss_of(run, images).backward()
    tract.step()
    torch.testing.assert_close(model[0].weight.grad, update_of(small_model(), images))


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


# ---------------------------------------------------------------------------- update_every


def test_between_two_measurements_the_factor_stays():
    """And nothing is measured: the forwards of those steps cost nothing."""
    batches = [images_like(4, 3, 8, 8, seed=seed).double() for seed in range(4)]
    model = small_model().double()
    tract = TrAct(model, update_every=2)
    means = [gram_matrix(model[0], batch)[0] / (4 * 16) for batch in batches]
    kept = 0.9 * means[0] + 0.1 * means[2]
    for batch, mean in zip(batches, (means[0], means[0], kept, kept), strict=True):
        model.zero_grad()
        loss_of(model, batch).backward()
        plain = model[0].weight.grad.flatten(1).clone()
        tract.step()
        expected = plain @ torch.linalg.inv(mean + 0.1 * torch.eye(27).double())
        torch.testing.assert_close(model[0].weight.grad.flatten(1), expected)


def test_nothing_is_measured_in_between(monkeypatch):
    calls = []
    monkeypatch.setattr(watch_module, "gram_matrix", lambda *a: calls.append(1) or gram_matrix(*a))
    model, images = small_model(), images_like(2, 3, 8, 8)
    tract = TrAct(model, update_every=3)
    for _ in range(7):
        model.zero_grad()
        loss_of(model, images).backward()
        tract.step()
    assert len(calls) == 3
    with pytest.raises(RuntimeError, match="No training forward reached 0"):
        tract.step()


@pytest.mark.parametrize("update_every", [1, 2])
def test_a_state_goes_on_where_it_was_taken(update_every):
    model, other = small_model(), small_model()
    tract = TrAct(model, update_every=update_every)

    def run(model: nn.Module, tract: TrAct, seed: int) -> torch.Tensor:
        model.zero_grad()
        loss_of(model, images_like(4, 3, 8, 8, seed=seed)).backward()
        tract.step()
        return model[0].weight.grad.clone()

    for seed in range(3):
        run(model, tract, seed)
    resumed = TrAct(other, update_every=update_every)
    resumed.load_state_dict(copy.deepcopy(tract.state_dict()))
    assert bool(tract.state_dict()) == (update_every > 1)
    for seed in range(3, 6):
        assert torch.equal(run(model, tract, seed), run(other, resumed, seed))
    with pytest.raises(ValueError, match=r"update_every = 5 on \['0'\] does not hold"):
        TrAct(small_model(), update_every=5).load_state_dict({"mean.7": torch.eye(27)})


# --------------------------------------------------------------------------------- solving


@pytest.mark.parametrize("lam", [1e-30, 1e-9])
@pytest.mark.parametrize("num_inputs", [27, 768])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0])
def test_a_tiny_lam_stays_finite_on_a_matrix_of_rank_one(lam, num_inputs, scale):
    layer = nn.Linear(num_inputs, 4)
    tract = TrAct(layer, lam)
    layer(scale * torch.ones(50, num_inputs)).sum().backward()
    tract.step()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.any()


def test_blank_images_under_a_relative_lam_change_nothing():
    layer = nn.Linear(6, 4)
    tract = TrAct(layer, lam_mode="relative")
    layer(torch.zeros(5, 6)).sum().backward()
    tract.step()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 6))


def test_what_is_not_finite_names_the_layer_and_the_step_and_leaves_the_weights():
    model, images = small_model(), images_like(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model[:1].parameters(), lr=0.1)
    tract = TrAct(model)
    for step in range(3):
        model.zero_grad()
        batch = images.clone()
        batch[1, 2, 3, 4] = float("nan") if step == 2 else 0
        loss_of(model, batch).backward()
        if step < 2:
            tract.step()
            optimizer.step()
    with pytest.raises(RuntimeError, match=r"The input of 0 is not finite in step 2 \(NaN"):
        tract.step()
    assert not model[0].weight.grad.any()


def test_no_step_on_a_gpu_waits_for_it():
    """Nothing reads a value: of a fake tensor there is none."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for build, shape in (
            (lambda: nn.Conv2d(3, 8, 7, 2, 3), (4, 3, 64, 64)),
            (lambda: nn.Conv2d(3, 8, 16, 16), (4, 3, 64, 64)),
            (lambda: nn.Linear(12, 8), (4, 12)),
        ):
            layer = build()
            tract = TrAct(layer, lam_mode="relative")
            tract._read = lambda wait: None  # what reads, when the device is done
            layer(torch.randn(shape)).sum().backward()
            tract.step()
            assert layer.weight.grad.shape == layer.weight.shape
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_lags_on_a_gpu_is_of_float32_and_does_not_wait(dtype):
    with FakeTensorMode():
        images = torch.empty(4, 67, 67, 12, device="cuda", dtype=dtype)
        canvas = Canvas(images, (0, 0), (67, 67))
        found = lag_gram(canvas, (4, 4), (64, 64), dtype)
    assert found.shape == (4, 4, 4, 4, 12, 12)
    assert found.dtype == torch.float32
    assert found.device.type == "cuda"
