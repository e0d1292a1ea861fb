"""Replaced first layers: for small images, normalized patches, whitening."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tract_transfer.build.batches import whitening_images
from tract_transfer.build.data import build_data
from tract_transfer.build.model import build_features
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ConfigError
from tract_transfer.models import build_backbone
from tract_transfer.models.stem import NormedPatches, whiten
from tract_transfer.run.run import run
from tract_transfer.tract import TrAct, find_first_layers

VIT = "name: cifar/vit, args: {depth: 1, width: 48, num_heads: 3}"


def whitened():
    return build_backbone("cifar/resnet18", stem="whitened", args={"width": 8})


@pytest.mark.parametrize(
    "name, stride",
    [
        ("timm/resnet18", 8),
        ("timm/tf_mobilenetv3_small_minimal_100", 16),
        ("torchvision/resnet18", 8),
        ("torchvision/densenet121", 8),
        ("torchvision/shufflenet_v2_x0_5", None),
    ],
)
def test_cifar_stem_is_3x3_with_stride_1_and_no_pool(name, stride):
    with torch.device("meta"):
        plain = build_backbone(name)
    backbone = build_backbone(name, stem="cifar").eval()
    assert backbone.origin == {"name": name, "stem": "cifar", "args": {}}
    stem = backbone.get_submodule(backbone.first_layers[0])
    old = plain.get_submodule(plain.first_layers[0])
    assert type(stem) is nn.Conv2d  # and not timm's Conv2dSame
    assert stem.weight.shape == (old.out_channels, 3, 3, 3)
    assert (stem.stride, stem.padding) == ((1, 1), (1, 1))
    assert (stem.bias is None) == (old.bias is None)
    pools = [n for n, module in backbone.named_modules() if isinstance(module, nn.MaxPool2d)]
    assert not any(name.endswith(("maxpool", "pool0")) for name in pools)
    if stride is not None:
        assert max(info.stride for info in backbone.map_info.values()) == stride
    with torch.no_grad():
        assert backbone.pooled(torch.rand(1, 3, 32, 32)).shape == (1, backbone.feature_dim)


@pytest.mark.parametrize("dual", [False, True])
def test_patches_are_normalized_before_and_with_dual_after(dual):
    convolution = nn.Conv2d(3, 10, 4, stride=4)
    images = torch.randn(2, 3, 8, 10)  # the last two columns are not a complete patch
    patches = NormedPatches(convolution, dual=dual)
    patch = images[1, :, 4:8, 0:4].flatten()
    weight, bias = convolution.weight.flatten(1), convolution.bias
    expected = F.linear(F.layer_norm(patch, (48,)), weight, bias)
    if dual:
        expected = F.layer_norm(expected, (10,))
    torch.testing.assert_close(patches(images)[1, :, 1, 0], expected)
    patches.before, patches.after = nn.Identity(), nn.Identity()
    torch.testing.assert_close(patches(images), convolution(images))


@pytest.mark.parametrize("stem", ["patch_norm", "dual_patch_norm"])
def test_tract_treats_the_layer_behind_the_norm(stem):
    torch.manual_seed(0)
    args = {"depth": 1, "width": 48, "num_heads": 3}
    backbone = build_backbone("cifar/vit", stem=stem, args=args).train()
    assert backbone.first_layers == ["model.patch_embed.proj.linear"]
    assert find_first_layers(backbone) == backbone.first_layers
    images = torch.rand(4, 3, 32, 32)
    tract = TrAct(backbone, 0.1)
    backbone.pooled(images).square().sum().backward()
    patches = backbone.model.patch_embed.proj
    plain = patches.linear.weight.grad.clone()
    tract.step()
    unfolded = F.unfold(backbone.normalize(images), 4, stride=4).transpose(1, 2)
    rows = patches.before(unfolded).detach().flatten(0, 1)
    gram = rows.T @ rows / len(rows) + 0.1 * torch.eye(48)
    expected = torch.linalg.solve(gram, plain.T).T
    torch.testing.assert_close(patches.linear.weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_whitening_decorrelates_patches():
    generator = torch.Generator().manual_seed(0)
    smooth = F.avg_pool2d(torch.rand(20, 3, 34, 34, generator=generator), 3, stride=1)
    images = (smooth * smooth.new_tensor([1.0, 0.7, 0.5]).view(3, 1, 1)).clamp(0, 1)
    backbone = whitened()
    whiten(backbone, images.split(7))
    layer = backbone.get_submodule(backbone.first_layers[0])
    features = layer(backbone.normalize(images)).detach()
    assert torch.equal(features[:, :12], -features[:, 12:])
    rows = features[:, :12].double().movedim(1, 3).reshape(-1, 12)
    patches = F.unfold(backbone.normalize(images), 2).double().movedim(1, 2).reshape(-1, 12)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    expected = torch.diag(variances / (variances + 5e-4))
    torch.testing.assert_close(rows.T @ rows / len(rows), expected, atol=1e-3, rtol=1e-3)


def test_whitening_is_made_from_training_images_frozen_and_saved(tmp_path, load_tiny):
    words = ("model.backbone.stem=whitened", "solver.max_iters=3", "solver.ema_decay=0.2")
    config = load_tiny(tmp_path, *words)
    run(config)
    expected = whitened()
    whiten(expected, whitening_images(config, build_data(config).train))
    words = ("model.backbone={name: null, args: {}}", f"model.weights={tmp_path / 'run'}")
    loaded = build_features(load_tiny(tmp_path, *words, f"output_dir={tmp_path / 'next'}"))
    (name,) = expected.first_layers
    assert loaded.first_layers == [name]
    assert torch.equal(loaded.get_submodule(name).weight, expected.get_submodule(name).weight)


def test_stems_that_a_task_cannot_use_are_refused(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "model.backbone.stem=whitened", "tract.enabled=true")
    frozen = r"tract: .*whitening.weight is frozen, so TrAct would do"
    with pytest.raises(ConfigError, match=frozen):
        build_trainer(config, build_data(config), build_accelerator(config))
    config = load_tiny(tmp_path, "model.backbone.stem=whitened", task="detection")
    with pytest.raises(
        ConfigError, match=r"model.backbone.stem: whitened is computed from the training"
    ):
        build_features(config)
    for key in ("mean: [-0.1, 0, 0]", "mean: [1.1, 0, 0]", "std: [0, 1, 1]"):
        with pytest.raises(ConfigError, match=r"model.backbone.(mean|std).0: Input should be"):
            load_tiny(tmp_path, f"model.backbone={{{VIT}, {key}}}")


def test_vit_trains_with_tract_on_images_in_0_to_255(tmp_path, load_tiny):
    std = 1 / 255
    words = f"model.backbone={{{VIT}, stem: dual_patch_norm, mean: [0, 0, 0], std: {[std] * 3}}}"
    small = ("data.transforms.size_px=32", "solver.max_iters=2")
    config = load_tiny(tmp_path, words, *small, "tract.enabled=true")
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    normalized = build_features(config).normalize(images)[0, :, 0, 0]
    torch.testing.assert_close(normalized, torch.tensor([0.0, 100, 255]))
    assert run(config)["iterations"] == 2
