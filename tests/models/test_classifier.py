import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import nn

from tract_transfer.models import HEADS, Backbone, Classifier


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    return Backbone(model, feature_dim=5, first_layers=["1"], mean=[0.5] * 3, std=[0.2] * 3)


IMAGES = torch.randint(256, (6, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator())
TARGETS = torch.tensor([0, 3, 1, 2, 3, 3])


def test_eval_gives_logits_and_training_the_loss(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4))
    logits = model.eval()(IMAGES)
    assert logits.shape == (6, 4)
    losses = model.train()(IMAGES, TARGETS)
    assert list(losses) == ["loss_cls"]
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(logits, TARGETS))
    torch.testing.assert_close(logits, model.head(backbone.pooled(IMAGES.float() / 255)))


def test_scores_are_not_rounded_under_autocast(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torch_s(backbone, smoothing):
    model = Classifier(backbone, HEADS.get("linear")(5, 4), label_smoothing=smoothing)
    loss = model.train()(IMAGES, TARGETS)["loss_cls"]
    logits = model.eval()(IMAGES)
    torch.testing.assert_close(
        loss, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, TARGETS)
    )
    soft = F.one_hot(TARGETS, 4).float() * (1 - smoothing) + smoothing / 4
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(1)).sum(1).mean())


def test_targets_may_be_probabilities(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4)).train()
    one_hot = F.one_hot(TARGETS, 4).float()
    torch.testing.assert_close(model(IMAGES, one_hot), model(IMAGES, TARGETS))


def test_a_head_that_starts_at_zero_knows_nothing(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4, zero_init=True))
    assert not model.eval()(IMAGES).any()
    loss = model.train()(IMAGES, TARGETS)["loss_cls"]
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_an_mlp_head_has_a_hidden_layer_and_drops_in_training_alone():
    head = HEADS.get("mlp")(5, 4, hidden_dim=7, dropout=0.5)
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 5), (7,), (4, 7), (4,)]
    features = torch.randn(3, 5)
    assert torch.equal(head.eval()(features), head(features))
    assert not torch.equal(head.train()(features), head(features))


def test_a_step_lowers_the_loss(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(IMAGES, TARGETS)["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


SOFT = torch.tensor([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.5, 0, 0, 0.5]])


@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
@pytest.mark.parametrize("targets", [TARGETS[:3], SOFT], ids=["indices", "probabilities"])
def test_bce_is_timm_s(backbone, threshold, targets):
    model = Classifier(
        backbone, HEADS.get("linear")(5, 4), loss="bce", bce_target_threshold=threshold
    )
    loss = model.train()(IMAGES[:3], targets)["loss_cls"]
    logits = model.eval()(IMAGES[:3])
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
    torch.testing.assert_close(loss, theirs(logits, targets))


def test_bce_smooths_as_timm_does_and_probabilities_alike(backbone):
    model = Classifier(backbone, HEADS.get("linear")(5, 4), 0.2, loss="bce")
    logits = model.eval()(IMAGES)
    theirs = BinaryCrossEntropy(smoothing=0.2)(logits, TARGETS)
    torch.testing.assert_close(model.train()(IMAGES, TARGETS)["loss_cls"], theirs)
    one_hot = F.one_hot(TARGETS, 4).float()
    torch.testing.assert_close(model(IMAGES, one_hot), model(IMAGES, TARGETS))


def test_deit_s_targets_above_nothing_are_wholly_there(backbone):
    model = Classifier(
        backbone, HEADS.get("linear")(5, 4), loss="bce", bce_target_threshold=0.0
    ).train()
    torch.testing.assert_close(model(IMAGES[:3], SOFT), model(IMAGES[:3], (SOFT > 0).float()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss": "hinge"}, "loss must be cross_entropy or bce, got 'hinge'"),
        ({"bce_target_threshold": 0.0}, "bce_target_threshold is for loss: bce"),
        (
            {"loss": "bce", "bce_target_threshold": 0.0, "label_smoothing": 0.1},
            "label_smoothing: 0",
        ),
    ],
)
def test_a_loss_that_is_none_is_refused(backbone, arguments, says):
    with pytest.raises(ValueError, match=says):
        Classifier(backbone, HEADS.get("linear")(5, 4), **arguments)
