"""What a report shows, its verdict on inputs made to have a property, and that it changes nothing.

Also what TrAct logs: the layers it treats, and that nobody calls its step.
"""

import copy
import json
import logging
import math

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tract_models import backward, images_like, small_model

from tract_transfer.tract import TrAct
from tract_transfer.tract.diagnose import compare


def crops(count: int = 24, side_px: int = 24) -> Tensor:
    """Crops of scikit-learn's two photographs, reduced four times, in [0, 255]."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for photograph in load_sample_images().images:
        image = nn.functional.avg_pool2d(torch.tensor(photograph).permute(2, 0, 1).float(), 4)
        for _ in range(count // 2):
            y, x = (
                int(torch.randint(size - side_px, (), generator=generator))
                for size in image.shape[1:]
            )
            parts.append(image[:, y : y + side_px, x : x + side_px])
    return torch.stack(parts)


def normalized(images: Tensor) -> Tensor:
    std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return (images - mean) / std


def convolution(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 8, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def report_of(images: Tensor, model: nn.Module | None = None, **options):
    model = model or convolution(images.shape[1])
    tract = TrAct(model, layers=["0"], **options)
    backward(model, images)
    return tract.report()["0"]


def white(count: int = 4000) -> Tensor:
    """Images whose 3 x 3 windows, one an image, have exactly the mean square I."""
    rows = images_like(count, 27).double()
    root = torch.linalg.cholesky(rows.T @ rows / count)
    return torch.linalg.solve_triangular(root, rows.T, upper=False).T.view(count, 3, 3, 3).float()


def unpadded() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Tanh(), nn.Linear(8, 5))


def with_alpha() -> Tensor:
    return torch.cat([normalized(crops()), torch.ones(24, 1, 24, 24)], 1)


INPUTS = {
    "normalized": (lambda: normalized(crops()), {}, []),
    "normalized, relative lam": (lambda: normalized(crops()), {"lam_mode": "relative"}, []),
    "[-1, 1]": (lambda: crops() / 127.5 - 1, {}, []),
    "[0, 1]": (lambda: crops() / 255, {}, ["mean_dominates"]),
    "[0, 255]": (crops, {}, ["rounding", "mean_dominates"]),
    "[0, 255], relative lam": (crops, {"lam_mode": "relative"}, ["mean_dominates"]),
    "divided by 255 twice": (lambda: crops() / 255**2, {}, ["large_lam", "mean_dominates"]),
    "large lam": (lambda: normalized(crops()), {"lam": 100}, ["large_lam"]),
    "lam of 5": (lambda: normalized(crops()), {"lam": 5}, ["lam_above_range"]),
    "tiny lam": (lambda: normalized(crops()), {"lam": 1e-3}, ["lam_below_range"]),
    "standard deviation 10": (lambda: 10 * normalized(crops()), {}, ["lam_below_range"]),
    "a constant channel": (with_alpha, {}, ["constant_channel"]),
    "black images": (lambda: torch.zeros(2, 3, 8, 8), {}, ["blank"]),
    "black images, relative lam": (
        lambda: torch.zeros(2, 3, 8, 8), {"lam_mode": "relative"}, ["blank"],
    ),
    "a NaN": (lambda: torch.full((2, 3, 8, 8), math.nan), {}, ["not_finite"]),
}  # fmt: skip
NO_EFFECT = {"large_lam", "blank"}
UNSAFE = {"rounding", "not_finite"}


@pytest.mark.parametrize("name", INPUTS)
def test_verdict_on_inputs_with_a_property(name):
    make, options, kinds = INPUTS[name]
    report = report_of(make(), **options)
    assert list(report.findings) == kinds
    assert report.has_effect == (not NO_EFFECT & set(kinds))
    assert report.is_safe == (not UNSAFE & set(kinds))
    assert report.verdict.startswith("TrAct works as intended") == (not kinds)
    assert report.verdict in str(report)
    scale = {"large_lam", "lam_above_range", "lam_below_range", "rounding", "mean_dominates"}
    given = {"lam": 0.1, "lam_mode": "absolute", **options}
    better = {"lam": 0.1, "lam_mode": "relative"}
    assert report.recommended == (better if scale & set(kinds) else given)
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("lam", [0.01, 0.1, 0.9])
def test_white_inputs_keep_the_direction(lam):
    report = report_of(white(), unpadded(), lam=lam)
    assert list(report.findings) == ["white"]
    assert not report.has_effect
    assert report.gradient_ratio == pytest.approx(1 / (1 + lam), rel=1e-4)
    assert report.gradient_angle_deg == pytest.approx(0, abs=0.01)
    assert report.effective_rank == pytest.approx(27, rel=1e-5)
    assert report.condition == pytest.approx(1, abs=1e-4)


def test_recommended_lam_ends_what_was_found():
    for make, options, kinds in INPUTS.values():
        if {"blank", "not_finite", "constant_channel"} & set(kinds):
            continue
        recommended = report_of(make(), **options).recommended
        assert set(report_of(make(), **recommended).findings) <= {"mean_dominates"}


def test_figures_are_those_of_the_unfolded_windows():
    images = normalized(crops()).double()
    model = convolution().double()
    report = report_of(images, model)
    rows = nn.functional.unfold(images, 3, padding=1).mT.flatten(0, 1)
    gram = rows.T @ rows / len(rows)
    expected = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(report.eigenvalues, expected, rtol=1e-6, atol=1e-10)
    assert report.largest == pytest.approx(float(expected[0]))
    assert report.condition == pytest.approx(float(expected[0] / expected[-1]), rel=1e-6)
    damped = float((expected[0] + 0.1) / (expected[-1] + 0.1))
    assert report.damped_condition == pytest.approx(damped, rel=1e-6)
    assert report.relative_lam == pytest.approx(0.1 / float(gram.trace() / 27), rel=1e-6)
    plain = model[0].weight.grad.flatten(1)
    treated = plain @ torch.linalg.inv(gram + 0.1 * torch.eye(27))
    assert report.gradient_ratio == pytest.approx(float(treated.norm() / plain.norm()), rel=1e-6)
    cosine = (plain * treated).sum() / plain.norm() / treated.norm()
    assert math.cos(math.radians(report.gradient_angle_deg)) == pytest.approx(float(cosine))
    assert report.gradient_angle_deg <= report.most_angle_deg
    for index, channel in enumerate(report.channels):
        assert channel.mean == pytest.approx(0, abs=1e-6)
        assert channel.std == pytest.approx(1, rel=1e-3)
        assert channel.rms**2 == pytest.approx(float(rows.view(-1, 3, 9)[:, index].var()), rel=0.05)


def test_most_angle_is_reached():
    """Kantorovich: by the sum of the vectors of the largest and the smallest eigenvalue."""
    rows = torch.diag(torch.tensor([3.0, 1.0])) * math.sqrt(2)
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    tract = TrAct(model, 1e-9)
    # The treated gradient of a = (s, t) is a / eigenvalues: the angle is largest at s^2 = 9 t^2.
    model(rows.double())
    model[0].weight.grad = torch.tensor([[3.0, 1.0]]).double()
    tract.step()
    report = tract.report()["0"]
    assert report.condition == pytest.approx(9)
    assert report.gradient_angle_deg == pytest.approx(report.most_angle_deg)


@pytest.mark.parametrize("num_inputs", [27, 300])  # beyond 256 the factor is float32
def test_report_after_the_step_is_the_one_before_it(num_inputs):
    images, model = images_like(500, num_inputs) + 0.3, nn.Sequential(nn.Linear(num_inputs, 4))
    tract, optimizer = TrAct(model), torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, images)
    before = tract.report()["0"]
    tract.step()
    after_step = tract.report()["0"]
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    for after in (after_step, tract.report()["0"]):
        for name in ("largest", "median", "gradient_ratio", "gradient_angle_deg", "mean_share"):
            assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-3), name
        assert after.findings == before.findings


def test_linear_is_described_by_the_mean_of_each_input():
    images = images_like(400, 6) + torch.tensor([2.0, -2, 0, 0, 0, 0])
    report = report_of(images, nn.Sequential(nn.Linear(6, 5)))
    assert report.kernel is None
    assert report.mean_share == pytest.approx(8 / 14, rel=0.1)
    assert list(report.findings) == ["mean_dominates"]
    (channel,) = report.channels
    assert channel.mean == pytest.approx(0, abs=0.1)
    assert channel.std == pytest.approx(channel.rms, rel=0.01)


def test_layer_frozen_or_replaced_after_tract_was_made_has_no_effect():
    model = small_model()
    tract = TrAct(model)
    model[0].weight.requires_grad_(False)
    backward(model, images_like(2, 3, 8, 8))
    report = tract.report()
    assert list(report["0"].findings) == ["frozen"]
    assert report["0"].largest > 0
    assert not report.has_effect
    assert "0 is frozen, so TrAct has no effect" in str(report)
    model = small_model()
    tract = TrAct(model)
    nn.utils.parametrizations.weight_norm(model[0])
    assert list(tract.report()["0"].findings) == ["computed"]


def test_empty_report_and_report_without_a_forward(refused):
    assert str(TrAct(small_model(), layers=[]).report()) == "TrAct treats no layer."
    tract = TrAct(small_model())
    with refused("a report before a forward", RuntimeError, match=r"report\(\) of 0 needs a forwa"):
        tract.report()


@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"lam_mode": "relative"}])
def test_report_changes_no_bit_of_a_training(options):
    models = [small_model(), small_model()]
    for reports, model in enumerate(models):
        tract = TrAct(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            for micro in range(2):
                backward(model, images_like(4, 3, 8, 8, seed=2 * step + micro))
                if reports:
                    tract.report()
            tract.step()
            if reports:
                tract.report()
            optimizer.step()
            state = tract.state_dict()
            if reports:
                tract.report()
                assert tract.state_dict().keys() == state.keys()
                assert all(torch.equal(state[k], v) for k, v in tract.state_dict().items())
    for weight, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(weight, other)


def test_running_mean_is_reported_before_the_step_that_keeps_it():
    model = small_model()
    tract = TrAct(model, update_every=2)
    for step in range(3):
        model.zero_grad()
        backward(model, (1 + step) * images_like(4, 3, 8, 8, seed=step))
        before = tract.report()["0"].largest
        tract.step()
        assert tract.report()["0"].largest == pytest.approx(before, rel=1e-5)


def test_inputs_are_measured_once_a_report(monkeypatch):
    model, measured = small_model(), []
    tract = TrAct(model)
    var_mean = torch.var_mean
    monkeypatch.setattr(torch, "var_mean", lambda *a, **k: measured.append(1) or var_mean(*a, **k))
    for step in range(6):
        model.zero_grad()
        backward(model, step + images_like(4, 3, 8, 8))
        tract.step()
        if step == 3:
            assert tract.report()["0"].channels[0].mean == pytest.approx(0, abs=0.2)
    assert len(measured) == 2
    assert tract.report()["0"].channels[0].mean == pytest.approx(4, abs=0.2)


def test_forgotten_forward_does_not_spoil_the_report():
    model, images = small_model(), images_like(4, 3, 8, 8)
    tract = TrAct(model)
    model(images * math.nan)
    tract.forget()
    backward(model, images)
    report = tract.report()["0"]
    assert report.channels[0].mean is None
    json.dumps(report.as_dict(), allow_nan=False)
    model.zero_grad()
    backward(model, images)
    assert tract.report()["0"].channels[0].mean == pytest.approx(0, abs=0.2)


def test_compiled_model_is_reported_without_means():
    model = convolution()
    tract = TrAct(model)
    compiled = torch.compile(model, backend="eager")
    backward(compiled, normalized(crops()))
    tract.step()
    (report,) = tract.report().values()
    assert report.channels[0].mean is None
    assert report.channels[0].rms == pytest.approx(1, rel=0.1)
    assert "mean unknown, std unknown" in str(report)
    assert not report.findings


def test_angle_and_ratio():
    first = torch.tensor([1.0, 0.0])
    assert compare(first, 2 * first) == (2, 0)
    assert compare(first, torch.tensor([0.0, 3.0])) == (3, pytest.approx(90))
    assert compare(first, -first) == (1, 180)
    assert compare(first, 0 * first) == (None, None)


def test_layers_are_logged_at_info_from_the_package(caplog, capsys):
    model = convolution()
    caplog.set_level(logging.WARNING, "tract_transfer")
    TrAct(model)
    assert not caplog.records
    with caplog.at_level(logging.INFO, "tract_transfer.tract"):
        TrAct(nn.Sequential(nn.Linear(6, 5)), 0.2, lam_mode="relative")
        TrAct(copy.deepcopy(model))
        TrAct(model, layers=[])
    assert [(record.name, record.message) for record in caplog.records] == [
        ("tract_transfer.tract",
         "TrAct treats 0: Linear, 6 inputs an output, lam = 0.2 (relative)"),
        ("tract_transfer.tract",
         "TrAct treats 0: Conv2d with kernel 3 x 3, 27 inputs an output, lam = 0.1 (absolute)"),
    ]  # fmt: skip
    assert capsys.readouterr() == ("", "")


def train_without_step(count: int, model: nn.Module, **options) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for index in range(count):
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        for _ in range(options.get("micro_batches", 1)):
            backward(model, images_like(2, 3, 8, 8, seed=index))
        optimizer.step()


MISSING = "0 got 20 updates without TrAct's step(), so TrAct has no effect"


@pytest.mark.parametrize("options", [{}, {"set_to_none": False}, {"micro_batches": 2}])
@pytest.mark.parametrize("attached", [False, True])
def test_twenty_updates_without_a_step_are_logged_once(options, attached, caplog):
    """The 21st backward is the first that sees 20 updates."""
    caplog.set_level(logging.WARNING, "tract_transfer")
    model = small_model()
    tract = TrAct(model)
    if attached:  # to another optimizer than the loop's
        tract.attach(torch.optim.SGD(model.parameters(), lr=0.01))
    train_without_step(20, model, **options)
    assert not caplog.text
    train_without_step(1, model, **options)
    assert caplog.text.count(MISSING) == 1
    assert "model_init" in caplog.text
    train_without_step(150, model, **options)
    assert len(caplog.records) == 1


def test_no_warning_where_nothing_is_updated(caplog):
    """Evaluation, no_grad, long accumulation, attacks, skipped steps, and a detached TrAct."""
    caplog.set_level(logging.WARNING, "tract_transfer")
    model, images = small_model(), images_like(2, 3, 8, 8)
    tract = TrAct(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(300):
        model.eval()(images)
        with torch.no_grad():
            model.train()(images)
            model[0].weight.mul_(1.0)
    for _ in range(300):
        backward(model, images)
    tract.step()
    optimizer.step()
    for _ in range(99):  # a scaler that skips the step, or an attack of the images
        optimizer.zero_grad()
        backward(model, images)
    tract.step()
    optimizer.step()
    for _ in range(50):
        train_without_step(5, model)
        tract.forget()
    tract.detach()
    train_without_step(150, model)
    assert not caplog.text
