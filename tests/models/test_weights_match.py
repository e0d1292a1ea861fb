"""Published checkpoints of all layouts load completely, or are refused with a report."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import WeightsError, load_weights
from tract_transfer.models.weights_match import HEAD, TRAINING_ONLY, find_prefix


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def shifted(state):
    """Another copy of the weights, which must not be loaded."""
    return {name: tensor + 1 if tensor.is_floating_point() else tensor
            for name, tensor in state.items()}  # fmt: skip


# Layouts of a checkpoint with the weights `s` of a network and another copy `o` of them.
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
        "teacher": {
            **prefixed("backbone.", s), "dino_head.last.weight": o["fc.bias"],
            "backbone.mask_token": torch.zeros(3),
        }
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
def state():
    torch.manual_seed(0)
    resnet = timm.create_model("test_resnet", num_classes=5)
    renamed = {"head.fc.weight": "fc.weight", "head.fc.bias": "fc.bias"}
    return {renamed.get(n, n): t.half().float() if t.is_floating_point() else t
            for n, t in resnet.state_dict().items()}  # fmt: skip


def blank(name="timm/test_resnet", **args):
    torch.manual_seed(1)
    return build_backbone(name, args=args)


def load(backbone, content, folder, **options):
    torch.save(content, folder / "w.pth")
    return load_weights(backbone, folder / "w.pth", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_completely(layout, state, tmp_path):
    backbone = blank()
    report = load(backbone, LAYOUTS[layout](state, shifted(state)), tmp_path)
    loaded = backbone.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert report.fits
    assert report.num_loaded == report.num_parameters
    assert report.num_parameters == sum(p.numel() for p in backbone.parameters())
    assert sum("fc." in name for name in report.dropped[HEAD]) == 2
    assert (TRAINING_ONLY in report.dropped) == (layout == "DINOv2")
    assert backbone.loaded is report
    assert any("(100.00%)" in line for line in report.lines())


def test_folders_of_the_hub_are_read(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    for _ in range(2):
        backbone = blank()
        load_weights(backbone, tmp_path)
        assert torch.equal(backbone.model.conv1[0].weight, state["conv1.0.weight"])
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        torch.save(state, tmp_path / "pytorch_model.bin")


def test_files_of_torchvision_are_read(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v3_small()
    backbone = blank("torchvision/mobilenet_v3_small")
    report = load(backbone, source.state_dict(), tmp_path)
    assert report.dropped == {HEAD: ["classifier.3.weight", "classifier.3.bias"]}
    assert torch.equal(backbone.model.classifier[0].weight, source.classifier[0].weight)


def test_shorter_prefix_of_equal_copies_is_preferred():
    assert find_prefix(["a.b"], ["x.y.a.b", "x.a.b"]) == "x."
    assert find_prefix(["a.b"], ["x.a.b", "x.ema.a.b"]) == "x.ema."
    assert find_prefix(["a.b"], ["c"]) == ""


# Resizing


def vit(**args):
    return {"depth": 2, "embed_dim": 24, "num_heads": 3, **args}


@pytest.mark.parametrize(
    "name, tokens, args",
    [
        ("vit_tiny_patch16_224", 1, {}),
        ("deit_tiny_distilled_patch16_224", 2, {}),
        ("vit_small_patch14_reg4_dinov2", 0, {"patch_size": 16}),
    ],
)
def test_position_embeddings_are_resized_and_tokens_kept(name, tokens, args, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name, **vit(img_size=64, **args))
    source.pos_embed.data += 1
    backbone = blank(f"timm/{name}", **vit(img_size=96, **args))
    report = load(backbone, {"model": source.state_dict()}, tmp_path)
    assert report.resized == {"pos_embed": f"(1, {16 + tokens}, 24) -> (1, {36 + tokens}, 24)"}
    old, new = source.pos_embed.detach(), backbone.model.pos_embed.detach()
    assert torch.equal(new[:, :tokens], old[:, :tokens])
    expected = timm.layers.resample_abs_pos_embed(old, [6, 6], num_prefix_tokens=tokens)
    torch.testing.assert_close(new, expected)
    for token in ("cls_token", "dist_token", "reg_token"):
        if (expected := getattr(source, token, None)) is not None:
            assert torch.equal(getattr(backbone.model, token), expected)


def test_vit_of_torchvision_is_resized(tmp_path):
    sizes = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    source = torchvision.models.VisionTransformer(image_size=32, **sizes)
    with torch.device("meta"):
        backbone = blank("torchvision/vit_b_16")
    backbone.mean, backbone.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    backbone.model = torchvision.models.VisionTransformer(image_size=64, **sizes)
    backbone.model.heads = torch.nn.Identity()
    report = load(backbone, source.state_dict(), tmp_path)
    assert report.resized == {"encoder.pos_embedding": "(1, 5, 8) -> (1, 17, 8)"}


def test_patch_embedding_is_resampled_only_with_adapt_stem(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", **vit(img_size=64))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = blank("timm/vit_tiny_patch16_224", **vit(img_size=32, patch_size=8))
    before = backbone.model.patch_embed.proj.weight.detach().clone()
    match = (
        r"but for its first layer.*\(24, 3, 16, 16\) for \(24, 3, 8, 8\).*model\.adapt_stem: true"
    )
    with pytest.raises(WeightsError, match=match):
        load_weights(backbone, tmp_path / "w.pth")
    assert torch.equal(backbone.model.patch_embed.proj.weight, before)
    report = load_weights(backbone, tmp_path / "w.pth", adapt_stem=True)
    assert report.resized["patch_embed.proj.weight"] == "(24, 3, 16, 16) -> (24, 3, 8, 8)"
    expected = timm.layers.resample_patch_embed(source.patch_embed.proj.weight, [8, 8])
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, expected)


@pytest.mark.parametrize("adapt_stem", [False, True])
def test_convolution_stem_is_never_resampled(adapt_stem, tmp_path):
    channels = [8, 16, 32, 64]
    torch.save(timm.create_model("resnet18", channels=channels).state_dict(), tmp_path / "w.pth")
    backbone = blank("cifar/resnet18", width=8)
    match = r"but for its first layer.*conv1.*model\.ignore_missing: \['conv1\.weight'\]"
    with pytest.raises(WeightsError, match=match):
        load_weights(backbone, tmp_path / "w.pth", adapt_stem=adapt_stem)
    report = load_weights(backbone, tmp_path / "w.pth", ignore_missing=["conv1.weight"])
    assert report.started_anew == ["conv1.weight"]
    assert report.num_parameters - report.num_loaded == 64 * 3 * 9


def test_layer_scales_of_deit3_are_renamed(tmp_path):
    state = timm.create_model("deit3_small_patch16_224", **vit(img_size=32)).state_dict()
    old = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
           for n, t in state.items()}  # fmt: skip
    assert old.keys() != state.keys()
    backbone = blank("timm/deit3_small_patch16_224", **vit(img_size=32))
    assert load(backbone, {"model": old}, tmp_path).fits


def with_first_weight(change):
    return lambda state: {**state, "conv1.0.weight": change(state["conv1.0.weight"])}


NOT_FINITE = r"NaN or infinite values in conv1\.0\.weight.*earlier checkpoint"
# content of a file -> the message
REFUSED = {
    "NaN": (with_first_weight(lambda weight: weight * float("nan")), NOT_FINITE),
    "infinite": (with_first_weight(lambda weight: weight / 0), NOT_FINITE),
    "quantized": (
        with_first_weight(lambda weight: weight.to(torch.int8)),
        r"torch\.int8 for torch\.float32",
    ),
    "a ViT of timm": (
        lambda _: timm.create_model("vit_tiny_patch16_224", **vit()).state_dict(),
        "width 24 with 2 blocks and patches of 16 px",
    ),
    "a ViT of torchvision": (
        lambda _: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8).state_dict(),
        "torchvision/vit_.*Set model.backbone",
    ),
    "another width": (
        lambda state: {name: torch.cat([t, t]) if t.ndim else t for name, t in state.items()},
        r"of another shape conv1\.0\.weight \(\d+, 3, 3, 3\) for \(\d+, 3, 3, 3\).*and \d+ more",
    ),
    "another network": (lambda _: torch.nn.Linear(3, 3).state_dict(), "another architecture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(name, state, tmp_path, refused):
    make, match = REFUSED[name]
    backbone = blank()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with refused(f"weights: {name}", WeightsError, match=match) as caught:
        load(backbone, make(state), tmp_path)
    assert all(torch.equal(before[key], t) for key, t in backbone.state_dict().items())
    assert backbone.loaded is None
    assert str(tmp_path / "w.pth") in str(caught.value)
    summary = caught.value.report.summary()
    assert not summary["fits"]
    assert any(summary[key] for key in ("missing", "misshapen", "unexpected", "not_finite"))


def test_unexpected_names_alone_are_refused(tmp_path):
    channels = [8, 8, 8, 8]
    deeper = timm.create_model("resnet34", channels=channels).state_dict()
    with pytest.raises(WeightsError, match="It looks like a ResNet-34") as caught:
        load(blank("timm/resnet18", channels=channels), deeper, tmp_path)
    assert not caught.value.report.missing
    assert "layer1.2.conv1.weight" in caught.value.report.unexpected


# Files of transformers

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}


@pytest.mark.parametrize("kind", ["vit", "vit, newer names", "dinov2", "resnet18", "resnet50"])
def test_model_of_transformers_computes_the_same(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind.startswith("vit"):
        config = transformers.ViTConfig(**TINY, intermediate_size=96, layer_norm_eps=1e-6)
        model = transformers.ViTForImageClassification(config)
        name, inner, patch_size = "timm/vit_tiny_patch16_224", model.vit, 16
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**TINY, patch_size=16)
        model = inner = transformers.Dinov2Model(config)
        name, patch_size = "timm/vit_small_patch14_dinov2", 16
    else:
        basic = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
        config = transformers.ResNetConfig(**(basic if kind == "resnet18" else {}))
        model = transformers.ResNetForImageClassification(config)
        name, inner, patch_size = f"timm/{kind}", model.resnet, None
    if kind == "vit, newer names":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    args = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 3}
    backbone = build_backbone(name, args=args if patch_size else {}).eval()
    report = load_weights(backbone, tmp_path)
    assert report.num_loaded == report.num_parameters
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out = inner.eval()(backbone.normalize(images))
        expected = out.last_hidden_state[:, 0] if patch_size else out.pooler_output.flatten(1)
        torch.testing.assert_close(backbone.pooled(images), expected, rtol=1e-4, atol=1e-5)
