"""A step that is not finite stops the training or leaves no trace, and can be replayed."""

import copy
import errno
import itertools
import json
import math
from unittest.mock import Mock

import pytest
import torch
from run_folders import assert_bits
from small_trainers import make_trainer
from torch import nn

from tract_transfer.data.loader import Batch
from tract_transfer.engine.debug_batch import (
    keep_debug_batch,
    load_debug_batch,
    replay,
    save_debug_batch,
)
from tract_transfer.engine.non_finite import NonFiniteError, StepGuard
from tract_transfer.tract import TrAct

pytestmark = pytest.mark.filterwarnings("ignore:Error detected in")
BROKEN = 3  # the iteration that has a NaN


class Net(nn.Module):
    """With `gradient`, large inputs break the gradient, but no loss."""

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


class Steep(nn.Linear):
    """A loss of 0 whose gradient is infinite, and not NaN."""

    def forward(self, images, targets):
        return {"loss_cls": (self.weight - self.weight.detach()).sum().sqrt()}


def batches_of(broken=(), value=math.nan, size=4):
    """Micro-batches of images 0, 1, ...; the first image of those in `broken` has `value`."""
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


def make(model=None, *, broken=(), value=math.nan, **options):
    return make_trainer(model or Net(), batches_of(broken, value), accumulate=2, **options)


def guard(action="stop", max_skipped=10):
    return StepGuard(action, max_skipped, lambda index: f"row {index}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_its_step_and_names_the_images(value, refused):
    trainer = make(broken=[2 * BROKEN + 1], value=value, guard=guard())
    match = rf"loss is not finite \(loss_cls nan\) in iteration {BROKEN + 1}\. "
    match += r"Images: row 28, row 29, row 30, row 31\. Lower solver\.lr"
    with refused(f"an image that makes the loss {value}", NonFiniteError, match=match):
        trainer.train()
    assert trainer.iteration == BROKEN
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_gradient_that_is_not_finite_names_images_of_all_micro_batches(refused):
    trainer = make(Net(gradient=True), guard=guard())
    batch = Batch(torch.full((20, 6), 60.0), torch.zeros(20, dtype=torch.int64), [*range(20)], [])
    trainer.batches = lambda start: iter([batch] * 2)
    match = r"gradient is not finite .*iteration 1\. .*row 6, row 7 and 32 more\."
    with refused("a gradient that is not finite", NonFiniteError, match=match):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_skipped_step_changes_only_the_count():
    """Not weights, momentum or BatchNorm's statistics; training continues, also if resumed."""
    model = Net()
    trainer = make(model, broken=[2 * BROKEN + 1], guard=guard("skip"), tract=TrAct(model))
    states = []
    step = trainer.step

    def watched(batches):
        states.append(copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict())))
        step(batches)

    trainer.step = watched
    trainer.train()
    (weights, optimizer), (weights_after, optimizer_after) = states[BROKEN : BROKEN + 2]
    assert_bits(weights, weights_after)
    assert_bits(optimizer["state"], optimizer_after["state"])
    assert trainer.iteration == 8
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert [step["iteration"] for step in trainer.guard.skipped_steps] == [BROKEN + 1]
    read = trainer.read_meter()
    assert read["skipped_steps"] == 1
    assert math.isfinite(read["loss"])
    assert json.dumps(trainer.guard.skipped_steps, allow_nan=False)
    resumed = make(guard=guard("skip"))
    resumed.load_state(copy.deepcopy(trainer.state_parts()), trainer.state(), 8)
    assert resumed.guard.skipped_steps == trainer.guard.skipped_steps


def test_losses_are_means_over_the_steps_that_were_not_skipped():
    plain, skipping = make(max_iters=3), make(broken=[6], guard=guard("skip"), max_iters=4)
    skipping.model.load_state_dict(plain.model.state_dict())
    plain.train(), skipping.train()
    assert plain.read_meter()["loss"] == skipping.read_meter()["loss"]
    none = make(broken=range(60), guard=guard("skip"), max_iters=3)
    none.train()
    assert "loss" not in none.read_meter()


def test_the_number_of_skipped_steps_is_limited(refused):
    trainer = make(broken=range(60), guard=guard("skip", max_skipped=2))
    name = "more steps without numbers than engine.max_skipped"
    with refused(name, NonFiniteError, match=r"2 steps have been .* already.*engine.max_skipped"):
        trainer.train()
    assert trainer.iteration == 2


def test_an_overflow_at_every_scale_is_an_error(refused):
    trainer = make(Net(gradient=True), broken=range(60), value=60.0, precision=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    match = "not finite at any scale by iteration 3"
    with refused("float16 that overflows at any scale", NonFiniteError, match=match):
        trainer.train()


# ------------------------------------------------------------------------------- debug batches


def test_a_debug_batch_has_the_images_and_the_weights_before_the_step(tmp_path):
    trainer = make(broken=[2 * BROKEN + 1], guard=guard())
    command = r"--debug-batch .*debug_batch.safetensors"
    with pytest.raises(NonFiniteError, match=command), keep_debug_batch(trainer, tmp_path):
        trainer.train()
    kept = load_debug_batch(tmp_path / "debug_batch.safetensors")
    assert (kept.iteration, kept.process) == (BROKEN, 0)
    assert kept.about["images"] == ["row 28", "row 29", "row 30", "row 31"]
    assert [batch["indices"] for batch in kept.batches] == [[*range(24, 28)], [*range(28, 32)]]
    assert kept.batches[1]["images"][0, 0].isnan()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(kept.model[name], parameter), name


def test_a_failed_save_hides_no_error_and_costs_no_file(tmp_path, monkeypatch):
    trainer = make(broken=[2 * BROKEN + 1], guard=guard())
    (tmp_path / "debug_batch.safetensors").write_bytes(b"an earlier one")

    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("tract_transfer.engine.debug_batch.save_file", full)
    match = r"loss is not finite .*row 28.* could not be saved: No space left in .*debug_batch"
    with pytest.raises(NonFiniteError, match=match), keep_debug_batch(trainer, tmp_path):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["debug_batch.safetensors"]
    assert (tmp_path / "debug_batch.safetensors").read_bytes() == b"an earlier one"


def replayed(folder, trainer):
    save_debug_batch(folder / "x.safetensors", trainer, {"images": []})
    kept = load_debug_batch(folder / "x.safetensors")
    return replay(trainer, kept, [Batch(**batch, skipped=[]) for batch in kept.batches])


def test_a_replay_names_the_first_layer(tmp_path):
    class Root(nn.Module):
        def forward(self, values):
            return (values - 5).sqrt()

    model = Net()
    model.body[2] = Root()
    lines = replayed(tmp_path, make(model, guard=guard()))
    assert "The losses of micro-batch 1: loss_cls nan" in lines
    assert "The first output that is not finite: body.2 (Root) of micro-batch 1" in lines
    assert any(line.startswith("Backward: Function '") for line in lines)


def test_a_replay_names_the_input_or_the_weight(tmp_path):
    trainer = make(broken=[0], guard=guard())
    trainer.model.body[3].bias.data[0] = math.inf
    lines = replayed(tmp_path, trainer)
    assert lines[0] == "body.3.bias is not finite before the step"
    assert "Not finite: the input of body.0 (Linear) of micro-batch 1" in lines


def test_a_replay_names_the_operation_or_the_weight_of_a_gradient(tmp_path):
    lines = replayed(tmp_path, make(Net(gradient=True), broken=[0], value=60.0))
    assert any("SqrtBackward0" in line or "MulBackward0" in line for line in lines), lines
    assert not any("first output" in line for line in lines)
    lines = replayed(tmp_path, make(Steep(1, 1, bias=False)))
    assert lines[-1] == "The gradient of weight is not finite"


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_another_file_is_not_a_debug_batch(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"The debug batch .*x\.safetensors is broken"):
        load_debug_batch(tmp_path / "x.safetensors")
