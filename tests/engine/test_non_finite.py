"""Laws of steps that are not finite: they stop the training, or leave no trace."""

import copy
import errno
import itertools
import json
import math

import pytest
import torch
from accelerate import Accelerator
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn

from tract_transfer.data.loader import Batch
from tract_transfer.engine.debug_batch import (
    keep_debug_batch,
    load_debug_batch,
    replay,
    save_debug_batch,
)
from tract_transfer.engine.non_finite import NonFiniteError, StepGuard, gradient_norm
from tract_transfer.engine.trainer import Trainer
from tract_transfer.tract import TrAct

BROKEN = 3  # the iteration whose second micro-batch has a NaN


class Net(nn.Module):
    """`gradient` breaks the gradient of large inputs, and no loss."""

    def __init__(self, gradient=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.breaks_gradient = gradient

    def forward(self, images, targets):
        logits = self.body(images)
        losses = {"loss_cls": nn.functional.cross_entropy(logits, targets)}
        if self.breaks_gradient and images.max() > 50:
            losses["loss_root"] = (logits * 0).sum().sqrt()  # 0, with an infinite slope
        return losses


def batches_of(broken=(), value=math.nan, size=4):
    """Micro-batches of images numbered 0, 1, ...; `broken` are those whose first has `value`."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(60):
        images = torch.randn(size, 6, generator=generator)
        if number in broken:
            images[0, 0] = value
        labels = torch.randint(3, (size,), generator=generator)
        indices = list(range(number * size, (number + 1) * size))
        made.append(Batch(images, labels, indices, []))
    return lambda start: itertools.islice(made, start * 2, None)


def make(model=None, *, broken=(), value=math.nan, layers=(), max_iters=8, **options):
    model = model or Net()
    return Trainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedule=ConstantParamScheduler(1.0),
        set_lr=lambda *_: 1.0,
        batches=batches_of(broken, value),
        tract=TrAct(model, layers=list(layers)),
        max_iters=max_iters,
        seed=3,
        accumulate=2,
        **options,
    )


def guard(action="stop", max_skipped=10):
    return StepGuard(action, max_skipped, lambda index: f"row {index}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_the_images(value, refused):
    trainer = make(broken=[2 * BROKEN + 1], value=value, guard=guard())
    with refused(
        f"an image that makes the loss {value}",
        NonFiniteError,
        match=rf"loss is not finite \(loss_cls nan\) in iteration {BROKEN + 1}",
    ) as caught:
        trainer.train()
    assert "Images: row 28, row 29, row 30, row 31. Lower solver.lr" in str(caught.value)
    assert trainer.iteration == BROKEN
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_gradient_that_is_not_finite_stops_too(refused):
    trainer = make(Net(gradient=True), broken=[2 * BROKEN], value=60.0, guard=guard())
    with refused(
        "a gradient that is not finite",
        NonFiniteError,
        match=r"gradient is not finite .*iteration 4",
    ) as caught:
        trainer.train()
    assert len(caught.value.steps[0]["images"]) == 8  # those of both micro-batches
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_many_images_are_counted():
    trainer = make(Net(gradient=True), broken=[0], value=60.0, guard=guard())
    trainer.batches = lambda start: iter(
        [Batch(torch.full((20, 6), 60.0), torch.zeros(20, dtype=torch.int64), list(range(20)), [])]
        * 2
    )
    with pytest.raises(NonFiniteError, match=r"row 6, row 7 and 32 more\."):
        trainer.train()


def test_a_step_that_is_passed_over_leaves_no_trace_but_a_count():
    """Weights, momentum and BatchNorm's statistics are as if its images had never come."""
    trainer = make(broken=[2 * BROKEN + 1], guard=guard("skip"), layers=["body.0"], max_iters=4)
    before = []
    step = trainer.step

    def watched(batches):
        before.append(copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict())))
        step(batches)

    trainer.step = watched
    trainer.train()
    weights, optimizer = trainer.model.state_dict(), trainer.optimizer.state_dict()
    for name, tensor in before[BROKEN][0].items():
        assert torch.equal(weights[name], tensor), name
    for number, state in before[BROKEN][1]["state"].items():
        assert torch.equal(state["momentum_buffer"], optimizer["state"][number]["momentum_buffer"])
    assert [each["iteration"] for each in trainer.guard.skipped_steps] == [BROKEN + 1]
    read = trainer.read_meter()
    assert read["skipped_steps"] == 1
    assert math.isfinite(read["loss"])
    assert json.dumps(trainer.guard.skipped_steps, allow_nan=False)


def test_training_goes_on_after_a_step_passed_over():
    trainer = make(broken=[2 * BROKEN], guard=guard("skip"), layers=["body.0"])
    trainer.train()
    assert trainer.iteration == 8
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_losses_are_those_of_the_steps_made():
    plain, skipping = make(max_iters=3), make(broken=[6], guard=guard("skip"), max_iters=4)
    skipping.model.load_state_dict(plain.model.state_dict())
    plain.train(), skipping.train()
    assert plain.read_meter()["loss"] == skipping.read_meter()["loss"]


def test_nothing_but_steps_passed_over_has_no_loss():
    trainer = make(broken=range(60), guard=guard("skip"), max_iters=3)
    trainer.train()
    assert "loss" not in trainer.read_meter()


def test_there_is_an_end_to_passing_over(refused):
    trainer = make(broken=range(60), guard=guard("skip", max_skipped=2))
    with refused(
        "more steps without numbers than engine.max_skipped",
        NonFiniteError,
        match=r"2 steps have been skipped already.*engine.max_skipped",
    ):
        trainer.train()
    assert trainer.iteration == 2


def test_the_count_survives_a_resume():
    first = make(broken=[0], guard=guard("skip"), max_iters=2)
    first.train()
    second = make(guard=guard("skip"))
    second.load_state(copy.deepcopy(first.state_parts()), first.state(), 2)
    assert second.guard.skipped_steps == first.guard.skipped_steps != []


def test_an_overflow_of_the_scaler_is_no_error():
    trainer = make(precision=torch.float16, guard=guard())
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer.train()
    read = trainer.read_meter()
    assert read["loss_scale"] < 2.0**60
    assert math.isfinite(read["loss"])


def test_no_scale_without_an_overflow_is_one(refused):
    trainer = make(Net(gradient=True), broken=range(60), value=60.0, precision=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    with refused(
        "float16 that overflows at any scale",
        NonFiniteError,
        match="not finite at any scale by iteration 3",
    ):
        trainer.train()


def test_the_norm_is_that_of_the_whole_gradient():
    model = Net()
    model(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))["loss_cls"].backward()
    gradient = torch.cat([each.grad.flatten() for each in model.parameters()])
    torch.testing.assert_close(gradient_norm(model.parameters()), gradient.norm())


def test_the_step_is_kept_with_the_weights_it_had(tmp_path):
    trainer = make(broken=[2 * BROKEN + 1], guard=guard())
    with pytest.raises(NonFiniteError, match=r"--debug-batch .*debug_batch.safetensors"):  # noqa: SIM117
        with keep_debug_batch(trainer, tmp_path):
            trainer.train()
    kept = load_debug_batch(tmp_path / "debug_batch.safetensors")
    assert (kept.iteration, kept.process) == (BROKEN, 0)
    assert kept.about["images"] == ["row 28", "row 29", "row 30", "row 31"]
    assert [each["indices"] for each in kept.batches] == [[*range(24, 28)], [*range(28, 32)]]
    assert kept.batches[1]["images"][0, 0].isnan()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(kept.model[name], parameter), name


def test_a_step_that_cannot_be_kept_does_not_hide_why_the_training_ended(tmp_path, monkeypatch):
    trainer = make(broken=[2 * BROKEN + 1], guard=guard())
    (tmp_path / "debug_batch.safetensors").write_bytes(b"an earlier one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tract_transfer.engine.debug_batch.save_file", full)
    says = r"loss is not finite .*row 28.* The step is not kept: No space left in .*debug_batch"
    with pytest.raises(NonFiniteError, match=says), keep_debug_batch(trainer, tmp_path):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["debug_batch.safetensors"]
    assert (tmp_path / "debug_batch.safetensors").read_bytes() == b"an earlier one"


def test_a_replay_tells_the_first_layer(tmp_path):
    class Hidden(Net):
        def __init__(self):
            super().__init__()
            self.body[2] = Root()

    class Root(nn.Module):
        def forward(self, values):
            return (values - 5).sqrt()

    trainer = make(Hidden(), guard=guard())
    save_debug_batch(tmp_path / "x.safetensors", trainer, {"images": []})
    kept = load_debug_batch(tmp_path / "x.safetensors")
    batches = [Batch(**each, skipped=[]) for each in kept.batches]
    lines = replay(trainer, kept, batches)
    assert "The losses of micro-batch 1: loss_cls nan" in lines
    assert "The first output that is not finite: body.2 (Root) of micro-batch 1" in lines
    assert any(line.startswith("Backward: Function '") for line in lines)


def test_a_replay_tells_where_a_gradient_begins(tmp_path):
    trainer = make(Net(gradient=True), broken=[0], value=60.0)
    save_debug_batch(tmp_path / "x.safetensors", trainer, {"images": []})
    kept = load_debug_batch(tmp_path / "x.safetensors")
    lines = replay(trainer, kept, [Batch(**each, skipped=[]) for each in kept.batches])
    assert any("SqrtBackward0" in line or "MulBackward0" in line for line in lines), lines
    assert not any("first output" in line for line in lines)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_another_file_is_no_debug_batch(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is no debug batch, or a broken one"):
        load_debug_batch(tmp_path / "x.safetensors")
