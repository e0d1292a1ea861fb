"""Files of transformers compute the same under timm's names."""

import pytest
import torch

from tract_transfer.models import build_backbone
from tract_transfer.models.weights import load_weights
from tract_transfer.models.weights_match import from_transformers, looks_like

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}


@pytest.mark.parametrize("kind", ["vit", "vit, newer names", "dinov2", "resnet18", "resnet50"])
def test_a_model_of_transformers_computes_the_same(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind.startswith("vit"):
        config = transformers.ViTConfig(**VIT, intermediate_size=96, layer_norm_eps=1e-6)
        model = transformers.ViTForImageClassification(config)
        name, inner, patch_size = "timm/vit_tiny_patch16_224", model.vit, 16
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**VIT, patch_size=16)
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


def test_other_names_are_left_as_they_are():
    state = build_backbone("timm/test_vit").state_dict()
    assert from_transformers(state) == state


def test_an_unknown_network_looks_like_nothing():
    assert looks_like({"a": torch.zeros(1)}) == ""
