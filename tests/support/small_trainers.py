"""A trainer of any model on given batches, with SGD at a constant learning rate."""

import torch
from accelerate import Accelerator

from tract_transfer.engine.trainer import Trainer
from tract_transfer.tract import TrAct


def make_trainer(model, batches, *, lr=0.1, max_iters=8, tract=None, **options):
    return Trainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        schedule=lambda progress: 1.0,
        set_lr=lambda optimizer, schedule, progress: schedule(progress),
        batches=batches,
        tract=tract or TrAct(model, layers=[]),
        max_iters=max_iters,
        seed=3,
        **options,
    )
