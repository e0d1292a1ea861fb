import pytest
import timm
import torch
import torchvision
from torch import nn

from tract_transfer.models import DETECTORS, HEADS, Classifier, build_backbone
from tract_transfer.tract import TrAct, find_first_layers


def cifar_backbone() -> nn.Module:
    return build_backbone("cifar/resnet18", args={"width": 16})


def test_our_models_say_it_themselves():
    assert find_first_layers(cifar_backbone()) == ["model.conv1"]
    classifier = Classifier(cifar_backbone(), HEADS.get("linear")(128, 3))
    assert find_first_layers(classifier) == ["backbone.model.conv1"]
    assert find_first_layers(nn.Sequential(classifier)) == ["0.backbone.model.conv1"]
    detector = DETECTORS.get("torchvision_fpn")(cifar_backbone(), 3, fpn_channels=8, head_dim=8)
    assert find_first_layers(detector) == ["backbone.model.conv1"]


@pytest.mark.parametrize(
    "name, first",
    [
        ("resnet18", ["conv1"]),
        ("vit_tiny_patch16_224", ["patch_embed.proj"]),
        ("convnext_atto", ["stem.0"]),
        ("mobilenetv3_small_050", ["conv_stem"]),
        ("tf_mobilenetv3_small_minimal_100", ["conv_stem"]),
        ("mixer_s32_224", ["stem.proj"]),
        ("repvgg_a0", ["stem.conv_kxk.conv", "stem.conv_1x1.conv"]),
        ("crossvit_9_240", ["patch_embed.0.proj", "patch_embed.1.proj"]),
    ],
)
def test_timm_s_models_know_it(name, first):
    model = timm.create_model(name) if "crossvit" not in name else on_meta(timm.create_model, name)
    expected = timm.get_pretrained_cfg(name).first_conv
    assert find_first_layers(model) == first == ([expected] if expected == first[0] else first)
    assert TrAct(model).layer_names == first


def on_meta(build, *args) -> nn.Module:
    with torch.device("meta"):
        return build(*args)


@pytest.mark.parametrize(
    "name, first",
    [
        ("resnet18", "conv1"),
        ("vgg11", "features.0"),
        ("swin_t", "features.0.0"),
        ("vit_b_16", "conv_proj"),
        ("densenet121", "features.conv0"),
        ("efficientnet_b0", "features.0.0"),  # its squeeze-and-excitation has 4 channels
    ],
)
def test_of_a_foreign_model_it_is_the_one_convolution_that_reads_images(name, first):
    model = on_meta(torchvision.models.get_model, name)
    assert find_first_layers(model) == [first]
    assert TrAct(model).layer_names == [first]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_may_have_other_channels(channels):
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert find_first_layers(model) == ["0"]


def test_an_mlp_begins_with_its_first_linear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    assert find_first_layers(model) == ["1"]


def test_two_convolutions_of_images_are_ambiguous():
    two = nn.ModuleDict({"left": nn.Conv2d(3, 4, 3), "right": nn.Conv2d(3, 4, 3)})
    with pytest.raises(ValueError, match=r"2 could: \['left', 'right'\].*layers=") as error:
        find_first_layers(two)
    assert "tract.layers" in str(error.value)
    assert TrAct(two, layers=["left", "right"]).layer_names == ["left", "right"]
    assert TrAct(two, layers=iter(["left", "left"])).layer_names == ["left"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3)),
    ],
    ids=["features", "nothing", "transposed"],
)
def test_a_model_without_one_is_refused(model):
    with pytest.raises(ValueError, match=r"none does\. Name it"):
        find_first_layers(model)


def test_models_without_a_layer_to_name_are_told_so():
    with pytest.raises(ValueError, match=r"the convolutions of Sequential are Conv3d\."):
        find_first_layers(nn.Sequential(nn.Conv3d(3, 4, 3)))
    text = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="Sequential is 0, an embedding of tokens"):
        find_first_layers(text)
    assert TrAct(text, layers=["1"]).layer_names == ["1"]


def test_a_foreign_attribute_of_the_same_name_is_passed_over():
    model = nn.Module()
    model.first_layers = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert find_first_layers(model) == ["first_layers.0"]
