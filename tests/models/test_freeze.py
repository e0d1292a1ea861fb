import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tract_transfer.models import build_backbone
from tract_transfer.models.freeze import freeze_stages, set_norm, stage_names

SMALL = {
    "cifar/resnet18": {"width": 8},
    "torchvision/resnet18": {},
    "timm/vgg11_bn": {"mlp_ratio": 0.01},
    "timm/test_vit": {},
    "timm/test_convnext": {},
}


def backbone(name="cifar/resnet18"):
    torch.manual_seed(0)
    return build_backbone(name, args=SMALL.get(name, {}))


def frozen_names(backbone) -> list[str]:
    return [n.removeprefix("model.") for n, p in backbone.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_a_resnet_s_stages_are_detectron2_s(name):
    with torch.device("meta"):
        stages = stage_names(build_backbone(name))
    assert [stage[-1].split(".")[0] for stage in stages] == [
        stages[0][-1], "layer1", "layer2", "layer3", "layer4",
    ]  # fmt: skip
    assert {"conv1", "bn1"} <= set(stages[0])
    assert not any(n.startswith("layer") for n in stages[0])


@pytest.mark.parametrize("name", ["timm/vgg16", "torchvision/vgg16", "timm/vgg16_bn"])
def test_a_vgg_s_stages_are_its_five_groups_of_convolutions(name):
    with torch.device("meta"):
        own = build_backbone(name)
        stages = stage_names(own)
    convs = [
        sum(isinstance(own.model.get_submodule(n), nn.Conv2d) for n in stage) for stage in stages
    ]
    assert convs == [2, 2, 3, 3, 3]


def test_a_vit_s_stages_are_its_embedding_and_quarters_of_its_blocks():
    with torch.device("meta"):
        own = build_backbone("timm/vit_tiny_patch16_224")
        stages = stage_names(own)
    blocks = [sorted({n.split(".")[1] for n in s if n.startswith("blocks.")}) for s in stages]
    assert blocks == [[], ["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"], ["10", "11", "9"]]
    freeze_stages(own, 1)
    assert set(frozen_names(own)) == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_each_stage_more_freezes_more_and_the_first_freezes_the_first_layer(name):
    frozen = []
    for count in range(len(stage_names(backbone(name))) + 1):
        own = backbone(name)
        freeze_stages(own, count)
        frozen.append(frozen_names(own))
        first = own.get_submodule(own.first_layers[0])
        assert first.weight.requires_grad == (count == 0)
    assert frozen[0] == []
    assert all(set(few) < set(more) for few, more in pairwise(frozen))
    last = list(own.pyramid())[-1]
    assert not own.maps(torch.rand(1, 3, 160, 160), [last])[last].requires_grad


def test_too_many_stages_are_refused():
    own = backbone("timm/vgg11_bn")
    with pytest.raises(ValueError, match=r"model\.freeze_at 6 must be at most 5, the stages"):
        freeze_stages(own, 6)


def one_step(own) -> dict[str, torch.Tensor]:
    own.train()
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.1)
    own.pooled(torch.rand(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    return {name: tensor.clone() for name, tensor in own.state_dict().items()}


def test_frozen_stages_keep_weights_and_statistics_and_the_rest_trains():
    own = backbone()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    freeze_stages(own, 2)
    after = one_step(own)
    assert list(after) == list(before)
    still = ("mean", "std", "model.conv1", "model.bn1", "model.layer1")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith(still), name


def test_frozen_norms_keep_weights_and_statistics_in_every_stage():
    own = set_norm(backbone(), "frozen")
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    copied = copy.deepcopy(own)  # as the average of the weights is made
    for each in (own, copied):
        after = one_step(each)
        assert list(after) == list(before)
        for name, tensor in after.items():
            is_norm = ".bn" in name or ".downsample.1." in name or name in ("mean", "std")
            assert torch.equal(tensor, before[name]) == is_norm, name


def test_in_training_frozen_norms_compute_what_they_do_in_eval():
    images = torch.rand(2, 3, 32, 32)
    own = set_norm(backbone(), "frozen")
    torch.testing.assert_close(own.train().pooled(images), own.eval().pooled(images))
    plain = set_norm(backbone(), "trained")
    assert not torch.allclose(plain.train().pooled(images), plain.eval().pooled(images))


@pytest.mark.parametrize("name", ["cifar/resnet18", "timm/test_efficientnet"])
def test_synchronised_norms_are_the_same_on_one_process(name):
    images = torch.rand(2, 3, 64, 64)
    plain, synced = backbone(name), set_norm(backbone(name), "synced")
    assert list(plain.state_dict()) == list(synced.state_dict())
    kinds = [type(m) for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    torch.testing.assert_close(synced.train().pooled(images), plain.train().pooled(images))


@pytest.mark.parametrize(
    "name, norm, says",
    [
        ("timm/test_vit", "frozen", r"model\.norm: frozen is for BatchNorms.*none"),
        ("timm/test_vit", "synced", r"model\.norm: synced is for BatchNorms.*none"),
        ("cifar/resnet18", "groups", "must be trained, frozen or synced, got 'groups'"),
    ],
)
def test_a_norm_there_is_not_is_refused(name, norm, says):
    with pytest.raises(ValueError, match=says):
        set_norm(backbone(name), norm)
