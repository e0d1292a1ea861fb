"""The training loop is the plain loop of PyTorch, plus what its arguments add."""

import copy
import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from run_folders import assert_bits
from small_trainers import make_trainer
from torch import nn

from tract_transfer.build.batches import build_train_batches
from tract_transfer.build.data import build_data
from tract_transfer.build.model import build_model
from tract_transfer.build.trainer import build_trainer
from tract_transfer.data.loader import Batch
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.hooks import evaluate, evaluating


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, images, targets=None):
        logits = self.body(images)
        if not self.training:
            return logits
        return {
            "loss_cls": nn.functional.cross_entropy(logits, targets),
            "loss_size": logits.square().mean(),
        }


def gradient_norm(model):
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


def batches_of(size, number=40, skipped=()):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number * size, 6, generator=generator)
    labels = torch.randint(3, (number * size,), generator=generator)

    def batches(start):
        parts = zip(images.split(size), labels.split(size), strict=True)
        for x, y in itertools.islice(itertools.cycle(parts), start, None):
            yield Batch(x, y, [], list(skipped))

    return batches


def make(model, *, batches=None, **options):
    return make_trainer(model, batches or batches_of(4), **options)


def test_without_tract_it_is_the_plain_pytorch_loop(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "solver.momentum=0.9", "solver.weight_decay=1e-3")
    data = build_data(config)
    trainer = build_trainer(config, data, Accelerator(cpu=True))
    trainer.train()

    model = build_model(config, 3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    batches = build_train_batches(config, data.train)(0)
    for iteration in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * iteration / 6))
        batch = next(batches)
        loss = nn.functional.cross_entropy(
            model.head(model.backbone.pooled(batch.images)), batch.targets
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_bits(trainer.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_are_one_batch_in_parts(accumulate):
    one = Net()
    two = copy.deepcopy(one)
    make(one, batches=batches_of(8)).train()
    make(two, batches=batches_of(8 // accumulate, 40 * accumulate), accumulate=accumulate).train()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_losses_are_means_over_the_steps(accumulate):
    model = Net()
    trainer = make(model, max_iters=3, accumulate=accumulate, lr=1e-30)
    batches = itertools.islice(batches_of(4)(0), 3 * accumulate)
    with torch.no_grad():
        expected = [model.train()(batch.images, batch.targets) for batch in batches]
    trainer.train()
    assert trainer.seen_images == 12 * accumulate
    read = trainer.read_meter()
    for name in ("loss_cls", "loss_size"):
        mean = sum(float(losses[name]) for losses in expected) / len(expected)
        assert read[name] == pytest.approx(mean, rel=1e-6)
    assert read["loss"] == pytest.approx(read["loss_cls"] + read["loss_size"])
    assert trainer.meter.losses == {}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_tract_changes_the_whole_gradient_once_before_it_is_clipped(accumulate):
    model, norms, clipped = Net(), [], []

    class Scale:
        def step(self):
            for parameter in model.parameters():
                parameter.grad.mul_(100)
            norms.append(gradient_norm(model))

    trainer = make(model, tract=Scale(), grad_clip=0.5, max_iters=4, accumulate=accumulate)
    trainer.optimizer.register_step_pre_hook(lambda *_: clipped.append(gradient_norm(model)))
    trainer.train()
    assert len(norms) == 4
    assert min(norms) > 1
    assert clipped == pytest.approx([0.5] * 4, rel=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_narrow_precision_trains(precision):
    torch.manual_seed(0)
    model = Net()
    trainer = make(model, precision=precision, max_iters=30)
    batch = next(batches_of(4)(0))

    @torch.no_grad()
    def loss():
        return sum(model.train()(batch.images, batch.targets).values())

    first = loss()
    trainer.train()
    assert trainer.scaler.is_enabled() == (precision == torch.float16)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert loss() < first


def test_float16_unscales_before_it_clips_and_an_overflow_is_no_error():
    model, norms = Net(), []
    trainer = make(model, precision=torch.float16, grad_clip=1e-3, max_iters=8)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    trainer.optimizer.register_step_pre_hook(lambda *_: norms.append(gradient_norm(model)))
    trainer.train()
    assert 3 < len(norms) < 8  # the scaler skips steps until its scale fits
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)
    assert trainer.read_meter()["loss_scale"] < 2.0**18


def test_random_numbers_depend_only_on_seed_iteration_and_process():
    draws = set()
    for seed, iteration, process in itertools.product(range(3), repeat=3):
        seed_all(seed, iteration, process)
        draws.add(torch.rand(1).item())
    assert len(draws) == 27


def test_skipped_items_are_listed_once():
    trainer = make(Net(), batches=batches_of(4, skipped=["row 3: cut", "row 9: cut"]), max_iters=3)
    trainer.train()
    assert trainer.skipped == ["row 3: cut", "row 9: cut"]


@pytest.mark.parametrize("precision", [None, torch.float16])
@pytest.mark.parametrize(("started", "now"), [(None, True), (True, None)])
def test_a_training_resumes_to_the_same_bits_and_keeps_its_step_of_adam(precision, started, now):
    """Gradient scalers call fused steps differently from others."""

    def trainer_of(fused, max_iters=6):
        torch.manual_seed(0)
        model = Net(dropout=0.3)
        trainer = make(model, precision=precision, max_iters=max_iters)
        trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        return trainer

    whole, first, second = trainer_of(started), trainer_of(started, 3), trainer_of(now)
    whole.train()
    first.train()
    second.load_state(*copy.deepcopy((first.state_parts(), first.state())), 3)
    second.train()
    assert_bits(whole.model.state_dict(), second.model.state_dict())
    assert second.seen_images == whole.seen_images == 24


def test_evaluating_restores_the_mode_of_every_module():
    model = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(2)), "b": nn.Dropout()}).train()
    model["a"][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_evaluate_feeds_every_batch_once_and_returns_skipped_items():
    model, evaluator, device = Net().train(), Mock(), torch.device("cpu")
    batches = [Batch(torch.randn(n, 6), torch.zeros(n), [], [f"row {n}"]) for n in (4, 1)]
    skipped = evaluate(model, batches, evaluator, device=device, precision=torch.bfloat16)
    assert skipped == ["row 4", "row 1"]
    predictions = [call.args[0] for call in evaluator.update.call_args_list]
    assert [(len(part), part.dtype) for part in predictions] == [
        (4, torch.bfloat16), (1, torch.bfloat16),
    ]  # fmt: skip
    assert model.training
