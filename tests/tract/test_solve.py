"""The damped inverse: of a running mean, of matrices without full rank, without waiting."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tract_models import images_like, loss_of, small_model

import tract_transfer.tract.gram as gram_module
import tract_transfer.tract.watch as watch_module
from tract_transfer.tract import TrAct, gram_matrix
from tract_transfer.tract.lags import Canvas, lag_gram

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


@pytest.mark.parametrize("broken", [0, 2])
def test_a_measurement_that_is_not_finite_is_not_kept(broken):
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
        loss_of(model, batch).backward()
        if step == broken:
            with pytest.raises(RuntimeError, match=f"not finite in step {broken}"):
                tract.step()
        else:
            tract.step()
    expected = 0.9 * means[0] + 0.1 * means[1]
    torch.testing.assert_close(tract.state_dict()["mean.0"], expected)


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("update_every", [1, 2])
def test_a_state_goes_on_where_it_was_taken(update_every, num_steps):
    model, other = small_model(), small_model()
    tract = TrAct(model, update_every=update_every)

    def run(model: nn.Module, tract: TrAct, seed: int) -> torch.Tensor:
        model.zero_grad()
        loss_of(model, images_like(4, 3, 8, 8, seed=seed)).backward()
        tract.step()
        return model[0].weight.grad.clone()

    for seed in range(num_steps):
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


fakes_a_gpu = pytest.mark.skipif(
    torch.__version__ < "2.9" and not torch.cuda.is_available(),
    reason="torch 2.8 asks the driver for its GPU when a slice is taken of a fake tensor on one",
)


@fakes_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_lags_on_a_gpu_is_of_float32_and_does_not_wait(dtype):
    with FakeTensorMode():
        images = torch.empty(4, 3, 131, 134, device="cuda", dtype=dtype)
        canvas = Canvas(images, (2, 2), (0, 0), (67, 67))
        found = lag_gram(canvas, (4, 4), (64, 64), dtype)
    assert found.shape == (4, 4, 4, 4, 12, 12)
    assert found.dtype == torch.float32
    assert found.device.type == "cuda"


@fakes_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_rows_patches_and_dilated_windows_do_not_wait_for_a_gpu(dtype):
    windows = gram_module._gram_of_windows._init_fn  # the operators have fakes, which do nothing
    with FakeTensorMode():
        images = torch.empty(4, 3, 66, 70, device="cuda", dtype=dtype)
        rows = torch.empty(500, 300, device="cuda", dtype=dtype)
        found = [
            gram_module._gram_of_rows._init_fn(rows, dtype),
            windows(images, [4, 4], [4, 4], [1, 1], [1, 1, 0, 2], "constant", dtype),
            windows(images, [3, 3], [1, 1], [2, 2], [2, 2, 2, 2], "reflect", dtype),
        ]
    assert [gram.shape for gram in found] == [(300, 300), (48, 48), (27, 27)]
    assert {(gram.dtype, gram.device.type) for gram in found} == {(torch.float32, "cuda")}
