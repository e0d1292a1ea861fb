"""Other first layers: normalised patches, whitening, and images as they are."""

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
from tract_transfer.models.stem import NormedPatches, change_stem, whiten
from tract_transfer.models.weights import load_weights
from tract_transfer.run.run import run
from tract_transfer.tract import TrAct, find_first_layers

ARGS = {"depth": 1, "width": 48, "num_heads": 3}
VIT = "name: cifar/vit, args: {depth: 1, width: 48, num_heads: 3}"
SMALL = ("data.transforms.size_px=32", "solver.max_iters=2")


def vit(stem="default"):
    torch.manual_seed(0)
    return build_backbone("cifar/vit", stem=stem, args=ARGS)


@pytest.mark.parametrize("dual", [False, True])
def test_without_its_norms_it_is_the_convolution(dual):
    convolution = nn.Conv2d(3, 10, 4, stride=4)
    patches = NormedPatches(convolution, dual=dual)
    patches.before, patches.after = nn.Identity(), nn.Identity()
    images = torch.randn(2, 3, 16, 26)  # the last two columns are no whole patch
    torch.testing.assert_close(patches(images), convolution(images))


@pytest.mark.parametrize("dual", [False, True])
def test_patches_are_normalised_before_and_with_dual_after(dual):
    convolution = nn.Conv2d(3, 10, 4, stride=4, bias=False)
    images = torch.randn(2, 3, 8, 8)
    maps = NormedPatches(convolution, dual=dual)(images)
    patch = images[1, :, 4:8, 0:4].flatten()
    expected = convolution.weight.flatten(1) @ F.layer_norm(patch, (48,))
    if dual:
        expected = F.layer_norm(expected, (10,))
    torch.testing.assert_close(maps[1, :, 1, 0], expected)


@pytest.mark.parametrize("stem", ["patch_norm", "dual_patch_norm"])
def test_tract_treats_the_layer_after_the_norm(stem):
    backbone = vit(stem).train()
    assert backbone.first_layers == ["model.patch_embed.proj.linear"]
    assert find_first_layers(backbone) == backbone.first_layers
    images = torch.rand(4, 3, 32, 32)
    tract = TrAct(backbone, 0.1)
    backbone.pooled(images).square().sum().backward()
    stem_module = backbone.model.patch_embed.proj
    plain = stem_module.linear.weight.grad.clone()
    tract.step()
    patches = F.unfold(backbone.normalize(images), 4, stride=4).transpose(1, 2)
    rows = stem_module.before(patches).detach().flatten(0, 1)
    gram = rows.T @ rows / len(rows) + 0.1 * torch.eye(48)
    expected = torch.linalg.solve(gram, plain.T).T
    torch.testing.assert_close(stem_module.linear.weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_published_weights_stay_the_embedding_s():
    plain, normed = vit(), vit()
    change_stem(normed, "patch_norm")
    old = plain.model.patch_embed.proj
    new = normed.model.patch_embed.proj.linear
    assert torch.equal(old.weight.flatten(1), new.weight)
    assert torch.equal(old.bias, new.bias)


def digits_of(tmp_path, load_tiny, *words):
    config = load_tiny(tmp_path, *words)
    return config, build_data(config)


def test_whitening_makes_patches_of_no_direction(tmp_path, load_tiny):
    generator = torch.Generator().manual_seed(0)
    smooth = F.avg_pool2d(torch.rand(20, 3, 34, 34, generator=generator), 3, stride=1)
    images = (smooth * smooth.new_tensor([1.0, 0.7, 0.5]).view(3, 1, 1)).clamp(0, 1)
    backbone = build_backbone("cifar/resnet18", stem="whitened", args={"width": 8})
    whiten(backbone, images.split(7))
    layer = backbone.get_submodule(backbone.first_layers[0])
    maps = layer(backbone.normalize(images)).detach()
    assert torch.equal(maps[:, :12], -maps[:, 12:])
    rows = maps[:, :12].double().movedim(1, 3).reshape(-1, 12)
    patches = F.unfold(backbone.normalize(images), 2).double().movedim(1, 2).reshape(-1, 12)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    expected = torch.diag(variances / (variances + 5e-4))
    torch.testing.assert_close(rows.T @ rows / len(rows), expected, atol=1e-3, rtol=1e-3)


def test_whitening_is_by_training_images_and_frozen(tmp_path, load_tiny):
    words = ("model.backbone.stem=whitened", "solver.max_iters=3", "solver.ema_decay=0.2")
    config, data = digits_of(tmp_path, load_tiny, *words)
    trainer = build_trainer(config, data, build_accelerator(config))
    name = "backbone.model.conv1.whitening.weight"
    filters = trainer.model.state_dict()[name].clone()
    again = build_backbone("cifar/resnet18", stem="whitened", args={"width": 8})
    whiten(again, whitening_images(config, data.train))
    assert torch.equal(filters, again.state_dict()[name.removeprefix("backbone.")])
    trainer.train()
    for model in (trainer.model, trainer.evaluated_model):
        assert torch.equal(model.state_dict()[name], filters)


def test_a_whitened_run_is_whole_on_disk(tmp_path, load_tiny):
    config, _ = digits_of(tmp_path, load_tiny, "model.backbone.stem=whitened", "solver.max_iters=2")
    run(config)
    words = ("model.backbone={name: null, args: {}}", f"model.weights={tmp_path / 'run'}")
    other, data = digits_of(tmp_path, load_tiny, *words, f"output_dir={tmp_path / 'next'}")
    loaded = build_features(other)
    saved = build_backbone("cifar/resnet18", stem="whitened", args={"width": 8})
    load_weights(saved, tmp_path / "run")
    images = torch.stack([data.train.image(index) for index in range(2)])
    torch.testing.assert_close(loaded.eval().pooled(images), saved.eval().pooled(images))


def test_tract_refuses_the_frozen_whitening(tmp_path, load_tiny):
    words = ("model.backbone.stem=whitened", "tract.enabled=true")
    config, data = digits_of(tmp_path, load_tiny, *words)
    with pytest.raises(
        ConfigError, match=r"tract: .*whitening.weight is frozen, so TrAct would do"
    ):
        build_trainer(config, data, build_accelerator(config))


def test_a_detector_has_no_images_to_whiten_by(tmp_path, load_tiny):
    config = load_tiny(tmp_path, "model.backbone.stem=whitened", task="detection")
    with pytest.raises(ConfigError, match=r"model.backbone.stem: whitened is made from the images"):
        build_features(config)


@pytest.mark.parametrize(
    ("name", "stem", "says"),
    [
        ("timm/resnet18", "patch_norm", "are for models that begin with a convolution over patch"),
        ("timm/mobilenetv2_050", "dual_patch_norm", "Set model.backbone.stem: default"),
        ("cifar/vit", "cifar", "Set its patch size instead"),
        ("timm/resnet18", "round", "must be default, cifar, patch_norm, dual_patch_norm or whit"),
    ],
)
def test_stems_that_do_not_fit_are_refused(name, stem, says, refused):
    with refused(f"{name} with the stem {stem}", ValueError, match=says):
        build_backbone(name, stem=stem)


@pytest.mark.parametrize(("std", "largest"), [("1.0", 1.0), ("0.00392156862745098", 255.0)])
def test_images_can_stay_as_they_are(tmp_path, load_tiny, std, largest):
    words = f"model.backbone={{{VIT}, mean: [0, 0, 0], std: [{std}, {std}, {std}]}}"
    config = load_tiny(tmp_path, words, *SMALL, "tract.enabled=true")
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    found = build_features(config).normalize(images)[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0, 100 / 255, 1.0]) * largest)
    assert run(config)["iterations"] == 2


@pytest.mark.parametrize("key", ["mean: [-0.1, 0, 0]", "mean: [1.1, 0, 0]", "std: [0, 1, 1]"])
def test_colours_have_their_range(tmp_path, load_tiny, key):
    with pytest.raises(ConfigError, match=r"model.backbone.(mean|std).0: Input should be"):
        load_tiny(tmp_path, f"model.backbone={{{VIT}, {key}}}")


@pytest.mark.parametrize("stem", ["patch_norm", "dual_patch_norm"])
def test_a_normed_vit_trains_with_tract(tmp_path, load_tiny, stem):
    config = load_tiny(
        tmp_path, f"model.backbone={{{VIT}, stem: {stem}}}", *SMALL, "tract.enabled=true"
    )
    assert run(config)["iterations"] == 2


def test_the_paper_s_vit_has_a_name_of_timm_s_and_trains_with_tract(tmp_path, load_tiny):
    args = "{img_size: 32, patch_size: 4, depth: 7, num_heads: 12, mlp_ratio: 1}"
    config = load_tiny(
        tmp_path, f"model.backbone={{name: timm/vit_small_patch16_224, args: {args}}}", *SMALL,
        "solver.max_iters=1", "data.batch_size=8", "tract.enabled=true",
        "solver={optimizer: adam, momentum: null, lr: 0.001, weight_decay: 5e-5}",
        "model.label_smoothing=0.1",
    )  # fmt: skip
    data = build_data(config)
    trainer = build_trainer(config, data, build_accelerator(config))
    own = build_backbone("cifar/vit")
    backbone = trainer.model.backbone
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in own.state_dict().items()}
    assert (backbone.image_size_px, backbone.feature_dim) == (32, 384)
    weight = backbone.model.patch_embed.proj.weight
    before = weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, weight)
