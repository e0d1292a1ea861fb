"""A run goes on with the step of Adam's that it began with, whatever is the default by then."""

import copy

import pytest
import torch
from accelerate import Accelerator

from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_trainer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("begun", "now"), [(None, True), (True, None)])
def test_it_goes_on_to_the_same_bits(tmp_path, load_tiny, precision, begun, now):
    """Under fp16 a gradient scaler calls fused steps otherwise than plain ones."""
    solver = "solver={optimizer: adamw, momentum: null, lr: 1e-3, schedule: constant}"
    config = load_tiny(tmp_path, solver, f"engine.precision={precision}")
    data = build_data(config)

    def trainer_of(fused):
        trainer = build_trainer(config, data, Accelerator(cpu=True))
        for group in trainer.optimizer.param_groups:
            assert group["fused"], "the default of today"
        groups = [{**group, "fused": fused} for group in trainer.optimizer.param_groups]
        trainer.optimizer = torch.optim.AdamW(groups, fused=fused)
        return trainer

    whole, first, second = trainer_of(begun), trainer_of(begun), trainer_of(now)
    whole.train()
    first.max_iters = 3
    first.train()
    second.load_state(*copy.deepcopy((first.state_parts(), first.state())), 3)
    second.train()
    theirs = second.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
