import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import nn

from tract_transfer.models import HEADS, Backbone, Classifier
from tract_transfer.models.classifier import FlipClassifier

IMAGES = torch.randint(256, (6, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator())
TARGETS = torch.tensor([0, 3, 1, 2, 3, 3])
SOFT = torch.tensor([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.5, 0, 0, 0.5]])


def classifier(*args, **options) -> Classifier:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    backbone = Backbone(layers, feature_dim=5, first_layers=["1"], mean=[0.5] * 3, std=[0.2] * 3)
    return Classifier(backbone, HEADS.get("linear")(5, 4), *args, **options)


def loss_and_logits(model, targets) -> tuple[torch.Tensor, torch.Tensor]:
    images = IMAGES[: len(targets)]
    return model.train()(images, targets)["loss_cls"], model.eval()(images)


def test_eval_returns_logits_and_training_the_loss():
    model = classifier()
    logits = model.eval()(IMAGES)
    assert logits.shape == (6, 4)
    losses = model.train()(IMAGES, TARGETS)
    assert list(losses) == ["loss_cls"]
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(logits, TARGETS))
    torch.testing.assert_close(logits, model.head(model.backbone.pooled(IMAGES.float() / 255)))


def test_logits_are_not_rounded_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier().eval()(IMAGES)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_that_of_torch(smoothing):
    loss, logits = loss_and_logits(classifier(smoothing), TARGETS)
    expected = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, TARGETS)
    torch.testing.assert_close(loss, expected)
    soft = F.one_hot(TARGETS, 4).float() * (1 - smoothing) + smoothing / 4
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
@pytest.mark.parametrize("targets, smoothing", [(TARGETS[:3], 0.0), (TARGETS, 0.2), (SOFT, 0.0)])
def test_bce_is_that_of_timm(threshold, targets, smoothing):
    model = classifier(smoothing, loss="bce", bce_target_threshold=threshold)
    loss, logits = loss_and_logits(model, targets)
    expected = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(loss, expected(logits, targets))


@pytest.mark.parametrize("options", [{}, {"loss": "bce", "label_smoothing": 0.2}])
def test_targets_may_be_probabilities(options):
    model = classifier(**options).train()
    torch.testing.assert_close(model(IMAGES, F.one_hot(TARGETS, 4).float()), model(IMAGES, TARGETS))


def test_a_head_initialized_to_zero_scores_all_classes_equally():
    model = classifier()
    model.head = HEADS.get("linear")(5, 4, zero_init=True)
    loss, logits = loss_and_logits(model, TARGETS)
    assert not logits.any()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_mlp_head_has_a_hidden_layer_and_drops_only_in_training():
    head = HEADS.get("mlp")(5, 4, hidden_dim=7, dropout=0.5)
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 5), (7,), (4, 7), (4,)]
    features = torch.randn(3, 5)
    assert torch.equal(head.eval()(features), head(features))
    assert not torch.equal(head.train()(features), head(features))


def test_flipped_logits_are_the_mean_of_both_views():
    model = classifier().eval()
    mirrored, both = IMAGES.flip(-1), FlipClassifier(model)
    assert torch.equal(both(IMAGES), (model(IMAGES) + model(mirrored)) / 2)
    torch.testing.assert_close(both(IMAGES), both(mirrored))
    assert not torch.equal(both(IMAGES), model(IMAGES))
