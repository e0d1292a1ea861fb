"""TrAct treats detectron2's convolution as a plain one, and steps before its clipping."""

import copy

import pytest
import torch
from torch import nn

from tract_transfer.tract import TrAct

pytestmark = pytest.mark.filterwarnings("ignore")
wrappers = pytest.importorskip("detectron2.layers.wrappers")


def test_its_norm_and_activation_do_not_change_the_treatment():
    torch.manual_seed(0)
    wrapped = wrappers.Conv2d(
        3, 4, 5, stride=2, padding=2, norm=nn.BatchNorm2d(4), activation=nn.ReLU()
    )
    plain = nn.Conv2d(3, 4, 5, stride=2, padding=2)
    plain.load_state_dict({n: p for n, p in wrapped.state_dict().items() if "norm" not in n})
    images = torch.randn(2, 3, 16, 16)
    for model in (
        nn.Sequential(wrapped),
        nn.Sequential(plain, copy.deepcopy(wrapped.norm), nn.ReLU()),
    ):
        tract = TrAct(model)
        assert tract.layer_names == ["0"]
        model(images).square().mean().backward()
        tract.step()
    torch.testing.assert_close(wrapped.weight.grad, plain.weight.grad)


def test_a_convolution_that_changes_its_weight_is_refused():
    class Standardized(wrappers.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean())

    with pytest.raises(ValueError, match="changes its weight or its input"):
        TrAct(nn.Sequential(Standardized(3, 4, 3)))


def test_attach_works_on_its_clipping_optimizers():
    """They replace the optimizer's class, so torch's hooks run after the clipping."""
    solver = pytest.importorskip("detectron2.solver")
    cfg = pytest.importorskip("detectron2.config").get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-3
    cfg.SOLVER.MOMENTUM = cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.BASE_LR = 1.0
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4).double(), torch.randn(9, 6).double()
    optimizer = solver.build_optimizer(cfg, layer)
    TrAct(layer).attach(optimizer)
    before = layer.weight.detach().clone()
    (layer(inputs).square().sum() / 2).backward()
    clipped = layer.weight.grad.clamp(-1e-3, 1e-3)
    optimizer.step()
    matrix = inputs.T @ inputs / 9 + 0.1 * torch.eye(6).double()
    torch.testing.assert_close(before - layer.weight, clipped @ torch.linalg.inv(matrix))
