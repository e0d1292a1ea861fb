"""Published checkpoints of all layouts load whole, or are refused with a report."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import WeightsError, load_weights
from tract_transfer.models.weights_detectron2 import save_detectron2
from tract_transfer.models.weights_match import HEADS, find_prefix


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def shifted(state):
    """Another copy of the weights, which must not be taken."""
    return {name: tensor + 1 if tensor.is_floating_point() else tensor
            for name, tensor in state.items()}  # fmt: skip


# How a checkpoint of each kind holds the weights `s` of a network and another copy `o` of them.
LAYOUTS = {
    "timm": lambda s, o: s,
    "timm's training": lambda s, o: {"state_dict": o, "state_dict_ema": s, "arch": "resnet18"},
    "DeiT": lambda s, o: {"model": o, "model_ema": s, "epoch": 300},
    "DeiT, published": lambda s, o: {"model": s},
    "DINO": lambda s, o: {
        "student": prefixed("module.backbone.", o), "teacher": prefixed("backbone.", s),
        "dino_loss": {"center": torch.zeros(1, 3)},
    },
    "DINOv2": lambda s, o: {
        "teacher": {**prefixed("backbone.", s), "dino_head.last.weight": o["fc.bias"]}
    },
    "MoCo": lambda s, o: {
        "state_dict": {
            **prefixed("module.encoder_q.", s), **prefixed("module.encoder_k.", o),
            "module.queue": torch.zeros(4),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}},
    },
    "MoCo v3": lambda s, o: {
        "state_dict": {
            **prefixed("module.base_encoder.", s), **prefixed("module.momentum_encoder.", o),
        }
    },
    "VISSL": lambda s, o: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": prefixed("_feature_blocks.", s), "heads": {}}}
        }
    },
    "Lightning": lambda s, o: {"state_dict": prefixed("model.", s), "loops": {"fit": 1}},
    "DDP": lambda s, o: prefixed("module.", s),
    "torch.compile": lambda s, o: prefixed("_orig_mod.", s),
    "compiled and wrapped": lambda s, o: {"model": prefixed("_orig_mod.module.", s)},
    "a detector": lambda s, o: {"model": {**prefixed("backbone.body.", s), "rpn.a": o["fc.bias"]}},
    "float16": lambda s, o: {n: t.half() if t.is_floating_point() else t for n, t in s.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture(scope="module")
def state(resnet):
    renamed = {"head.fc.weight": "fc.weight", "head.fc.bias": "fc.bias"}
    return {renamed.get(n, n): t.half().float() if t.is_floating_point() else t
            for n, t in resnet.state_dict().items()}  # fmt: skip


def blank(name="timm/test_resnet", **args):
    torch.manual_seed(1)
    return build_backbone(name, args=args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_whole(layout, state, tmp_path):
    backbone = blank()
    torch.save(LAYOUTS[layout](state, shifted(state)), tmp_path / "w.pth")
    report = load_weights(backbone, tmp_path / "w.pth")
    loaded = backbone.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert report.fits
    assert report.num_loaded == report.num_parameters
    assert report.num_parameters == sum(p.numel() for p in backbone.parameters())
    heads = [name for name in report.dropped[HEADS[0]] if "fc." in name]
    assert len(heads) == 2
    assert backbone.loaded is report
    assert any("(100.00%)" in line for line in report.lines())


def test_safetensors_of_the_hub_are_read(state, tmp_path):
    backbone = blank()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    load_weights(backbone, tmp_path)
    assert torch.equal(backbone.model.conv1[0].weight, state["conv1.0.weight"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_weights(backbone, tmp_path)


def test_torchvision_s_own_files_are_read(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v3_small()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = blank("torchvision/mobilenet_v3_small")
    report = load_weights(backbone, tmp_path / "w.pth")
    assert report.dropped == {HEADS[0]: ["classifier.3.weight", "classifier.3.bias"]}
    assert torch.equal(backbone.model.classifier[0].weight, source.classifier[0].weight)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_detectron2_s_files_are_read_with_their_colours(suffix, tmp_path):
    torch.manual_seed(0)
    source = build_backbone("torchvision/resnet18")
    source.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    file = tmp_path / f"w{suffix}"
    beside = save_detectron2(file, source, {})
    backbone = blank("timm/resnet18")
    load_weights(backbone, file)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (each.eval().pooled(images) for each in (source, backbone))
    torch.testing.assert_close(found, expected)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="in which order and by what the images"):
        load_weights(backbone, file)


# ------------------------------------------------------------------------------------ resizing


def vit(**args):
    return {"depth": 2, "embed_dim": 24, "num_heads": 3, **args}


@pytest.mark.parametrize(
    "name, prefix_tokens, args",
    [
        ("vit_tiny_patch16_224", 1, {}),
        ("deit_tiny_distilled_patch16_224", 2, {}),
        ("vit_small_patch14_reg4_dinov2", 0, {"patch_size": 16}),
    ],
)
def test_position_embeddings_are_resized_and_tokens_kept(name, prefix_tokens, args, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name, **vit(img_size=64, **args))
    source.pos_embed.data += 1
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    backbone = blank(f"timm/{name}", **vit(img_size=96, **args))
    report = load_weights(backbone, tmp_path / "w.pth")
    tokens = prefix_tokens
    shapes = f"(1, {16 + tokens}, 24) -> (1, {36 + tokens}, 24)"
    assert report.resized == {"pos_embed": shapes}
    old, new = source.pos_embed.detach(), backbone.model.pos_embed.detach()
    assert torch.equal(new[:, :tokens], old[:, :tokens])
    expected = timm.layers.resample_abs_pos_embed(old, [6, 6], num_prefix_tokens=tokens)
    torch.testing.assert_close(new, expected)
    for token in ("cls_token", "dist_token", "reg_token"):
        if (own := getattr(source, token, None)) is not None:
            assert torch.equal(getattr(backbone.model, token), own)


def test_torchvision_s_vit_is_resized(tmp_path):
    sizes = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    source = torchvision.models.VisionTransformer(image_size=32, **sizes)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = blank("torchvision/vit_b_16")
    backbone.model = torchvision.models.VisionTransformer(image_size=64, **sizes)
    backbone.model.heads = torch.nn.Identity()
    report = load_weights(backbone, tmp_path / "w.pth")
    assert report.resized == {"encoder.pos_embedding": "(1, 5, 8) -> (1, 17, 8)"}


def test_a_patch_embedding_is_resampled_when_told_alone(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", **vit(img_size=64))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = blank("timm/vit_tiny_patch16_224", **vit(img_size=32, patch_size=8))
    before = backbone.model.patch_embed.proj.weight.detach().clone()
    says = (
        r"but for its first layer.*\(24, 3, 16, 16\) for \(24, 3, 8, 8\).*model\.adapt_stem: true"
    )
    with pytest.raises(WeightsError, match=says):
        load_weights(backbone, tmp_path / "w.pth")
    assert torch.equal(backbone.model.patch_embed.proj.weight, before)
    report = load_weights(backbone, tmp_path / "w.pth", adapt_stem=True)
    assert report.resized["patch_embed.proj.weight"] == "(24, 3, 16, 16) -> (24, 3, 8, 8)"
    expected = timm.layers.resample_patch_embed(source.patch_embed.proj.weight, [8, 8])
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, expected)


@pytest.mark.parametrize("adapt_stem", [False, True])
def test_a_convolution_stem_is_never_cropped(adapt_stem, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    backbone = blank("cifar/resnet18")
    says = r"but for its first layer.*conv1.*model\.ignore_missing: \['conv1\.weight'\]"
    with pytest.raises(WeightsError, match=says):
        load_weights(backbone, tmp_path / "w.pth", adapt_stem=adapt_stem)
    report = load_weights(backbone, tmp_path / "w.pth", ignore_missing=["conv1.weight"])
    assert report.started_anew == ["conv1.weight"]
    assert report.num_parameters - report.num_loaded == 64 * 3 * 9


def test_deit3_s_layer_scales_are_renamed(tmp_path):
    source = timm.create_model("deit3_small_patch16_224", **vit(img_size=32))
    state = source.state_dict()
    old = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
           for n, t in state.items()}  # fmt: skip
    assert old.keys() != state.keys()
    torch.save({"model": old}, tmp_path / "w.pth")
    backbone = blank("timm/deit3_small_patch16_224", **vit(img_size=32))
    assert load_weights(backbone, tmp_path / "w.pth").fits


# ------------------------------------------------------------------------------------ refusals


def refused(backbone, content, folder, **options):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.save(content, folder / "w.pth")
    with pytest.raises(WeightsError) as caught:
        load_weights(backbone, folder / "w.pth", **options)
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())
    assert backbone.loaded is None
    assert str(folder / "w.pth") in str(caught.value)
    return str(caught.value), caught.value.report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, state, tmp_path):
    bad = {**state, "conv1.0.weight": state["conv1.0.weight"].clone()}
    bad["conv1.0.weight"][0, 0, 0, 0] = value
    message, report = refused(blank(), bad, tmp_path)
    assert "NaN or infinite values in conv1.0.weight" in message
    assert "earlier checkpoint" in message
    assert report.not_finite == ["conv1.0.weight"]


def test_a_deeper_model_s_file_is_refused_and_named(tmp_path):
    deeper = timm.create_model("resnet34").state_dict()
    message, report = refused(blank("timm/resnet18"), deeper, tmp_path)
    assert "It looks like a ResNet-34" in message
    assert not report.missing
    assert "layer1.2.conv1.weight" in report.unexpected


@pytest.mark.parametrize(
    "source, says",
    [
        (
            lambda: timm.create_model("vit_tiny_patch16_224", **vit()),
            "width 24, 2 blocks, patches of 16 px",
        ),
        (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8), "torchvision/vit_"),
        (lambda: torch.nn.Linear(3, 3), "another architecture"),
    ],
)
def test_another_model_s_file_is_refused_and_named(source, says, tmp_path):
    message, _ = refused(blank(), source().state_dict(), tmp_path)
    assert says in message
    assert "Set model.backbone" in message


def test_quantized_weights_are_refused(state, tmp_path):
    quantized = {
        **state,
        "conv1.0.weight": torch.zeros_like(state["conv1.0.weight"]).to(torch.int8),
    }
    message, _ = refused(blank(), quantized, tmp_path)
    assert "torch.int8 for torch.float32" in message


def test_of_equal_copies_the_shorter_path_is_taken():
    assert find_prefix(["a.b"], ["x.y.a.b", "x.a.b"]) == "x."
    assert find_prefix(["a.b"], ["x.a.b", "x.ema.a.b"]) == "x.ema."
    assert find_prefix(["a.b"], ["c"]) == ""
